"""The `tokenizer.json` file of the library `tokenizers`: read into a SentencePiece model.

SentencePiece merges two neighbours whenever together they are a piece, the one with the best score first. `tokenizers`
has a list of pairs that may merge, in order. Both do the same where the list has every pair of pieces that makes a
piece, and where all pairs of one piece stand together, as transformers writes it. Both are checked here, so that a text
has the same ids as there. One thing differs between Gemma's own two files: `tokenizers` looks for added tokens in the
text as it is typed, where a run of spaces is not yet the piece `▁▁`. See `Tokenizer.added`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gemma2.checkpoints.added_tokens import MOST, Added, add, parse_added
from gemma2.checkpoints.merges import merge_ranks
from gemma2.checkpoints.sentencepiece_proto import (
    BYTE,
    NORMAL,
    SPECIAL,
    USER_DEFINED,
    Vocabulary,
    read_proto,
)
from gemma2.checkpoints.with_symbols import beyond_sentencepiece, is_gemmas, tokenizer_with
from gemma2.errors import BadModelFile
from gemma2.symbols import SPACE
from gemma2.tokenizer import Tokenizer

MOST_BYTES = 96 * 2**20  # Gemma 2's own has 17 to 34 MB
TAB = "<0x09>"  # which older files spell "\t"
NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PRE_TOKENIZER = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
# What the model may state of itself, beside vocabulary and merges.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "dropout": (None, 0, 0.0),
    "unk_token": ("<unk>",),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (True, False),  # without meaning where every byte is a piece
    "byte_fallback": (True,),
    "ignore_merges": (False, None),
}
UNSTATED = {"type": "BPE", "unk_token": None, "byte_fallback": False}  # what a file means that leaves these out
BEGIN, TEXT = ("SpecialToken", "<bos>"), ("Sequence", "A")


def read_tokenizer_json(path: Path, named: Sequence[Added] = ()) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    Args:
        named: special tokens that files beside it name, see `added_beside`.
    Raises:
        BadModelFile: not such a file, or one whose tokenizer is not Gemma's; says which setting is another.
    """
    with _without_collection():
        return _tokenizer(_content(path), str(path), named)


