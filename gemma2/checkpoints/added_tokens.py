"""Tokens that were added to a vocabulary after it was trained: what files say of them, and the pieces they become.

`tokenizer.json` lists them inside; beside a `tokenizer.model` they are in `tokenizer_config.json` (newer files) or in
`added_tokens.json` and `special_tokens_map.json` (older ones).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from gemma2.checkpoints.hf_config import read_json
from gemma2.checkpoints.sentencepiece_proto import CONTROL, NORMAL, SPECIAL, SYMBOL, USER_DEFINED
from gemma2.errors import BadModelFile
from gemma2.symbols import SPACE, Symbol

MOST = 2**16  # added tokens of a file
LONGEST = 2**21, 2**17  # characters that all of them may have together, and those that are single words
AROUND = ("lstrip", "rstrip", "single_word")  # flags that make a token depend on the text around it, as in `Symbol`
# The keys under which transformers' files name one special token each, in its order, and those that list more of them.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTED = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class Added:
    """One added token: its text, the id that the file states, if any, and its flags, see `Symbol`."""

    text: str
    id: int | None
    special: bool
    normalized: bool = False
    around: tuple[bool, bool, bool] = (False, False, False)  # in the order of `AROUND`

    @property
    def single_word(self) -> bool:
        return self.around[2]

    def symbol(self, id: int) -> Symbol:
        return Symbol(self.text, id, self.normalized, *self.around)


def parse_added(stated: Any, where: str, id: Any = None, special: bool = False) -> Added:
    """An added token as transformers writes it: its text alone, or an object with content and flags.

    One that does not say whether it is normalized is so if it is not special, as in transformers.

    Raises:
        BadModelFile: wrong types.
    """
    if isinstance(stated, str):
        stated = {"content": stated}
    text = stated.get("content") if isinstance(stated, Mapping) else None
    if not isinstance(text, str) or not text:
        raise BadModelFile(f"{where}: an added token without a text: {stated!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadModelFile(f"{where}: added token {text!r:.80} is not valid Unicode (a lone surrogate)") from None
    if id is not None and (type(id) is not int or not 0 <= id < 2**31):
        raise BadModelFile(f"{where}: added token {text!r:.80} has the id {id!r:.40}, and ids are integers from 0")
    for flag in (*AROUND, "normalized", "special"):
        if not isinstance(stated.get(flag, False), bool):
            raise BadModelFile(
                f"{where}: {flag} of added token {text!r:.80} is {stated[flag]!r:.40}, not true or false"
            )
    special = stated.get("special", special)
    around = tuple(stated.get(flag, False) for flag in AROUND)
    return Added(text, id, special, stated.get("normalized", not special), (around[0], around[1], around[2]))


def added_beside(folder: Path) -> tuple[list[Added], list[Added]]:
    """What the small files of a folder add to its tokenizer.model, and the special tokens that they name.

    The first stand in the order of their ids. The second have none: they are pieces already, or become the last pieces.
    """
    where = folder / "tokenizer_config.json"
    config = _read(where)
    named: dict[str, Any] = dict(config)
    added: list[Added] = []
    if "added_tokens_decoder" in config:
        stated = _as_object(config["added_tokens_decoder"], where, "added_tokens_decoder")
        for key, token in stated.items():
            id = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else key
            added.append(parse_added(token, str(where), id))
    else:
        named |= _read(folder / "special_tokens_map.json")
    specials = [
        parse_added(token, str(where), special=True) for token in (named.get(key) for key in NAMED) if token is not None
    ]
    for key in LISTED:
        # A mapping here has names for the tokens; what else it may be, transformers ignores too.
        tokens = named.get(key) or []
        tokens = list(tokens.values()) if isinstance(tokens, Mapping) else tokens if isinstance(tokens, list) else []
        specials += [parse_added(token, str(where), special=True) for token in tokens]
    if "added_tokens_decoder" not in config:
        where = folder / "added_tokens.json"
        called = {token.text for token in specials}
        for text, id in _read(where).items():
            added.append(parse_added({"content": text, "special": text in called}, str(where), id))
    return sorted(added, key=lambda token: token.id or 0), specials


def add(pieces: list[str], kinds: list[int], added: Iterable[Added], where: str) -> tuple[list[str], dict[str, Symbol]]:
    """Put added tokens into a vocabulary, as the library `tokenizers` does.

    A token that is a piece already keeps that piece's id; one with the id of another piece renames it; any other gets
    the next id. The kind of a piece follows from the token's flag `special`, but Gemma's own symbols keep theirs.

    Returns:
        Lines that the reader should know, and the tokens by their texts. Of two with one text the one that states no id
        only names the other, whose flags hold.
    Raises:
        BadModelFile: two tokens of one id, or more than 65,536 tokens.
    """
    added, ids = list(islice(added, MOST + 1)), {piece: i for i, piece in enumerate(pieces)}
    whole = "\0".join(token.text for token in added if token.single_word)
    if sum(len(token.text) for token in added) > LONGEST[0] or len(whole) > LONGEST[1]:
        raise BadModelFile(f"{where}: added tokens that are too many or too long to be looked for")
    trained, said, taken, symbols = len(pieces), list[str](), dict[int, str](), dict[str, Symbol]()
    for count, token in enumerate(added):
        if count == MOST:
            raise BadModelFile(f"{where}: more than {MOST:,} added tokens")
        if token.id is not None and taken.setdefault(token.id, token.text) != token.text:
            raise BadModelFile(
                f"{where}: added tokens {taken[token.id]!r:.60} and {token.text!r:.60} both have the id {token.id}"
            )
        found = ids.get(token.text)
        if token.single_word and SYMBOL.search(token.text):
            raise BadModelFile(
                f"{where}: added token {token.text!r:.60} has single_word=true, and one of Gemma's symbols is in it"
            )
        merged = found is not None and found < trained and kinds[found] == NORMAL
        if found is None and token.id is not None and token.id < trained:
            found = token.id
            said.append(f"piece {found}, {pieces[found]!r:.60}, is renamed to {token.text!r:.60}")
            del ids[pieces[found]]
            pieces[found] = token.text
            ids[token.text] = found
            kinds[found] = NORMAL
        elif found is None:
            found = ids[token.text] = len(pieces)
            pieces.append(token.text)
            kinds.append(NORMAL)
        if token.id is not None and found != token.id:
            said.append(f"added token {token.text!r:.60} has the id {found}, as in transformers, and not {token.id}")
        if token.id is not None or token.text not in symbols:
            symbols[token.text] = token.symbol(found)
        kind = kind_of(token, kinds[found])
        if merged and _is_merged_too(symbols[token.text], whole):
            if kind == CONTROL:
                raise BadModelFile(
                    f"{where}: special token {token.text!r:.60} is a piece of ordinary text too, where it is not found"
                )
            kind = NORMAL
        kinds[found] = kind
        symbols[token.text] = replace(symbols[token.text], special=kind == CONTROL)
    return said, symbols


def _is_merged_too(symbol: Symbol, whole: str) -> bool:
    """Whether a piece that is an added token is also made of its parts, in places where the token is not found.

    That is inside of tokens that are single words, `whole`, and where a space is typed instead of a `▁`.
    """
    return symbol.text in whole or (SPACE in symbol.text and not symbol.normalized)


def kind_of(token: Added, kind: int) -> int:
    """The kind of the piece of an added token, which so far has been of `kind`."""
    if kind != NORMAL:
        return kind
    if token.text in SPECIAL:
        return SPECIAL[token.text]
    return CONTROL if token.special and not SYMBOL.fullmatch(token.text) else USER_DEFINED


def _read(path: Path) -> dict[str, Any]:
    return _as_object(read_json(path), path, "it") if path.is_file() else {}


def _as_object(value: Any, where: Path, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadModelFile(f"{where}: {name} must be a JSON object, found {value!r:.60}")
    return value
