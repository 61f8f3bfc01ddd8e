"""`gemma2 parity` on the command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from gemma2.cli import main
from tests.parity.test_judge import written

IDS = "2,17,5,99,1024,7,300,12,45,2000,8"
BFLOAT16 = "self:dtype=bfloat16,numerics=gemma_pytorch"
SHOWN = "sites  64 of 64 compared"
Capture = pytest.CaptureFixture[str]


def lines(capsys: Capture, *argv: object, code: int = 0) -> list[str]:
    """What is printed, without a word on standard error."""
    capsys.readouterr()
    assert main(["parity", *map(str, argv)]) == code
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def strict(text: str) -> Any:
    """JSON as every parser reads it."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, of which the first block's MLP is another than that of `small`."""
    return written(
        tmp_path_factory.mktemp("other"),
        lambda model: model.get_parameter("model.layers.0.mlp.up_proj.weight")[:99].mul_(1.5),
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("small"))


def test_transformers_is_equal_to_the_bit_with_no_option_but_its_name(capsys: Capture) -> None:
    pytest.importorskip("transformers", reason="the live comparison needs the extra gemma2[transformers]")
    printed = lines(capsys, "pocket", "--against", "transformers")
    assert printed[0] == "MODEL  pocket"
    assert re.fullmatch(r"REF    transformers [\d.]+ eager, computed in bfloat16", printed[1])
    assert printed[2:4] == ["text   62 token ids of Genesis 1 (default text)", "sites  106 of 180 compared"]
    assert printed[-1] == "verdict: equal to the bit (106 of 106 sites equal ours in every bit)"
    cases = {line[:29].strip(): line[31:37] for line in printed if re.search(r"  (agrees|differs|not run)  ", line)}
    assert len(cases) == 9 and set(cases.values()) == {"agrees"}, "transformers can do every case"


def test_a_row_a_site_the_predictions_the_cases_and_the_verdict_are_printed(small: Path, capsys: Capture) -> None:
    printed = lines(capsys, small, "--against", BFLOAT16, "--ids", IDS, "--dtype", "bfloat16")
    system = f"gemma2 {version('gemma2')} on cpu, numerics gemma_pytorch"
    assert printed[:2] == [f"MODEL  {small}", f"REF    {system}, computed in bfloat16"]
    assert printed[2:5] == ["text   11 token ids given by --ids", SHOWN, ""]
    assert printed[5].split() == ["site", "max", "abs", "relative", "ours", "cosine", "error", "/", "rounding"]
    shown = [line.split()[0] for line in printed[6:11]]
    assert shown == ["hook_embed", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "ln_final", "logits"]
    assert printed[6].endswith("equal bits")
    assert re.fullmatch(r"logits +\S+ +\d\.\d\de-\d\d +\d\.\d\de-\d\d +\d\.\d{8} +0?\.?\d+", printed[10])
    assert printed[11] == "... 59 more sites, none of which differs (--all shows them)"
    legend = [re.split("  +", line)[0] for line in printed[13:17]]
    assert legend == ["max abs, relative, cosine", "ours", "error / rounding", "equal bits"]
    assert re.fullmatch(
        r"predictions of REF against float64: KL \S+ nats on average, \S+ at most; "
        r"\d+ of 11 top tokens differ(, which led by \S+ at most)?",
        printed[18],
    )
    assert printed[20].startswith("begins with <bos>              agrees  the first token id is 2")
    assert len(printed) == 31 and printed[-1].startswith("verdict: rounding (")


def test_all_prints_every_site(small: Path, capsys: Capture) -> None:
    printed = lines(capsys, small, "--against", "self", "--ids", IDS, "--all", "--no-cases")
    assert sum(line.endswith("equal bits") for line in printed) == 2 * 29 + 6
    assert not any(re.search("agrees|differs|not run", line) for line in printed)
    assert printed[-1] == "verdict: equal to the bit (64 of 64 sites equal ours in every bit)"


def test_a_difference_is_named_by_its_site_and_is_exit_code_one(small: Path, other: Path, capsys: Capture) -> None:
    printed = lines(capsys, small, "--against", f"self:model={other}", "--ids", IDS, code=1)
    (row,) = [line for line in printed if line.endswith("  DIFFERS")]
    assert row.startswith("blocks.0.mlp.hook_pre_linear ")
    first = "verdict: difference, first at blocks.0.mlp.hook_pre_linear, "
    assert re.fullmatch(re.escape(first) + r"\S+ times what rounding explains", printed[-1])


