"""A `tokenizer.json` for a tokenizer, which `tokenizers` and transformers read without SentencePiece."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gemma2.checkpoints.sentencepiece_proto import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, read_proto
from gemma2.checkpoints.tokenizer_json import DECODER, NORMALIZER, PRE_TOKENIZER
from gemma2.checkpoints.with_symbols import LONGEST_RUN, is_gemmas
from gemma2.symbols import SPACE, Symbol
from gemma2.tokenizer import TURNS, Tokenizer

SPECIAL = {"<mask>", *(f"<{name}>" for name in TURNS)}  # symbols that transformers calls special


def tokenizer_json(tokenizer: Tokenizer) -> bytes | None:
    """The bytes of a `tokenizer.json` that gives every text the ids that `tokenizer` gives it.

    None for a tokenizer that puts a space before every text: `tokenizers` would put one behind every added token too.
    """
    if tokenizer.space_prefix:
        return None
    found = read_proto(tokenizer.to_proto(), tokenizer.where)
    pieces, kinds, scores = found.pieces, found.kinds.tolist(), found.scores.tolist()
    symbols, texts = {symbol.id: symbol for symbol in tokenizer.added or ()}, list(pieces)
    added = []
    for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)):
        # SentencePiece finds its symbols after spaces have become `▁`.
        symbol = symbols.get(i) or Symbol(piece, i, normalized=kind == USER_DEFINED and SPACE in piece)
        texts[i] = symbol.text
        if i in symbols or kind in (CONTROL, UNKNOWN, USER_DEFINED):
            added.append(_added(symbol, kind in (CONTROL, UNKNOWN) or symbol.text in SPECIAL))
    # What was added behind a vocabulary is not in it: one character would be taken for that piece wherever it stands.
    trained, tokens = len(texts), {token["id"] for token in added}
    while trained - 1 in tokens and not is_gemmas(texts[trained - 1]):
        trained -= 1
    special = tokenizer.special["bos"], texts[tokenizer.special["bos"]]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": NORMALIZER,
        "pre_tokenizer": PRE_TOKENIZER,
        "post_processor": _template(*special),
        "decoder": DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: i for i, text in enumerate(texts[:trained])},
            "merges": _merges(
                tokenizer, ["" if a != b else a for a, b in zip(pieces, texts, strict=True)], kinds, scores
            ),
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _merges(tokenizer: Tokenizer, pieces: Sequence[str], kinds: Sequence[int], scores: Sequence[float]) -> list[str]:
    """All pairs of pieces that make a piece, the piece with the best score first; as "a b", which old readers need.

    Those of runs of spaces come before all others, in the order that cuts a run as the tokenizer does.
    """
    runs = [i for i, piece in enumerate(pieces) if 0 < len(piece) <= LONGEST_RUN and not piece.strip(SPACE)]
    others = sorted(set(np.flatnonzero(np.array(kinds) == NORMAL).tolist()) - set(runs), key=lambda i: (-scores[i], i))
    known = {pieces[i] for i in (*runs, *others)}

    def pairs(ids: Iterable[int]) -> list[tuple[str, str]]:
        each = ((pieces[i][:n], pieces[i][n:]) for i in ids for n in range(1, len(pieces[i])))
        return [pair for pair in each if pair[1] in known and pair[0] in known]

    longest = max(runs, key=lambda i: len(pieces[i]))
    first = tokenizer.encode(" " * (len(pieces[longest]) + 1), bos=False)[0]
    spaces = sorted(pairs(runs), reverse=True) if first == longest else pairs(runs)
    return [f"{left} {right}" for left, right in (*spaces, *pairs(others))]


def _added(symbol: Symbol, special: bool) -> dict[str, Any]:
    flags = {name: getattr(symbol, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
    return {"id": symbol.id, "content": symbol.text, **flags, "special": special}


def _template(id: int, bos: str) -> dict[str, Any]:
    """Puts `<bos>` in front of a text, and of each of two."""

    def part(kind: str, name: str, number: int) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": number}}

    first, second = (
        [part("SpecialToken", bos, number), part("Sequence", name, number)] for number, name in enumerate("AB")
    )
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, *second],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }
