"""`gemma2 ablate`: the table, the JSON, the picture and the page, and what is refused before a model is loaded."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gemma2.cli import main
from gemma2.pictures.ablate_words import POCKET
from tests.browser import needs_browser, opened
from tests.test_readme import ROOT, check_code

VERSES = (
    "And it came to pass in those days, that there went out a decree from Caesar Augustus, that all the world should "
    "be taxed. And all went to be taxed, every one into his own city. And Joseph also went up from Galilee, out of the "
    "city of Nazareth, into Judaea, unto the city of David, which is called Bethlehem; to be taxed with Mary."
)
ROWS = [
    "unchanged",
    "no score cap",
    "no final cap",
    "neither cap",
    "window 64 for 128",
    "window 32 for 128",
    "all layers global",
    "all layers local",
    "local and global swapped",
    "no post-norms",
    "no embedding scale",
]
PLAIN = ["--device", "cpu", "--dtype", "float32", "--samples", "50"]


def test_the_page_on_ablation_runs_and_prints_what_it_shows() -> None:
    check_code((ROOT / "docs" / "ablation.md").read_text(encoding="utf-8"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "verses & more.txt"
    path.write_text(VERSES, encoding="utf-8")
    return path


def test_the_table_names_each_change_at_each_context(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "pocket", "--text", str(text), "--context", "64,7", "--tokens", "70", *PLAIN]) == 0
    out, err = capsys.readouterr()
    assert err == "" and re.search(r"The text is verses & more.txt, the first 70 of \d+ tokens\.", out)
    short, long, caps = out.split("\n\n")[1:4]
    assert short.startswith("context 7: 12 windows, 70 predicted tokens\nchange")
    warning = "At context 64 the text has 2 windows: the intervals say little. Give a longer text."
    assert long.startswith(f"context 64: 2 windows, 70 predicted tokens\n{warning}\nchange")
    for part, first in ((short, 2), (long, 3)):
        assert [re.split(r"\s{2,}", line)[0] for line in part.splitlines()[first:]] == ROWS
    assert re.search(r"^window 64 for 128 .* \+0\.000 \[\+0\.000, \+0\.000\] +1 +0 \[0, 0\]", long, re.MULTILINE)
    assert "scores, layer 5" in caps and "top logit of each token" in caps and out.endswith(f"\n{POCKET}\n")


def test_json_and_page_and_picture_hold_the_same_rows(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, picture = tmp_path / "out.html", tmp_path / "out.png"
    more = ["--json", "--layers", "-o", str(page), "--png", str(picture)]
    assert main(["ablate", "pocket", "--text", str(text), "--context", "48", *PLAIN, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [*ROWS, *(f"without layer {i}" for i in range(6))]
    assert [effect["name"] for effect in found["effects"]] == names
    assert found["switches"]["window 32 for 128"] == {"window": 32} and found["switches"]["no score cap"] == {
        "attn_softcap": None
    }
    kl = {effect["name"]: effect["kl"]["value"] for effect in found["effects"]}
    assert kl["unchanged"] == kl["all layers global"] == 0 < kl["without layer 0"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = Told()
    told.feed(page.read_text(encoding="utf-8"))
    assert not told.fetched and told.rows == len(names) - 1 and told.figures == 4
    assert "verses &amp; more.txt" in page.read_text(encoding="utf-8")
    again = ["ablate", "pocket", "--text", str(text), *PLAIN, "-o", str(page)]
    assert main(again) == 1 and "is there already" in capsys.readouterr().err


class Told(HTMLParser):
    """Counts what a page shows, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.figures = 0
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.rows += tag == "td" and given.get("class") == "mark"
        self.figures += tag == "figure"
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value]


@needs_browser
def test_the_page_opens_in_a_browser_from_a_file(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out.html"
    options = ["--context", "8,20", "--tokens", "19", "--heads", "-o", str(page), *PLAIN]
    assert main(["ablate", "pocket", "--text", str(text), *options]) == 0
    dom, said = opened(page, tmp_path / "browser")
    assert said == []
    assert dom.count('class="mark"') == 2 * (len(ROWS) - 1) and dom.count("<figure>") == 4
    assert len(re.findall(r'<table class="grid">', dom)) == 2 and dom.count("rgba(var(--warm), 0.750)") == 2


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--context", "1"], 2, "context must be an integer of at least 2, not 1"),
        (["--context", "64,x"], 2, "--context takes up to three numbers of tokens"),
        (["--context", "2,3,4,5"], 2, "--context takes up to three numbers of tokens"),
        (["--tokens", "0"], 2, "tokens must be a positive integer"),
        (["--samples", "0"], 2, "samples must be a positive integer"),
        (["--seed", "-1"], 2, "seed must be a non-negative integer"),
        (["-o", "missing/out.html"], 1, "missing: no such folder to write to"),
        (["--png", "missing/out.png"], 1, "missing: no such folder to write to"),
        (["-o", "same", "--png", "same"], 2, "-o and --png are the same file"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_looked_for(
    options: list[str], code: int, message: str, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablate", "no-such-model", "--text", str(text), *options]) == code
    assert message in capsys.readouterr().err


def test_texts_that_cannot_be_measured_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.write_bytes(b"")
    broken.write_bytes(b"And \xff")
    for path, code, message in (
        (empty, 2, "the text has no tokens"),
        (broken, 2, "not valid UTF-8 at byte 4"),
        (tmp_path / "none", 1, "--text"),
    ):
        assert main(["ablate", "pocket", "--text", str(path), *PLAIN]) == code
        assert message in capsys.readouterr().err
    empty.write_text("And God said", encoding="utf-8")
    assert main(["ablate", "pocket", "--text", str(empty), "--context", "1025", *PLAIN]) == 2
    assert "--context 1025: the model's context is 1,024" in capsys.readouterr().err


def test_one_window_is_one_and_files_of_the_pocket_model_are_the_pocket_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, page = tmp_path / "text", tmp_path / "out.html"
    text.write_text("And God said", encoding="utf-8")
    model = "pocket:pocket-q8_0.gguf"
    assert main(["ablate", model, "--text", str(text), "--context", "4", "-o", str(page), *PLAIN]) == 0
    out = capsys.readouterr().out
    assert "context 4: 1 window, 3 predicted tokens" in out and "the text has 1 window: there is no interval." in out
    html = page.read_text(encoding="utf-8")
    assert "context 4: 1 window, " in html and POCKET in out and "On the real 2B, raw top logits" in html


def test_a_page_says_no_change_of_a_change_that_does_nothing_and_draws_one_that_does(
    text: Path, tmp_path: Path
) -> None:
    page = tmp_path / "out.html"
    options = ["--context", "20", "--tokens", "19", "-o", str(page), *PLAIN]
    assert main(["ablate", "pocket", "--text", str(text), *options]) == 0
    html = page.read_text(encoding="utf-8")
    row = {name: html.split(f'">{name}<br>')[1].split("</tr>")[0] for name in ROWS[1:]}
    assert "no change" in row["all layers global"] and "<circle" not in row["all layers global"]
    assert "<circle" in row["no post-norms"] and "no change" not in row["no post-norms"]
