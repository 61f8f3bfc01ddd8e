"""A `tokenizer.json` for a tokenizer, which `tokenizers` and transformers read without SentencePiece."""

from __future__ import annotations

import json
from typing import Any

from gemma2.checkpoints.sentencepiece_proto import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, read_proto
from gemma2.checkpoints.tokenizer_json import DECODER, NORMALIZER, PRE_TOKENIZER
from gemma2.tokenizer import SPACE, TURNS, Tokenizer

SPECIAL = {"<mask>", *(f"<{name}>" for name in TURNS)}  # symbols that transformers calls special


def tokenizer_json(tokenizer: Tokenizer) -> bytes | None:
    """The bytes of a `tokenizer.json` that gives every text the ids that `tokenizer` gives it.

    None for a tokenizer that puts a space before every text: `tokenizers` would put one behind every added token too.
    """
    if tokenizer.space_prefix:
        return None
    found = read_proto(tokenizer.to_proto(), tokenizer.where)
    pieces, kinds, scores, typed = found.pieces, found.kinds.tolist(), found.scores.tolist(), tokenizer.typed
    texts = list(pieces)
    for text, i in (typed or {}).items():
        texts[i] = text
    added = []
    for i, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            # SentencePiece finds its symbols after spaces have become `▁`; what is found before is in `typed`.
            normalized = kind == USER_DEFINED and SPACE in text and (typed is None or text not in typed)
            added.append(_added(i, text, normalized, kind != USER_DEFINED or text in SPECIAL))
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
            "vocab": {text: i for i, text in enumerate(texts)},
            "merges": _merges(pieces, kinds, scores),
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _merges(pieces: Any, kinds: list[int], scores: list[float]) -> list[str]:
    """All pairs of pieces that make a piece, the piece with the best score first; as "a b", which old readers need."""
    merged = [i for i, kind in enumerate(kinds) if kind == NORMAL or not pieces[i].strip(SPACE)]
    known = {pieces[i] for i in merged}
    merged.sort(key=lambda i: (kinds[i] == NORMAL, -scores[i], i))
    pairs = []
    for i in merged:
        piece = pieces[i]
        pairs += [f"{piece[:n]} {piece[n:]}" for n in range(1, len(piece)) if piece[n:] in known and piece[:n] in known]
    return pairs


def _added(id: int, text: str, normalized: bool, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"id": id, "content": text, **flags, "normalized": normalized, "special": special}


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