def test_json_is_strict_and_has_what_is_printed(small: Path, other: Path, capsys: Capture) -> None:
    found = strict("\n".join(lines(capsys, small, "--against", BFLOAT16, "--ids", IDS, "--json")))
    assert (found["verdict"], found["first"], found["tokens"]) == ("rounding", None, 11)
    assert (found["model"], found["text"]) == (str(small), "given by --ids")
    assert found["dtype"] == "bfloat16" and found["numerics"] is None
    assert len(found["rows"]) == 64 and found["rows"][0]["site"] == "hook_embed" and len(found["cases"]) == 9
    assert {"kl_mean", "flips", "margin"} <= found["logits"].keys()
    wrong = strict("\n".join(lines(capsys, small, "--against", f"self:model={other}", "--ids", IDS, "--json", code=1)))
    assert (wrong["verdict"], wrong["first"]) == ("difference", "blocks.0.mlp.hook_pre_linear")
    assert [row["site"] for row in wrong["rows"] if row["differs"]] == [wrong["first"]]


def test_json_stays_strict_where_values_are_not_finite(tmp_path: Path, capsys: Capture) -> None:
    path = written(tmp_path, lambda model: model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1e4))
    argv = [path, "--against", "self", "--dtype", "float16", "--ids", IDS]
    found = strict("\n".join(lines(capsys, *argv, "--json", code=1)))
    (row,) = [row for row in found["rows"] if row["site"] == found["first"]]
    assert row["ratio"] is None and "ours not finite: " in row["why"]
    assert re.search(r"first at blocks.0.mlp.hook_pre_linear: ours not finite: ", lines(capsys, *argv, code=1)[-1])


def test_a_profile_makes_what_is_documented_equal_and_says_so(small: Path, capsys: Capture) -> None:
    printed = lines(capsys, small, "--against", BFLOAT16, "--ids", IDS, "--numerics", "gemma_pytorch")
    assert printed[2] == "text      11 token ids given by --ids"
    assert printed[3] == "numerics  MODEL is rounded as gemma_pytorch"
    assert printed[-1] == "verdict: equal to the bit (64 of 64 sites equal ours in every bit)"


def test_a_difference_that_a_profile_documents_is_said_to_be_one(capsys: Capture) -> None:
    pytest.importorskip("llama_cpp", reason="the live comparison needs the extra gemma2[llama-cpp]")
    asked = ("pocket:pocket-q8_0.gguf", "--against", "llama.cpp", "--ids", IDS, "--no-cases")
    printed = lines(capsys, *asked, code=1)
    hint = "--numerics llama.cpp counts the documented rounding of llama.cpp as agreement"
    assert printed[-2].startswith("verdict: difference") and printed[-1] == hint
    assert hint not in lines(capsys, *asked, "--numerics", "llama.cpp")


def test_explain_prints_what_each_change_closes_and_what_remains(small: Path, capsys: Capture) -> None:
    argv = [small, "--against", BFLOAT16, "--ids", IDS, "--explain"]
    printed = lines(capsys, *argv, "gemma_pytorch")
    assert printed[0].split() == ["change", "distance", "closes", "equal", "sites"]
    assert printed[1].startswith("(start)") and len(printed) == 1 + 5 + 2
    (turned,) = [line for line in printed if line.startswith("gemma_pytorch rope_mul=float32 ")]
    assert re.search(r" \d\.\d{3}e[+-]\d\d +-?[\d.]+% +\d+ of 64  rotation is computed in float32", turned)
    assert printed[-1] == "remains: 0.00% of the distance at the start"
    assert lines(capsys, *argv, "transformers")[-1] == "remains: 100.00% of the distance at the start", (
        "it has no changes"
    )
    back = lines(capsys, *argv, "transformers", "--from", "gemma_pytorch")
    assert [line.split()[0] for line in back[1:6]] == ["(start)", "-", "-", "-", "-"]
    steps = strict("\n".join(lines(capsys, *argv, "gemma_pytorch", "--json")))
    assert steps[0]["change"] == "" and steps[-1]["distance"] == 0
    assert math.isclose(sum(step["closed"] for step in steps), 1)


def test_a_trace_is_held_against_its_own_ids(small: Path, tmp_path: Path, capsys: Capture) -> None:
    trace = tmp_path / "t.safetensors"
    assert main(["trace", str(small), "--ids", IDS, "-o", str(trace), "--device", "cpu"]) == 0
    printed = lines(capsys, small, "--against", trace)
    system = f"gemma2 {version('gemma2')}"
    assert printed[1:4] == [f"REF    {system}, computed in float32", "text   11 token ids from the trace", SHOWN]
    reasons = [line for line in printed if "  not run  " in line]
    assert [line.split("  ")[0] for line in reasons] == [
        "prompt longer than the window",
        "layer order",
        "cached against uncached",
        "chunked prefill",
        "ragged against solo",
    ]
    assert all(f"{trace}: a trace is a record: " in line for line in reasons)
    assert printed[-1] == "verdict: equal to the bit (64 of 64 sites equal ours in every bit)"


