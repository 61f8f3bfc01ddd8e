"""Sound GGUF files that state another model than a Gemma 2, or one that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma2.checkpoints.gguf_weights import EPSILON, INTEGERS
from tests.gguf_files import File, tiny_model
from tests.hostile.child import faults, merged

Make = Callable[[], bytes]
GOOD = tiny_model("Q4_0")
EMBED, NORM, Q, DOWN = "token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.1.ffn_down.weight"
ARCHITECTURE = "general.architecture"
nan, inf = float("nan"), float("inf")


def pair(key: str, kind: str, what: Any) -> Make:
    return lambda: GOOD.with_pair(key, kind, what).write()


def lacking(*keys: str) -> Make:
    return lambda: GOOD.without(*keys).write()


def key(name: str, kind: str, what: Any) -> Make:
    return pair(f"gemma2.{name}", kind, what)


def both(width: int, kind: str = "u32") -> Make:
    """Another width of heads, which two keys state."""
    return lambda: (
        GOOD.with_pair("gemma2.attention.key_length", kind, width)
        .with_pair("gemma2.attention.value_length", kind, width)
        .write()
    )


def foreign(name: str) -> Make:
    """A model of another architecture, all of whose keys bear its name."""
    return lambda: replace(
        GOOD.with_pair(ARCHITECTURE, "str", name),
        pairs=tuple(
            (str(old).replace("gemma2.", f"{name}."), kind, name if old == ARCHITECTURE else what)
            for old, kind, what in GOOD.pairs
        ),
    ).write()


RUNS = "this program runs 'gemma2'"
ARCHITECTURES: dict[str, tuple[Make, str]] = {
    **{
        f"a {name} file": (foreign(name), f"architecture {name!r}, {RUNS}")
        for name in ("llama", "gemma", "gemma3", "gemma3n", "gemma-embedding", "qwen2", "phi3", "clip", "bert")
    },
    "a gemma3 file without tensors": (
        lambda: replace(GOOD.with_pair(ARCHITECTURE, "str", "gemma3"), tensors=()).write(),
        f"architecture 'gemma3', {RUNS}",
    ),
    "no architecture": (lambda: GOOD.without(ARCHITECTURE).write(), "general.architecture is missing, so this is no"),
    "no keys": (
        lambda: replace(GOOD, pairs=()).write(),
        "general.architecture is missing, so this is not a model file",
    ),
    "nothing at all": (lambda: File(pairs=()).write(), "general.architecture is missing, so this is not a model file"),
    "architecture empty": (pair(ARCHITECTURE, "str", ""), f"architecture '', {RUNS}"),
    "architecture in capitals": (pair(ARCHITECTURE, "str", "Gemma2"), f"architecture 'Gemma2', {RUNS}"),
    "architecture with a space": (pair(ARCHITECTURE, "str", "gemma2 "), f"architecture 'gemma2 ', {RUNS}"),
    "architecture that steers a terminal": (
        pair(ARCHITECTURE, "str", "\x1b[2J\n"),
        rf"architecture '\x1b[2J\n', {RUNS}",
    ),
    "architecture of 16 MB": (pair(ARCHITECTURE, "str", "a" * 2**24), f"architecture '{'a' * 79}, {RUNS}"),
    "architecture a number": (pair(ARCHITECTURE, "u32", 2), f"architecture 2 (u32), {RUNS}"),
    "architecture a bool": (pair(ARCHITECTURE, "bool", True), f"architecture True (bool), {RUNS}"),
    **{
        f"architecture {len(what)} of {kind}": (
            pair(ARCHITECTURE, kind, what),
            f"architecture an array of {len(what)} ({kind}), {RUNS}",
        )
        for kind, what in (
            ("str[]", ["gemma2"]),
            ("str[]", ["gemma2", "llama"]),
            ("u8[]", b"gemma2"),
            ("f32[]", []),
            ("i64[]", [1, 2]),
        )
    },
    **{
        f"a file of type {what}": (
            pair("general.type", kind, what),
            f"general.type is {shown}, not a model with weights",
        )
        for kind, what, shown in (
            ("str", "adapter", "'adapter' (str)"),
            ("str", "mmproj", "'mmproj' (str)"),
            ("str", "imatrix", "'imatrix' (str)"),
            ("u32", 1, "1 (u32)"),
            ("u32[]", (1, 2), "an array of 2 (u32[])"),
        )
    },
    "a vocabulary alone": (lambda: replace(GOOD, tensors=()).write(), f"24 missing: {EMBED}, blk.0.attn_norm.weight, "),
    "neither weights nor a vocabulary": (
        lambda: replace(GOOD.without("tokenizer.ggml.tokens"), tensors=()).write(),
        "neither token_embd.weight nor a tokenizer, so no vocabulary",
    ),
}

WIDTH, WHOLE, FRACTION = "gemma2.attention.key_length", "and must be an integer", "and must be a float"
NUMBER = "must be a positive integer below 2^31, not"
FLOATS = (EPSILON, "attn_logit_softcapping", "final_logit_softcapping", "rope.freq_base")
FINITE = "must be a positive finite float32, not"
KEYS: dict[str, tuple[Make, str]] = {
    **{
        f"no {name}": (
            lacking(f"gemma2.{name}"),
            f"missing gemma2.{name}; a shape is never",
        )
        for name in (*INTEGERS.values(), EPSILON)
    },
    "no keys of gemma2": (
        lambda: GOOD.without(*(str(name) for name, _, _ in GOOD.pairs if str(name).startswith("gemma2."))).write(),
        "missing gemma2.context_length, gemma2.embedding_length, gemma2.feed_forward_length, gemma2.block_count, ",
    ),
    **{
        f"{name} {kind}": (key(name, kind, what), f"gemma2.{name} is {shown} ({kind}), {WHOLE}")
        for name in (*INTEGERS.values(), "attention.sliding_window", "vocab_size", "attention.sliding_window_pattern")
        for kind, what, shown in (("str", "2", "'2'"), ("f32", 2.0, "2.0"))
    },
    **{
        f"block_count {kind}": (key("block_count", kind, what), f"gemma2.block_count is {shown} ({kind}), {WHOLE}")
        for kind, what, shown in (
            ("bool", True, "True"),
            ("u32[]", (2,), "an array of 1"),
            ("u32[]", (2, 2), "an array of 2"),
            ("f64", nan, "nan"),
            ("str[]", ("2",), "an array of 1"),
        )
    },
    **{
        f"head_count {kind}": (key("attention.head_count", kind, what), "gemma2.attention.head_count is an array of 2")
        for kind, what in (("u32[]", (4, 4)), ("i32[]", (4, 4)))
    },
    **{
        f"{name} {kind}": (key(name, kind, what), f"gemma2.{name} is {shown} ({kind}), {FRACTION}")
        for name in FLOATS
        for kind, what, shown in (("u32", 50, "50"), ("str", "50", "'50'"))
    },
    "attention.scale a string": (
        key("attention.scale", "str", "1"),
        f"gemma2.attention.scale is '1' (str), {FRACTION}",
    ),
    "softcapping an array": (key("attn_logit_softcapping", "f32[]", (50.0,)), "is an array of 1 (f32[]), and must be"),
    **{
        f"block_count {n}": (key("block_count", kind, n), f"gemma2.block_count is {n}; 1 to 1,024 are taken")
        for kind, n in (
            ("u32", 0),
            ("i32", -1),
            ("u32", 1025),
            ("u32", 2**32 - 1),
            ("u64", 2**64 - 1),
            ("i64", -(2**63)),
        )
    },
    **{
        f"head_count {n}": (key("attention.head_count", kind, n), f"gemma2.attention.head_count is {n}; 1 to")
        for kind, n in (("u32", 0), ("i32", -4), ("u32", 2**31), ("u64", 2**64 - 1))
    },
    "46 layers of 0 heads": (
        lambda: (
            GOOD.with_pair("gemma2.block_count", "u32", 46).with_pair("gemma2.attention.head_count", "u32", 0).write()
        ),
        "gemma2.attention.head_count is 0; 1 to",
    ),
    "46 layers of more heads than width": (
        lambda: (
            GOOD.with_pair("gemma2.block_count", "u32", 46).with_pair("gemma2.attention.head_count", "u32", 64).write()
        ),
        f"query_pre_attn_scalar {FINITE} 0",
    ),
    **{
        f"{name} {n}": (key(name, kind, n), f"gemma2.{name} {NUMBER} {n}")
        for name in (
            "context_length",
            "embedding_length",
            "feed_forward_length",
            "attention.head_count_kv",
            "attention.sliding_window",
        )
        for kind, n in (("u32", 0), ("i32", -1), ("u32", 2**31), ("u64", 2**64 - 1))
    },
    **{
        f"heads {n} wide": (both(n, kind), f"{WIDTH} {NUMBER} {n}")
        for kind, n in (("u32", 0), ("i32", -8), ("u32", 2**31))
    },
    "heads of an odd width": (both(7), f"{WIDTH} must be even for rotary pairs, not 7"),
    "heads of two widths": (
        key("attention.value_length", "u32", 16),
        "gemma2.attention.value_length is 16, but Gemma",
    ),
    "rotary part of a head": (key("rope.dimension_count", "u32", 4), "gemma2.rope.dimension_count is 4, but Gemma 2's"),
    "key/value heads that do not divide": (
        key("attention.head_count_kv", "u32", 3),
        "gemma2.attention.head_count_kv 3 does not divide gemma2.attention.head_count 4",
    ),
    "more key/value heads than heads": (
        key("attention.head_count_kv", "u32", 8),
        "gemma2.attention.head_count_kv 8 does not",
    ),
    **{
        f"{name} {n}": (key(name, "f32", n), f"gemma2.{name} {FINITE} {float(n)}")
        for name in FLOATS
        for n in (0.0, -1.0, nan, inf, -inf)
    },
    "softcapping beyond float32": (
        key("final_logit_softcapping", "f64", 1e300),
        f"gemma2.final_logit_softcapping {FINITE}",
    ),
    "epsilon below float32": (key(EPSILON, "f64", 1e-300), f"gemma2.{EPSILON} {FINITE} 1e-300"),
    "epsilon of a fifth": (key(EPSILON, "f32", 0.2), f"gemma2.{EPSILON} must be at most 0.1, not 0.2"),
    **{
        f"rotary scaling {shown}": (
            key("rope.scaling.type", kind, what),
            f"gemma2.rope.scaling.type is {shown}; Gemma 2's",
        )
        for kind, what, shown in (
            ("str", "linear", "'linear' (str)"),
            ("str", "yarn", "'yarn' (str)"),
            ("u32", 1, "1 (u32)"),
            ("f32[]", (1.0, 2.0), "an array of 2 (f32[])"),
        )
    },
    "rotary factor": (
        key("rope.scaling.factor", "f32", 8.0),
        "gemma2.rope.scaling.factor is 8.0 (f32); Gemma 2 has none",
    ),
    "rotary factor of old": (
        key("rope.scale_linear", "f32", 2.0),
        "gemma2.rope.scale_linear is 2.0 (f32); Gemma 2 has none",
    ),
    "rotary factor NaN": (
        key("rope.scaling.factor", "f32", nan),
        "gemma2.rope.scaling.factor is nan (f32); Gemma 2 has",
    ),
    "rotary factor a string": (
        key("rope.scaling.factor", "str", "8"),
        f"gemma2.rope.scaling.factor is '8' (str), {FRACTION}",
    ),
    "vocab_size of another": (
        key("vocab_size", "u32", 256_000),
        "gemma2.vocab_size is 256000, the embedding has 4096 rows",
    ),
    "pattern of three layers": (
        key("attention.sliding_window_pattern", "bool[]", (True, False, True)),
        "gemma2.attention.sliding_window_pattern has 3 entries for 2 layers",
    ),
    "pattern negative": (
        key("attention.sliding_window_pattern", "i32", -2),
        "sliding_window_pattern is -2, and cannot be",
    ),
    "pattern of numbers": (
        key("attention.sliding_window_pattern", "u32[]", (1, 0)),
        f"is an array of 2 (u32[]), {WHOLE}",
    ),
}


@pytest.mark.long
def test_what_states_no_gemma_2_is_named_at_once_and_in_little_memory(tmp_path: Path) -> None:
    assert faults(merged(ARCHITECTURES, KEYS), tmp_path) == {}
