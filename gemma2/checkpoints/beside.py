"""What the small files of a folder say about turns: the chat template, and the ids at which a text ends."""

from __future__ import annotations

from pathlib import Path

from gemma2.checkpoints.hf_config import read_json
from gemma2.tokenizer import Tokenizer


def chat_tuned(folder: Path, tokenizer: Tokenizer) -> bool | None:
    """Whether a folder says that its model was tuned for chat; None when it says nothing.

    Google's -it checkpoints stop at <end_of_turn>; the pre-trained ones stop at <eos> alone.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    stated = read_json(path)
    stops = stated.get("eos_token_id") if isinstance(stated, dict) else None
    end = tokenizer.special.get("end_of_turn")
    return end is not None and end in (stops if isinstance(stops, list) else [stops])


def chat_template(folder: Path) -> str | None:
    """The chat template in a folder: newer ones have a file for it, older ones put it into tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    path = folder / "tokenizer_config.json"
    stated = read_json(path) if path.is_file() else None
    template = stated.get("chat_template") if isinstance(stated, dict) else None
    return template if isinstance(template, str) else None


def end_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids at which the files of a folder say that a text ends."""
    return frozenset()
