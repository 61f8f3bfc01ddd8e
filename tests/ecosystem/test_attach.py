"""The page on attaching other tools: its blocks run where their packages are, and print what it shows."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from pathlib import Path

import pytest

from tests.ecosystem.conftest import needs
from tests.test_readme import BLOCK, there

PAGE = Path(__file__).resolve().parents[2] / "docs" / "attach.md"
TOOLS = {"nnsight", "captum", "pyvene", "lightning", "peft"}


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs_and_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("nnsight")
    monkeypatch.chdir(tmp_path)
    logging.disable(logging.WARNING)  # Lightning's remarks
    blocks, namespace, ran = BLOCK.findall(PAGE.read_text(encoding="utf-8")), dict[str, object](), set[str]()
    assert {name for packages, _, _ in blocks for name in packages.split(", ") if name} == TOOLS
    for number, (packages, code, output) in enumerate(blocks):
        if not all(map(there, filter(None, packages.split(", ")))):
            continue
        ran |= {packages}
        source = tmp_path / f"block_{number}.py"  # nnsight reads the lines of a trace
        source.write_text(code, encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, str(source), "exec"), namespace)
        shown = [line for line in printed.getvalue().splitlines() if not re.match(r"loaded|nnsight", line)]
        assert "\n".join(shown).strip() == output.strip() or not output, (code, printed.getvalue())
    logging.disable(logging.NOTSET)
    assert len(ran) > 1