@contextmanager
def _without_collection() -> Iterator[None]:
    """No search for reference cycles, which takes longer than reading the file: it makes a million small objects."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _content(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise BadModelFile(f"{path}: {size:,} bytes, and a Gemma 2's tokenizer.json has at most {MOST_BYTES:,}")
    raw = path.read_bytes()
    start = raw[:100].lstrip()
    if not start:
        raise BadModelFile(f"{path}: empty file, expected a tokenizer.json")
    if start.startswith(b"version https://git-lfs"):
        raise BadModelFile(f"{path}: a Git LFS pointer, not the file itself: run `git lfs pull`")
    if start.startswith(b"<"):
        raise BadModelFile(f"{path}: a web page (HTML), not a tokenizer.json: download the file itself")
    try:
        found = json.loads(raw, parse_constant=_refuse_constant)
    except RecursionError:
        raise BadModelFile(f"{path}: not a tokenizer.json (nested too deeply)") from None
    except MemoryError:
        raise BadModelFile(f"{path}: does not fit into memory") from None
    except ValueError as error:  # not UTF-8, not JSON, NaN, or a number of 5,000 digits
        raise BadModelFile(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise BadModelFile(f"{path}: not a tokenizer.json: there is no object 'model' in it")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _tokenizer(content: dict[str, Any], where: str, named: Sequence[Added]) -> Tokenizer:
    model = content["model"]
    _check_settings(content, where)
    notes = _check_frame(content, where)
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise BadModelFile(f"{where}: model.vocab must be an object of pieces and their ids")
    pieces = _pieces(vocabulary, where)
    kinds = [SPECIAL.get(piece, NORMAL) for piece in pieces]
    for byte in range(256):
        i = vocabulary.get(f"<0x{byte:02X}>", vocabulary.get("\t") if byte == 9 else None)
        if i is None:
            raise BadModelFile(f"{where}: no byte piece <0x{byte:02X}>")
        kinds[i] = BYTE
    trained = list(pieces)
    added = _added(content.get("added_tokens"), where)
    said, symbols = add(pieces, kinds, [*added, *named], where)
    ranks, longest_first = merge_ranks(model.get("merges"), vocabulary, trained, kinds, where)
    if TAB not in vocabulary:
        pieces[vocabulary["\t"]] = TAB
    merged = {}
    for i, piece in enumerate(trained):
        if len(piece) > 1 and piece[0] == SPACE and not piece.strip(SPACE):
            # Runs of spaces: as symbols, or merged from their parts in the order of the file.
            if piece in symbols and not (longest_first or symbols[piece].normalized):
                merged[i] = float(ranks[i])
            if piece in symbols or longest_first:
                kinds[i] = USER_DEFINED
    kind = np.array(kinds, np.int32)
    found = Vocabulary(pieces, np.where(kind == NORMAL, ranks, np.float32(0)), kind)
    return tokenizer_with(found, trained, list(symbols.values()), where, [*notes, *said], merged)


def not_in(path: Path, other: Tokenizer) -> str:
    """Names an added token or a piece of a tokenizer.json that another tokenizer has not, or not in the same way.

    "" if it has them all, and for a file whose pieces and tokens cannot be read.
    """
    try:
        content = _content(path)
        added = _added(content.get("added_tokens"), str(path))
    except (BadModelFile, OSError):
        return ""
    kinds = read_proto(other.to_proto(), other.where).kinds
    known = {symbol.text: symbol for symbol in other.added or ()}
    symbols = {token.symbol(token.id or 0) for token in added}
    beyond = beyond_sentencepiece(symbols)
    for symbol in symbols:
        i = other.id_of(symbol.text)
        same = i == symbol.id and (is_gemmas(symbol.text) or kinds[i] != NORMAL)
        if not same or (symbol in beyond and known.get(symbol.text) != symbol):
            return f"added token {symbol.text!r:.60}"
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict):
        for piece, i in vocabulary.items():
            if piece != "\t" and i != other.id_of(piece):
                return f"piece {piece!r:.60}"
    return ""


def _check_settings(content: Mapping[str, Any], where: str) -> None:
    model = content["model"]
    for key, taken in SETTINGS.items():
        stated = model.get(key, UNSTATED.get(key, taken[0]))
        if not any(stated == one and isinstance(stated, bool) == isinstance(one, bool) for one in taken):
            raise BadModelFile(f"{where}: model.{key} is {stated!r:.80}, and in Gemma's tokenizers {taken[0]!r}")


def _check_frame(content: Mapping[str, Any], where: str) -> list[str]:
    """What surrounds the model must be Gemma's. Returns lines for what is not followed."""
    normalizer = _alone(content.get("normalizer"), "normalizers")
    if normalizer != NORMALIZER:
        raise BadModelFile(f"{where}: normalizer {_named(normalizer)} is not Gemma's, which replaces ' ' by '{SPACE}'")
    before = _alone(content.get("pre_tokenizer"), "pretokenizers")
    if before is not None and before != PRE_TOKENIZER:
        raise BadModelFile(f"{where}: pre_tokenizer {_named(before)} is not Gemma's, which splits at ' ' or is null")
    if content.get("decoder") != DECODER:
        raise BadModelFile(
            f"{where}: decoder {_named(content.get('decoder'))} is not Gemma's, a Sequence of Replace, ByteFallback "
            "and Fuse"
        )
    notes = []
    after = _alone(content.get("post_processor"), "processors")
    around: list[tuple[str, str]] = []
    if after is not None:
        single = after.get("single") if isinstance(after, Mapping) else None
        if not isinstance(single, list) or after.get("type") != "TemplateProcessing":
            raise BadModelFile(f"{where}: post_processor {_named(after)} is not Gemma's TemplateProcessing with <bos>")
        around = [_template_part(part) for part in single]
        behind = around[around.index(TEXT) + 1 :] if TEXT in around else []
        if around[: len(around) - len(behind)] not in ([TEXT], [BEGIN, TEXT]) or behind not in (
            [],
            [("SpecialToken", "<eos>")],
        ):
            raise BadModelFile(
                f"{where}: post_processor TemplateProcessing {single!r:.200} is not Gemma's: <bos>, text"
            )
        if behind:
            notes.append("tokenizer.json puts <eos> behind a text, but Gemma 2 was trained without: none is put there")
    if BEGIN not in around:
        notes.append(
            "tokenizer.json puts no <bos> before a text, but Gemma 2 needs it: it is put in front all the same"
        )
    for key in ("truncation", "padding"):
        if content.get(key) is not None:
            notes.append(f"tokenizer.json states {key}, as a training program left it there: texts are not changed")
    return notes


