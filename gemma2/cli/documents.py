"""Texts in a file: a plain text, or JSON lines of texts or of contexts with continuations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma2.cli.prompts import read_file

JSONL = (
    'a text in UTF-8, or JSON lines (.jsonl), each {"text": ...} or a string; '
    "an empty or broken line is named and refused"
)
KEYS = ({"text"}, {"context", "continuation"})
Document = str | tuple[str, str]


def read_documents(path: Path, option: str, *, pairs: bool = False) -> list[Document]:
    """The texts in a file, which is one text unless its name ends in .jsonl.

    Args:
        option: what named the file, for errors.
        pairs: take lines {"context": ..., "continuation": ...} too.
    Raises:
        ValueError: a file that is not UTF-8 or has no text, or a line that is none of these, with its number; OSError.
    """
    text = read_file(path, option)
    if path.suffix != ".jsonl":
        if not text:
            raise ValueError(f"{path}: is empty; there is no text to score")
        return [text]
    lines = text.removesuffix("\n").split("\n")
    return [_document(line, f"{path}, line {number}", pairs) for number, line in enumerate(lines, 1)]


def _document(line: str, where: str, pairs: bool) -> Document:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if isinstance(found, str):
        found = {"text": found}
    kinds = KEYS if pairs else KEYS[:1]
    keys = next((keys for keys in kinds if isinstance(found, dict) and keys <= found.keys()), None)
    if keys is None or not all(isinstance(found[key], str) for key in keys):
        wanted = " or ".join(", ".join(f'"{key}"' for key in sorted(keys)) for keys in kinds)
        raise ValueError(f"{where}: must be a JSON object with {wanted}, each a string, or a JSON string")
    if not found["text" if "text" in keys else "continuation"]:
        raise ValueError(f"{where}: an empty text has no token to score")
    return found["text"] if "text" in keys else (found["context"], found["continuation"])
