"""What the small files of a folder say about turns: the chat template, and the ids at which a text ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma2.checkpoints.hf_config import read_json
from gemma2.errors import BadModelFile
from gemma2.templates import NOT_GEMMAS, is_gemmas
from gemma2.tokenizer import Tokenizer

GENERATION, CONFIG = "generation_config.json", "config.json"
TOKENIZER, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, NAMED_TEMPLATES, PROCESSOR = "chat_template.jinja", "additional_chat_templates", "chat_template.json"
SHOWN = 60  # characters of a value in a note


def chat_tuned(folder: Path, tokenizer: Tokenizer) -> bool | None:
    """Whether a folder says that its model was tuned for chat; None when it says nothing.

    Google's -it checkpoints stop at <end_of_turn> and have Gemma's chat template; the pre-trained ones stop at <eos>
    alone.
    """
    template = chat_template(folder)
    ids = end_ids(folder, tokenizer)
    if tokenizer.special.get("end_of_turn") in ids or (template is not None and is_gemmas(template)):
        return True
    return False if (folder / GENERATION).is_file() and ids == {tokenizer.special["eos"]} else None


def chat_template(folder: Path) -> str | None:
    """The chat template in a folder, where transformers finds it: newer ones have a file for it, older ones put it into
    tokenizer_config.json, alone or as one of several with names, of which the "default" is taken. Last, a file that was
    written for a processor is looked at."""
    for path in (folder / NAMED_TEMPLATES / "default.jinja", folder / TEMPLATE):
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
    for name in (TOKENIZER, PROCESSOR):
        stated = _stated(folder, name).get("chat_template")
        if isinstance(stated, list):
            pairs = [one for one in stated if isinstance(one, dict) and one.get("name") == "default"]
            stated = pairs[-1].get("template") if pairs else None
        elif isinstance(stated, dict):
            stated = stated.get("default")
        if isinstance(stated, str):
            return stated
    return None


def end_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids at which the files of a folder say that a text ends: `eos_token_id` of generation_config.json or, where
    there is none, of config.json, as transformers takes it; and the `eos_token` of the tokenizer's files."""
    return frozenset(found for found in _ends(folder, tokenizer) if isinstance(found, int))


def turn_notes(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """A line for everything that the files of a folder say about turns and that cannot be done."""
    said = [found for found in _ends(folder, tokenizer) if isinstance(found, str)]
    template = chat_template(folder)
    return said if template is None or is_gemmas(template) else [*said, NOT_GEMMAS]


def _ends(folder: Path, tokenizer: Tokenizer) -> Iterator[int | str]:
    """Ids at which a text ends, and a line for what is stated and is no id."""
    name = GENERATION if (folder / GENERATION).is_file() else CONFIG
    stated = _stated(folder, name).get("eos_token_id")
    rows = _stated(folder, CONFIG).get("vocab_size")
    size = max(len(tokenizer), rows if type(rows) is int else 0)
    listed = stated if isinstance(stated, list) else [] if stated is None else [stated]
    good = [token for token in listed if type(token) is int and 0 <= token < size]
    yield from good
    if len(good) < len(listed):
        yield f"{name}: eos_token_id is {_shown(stated)}; a value that is no token id below {size} is ignored"
    for name in (TOKENIZER, SPECIAL):
        try:
            found = _stated(folder, name)
        except BadModelFile as error:
            yield f"{error}: it is left out"
            continue
        piece = found.get("eos_token")
        if isinstance(piece, dict):  # how transformers writes an AddedToken
            piece = piece.get("content")
        if piece is not None:
            token = _id_of(piece, tokenizer, found.get("added_tokens_decoder"))
            if token is not None and token < size:
                yield token
            else:
                yield f"{name}: eos_token {_shown(piece)} is not in the vocabulary, and is ignored"


def _id_of(piece: object, tokenizer: Tokenizer, added: object) -> int | None:
    """The id of a token that is given by its spelling: in the vocabulary, or among what a file adds to it."""
    if not isinstance(piece, str) or not piece:
        return None
    named = tokenizer.special.get(piece[1:-1]) if piece == f"<{piece[1:-1]}>" else None
    if named is not None:
        return named
    for token, stated in added.items() if isinstance(added, Mapping) else ():
        if isinstance(stated, dict) and stated.get("content") == piece and token.isdecimal() and len(token) < 10:
            return int(token)
    try:
        ids = tokenizer.encode(piece, bos=False, special=True)
    except ValueError:  # no text at all
        return None
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.special["unk"] else None


def _stated(folder: Path, name: str) -> Mapping[str, Any]:
    """What a JSON file of a folder states; nothing where there is none, or where it holds something else."""
    path = folder / name
    found = read_json(path) if path.is_file() else None
    return found if isinstance(found, dict) else {}


def _shown(value: object) -> str:
    return f"{value!r:.{SHOWN}}"
