"""README and docs say only what is so: their code runs and prints what they show, their links and counts are right."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shutil
import warnings
from pathlib import Path

import pytest

from gemma2.cli import main

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
CARD = ROOT / "gemma2" / "assets" / "pocket" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", CARD, *DOCS]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A block may stand below a comment that names the packages without which it is not run.
BLOCK = re.compile(r"(?:<!-- needs ([^\n]*) -->\n)?```python\n(.*?)```(?:\n+```text\n(.*?)```)?", re.DOTALL)


def there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package above
        return False


def check_code(page: str) -> None:
    """The Python of a page runs, block after block, and prints what the page shows under each."""
    blocks, namespace = BLOCK.findall(page), dict[str, object]()
    assert blocks and any(output for _, _, output in blocks)
    for packages, code, output in blocks:
        if not all(map(there, filter(None, packages.split(", ")))):
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "page", "exec"), namespace)
        assert printed.getvalue().strip() == output.strip() or not output, code


def test_readmes_code_runs_and_prints_what_it_shows() -> None:
    check_code(README)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_the_recipes_run_and_print_what_they_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    check_code(page)
    (command,) = re.findall(r"\$ gemma2 (parity .*)", page)
    capsys.readouterr()
    assert main(command.split()) == 1
    shown = re.findall(r"verdict: difference, first at [\w.]+", page)
    assert len(shown) == 1 and capsys.readouterr().out.splitlines()[-1].startswith(shown[0])


def test_the_page_for_users_of_transformers_runs_and_prints_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "filters", warnings.filters[:])  # the page changes them
    check_code((ROOT / "docs" / "from-transformers.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["explain.md", "lenses.md", "sites.md", "training.md", "weights.md"])
def test_the_code_of_a_page_runs_and_prints_what_it_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_code((ROOT / "docs" / name).read_text(encoding="utf-8"))


@pytest.mark.long
def test_the_page_on_speed_runs_and_prints_what_it_shows() -> None:
    check_code((ROOT / "docs" / "fast.md").read_text(encoding="utf-8"))


def test_the_reading_order_has_the_true_line_counts() -> None:
    rows = re.findall(r"\| \[`(gemma2/\w+\.py)`\]\([^)]*\) \| (\d+) \|", README)
    assert len(rows) >= 5
    for name, lines in rows:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) == int(lines), name
    total = re.search(r"\*\*(\d+) lines\*\*", README)
    assert total and int(total[1]) == sum(int(lines) for _, lines in rows)


@pytest.mark.parametrize("index", [ROOT / "README.md", ROOT / "docs" / "README.md"], ids=["README", "docs/README"])
def test_an_index_links_every_page(index: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", index.read_text(encoding="utf-8"))
    found = {(index.parent / link).resolve() for link in links if "://" not in link}
    assert not set(DOCS) - {index} - found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_pages_name_exist(page: Path) -> None:
    names = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
    }
    for name in re.findall(r"`(test_[a-z_0-9]+)`", page.read_text(encoding="utf-8")):
        assert name in names, name
