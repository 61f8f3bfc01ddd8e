"""The tokenizer's part of a GGUF, as llama.cpp's converter writes it, and what it cannot state."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple
from operator import itemgetter

import numpy as np

from gemma2.checkpoints.gguf import Value
from gemma2.checkpoints.gguf_tokenizer import ADDED, AS_ADDED, ENDS, PADDED, PREFIX, may_end, unspelled
from gemma2.checkpoints.sentencepiece_proto import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, read_proto
from gemma2.checkpoints.with_symbols import LONGEST_RUN, beyond_sentencepiece, is_gemmas
from gemma2.errors import BadModelFile
from gemma2.symbols import SPACE, Symbol
from gemma2.tokenizer import CONTROL as STEERING
from gemma2.tokenizer import Tokenizer


def tokenizer_metadata(
    proto: bytes,
    where: str = "tokenizer.model",
    rows: int | None = None,
    ends: Iterable[int] = (),
    added: Iterable[Symbol] | None = None,
) -> dict[str, Value]:
    """The tokenizer's part of a GGUF, key for key and in the order of llama.cpp's converter for Gemma 2.

    Args:
        proto: the bytes of a `tokenizer.model`.
        where: its name, for error messages.
        rows: of the embedding; default: one for each piece.
        ends: ids at which a text ends beside Gemma's own; a GGUF has room for two.
        added: the tokenizer's added tokens, if SentencePiece does not find them by itself.
    Raises:
        BadModelFile: what `Tokenizer` refuses, more pieces than rows, and settings other than Gemma's, which a GGUF
            could not hold.
    """
    special = Tokenizer(proto, where).special
    found = read_proto(proto, where)
    pieces, scores, types = list(found.pieces), found.scores.copy(), found.kinds.astype("<i4")
    told, taken = beyond_sentencepiece(added), {p.replace(SPACE, " ") for p in pieces if is_gemmas(p)}
    for i in np.flatnonzero((types != NORMAL) & (types != BYTE) & (types != UNUSED)).tolist():
        steers = STEERING.fullmatch(pieces[i]) and pieces[i] != "[toxicity=0]"
        scores[i] = ADDED
        types[i] = USER_DEFINED if types[i] == USER_DEFINED and not steers else CONTROL
        if types[i] == USER_DEFINED:
            if not is_gemmas(pieces[i]) and pieces[i].replace(SPACE, " ") in taken:
                pieces[i], types[i] = unspelled(i), UNUSED
            pieces[i] = pieces[i].replace(SPACE, " ")
    missing = 0 if rows is None else rows - len(pieces)
    if missing < 0:
        raise BadModelFile(f"{where}: {len(pieces)} pieces for an embedding of {rows} rows, which a GGUF cannot state")
    pieces += [f"[PAD{i}]" for i in range(len(pieces), len(pieces) + missing)]
    scores = np.append(scores, np.full(missing, PADDED, "<f4"))
    types = np.append(types, np.full(missing, UNUSED, "<i4"))
    others = sorted(set(ends) - {special["eos"], special.get("end_of_turn")})
    others = [i for i in others if i < len(found.pieces) and may_end(found.pieces[i], int(found.kinds[i]))]
    return {
        PREFIX + "model": Value("str", "llama"),
        PREFIX + "pre": Value("str", "default"),
        PREFIX + "tokens": Value("str[]", pieces),
        PREFIX + "scores": Value("f32[]", scores),
        PREFIX + "token_type": Value("i32[]", types),
        PREFIX + "bos_token_id": Value("u32", special["bos"]),
        PREFIX + "eos_token_id": Value("u32", special["eos"]),
        PREFIX + "unknown_token_id": Value("u32", special["unk"]),
        PREFIX + "padding_token_id": Value("u32", special["pad"]),
        PREFIX + "add_bos_token": Value("bool", True),
        PREFIX + "add_sep_token": Value("bool", False),
        PREFIX + "add_eos_token": Value("bool", False),
        PREFIX + "add_space_prefix": Value("bool", found.space_prefix),
        **{f"{PREFIX}{name}_token_id": Value("u32", id) for name, id in zip(ENDS[1:], others, strict=False)},
        **(
            {AS_ADDED: Value("str", json.dumps(sorted((astuple(symbol)[:6] for symbol in told), key=itemgetter(1))))}
            if told
            else {}
        ),
    }


def lost(tokenizer: Tokenizer) -> list[str]:
    """What a GGUF cannot state of a tokenizer."""
    said, beyond = [], sorted(symbol.text for symbol in beyond_sentencepiece(tokenizer.added))
    if beyond:
        listed = ", ".join(map(repr, beyond[:3])) + (", ..." if beyond[3:] else "")
        said.append(
            f"how added tokens are found ({listed:.200}) is in a key of this project ({AS_ADDED}): llama.cpp may find "
            "them elsewhere"
        )
    run = tokenizer.id_of(SPACE * LONGEST_RUN)
    if run is not None and tokenizer.encode(" " * (LONGEST_RUN + 9), bos=False)[0] != run:
        said.append(f"runs of more than {LONGEST_RUN} spaces are cut otherwise from a GGUF, the longest piece first")
    return said
