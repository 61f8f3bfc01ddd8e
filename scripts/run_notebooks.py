"""Run notebooks from top to bottom and store what they print and draw. Jupyter is not needed.

python scripts/run_notebooks.py notebooks/*.ipynb            # run, and store
python scripts/run_notebooks.py --check notebooks/*.ipynb    # run, and compare what is printed with what is stored
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from gemma2.atomic import replacing

os.environ.setdefault("MPLBACKEND", "agg")
DPI = 72


def executed(notebook: dict[str, Any], name: str) -> list[list[dict[str, Any]]]:
    """The outputs of each code cell, run in order in one namespace. What a cell raises is raised."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for number, cell in enumerate(code_cells(notebook)):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{name}[{number}]", "exec"), namespace)
        found: list[dict[str, Any]] = []
        if printed.getvalue():
            text = printed.getvalue().splitlines(keepends=True)
            found.append({"name": "stdout", "output_type": "stream", "text": text})
        outputs.append(found + [_drawn(figure) for figure in _figures()])
    return outputs


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(outputs: list[dict[str, Any]]) -> str:
    return "".join("".join(one["text"]) for one in outputs if one["output_type"] == "stream")


def _figures() -> list[Any]:
    """The open figures, closed."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return []
    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    pyplot.close("all")
    return figures


def _drawn(figure: Any) -> dict[str, Any]:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    picture = base64.b64encode(file.getvalue()).decode()
    return {
        "data": {"image/png": picture, "text/plain": ["<Figure>"]},
        "metadata": {},
        "output_type": "display_data",
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    failed = False
    for path in args.notebooks:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        outputs = executed(notebook, path.name)
        for number, (cell, found) in enumerate(zip(code_cells(notebook), outputs, strict=True), start=1):
            if args.check and printed(cell["outputs"]) != printed(found):
                failed = True
                print(f"{path}: cell {number} prints\n{printed(found)}and stored is\n{printed(cell['outputs'])}")
            cell["outputs"], cell["execution_count"] = found, number
        if not args.check:
            with replacing(path) as (partial,):
                partial.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
