"""The notebooks run from top to bottom, print what they show, draw, and are small."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from run_notebooks import code_cells, executed, main, printed

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"-?\d+\.\d+")


def alike(ours: str, stored: str) -> bool:
    """The same text; decimal numbers may differ by what rounding on another machine does."""
    pairs = zip(NUMBER.findall(ours), NUMBER.findall(stored), strict=False)
    near = all(abs(float(a) - float(b)) <= 0.02 + 0.01 * abs(float(b)) for a, b in pairs)
    words = (NUMBER.sub("#", re.sub(" +", " ", text)) for text in (ours, stored))
    return near and next(words) == next(words)


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["first_look", "patching_from_gguf"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_stores(path: Path) -> None:
    pytest.importorskip("matplotlib")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    with torch.random.fork_rng(), torch.enable_grad():  # the notebooks switch gradients off
        outputs = executed(notebook, path.name)
    for cell, found in zip(code_cells(notebook), outputs, strict=True):
        assert alike(printed(found), printed(cell["outputs"])), printed(found)
        kinds = [[one["output_type"] for one in each] for each in (found, cell["outputs"])]
        assert kinds[0] == kinds[1]
    drawn = [one for found in outputs for one in found if one["output_type"] == "display_data"]
    assert len(drawn) == 1 and len(drawn[0]["data"]["image/png"]) > 5000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_of_the_format(path: Path) -> None:
    assert path.stat().st_size < 150_000
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] == 5
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    for cell in notebook["cells"]:
        for target in re.findall(r"\]\(([^)#]+)", "".join(cell["source"])):
            assert (path.parent / target).exists(), target


def test_a_stored_output_that_is_not_what_is_printed_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": ["print(1 + 1)"], "outputs": []}
    path = tmp_path / "one.ipynb"
    path.write_text(
        json.dumps({"cells": [cell | {"execution_count": None}], "metadata": {}, "nbformat": 4}), encoding="utf-8"
    )
    assert main(["--check", str(path)]) == 1 and "cell 1 prints\n2" in capsys.readouterr().out
    assert main([str(path)]) == 0 == main(["--check", str(path)])
    assert not alike("it is 2.5", "it is 2.9") and not alike("it", "is") and alike("it is 2.501", "it is 2.5")
