"""`gemma2 lens` and `gemma2 attention`: a page that works from a file, with every cell, and a PNG; or one clear line"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gemma2
from gemma2.cli import main
from gemma2.pictures.attention import shown_maps
from gemma2.pictures.data import packed, script_json
from gemma2.pictures.page import readable
from gemma2.research import attention_maps, fit_jacobian, lens_table
from tests.browser import needs_browser, opened

PROMPT = 'And God said, "Let there be <b>light</b>" & $x$ </script>\n\tand there was light.'
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def gemma() -> gemma2.Gemma:
    return gemma2.load("pocket", device="cpu")


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def data_of(page: str) -> dict[str, object]:
    """The numbers that a page's script reads."""
    found = re.search(r"const D = (\{.*\});\n", page)
    assert found
    numbers: dict[str, object] = json.loads(found[1])
    return numbers


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_lens_writes_a_page_with_the_models_own_numbers_and_a_png(gemma: gemma2.Gemma, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    assert main(["lens", "pocket", "--prompt", PROMPT]) == 0
    assert capsys.readouterr() == ("lens.html, lens.png\n", "") and is_png(Path("lens.png"))
    page = Path("lens.html").read_text(encoding="utf-8")
    ids = gemma.tokenizer.encode(PROMPT)
    data = data_of(page)
    table = lens_table(gemma, torch.tensor([ids]), ["hook_embed", "blocks.*.hook_resid_post"])
    assert data["n"] == len(ids) and data["rank"] == table.target_ranks.flatten().tolist()
    shown = torch.tensor(data["p"]).view(7, 1, len(ids), 5)
    assert (shown - table.probabilities).abs().max() < 1e-4
    words, top = data["words"], data["top"]
    assert isinstance(words, list) and isinstance(top, list)
    assert words[top[-5]] == readable(gemma.tokenizer, int(table.ids[-1, 0, -1, 0]))
    assert page.count("<td tabindex") == 7 * len(ids) and f"All {len(ids)} tokens are shown." in page
    assert "http" not in page and page.count("</script>") == 1


@needs_browser
def test_the_lens_page_opens_from_a_file_without_a_word_and_shows_what_is_pointed_at(
    gemma: gemma2.Gemma, tmp_path: Path
) -> None:
    assert main(["lens", "pocket", "--prompt", PROMPT, "--no-png"]) == 0
    page = Path("lens.html")
    point = "<script>document.querySelector('tr[data-r=\"6\"] td:nth-child(4)').focus()</script></body>"
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", point), encoding="utf-8")
    found, said = opened(page, tmp_path / "browser")
    assert said == []
    assert found.count("<td tabindex") == 7 * len(gemma.tokenizer.encode(PROMPT))
    hover = found.split('id="said"')[1].split("<script")[0]
    assert hover.count('class="row"') == 5 and "(position 2), after layer 5 (global)" in hover
    assert "next in the text: <code>·said</code>" in hover and " %</span>" in hover


def test_a_long_text_is_shown_in_part_and_said_to_be(gemma: gemma2.Gemma, capsys: Capture) -> None:
    Path("text.txt").write_text("And God said, Let there be light. " * 9, encoding="utf-8")
    count = len(gemma.tokenizer.encode("And God said, Let there be light. " * 9))
    assert count > 64
    for command, cells in (("lens", r"<td tabindex"), ("attention", "")):
        assert main([command, "pocket", "--file", "text.txt", "--no-png", "-o", f"{command}.html"]) == 0
        out, err = capsys.readouterr()
        assert err == f"note: the last 64 of {count} tokens are shown; --last N shows more\n"
        assert out.splitlines()[-1] == f"{command}.html"
        page = Path(f"{command}.html").read_text(encoding="utf-8")
        assert f"The last 64 of {count} tokens are shown" in page
        assert not cells or page.count(cells) == 7 * 64
        assert main([command, "pocket", "--file", "text.txt", "--no-png", "--force", "--last", "500"]) == 0
        assert capsys.readouterr().err == ""
        assert f"All {count} tokens are shown." in Path(f"{command}.html").read_text(encoding="utf-8")


def test_sites_and_a_fitted_lens_can_be_chosen(gemma: gemma2.Gemma, capsys: Capture) -> None:
    lens = fit_jacobian(gemma, [gemma.tokenizer.encode("And God said, Let")], layers=[4, 5], skip=1)
    lens.save("jacobian.safetensors")
    assert main(["lens", "pocket", "--prompt", "And God", "--fitted", "jacobian.safetensors", "--no-png"]) == 0
    page = Path("lens.html").read_text(encoding="utf-8")
    assert "Jacobian lens of pocket" in page and "multiplied by the average Jacobian" in page
    assert page.count("<td tabindex") == 2 * 3
    chosen = ["--sites", "blocks.*.hook_mlp_out", "--sites", "blocks.2.hook_resid_mid"]
    assert main(["lens", "pocket", "--prompt", "And God", "--no-png", "--force", *chosen]) == 0
    page = Path("lens.html").read_text(encoding="utf-8")
    assert page.count("<td tabindex") == 7 * 3 and "own prediction" not in page
    assert "the value at a site, as if it were the residual stream, goes through" in page
    assert main(["lens", "pocket", "--prompt", "And God", "--no-png", "--force"]) == 0
    page = Path("lens.html").read_text(encoding="utf-8")
    assert "a layer's residual stream goes through" in page and "The top row is the model's own prediction." in page


def test_attention_writes_a_page_with_the_models_own_numbers_and_a_png(gemma: gemma2.Gemma, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    assert main(["attention", "pocket", "--prompt", PROMPT, "-o", "a.html"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "a.html, a.png" and is_png(Path("a.png")) and len(out) == 8
    page = Path("a.html").read_text(encoding="utf-8")
    data = data_of(page)
    ids = gemma.tokenizer.encode(PROMPT)
    maps = torch.stack([value[0] for value in attention_maps(gemma, torch.tensor([ids])).values()])
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    assert float(maps[..., ~seen].max()) == 0 and data["maps"] == packed(maps[..., seen])
    assert "http" not in page and page.count("</script>") == 1


@needs_browser
def test_the_attention_page_opens_from_a_file_and_a_head_opens_large(gemma: gemma2.Gemma, tmp_path: Path) -> None:
    assert main(["attention", "pocket", "--prompt", PROMPT, "--no-png"]) == 0
    page = Path("attention.html")
    text = page.read_text(encoding="utf-8")
    click = """<script>
document.querySelectorAll("#heads button")[8 + 3].click(); point(5, 2);
const drawn = [...document.querySelectorAll("canvas")].map(canvas =>
  canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some(x => x > 0));
document.title = drawn.filter(x => x).length + " of " + drawn.length + " drawn";
</script></body>"""
    page.write_text(text.replace("</body>", click), encoding="utf-8")
    found, said = opened(page, tmp_path / "browser")
    assert said == []
    assert found.count('aria-label="layer') == 6 * 8 and "<title>49 of 49 drawn</title>" in found
    assert re.search(r"<dialog [^>]*open", found) and "layer 4 (local), head 3</h2>" in found
    share = attention_maps(gemma, torch.tensor([gemma.tokenizer.encode(PROMPT)]), 4, 3)[4][0, 0, 5, 2]
    shown = re.search(r'id="cell">(.*?)</p>', found)
    assert shown and "(position 5) looks at" in shown[1] and "(position 2)" in shown[1]
    percent = float(shown[1].rsplit(": ", 1)[1].removesuffix(" %"))
    assert abs(percent / 100 - float(share)) < 6e-4


@needs_browser
def test_the_column_of_what_is_not_shown_is_out_of_sight_of_a_local_layer_when_all_of_it_is(tmp_path: Path) -> None:
    ids = ",".join(str(i) for i in (2, *range(500, 799)))  # the last 200 of 300, in windows of 128
    assert main(["attention", "pocket", "--ids", ids, "--last", "200", "--no-png"]) == 0
    page = Path("attention.html")
    asked = """<script>const told = [];
for (const [at, row] of [[1, 126], [1, 127], [0, 127]]) {
  document.querySelectorAll("#heads button")[8 * at].click(); point(row, 1); told.push(cell.textContent);
}
document.title = told.join("; ");</script></body>"""
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", asked), encoding="utf-8")
    found, said = opened(page, tmp_path / "browser")
    title = re.search("<title>(.*?)</title>", found)
    assert said == [] and title
    near, far, whole = title[1].split("; ")
    assert "(position 226) looks at (99 more) (not shown here): " in near and near.endswith(("%", ": 0"))
    assert "(position 227)" in far and far.endswith(": out of sight")
    assert "(position 227)" in whole and whole.endswith(("%", ": 0"))


def test_every_token_can_be_seen() -> None:
    class Pieces(list[str]):
        def piece(self, id: int) -> str:
            return self[id]

    pieces = Pieces(["▁the", "\n\n", "\t", "\r", "​", "﻿", "‮", "　", "é", "😀"])
    shown = ["·the", "⏎⏎", "⇥", "\\r", "\\u200b", "\\ufeff", "\\u202e", "\\u3000", "é", "😀", "<10>"]
    assert [readable(pieces, i) for i in range(11)] == shown  # type: ignore[arg-type]


def test_what_is_not_shown_of_a_long_text_is_one_column() -> None:
    weights = {0: torch.rand(1, 2, 4, 10), 1: torch.rand(1, 2, 4, 10)}
    maps = shown_maps(weights, 10)
    assert maps.weights.shape == (2, 2, 4, 6) and maps.places == [0, 5, 6, 7, 8, 9] and maps.at == [6, 7, 8, 9]
    whole = torch.stack([weights[0][0], weights[1][0]])
    assert torch.allclose(maps.weights.sum(-1), whole.sum(-1))
    assert torch.allclose(maps.weights[..., 1], whole[..., 1:6].sum(-1))
    assert shown_maps({0: torch.rand(1, 2, 9, 10)}, 10).places == list(range(10))


def test_text_cannot_break_out_of_a_script() -> None:
    hostile = ["</script><script>alert(1)", "<!--", "\u2028", "&", "\ud800"]
    text = script_json(hostile)
    assert json.loads(text) == hostile and not set("<&\u2028") & set(text)
    with pytest.raises(ValueError):
        script_json([float("nan")])


@pytest.mark.parametrize("command", ["lens", "attention"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "-o", "page.png"], "the page's name must end in .html"),
        (["--prompt", "a", "-o", "nowhere/page.html"], "nowhere: no such folder to write to"),
        (["--prompt", "a", "-o", "there.html"], "there.html: is there already; --force"),
        (["--prompt", "a", "-o", "drawn.html"], "drawn.png: is there already; --force"),
        (["--prompt", "a", "--last", "0"], "--last must be a positive integer"),
        ([], "say for which text"),
        (["--prompt", "a " * 9000, "--no-png"], "exceed the model's context"),
        (["--ids", "2,5,99999", "--no-png"], "outside the vocabulary"),
        (["--file", "none.txt"], "--file none.txt: No such file"),
    ],
    ids=lambda value: None,
)
def test_what_cannot_be_drawn_is_one_line_and_writes_nothing(
    command: str, options: list[str], message: str, capsys: Capture
) -> None:
    Path("there.html").touch()
    Path("drawn.png").touch()
    assert main([command, "pocket", *options]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["drawn.png", "there.html"]


def test_more_bad_input_is_one_line(capsys: Capture) -> None:
    Path("not.safetensors").write_bytes(b"no")
    for options, message in (
        (["lens", "pocket", "--prompt", "a", "--fitted", "not.safetensors"], "not a whole safetensors file"),
        (["lens", "pocket", "--prompt", "a", "--sites", "blocks.*.attn.hook_z"], "a lens reads values of the residual"),
        (["attention", "pocket", "--ids", "2"], "the text has 1 token, and 2 are needed"),
        (["attention", "pocket", "--prompt", "a b", "--beyond", "-1"], "beyond must be a non-negative integer"),
    ):
        assert main([*options, "--no-png"]) in (1, 2)
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["not.safetensors"]


def test_without_matplotlib_the_cure_is_said(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert main(["lens", "pocket", "--prompt", "a"]) == 1
    assert "--no-png, or no --png, leaves the picture out" in capsys.readouterr().err
    assert main(["lens", "pocket", "--prompt", "a", "--no-png"]) == 0