def _template_part(part: Any) -> tuple[str, str]:
    """("SpecialToken", its name) or ("Sequence", "A")."""
    if isinstance(part, Mapping) and len(part) == 1:
        ((kind, stated),) = part.items()
        if isinstance(stated, Mapping) and isinstance(stated.get("id"), str):
            return str(kind), stated["id"]
    return "", ""


def _alone(stated: Any, members: str) -> Any:
    """What a Sequence of one member has in it; anything else as it is."""
    if isinstance(stated, Mapping) and stated.get("type") == "Sequence":
        inside = stated.get(members)
        if isinstance(inside, list) and len(inside) == 1:
            return inside[0]
    return stated


def _named(stated: Any) -> str:
    """For a message: the type of a normalizer and the like, with its members' or its settings."""
    if not isinstance(stated, Mapping):
        return "null" if stated is None else f"{stated!r:.60}"
    inside = next((value for key, value in stated.items() if isinstance(value, list) and key != "single"), None)
    members = [str(each.get("type")) for each in inside or () if isinstance(each, Mapping)]
    settings = {key: value for key, value in stated.items() if key != "type"}
    return f"{stated.get('type')!s:.60} ({', '.join(members) or settings!s:.120})"[:200]


def _pieces(vocabulary: Mapping[str, Any], where: str) -> list[str]:
    """The pieces in the order of their ids, which are 0, 1, 2 and so on."""
    pieces: list[str | None] = [None] * len(vocabulary)
    for piece, i in vocabulary.items():
        if type(i) is not int or i < 0:
            raise BadModelFile(f"{where}: piece {piece!r:.60} has the id {i!r:.40}, and ids are integers from 0")
        if i >= len(pieces):
            raise BadModelFile(f"{where}: piece {piece!r:.60} has the id {i}, but there are only {len(pieces)} pieces")
        if pieces[i] is not None:
            raise BadModelFile(f"{where}: pieces {pieces[i]!r:.60} and {piece!r:.60} both have the id {i}")
        if not piece:
            raise BadModelFile(f"{where}: the piece with the id {i} is empty, which a SentencePiece model cannot hold")
        pieces[i] = piece
    try:
        "".join(vocabulary).encode()
    except UnicodeEncodeError:
        raise BadModelFile(f"{where}: a piece is not valid Unicode (a lone surrogate)") from None
    return [piece for piece in pieces if piece is not None]


def _added(stated: Any, where: str) -> list[Added]:
    if stated is None:
        return []
    if not isinstance(stated, list):
        raise BadModelFile(f"{where}: added_tokens must be a list, found {stated!r:.60}")
    if len(stated) > MOST:
        raise BadModelFile(f"{where}: more than {MOST:,} added tokens")
    found = []
    for token in stated:
        if not isinstance(token, Mapping) or "id" not in token:
            raise BadModelFile(f"{where}: an added token is {token!r:.80}, and must be an object with content and id")
        found.append(parse_added(token, where, token["id"]))
    return found
