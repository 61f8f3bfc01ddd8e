"""`gemma2 compare`: the tables, the JSON, the page and the picture, and what is refused before a model is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import quantization_page

import gemma2
from gemma2.cli import main
from gemma2.convert import convert
from gemma2.evaluate.compare import compare
from gemma2.load import POCKET
from tests.browser import needs_browser, opened
from tests.test_readme import ROOT, check_code

VERSES = (
    "And it came to pass in those days, that there went out a decree from Caesar Augustus, that all the world should "
    "be taxed. And all went to be taxed, every one into his own city."
)
Q8 = "pocket:pocket-q8_0.gguf"
PLAIN = ["--device", "cpu", "--samples", "20", "--no-speed"]


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("q4") / "small & q4.gguf"
    convert("pocket", path, type="q4_0", progress=False)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "verses & more.txt"
    path.write_text(VERSES, encoding="utf-8")
    return path


def test_the_tables_name_every_model_with_its_size_and_its_distance(
    text: Path, q4: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma2.evaluate.costs.NEW", 3)
    options = ["--window", "16", "--limit", "40", "--passages", "1", "--device", "cpu", "--samples", "20"]
    assert main(["compare", "pocket", Q8, str(q4), "--text", str(text), *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first = (
        "The text is verses & more.txt, the first 40 of 53 tokens, in 4 windows of 16 tokens, of which each after the "
    )
    few = "Windows are few, so intervals say little: give a longer text."
    assert out.startswith(f"{first}first scores its last 8. {few}\n")
    sizes, distance, *worst = out.split("\n\n")[1:]
    lines = [re.split(r"\s{2,}", line) for line in sizes.splitlines()[2:]]
    assert [line[:2] for line in lines] == [["pocket", "bf16"], ["pocket-q8_0", "q8_0"], ["small & q4", "q4_0"]]
    assert [line[3] for line in lines] == ["16.00", "8.53", "5.26"]
    a, b = (gemma2.load(name, dtype="float32", device="cpu") for name in ("pocket", q4))
    wanted = compare(a, b, VERSES, window=16, limit=40).summary()
    assert [lines[0][4], lines[2][4]] == [f"{wanted.before:.4f}", f"{wanted.after:.4f}"]
    assert all(float(speed) > 0 for line in lines for speed in line[-2:])
    kl = [float(re.split(r"\s{2,}", line)[1].split()[0]) for line in distance.splitlines()[2:]]
    assert 0 < kl[0] < 1e-3 < kl[1] < 0.1
    assert len(worst) == 2 and worst[1].startswith("Where small & q4 differs most\nTokens ")
    assert re.search(r"Where the text has \S+ \(KL [\d.e-]+ nats\), A's likeliest token is \S+ \([\d.]+%\)", worst[1])


def test_json_page_and_picture_hold_the_same_figures_with_the_atlas(
    text: Path, folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder("source", num_hidden_layers=2, query_pre_attn_scalar=16)
    q4 = tmp_path / "small & q4.gguf"
    convert(source, q4, type="q4_0", progress=False)
    page, picture = tmp_path / "out.html", tmp_path / "out.png"
    options = ["--window", "16", "--limit", "20", "--atlas", "--atlas-limit", "6", *PLAIN]
    given = ["compare", str(source), str(q4), "--text", str(text), *options]
    assert main([*given, "--json", "-o", str(page), "--png", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    (one,) = found["b"]
    a, b = (gemma2.load(name, dtype="float32", device="cpu") for name in (source, q4))
    wanted = compare(a, b, VERSES, window=16, limit=20).summary()
    assert one["summary"]["kl"]["value"] == pytest.approx(wanted.kl.value, rel=1e-5)
    assert one["summary"]["after"] == pytest.approx(wanted.after) and one["stored"]["type"] == "Q4_0"
    assert found["a"]["stored"]["bits"] == 32 and found["a"]["summary"] is None
    atlas = one["atlas"]
    assert len(atlas["matrices"]) == 15 and atlas["tokens"] == 6 and len(atlas["layers"]) == 2
    kinds = {m["stored"]["type"] for m in atlas["matrices"] if m["layer"] is not None}
    assert kinds == {"Q4_0"} and atlas["matrices"][0]["stored"]["type"] == "Q8_0"
    assert picture.read_bytes().startswith(b"\x89PNG")
    html = page.read_text(encoding="utf-8")
    told = Told()
    told.feed(html)
    assert not told.fetched and told.tables == 5 and told.drawings == 1 and told.worst == len(one["passages"]) > 0
    assert all(passage["text"].strip() in VERSES for passage in one["passages"])
    assert "small &amp; q4" in html and "Atlas of small &amp; q4" in html
    assert f"{one['summary']['most']:.3g}" in html and html.count("<polyline") == 6
    assert all(f'<td class="number sum">{layer["kl"]:.2g}</td>' in html for layer in atlas["layers"])
    colours = re.findall(r'class="token[^>]*rgba\(var\(--warm\), ([\d.]+)\)', html)
    kl = [max(x, 0.0) for passage in one["passages"] for x in passage["kl"]]
    assert [float(colour) for colour in colours] == pytest.approx([0.7 * x / max(kl) for x in kl], abs=6e-4)
    assert main([*given, "-o", str(page)]) == 1 and "is there already" in capsys.readouterr().err


class Told(HTMLParser):
    """Counts what a page shows, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = self.drawings = self.worst = 0
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tables += tag == "table"
        self.drawings += tag == "svg"
        self.worst += (dict(attrs).get("class") or "") == "token worst"
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value]


