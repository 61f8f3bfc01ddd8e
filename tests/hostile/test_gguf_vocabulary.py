"""GGUF files with a good model and a tokenizer that is not Gemma's, or none at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.gguf_files import pocket_vocabulary, tiny_model
from tests.hostile.child import faults

Make = Callable[[], bytes]
GOOD = tiny_model("Q4_0")
PIECES, SCORES, TYPES = pocket_vocabulary()
SIZE = len(PIECES)
LAST = SIZE - 1
TOKENS, SCORE, TYPE = "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
nan, inf = float("nan"), float("inf")


def pair(name: str, kind: str, what: Any) -> Make:
    return lambda: GOOD.with_pair(f"tokenizer.ggml.{name}", kind, what).write()


def at(place: int, piece: str) -> Make:
    """One piece replaced."""
    return pair("tokens", "str[]", [*PIECES[:place], piece, *PIECES[place + 1 :]])


def scored(place: int, score: float) -> Make:
    return pair("scores", "f32[]", [*SCORES[:place], score, *SCORES[place + 1 :]])


def typed(place: int, kind: int) -> Make:
    return pair("token_type", "i32[]", [*TYPES[:place], kind, *TYPES[place + 1 :]])


def sized(tokens: int, scores: int, types: int) -> Make:
    """Other lengths of the three arrays; what is longer repeats its last entry."""

    def fitted(array: list[Any], size: int) -> list[Any]:
        return array[:size] + array[-1:] * (size - len(array))

    return lambda: (
        GOOD.with_pair(TOKENS, "str[]", fitted(PIECES, tokens))
        .with_pair(SCORE, "f32[]", fitted(SCORES, scores))
        .with_pair(TYPE, "i32[]", fitted(TYPES, types))
        .write()
    )


def without(name: str) -> Make:
    return lambda: GOOD.without(f"tokenizer.ggml.{name}").write()


def swapped(one: str, other: str) -> Make:
    """Two pieces exchanged, each with its type."""
    order = list(range(SIZE))
    a, b = PIECES.index(one), PIECES.index(other)
    order[a], order[b] = b, a
    return lambda: (
        GOOD.with_pair(TOKENS, "str[]", [PIECES[i] for i in order])
        .with_pair(TYPE, "i32[]", [TYPES[i] for i in order])
        .write()
    )


FIRST_BYTE = PIECES.index("<0x00>")
UNEQUAL = f"tokenizer.ggml.tokens has {SIZE} entries, scores {SIZE} and token_type {SIZE}"
VOCABULARIES: dict[str, tuple[Make, str]] = {
    "no tokenizer": (
        lambda: GOOD.without(*(str(name) for name, _, _ in GOOD.pairs if str(name).startswith("tokenizer."))).write(),
        "no tokenizer in it (tokenizer.ggml.model is missing)",
    ),
    "no model": (without("model"), "no tokenizer in it (tokenizer.ggml.model is missing)"),
    **{
        f"no {name}": (without(name), f"tokenizer.ggml.{name} is missing, so its tokenizer cannot be rebuilt")
        for name in ("tokens", "scores", "token_type")
    },
    **{
        f"model {what}": (pair("model", kind, what), f"tokenizer.ggml.model is {shown}, and Gemma 2's is 'llama'")
        for kind, what, shown in (
            ("str", "gpt2", "'gpt2' (str)"),
            ("str", "bert", "'bert' (str)"),
            ("str", "gemma4", "'gemma4' (str)"),
            ("str", "", "'' (str)"),
            ("u32", 1, "1 (u32)"),
            ("str[]", ("llama",), "an array of 1 (str[])"),
            ("f32[]", (1.5e-7, 0.0), "an array of 2 (f32[])"),
        )
    },
    **{
        f"{name} {kind}": (pair(name, kind, what), f"tokenizer.ggml.{name} is of type {kind}, and must be {right}")
        for name, right, others in (
            ("tokens", "str[]", {"str": "<pad>", "u32[]": range(SIZE), "u8[]": bytes(SIZE)}),
            (
                "scores",
                "f32[]",
                {
                    "f64[]": SCORES,
                    "i32[]": TYPES,
                    "str[]": PIECES,
                    "u8[]": bytes(SIZE),
                    "f32": 0.0,
                    "bool[]": bytes(SIZE),
                },
            ),
            ("token_type", "i32[]", {"u32[]": TYPES, "u8[]": TYPES, "f32[]": TYPES, "i64[]": TYPES, "str[]": PIECES}),
        )
        for kind, what in others.items()
    },
    "a token short": (sized(LAST, SIZE, SIZE), UNEQUAL.replace(f"tokens has {SIZE}", f"tokens has {LAST}")),
    "a score short": (sized(SIZE, LAST, SIZE), UNEQUAL.replace(f"scores {SIZE}", f"scores {LAST}")),
    "a type short": (sized(SIZE, SIZE, LAST), UNEQUAL.replace(f"token_type {SIZE}", f"token_type {LAST}")),
    "a score too many": (sized(SIZE, SIZE + 1, SIZE), UNEQUAL.replace(f"scores {SIZE}", f"scores {SIZE + 1}")),
    "a type too many": (sized(SIZE, SIZE, SIZE + 1), UNEQUAL.replace(f"token_type {SIZE}", f"token_type {SIZE + 1}")),
    "scores empty": (sized(SIZE, 0, SIZE), UNEQUAL.replace(f"scores {SIZE}", "scores 0")),
    "all a token short": (sized(LAST, LAST, LAST), f"{LAST} pieces, but the embedding has {SIZE} rows"),
    "all empty": (sized(0, 0, 0), "tokenizer"),
    **{
        f"score {score} of piece {place}": (
            scored(place, score),
            f"tokenizer.ggml.scores has {score} for token {place}, which is not a finite number",
        )
        for place in (LAST, 3000, 0, 2, 3, FIRST_BYTE)
        for score in (nan, inf, -inf)
    },
    **{
        f"type {kind} of token {place}": (
            typed(place, kind),
            f"tokenizer.ggml.token_type {kind} of token {place}; there are types 1 to 6",
        )
        for place in (0, LAST)
        for kind in (0, 7, -1, 2**31 - 1, -(2**31))
    },
    "a piece twice": (at(LAST, PIECES[LAST - 1]), "not a SentencePiece model"),
    "<bos> twice": (at(LAST, "<bos>"), "not a SentencePiece model"),
    "a piece empty": (at(LAST, ""), "not a SentencePiece model"),
    "a piece with a NUL": (at(LAST, "a\0b"), "not a SentencePiece model"),
    "a piece of 60,000 characters": (at(LAST, "x" * 60_000), "not a SentencePiece model"),
    **{
        f"no {piece}": (at(PIECES.index(piece), "<odd>"), words)
        for piece, words in {
            "<bos>": "bos_token_id is 2, which is '<odd>' and not <bos>",
            "<unk>": "unknown_token_id is 3, which is '<odd>' and not <unk>",
        }.items()
    },
    "no <0x41>": (at(PIECES.index("<0x41>"), "<odd>"), "byte piece <odd> is invalid"),
    "a byte in small letters": (at(PIECES.index("<0x0A>"), "<0x0a>"), "byte piece <0x0a> is invalid"),
    "no bytes": (
        pair("tokens", "str[]", [f"odd{i}" if piece.startswith("<0x") else piece for i, piece in enumerate(PIECES)]),
        "byte piece odd217 is invalid",
    ),
    **{
        f"{name} id {what} ({kind})": (pair(f"{name}_token_id", kind, what), f"tokenizer.ggml.{name}_token_id is ")
        for name in ("bos", "eos", "unknown")
        for kind, what in (
            ("u32", 3000),
            ("u32", SIZE),
            ("u32", 2**32 - 1),
            ("i32", -1),
            ("u64", 2**64 - 1),
            ("f32", 2.0),
            ("str", "<bos>"),
            ("bool", True),
            ("u32[]", (2,)),
            ("u32[]", (2, 2)),
        )
    },
    "bos the id of eos": (pair("bos_token_id", "u32", 1), "bos_token_id is 1, which is '<eos>' and not <bos>"),
    "eos the id of bos": (pair("eos_token_id", "u32", 2), "eos_token_id is 2, which is '<bos>' and not <eos>"),
    "unknown the id of pad": (
        pair("unknown_token_id", "u32", 0),
        "unknown_token_id is 0, which is '<pad>' and not <unk>",
    ),
    "the end of a turn a letter": (pair("eot_token_id", "u32", LAST), f"eot_token_id is {LAST}, which is "),
    "<bos> and <eos> exchanged": (swapped("<bos>", "<eos>"), "bos_token_id is 2, which is '<eos>' and not <bos>"),
    **{
        f"{name} {kind}": (pair(name, kind, what), f"tokenizer.ggml.{name} is of type {kind}, and must be bool")
        for name in ("add_space_prefix", "add_bos_token", "add_eos_token")
        for kind, what in (("u32", 0), ("str", "false"), ("bool[]", b"\0"), ("u8[]", b"\0\0"))
    },
}


def test_a_vocabulary_that_is_not_gemmas_is_refused_at_once_and_in_little_memory(tmp_path: Path) -> None:
    assert faults(VOCABULARIES, tmp_path) == {}
