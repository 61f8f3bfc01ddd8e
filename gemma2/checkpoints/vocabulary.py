"""The tokenizer in a folder or file, and how it fits an embedding."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemma2.checkpoints import gguf, gguf_tokenizer
from gemma2.checkpoints.added_tokens import Added, add, added_beside
from gemma2.checkpoints.hf_config import read_json
from gemma2.checkpoints.sentencepiece_proto import (
    CONTROL,
    SPECIAL,
    SYMBOL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    read_proto,
)
from gemma2.checkpoints.tokenizer_json import not_in, read_tokenizer_json
from gemma2.checkpoints.with_symbols import beyond_sentencepiece, in_effect, tokenizer_with
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile
from gemma2.symbols import Symbol
from gemma2.tokenizer import Tokenizer

# The key of tokenizer_config.json with which this project says that a tokenizer.model was made from the tokenizer.json
# beside it, whose rules for runs of spaces hold (see `Tokenizer.added`). Other readers leave it alone.
AS_TYPED = "gemma2.added_tokens_as_typed"
MODEL, JSON = "tokenizer.model", "tokenizer.json"
ELSEWHERE = (
    "any Gemma 2 repository, as google/gemma-2-2b, has a tokenizer.model (4.7 MB): put it there, or name a tokenizer "
    "with tokenizer="
)

Given = str | Path | Tokenizer | None


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer in a folder.

    As in transformers, tokenizer.json comes before tokenizer.model. Where both say the same, as Google's do, the
    tokenizer is that of tokenizer.model. Tokens that are added by the files beside them are part of it.

    Raises:
        BadModelFile: neither is there, or neither can be read.
    """
    model, fast = folder / MODEL, folder / JSON
    if not fast.is_file():
        if not model.is_file():
            raise BadModelFile(f"{folder}: neither {JSON} nor {MODEL}; {ELSEWHERE}")
        return _with_added(Tokenizer.from_file(model), folder)
    try:
        found = read_tokenizer_json(fast, [token for some in added_beside(folder) for token in some])
    except BadModelFile as error:
        if not model.is_file():
            raise BadModelFile(f"{error}; {ELSEWHERE}") from None
        other = _with_added(Tokenizer.from_file(model), folder)
        lost = not_in(fast, other)
        if lost:
            raise BadModelFile(
                f"{error}; {MODEL} is another tokenizer, without that {lost}: if it is meant, name it with tokenizer="
            ) from None
        return _noting(other, f"{JSON} cannot be used, so {MODEL} is: {str(error).removeprefix(f'{fast}: ')}")
    if not model.is_file():
        return found
    try:
        other = Tokenizer.from_file(model)
        if other.to_proto() != found.to_proto():
            other = _with_added(other, folder)
        if same_tokenizer(other, found):
            return other if other.added is None and same_symbols(other, found) and not _made_here(folder) else found
    except BadModelFile:
        return _noting(found, f"{MODEL} cannot be read; {JSON} is used")
    return _noting(
        found, f"{JSON} ({len(found)} pieces) is used, as in transformers; {MODEL} ({len(other)}) is another"
    )


def parse_tokenizer(given: Given) -> Tokenizer | None:
    """A tokenizer by itself, or by what it is in; None for None.

    Args:
        given: a tokenizer.model, a tokenizer.json, a GGUF, or a folder that has one of the first two.
    Raises:
        BadModelFile: no such file, or one that has no tokenizer of a Gemma 2 in it.
    """
    if given is None or isinstance(given, Tokenizer):
        return given
    path = Path(given).expanduser()
    if path.is_dir():
        return tokenizer_of(path)
    if path.is_file():
        header = gguf_in(path)
        if header is not None:
            return _noting(gguf_tokenizer.build_tokenizer(header), *gguf_tokenizer.notes(header))
        with path.open("rb") as file:
            start = file.read(64)
        if path.suffix == ".json" or start.lstrip().startswith(b"{"):
            return read_tokenizer_json(path)
        return Tokenizer.from_file(path)
    raise BadModelFile(f"{path}: no such file or folder")


def gguf_in(path: Path) -> gguf.GGUF | None:
    """The header of a file that is a GGUF; None for any other file, and for a folder."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return None
    return gguf.read_parts(path)


def check_vocabulary(tokenizer: Tokenizer, config: Gemma2Config) -> Tokenizer:
    """The tokenizer for the rows of the embedding. Raises BadModelFile if it cannot be this model's."""
    return tokenizer.for_rows(config.vocab_size)


def same_tokenizer(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers have the same pieces, which merge in the same order."""
    if one.to_proto() == other.to_proto():
        return True
    a, b = (read_proto(each.to_proto(), each.where) for each in (one, other))
    same = a.pieces == b.pieces and np.array_equal(a.kinds, b.kinds) and a.space_prefix == b.space_prefix
    return same and np.array_equal(np.argsort(-a.scores, kind="stable"), np.argsort(-b.scores, kind="stable"))


def same_symbols(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers of the same pieces find the same added tokens, and in the same way.

    How they cut runs of spaces is not looked at: Google's own two files differ there, in runs of more than 31.
    """
    return beyond_sentencepiece(one.added) == beyond_sentencepiece(other.added)


def _with_added(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.model, with the tokens that the files beside it add."""
    added, named = added_beside(folder)
    if all(_is_there(token, tokenizer) for token in (*added, *named)):
        return tokenizer  # as in Google's folders; reading 256,000 pieces is saved
    found = read_proto(tokenizer.to_proto(), tokenizer.where)
    pieces, kinds = list(found.pieces), found.kinds.tolist()
    own = [
        Symbol(piece, i, special=kind == CONTROL)
        for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    notes, more = add(pieces, kinds, [*added, *named], str(folder))
    symbols = in_effect(own, more)
    scores = np.zeros(len(pieces), np.float32)
    scores[: len(found.scores)] = found.scores
    return tokenizer_with(
        Vocabulary(pieces, scores, np.array(kinds, np.int32), found.space_prefix),
        found.pieces,
        symbols if beyond_sentencepiece(symbols) else [],
        tokenizer.where,
        notes,
    )


def _is_there(token: Added, tokenizer: Tokenizer) -> bool:
    """Whether an added token changes nothing, because it is one of Gemma's own symbols in its place."""
    found = tokenizer.id_of(token.text)
    own = token.text in SPECIAL or SYMBOL.fullmatch(token.text) is not None
    if not own or found is None or token.id not in (None, found):
        return False
    return token.id is None or token.symbol(found) == Symbol(token.text, found)


def _made_here(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    stated = read_json(path) if path.is_file() else None
    return isinstance(stated, dict) and stated.get(AS_TYPED) is True


def _noting(tokenizer: Tokenizer, *notes: str) -> Tokenizer:
    tokenizer.notes = (*tokenizer.notes, *notes)
    return tokenizer
