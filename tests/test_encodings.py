"""Text is UTF-8 on every platform: whoever opens a text file, or reads what a child says, names the encoding.

ruff's rule for this, PLW1514, sees only files whose type it can infer.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("gemma2", "scripts", "studies", "tests")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))] + [ROOT / "gemma2_command.py"]
BYTES = ("os", "gzip", "tarfile", "archive")  # their `open` gives bytes or a descriptor


def unnamed(tree: ast.AST) -> Iterator[int]:
    """The lines of calls that open text without naming its encoding."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        method = isinstance(call.func, ast.Attribute)
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = getattr(call.func.value, "id", "") if isinstance(call.func, ast.Attribute) else ""
        if "encoding" in given or None in given or owner in BYTES:
            continue
        if name == "open":
            modes = [given["mode"]] if "mode" in given else call.args[not method :][:1]
            text = not any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
        else:
            text = (name == "read_text" and not call.args) or name == "write_text" or "text" in given
        if text and name in ("open", "read_text", "write_text", "run", "Popen", "check_output"):
            yield call.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_text_names_its_encoding(path: Path) -> None:
    assert list(unnamed(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("open('x')", [1]),
        ("open('x', 'w')", [1]),
        ("open('x', mode='w')", [1]),
        ("open('x', 'rb')", []),
        ("open('x', encoding='utf-8')", []),
        ("path.open()", [1]),
        ("path.open('wb')", []),
        ("os.open('x', 0)", []),
        ("path.read_text()", [1]),
        ("path.read_text('utf-8')", []),
        ("path.write_text(x)", [1]),
        ("subprocess.run(x, text=True)", [1]),
        ("subprocess.run(x, encoding='utf-8')", []),
        ("subprocess.run(x)", []),
    ],
)
def test_a_text_without_an_encoding_is_found(line: str, found: list[int]) -> None:
    assert list(unnamed(ast.parse(line))) == found