def test_the_page_is_whole_stands_alone_and_replaces_an_older_one(
    small: Path, other: Path, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("matplotlib", reason="the chart needs the extra gemma2[plots]")
    page = tmp_path / "page.html"
    page.write_text("older", encoding="utf-8")
    lines(capsys, small, "--against", f"self:model={other}", "--ids", IDS, "--html", page, code=1)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert f"MODEL is {small}. REF is gemma2 " in text and "Text: 11 token ids given by --ids." in text
    assert text.count("<svg") == text.count("</svg>") == 1, "one chart"
    assert 'class="difference">difference</strong>, first at <code>blocks.0.mlp.hook_pre_linear</code>' in text
    assert text.count("<tr class=differs>") >= 1 and text.count("<tr") == 1 + 9 + 1 + 64
    assert "begins with &lt;bos&gt;" in text, "escaped"
    assert not re.search(r'(src|href)="?https?:', text), "nothing is fetched"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_a_page_is_drawn_of_a_single_site_and_of_values_that_are_not_finite(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib", reason="the chart needs the extra gemma2[plots]")
    path = written(tmp_path, lambda model: model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1e4))
    argv = [path, "--against", "self", "--dtype", "float16", "--ids", IDS, "--no-cases", "--html", tmp_path / "p.html"]
    lines(capsys, *argv, code=1)
    assert "ours not finite" in (tmp_path / "p.html").read_text(encoding="utf-8")
    lines(capsys, *argv, "--sites", "hook_embed")
    assert "None was run." in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_nothing_but_the_result_is_written_to_a_pipe(small: Path) -> None:
    command = [sys.executable, "-m", "gemma2", "parity", str(small), "--against", "self", "--ids", IDS]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "COLUMNS": "80"}, check=True)
    assert done.stderr == b"" and done.stdout.endswith(b"sites equal ours in every bit)\n")


def test_a_text_a_file_and_a_window_of_sites_are_taken_as_given(small: Path, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("In the beginning", encoding="utf-8")
    shown = ["--sites", "hook_embed", "--sites", "blocks.1.hook_resid_*", "--no-cases", "--all"]
    by_prompt = lines(capsys, small, "--against", "self", "--prompt", "In the beginning", *shown)
    by_file = lines(capsys, small, "--against", "self", "--file", text, *shown)
    assert by_prompt[2] == "text   4 token ids of 'In the beginning'" and by_file[2] == f"text   4 token ids of {text}"
    assert by_file[3:] == by_prompt[3:]
    assert [line.split()[0] for line in by_prompt[6:10]] == [
        "hook_embed",
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_resid_mid",
        "blocks.1.hook_resid_post",
    ]


def test_a_modified_copy_is_compared_by_its_place_and_its_first_changed_site_is_named(
    other: Path, small: Path, capsys: Capture
) -> None:
    argv = [small, "--against", f"self:model={other}", "--ids", IDS, "--no-cases", "--dtype", "float32"]
    printed = lines(capsys, *argv, code=1)
    assert printed[1] == f"REF    gemma2 {version('gemma2')} on cpu, model {other}, computed in float32"
    assert "first at blocks.0.mlp.hook_pre_linear" in printed[-1]
    assert lines(capsys, "pocket", "--against", "self:model=pocket", "--ids", IDS, "--no-cases")[-1].startswith(
        "verdict: equal to the bit"
    ), "any name that MODEL may have"


@pytest.mark.long
@pytest.mark.parametrize("shown", ["*", "blocks.*.mlp.hook_pre_linear", "hook_embed"])
def test_the_chart_numbers_the_blocks_whichever_sites_are_shown(shown: str, small: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the chart needs the extra gemma2[plots]")
    page = tmp_path / "page.html"
    argv = ["--ids", IDS, "--no-cases", "--sites", shown, "--html", str(page)]
    assert main(["parity", str(small), "--against", "self", *argv]) == 0
    written_as = re.findall(
        r"<!-- (.*?) -->", page.read_text(encoding="utf-8")
    )  # matplotlib draws letters as paths, after a comment
    numbers = [label for label in written_as if label in ("0", "1")]
    assert numbers == (["0", "1"] if shown != "hook_embed" else [])


def shape(text: str) -> list[str]:
    """Lines without what another machine or version prints otherwise: numbers, and how wide they make a column."""
    return [re.sub(r"[\d.]+(e[+-]\d+)?", "#", " ".join(line.split())) for line in text.splitlines()]


@pytest.mark.long
def test_the_page_shows_what_is_printed(capsys: Capture) -> None:
    pytest.importorskip("transformers", reason="the page's example is one with transformers")
    page = (Path(__file__).resolve().parents[1] / "docs" / "parity.md").read_text(encoding="utf-8")
    shown = page.split("```text\n")[1].split("```")[0]
    assert shape("\n".join(lines(capsys, "pocket", "--against", "transformers"))) == shape(shown)


def test_the_pages_modified_copy_ends_as_the_page_says(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "parity.md").read_text(encoding="utf-8")
    _, about = page.split("## Comparing a modified copy\n")
    code, verdict = about.split("```python\n")[1].split("```")[0], about.split("```text\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/parity.md", "exec"), {})
    printed = lines(capsys, "pocket", "--against", "self:model=copy", "--no-cases", code=1)
    assert shape(printed[-1]) == shape(verdict)