@needs_browser
def test_the_page_opens_in_a_browser_from_a_file(
    text: Path, q4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out.html"
    options = ["--limit", "20", "-o", str(page), *PLAIN]
    assert main(["compare", "pocket", "pocket", Q8, str(q4), "--text", str(text), *options]) == 0
    dom, said = opened(page, tmp_path / "browser")
    assert said == []
    assert dom.count("<circle") == 3 and dom.count('class="passage"') == 2  # none where the KL is 0 everywhere
    assert "pocket (1)" in dom


def test_forms_of_weights_are_for_each_b_and_leave_floats_alone(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floats, ternary = (str(tmp_path / f"{name}.gguf") for name in ("f32", "tq1_0"))
    for name, path in (("f32", floats), ("tq1_0", ternary)):
        convert("pocket", path, type=name, progress=False)
    options = ["--limit", "12", "--json", "--text", str(text), *PLAIN]
    assert main(["compare", "pocket", floats, ternary, "--weights", "packed", "--fast", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["stored"]["type"] for one in found["b"]] == ["F32", "TQ1_0"] and "weights packed" in found["about"]
    assert found["b"][0]["summary"]["kl"]["value"] < 1e-9
    assert main(["compare", "pocket", "pocket", "--weights", "int4", *options]) == 0
    (one,) = json.loads(capsys.readouterr().out)["b"]
    assert one["stored"]["bits"] < 8 and one["summary"]["kl"]["value"] > 1e-4


def test_a_text_of_one_token_and_one_beyond_the_context_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text"
    cases = (("And", "float64", "1 token, in one window."), ("void " * 515, "float32", "in 2 windows of 1,024 tokens"))
    for text, dtype, said in cases:
        path.write_text(text, encoding="utf-8")
        assert main(["compare", "pocket", Q8, "--text", str(path), "--dtype", dtype, *PLAIN]) == 0
        out, err = capsys.readouterr()
        assert said in out and f"{dtype} on cpu" in out and err == ""


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--limit", "0"], 2, "limit must be a positive integer"),
        (["--atlas-limit", "0"], 2, "atlas_limit must be a positive integer"),
        (["--samples", "0"], 2, "samples must be a positive integer"),
        (["--passages", "-1"], 2, "passages must be a non-negative integer"),
        (["-o", "missing/out.html"], 1, "missing: no such folder to write to"),
        (["--png", "missing/out.png"], 1, "missing: no such folder to write to"),
        (["-o", "same", "--png", "same"], 2, "-o and --png are the same file"),
        (["--atlas", "--fast"], 2, "leave --fast out"),
        ([], 1, "no-such-model: no such file or folder"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_looked_for(
    options: list[str], code: int, message: str, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "no-such-model", Q8, "--text", str(text), *options]) == code
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""


def test_what_is_wrong_with_any_b_is_said_before_a_weight_is_read(
    text: Path,
    tmp_path: Path,
    folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr("gemma2.cli.compare.load_model", fail)
    other = folder("other")
    proto = (POCKET / "tokenizer.model").read_bytes()
    (other / "tokenizer.model").write_bytes(proto.replace("▁LORD".encode(), "▁LORX".encode(), 1))
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.write_bytes(b"")
    broken.write_bytes(b"And \xff")
    for arguments, code, message in (
        ([str(other), "--text", str(text)], 2, "pocket and other have different tokenizers"),
        (["missing.gguf", "--text", str(text)], 1, "missing.gguf: no such file or folder"),
        ([Q8, "--text", str(empty)], 2, "the text has no tokens"),
        ([Q8, "--text", str(broken)], 2, "not valid UTF-8 at byte 4"),
        ([Q8, "--text", str(tmp_path / "none")], 1, "--text"),
        ([Q8, "--text", str(text), "--window", "1025"], 2, "window 1,025 is longer than the context of a model, 1,024"),
        ([Q8, "--text", str(text), "--weights", "int3"], 2, "int3"),
        (["pocket", "--text", str(text), "--weights", "packed"], 2, 'weights="packed" keeps the blocks of a GGUF'),
    ):
        assert main(["compare", "pocket", Q8, *arguments, *PLAIN]) == code, message
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and out == ""


def test_the_page_about_quantization_is_printed_from_its_record_and_its_code_runs() -> None:
    page = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    check_code(page)
    record = json.loads((ROOT / "docs" / "quantization" / "pocket.json").read_text(encoding="utf-8"))
    assert quantization_page.page(record) == page
