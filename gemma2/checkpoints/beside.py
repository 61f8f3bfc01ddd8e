"""What the small files of a folder say about turns: the chat template, and the ids at which a text ends."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma2.checkpoints.added_tokens import LISTED, NAMED
from gemma2.checkpoints.hf_config import read_json
from gemma2.errors import BadModelFile
from gemma2.templates import NOT_GEMMAS, is_gemmas
from gemma2.tokenizer import Tokenizer

GENERATION, CONFIG = "generation_config.json", "config.json"
TOKENIZER, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, NAMED_TEMPLATES, PROCESSOR = "chat_template.jinja", "additional_chat_templates", "chat_template.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SHOWN = 60  # characters of a value in a note


@dataclass(frozen=True)
class Turns:
    """What files say about turns; `Checkpoint` says what each of these is. `notes` does not say what follows from the
    template alone."""

    chat_tuned: bool | None = None
    chat_template: str | None = None
    end_ids: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()
    companions: Mapping[str, Any] = field(default_factory=dict)


def turns_of(folder: Path, tokenizer: Tokenizer) -> Turns:
    """What the small files of a folder say about turns."""
    tuned, template, ends = chat_tuned(folder, tokenizer), chat_template(folder), end_ids(folder, tokenizer)
    ignored = tuple(found for found in _ends(folder, tokenizer) if isinstance(found, str))
    return Turns(tuned, template, ends, ignored, companions(folder))


def companions(folder: Path) -> dict[str, Mapping[str, Any]]:
    """What the files of a folder say for other programs, by the name of the file: the ids of special tokens, their
    names, and all of generation_config.json."""
    config, settings, generation = (_stated(folder, name) for name in (CONFIG, TOKENIZER, GENERATION))
    with contextlib.suppress(BadModelFile):  # of which there is a note
        # transformers reads the older file where the newer one does not list the added tokens.
        settings = settings if "added_tokens_decoder" in settings else {**settings, **_stated(folder, SPECIAL)}
    found = {
        CONFIG: {key: config[key] for key in IDS if key in config},
        TOKENIZER: {key: settings[key] for key in (*NAMED, *LISTED, "padding_side") if settings.get(key) is not None},
        GENERATION: generation,
    }
    return {name: content for name, content in found.items() if content}


def with_tokenizers(own: Turns, brought: Turns, where: str, tokenizer: Tokenizer, rows: int) -> Turns:
    """What a checkpoint says about turns, with what the folder or file of another tokenizer says.

    A text ends where either says; the template is the tokenizer's if it has one.

    Args:
        where: what notes call that folder or file.
        tokenizer: that tokenizer, for a model of so many `rows`.
    """
    ends = frozenset(id for id in brought.end_ids if id < rows)
    notes = own.notes + brought.notes
    if more := sorted(ends - own.end_ids - tokenizer.end_ids):
        pieces = ", ".join(repr(tokenizer.piece(id)) if id < len(tokenizer) else str(id) for id in more)
        notes += (f"a text also ends at {pieces:.200}, as {where} says",)
    template = own.chat_template if brought.chat_template is None else brought.chat_template
    if own.chat_template not in (None, template):
        notes += (f"the chat template of {where} takes the place of the checkpoint's",)
    tuned = brought.chat_tuned or None if own.chat_tuned is None else own.chat_tuned
    settings = {name: content for name, content in brought.companions.items() if name == TOKENIZER}
    return Turns(tuned, template, own.end_ids | ends, notes, {**own.companions, **settings})


def template_notes(template: str | None) -> tuple[str, ...]:
    """A line for a chat template that is not Gemma's."""
    return () if template is None or is_gemmas(template) else (NOT_GEMMAS,)


def chat_tuned(folder: Path, tokenizer: Tokenizer) -> bool | None:
    """Whether a folder says that its model was tuned for chat; None when it says nothing.

    Google's -it checkpoints stop at <end_of_turn> and have Gemma's chat template; the pre-trained ones stop at <eos>
    alone.
    """
    tuned = tuned_by(chat_template(folder), end_ids(folder, tokenizer), tokenizer)
    return tuned if tuned or (folder / GENERATION).is_file() else None


def tuned_by(template: str | None, ends: Collection[int], tokenizer: Tokenizer) -> bool | None:
    """What a chat template and the ids at which a text ends say of a model: that it was tuned for chat, that it was
    not, or nothing."""
    if tokenizer.special.get("end_of_turn") in ends or (template is not None and is_gemmas(template)):
        return True
    return False if set(ends) == {tokenizer.special["eos"]} else None


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
        piece = _spelling(found.get("eos_token"))
        if piece is not None:
            token = id_of(piece, tokenizer, found.get("added_tokens_decoder"))
            if token is not None and token < size:
                yield token
            else:
                yield f"{name}: eos_token {_shown(piece)} is not in the vocabulary, and is ignored"


def _spelling(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token  # a dict is how transformers writes an AddedToken


def id_of(piece: object, tokenizer: Tokenizer, added: object = None) -> int | None:
    """The id of a token that is given by its spelling: in the vocabulary, or among what a file adds to it."""
    piece = _spelling(piece)
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
