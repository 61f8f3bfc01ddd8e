"""GGUF files that state a Gemma 2, and whose tensors are not one: names, shapes, numbers that are none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gemma2
from gemma2.checkpoints.gguf import read_header
from gemma2.checkpoints.gguf_weights import GGUFWeights
from tests.gguf_files import SCALES, WEIGHTS, Entry, spoilt, tiny_model, weight
from tests.hostile.child import faults, merged
from tests.hostile.test_gguf_keys import DOWN, EMBED, GOOD, NORM, Make, Q, both, inf, key, nan, pair


def without(*names: str) -> Make:
    return lambda: GOOD.without_tensors(*names).write()


def plus(*entries: Entry) -> Make:
    return lambda: GOOD.plus(*entries).write()


def stray(name: str) -> Entry:
    return weight(name, (32,), "F32")


def shaped(name: str, *shape: int, kind: str = "F32") -> Make:
    return lambda: GOOD.with_tensor(name, **vars(weight(name, shape, kind))).write()


def renamed(old: str, new: str) -> Make:
    return lambda: replace(
        GOOD, tensors=tuple(replace(t, name=str(t.name).replace(old, new)) for t in GOOD.tensors)
    ).write()


NONE = "tensors that no Gemma 2 has: "
HEAD = "output.weight"
TENSORS: dict[str, tuple[Make, str]] = {
    **{f"no {name}": (without(name), f"1 missing: {name}") for name in (NORM, Q, DOWN, "blk.1.post_ffw_norm.weight")},
    "no embedding": (without(EMBED), f"1 missing: {EMBED}"),
    "no post norms, as in Gemma 1": (
        without(*(str(t.name) for t in GOOD.tensors if "post" in str(t.name))),
        "4 missing: blk.0.post_attention_norm.weight, blk.0.post_ffw_norm.weight, blk.1.post_attention_norm.weight, ",
    ),
    "a layer missing": (key("block_count", "u32", 3), "11 missing: blk.2.attn_norm.weight, blk.2.attn_q.weight, "),
    "1,022 layers missing": (key("block_count", "u32", 1024), "11242 missing: blk.2.attn_norm.weight, "),
    "a layer too many": (key("block_count", "u32", 1), "11 unknown: blk.1.attn_norm.weight, blk.1.attn_q.weight, "),
    "a layer out of order": (renamed("blk.1.", "blk.2."), "11 missing: blk.1.attn_norm.weight, "),
    "only the embedding": (
        lambda: replace(GOOD, tensors=GOOD.tensors[:1]).write(),
        "23 missing: blk.0.attn_norm.weight",
    ),
    "a stray tensor": (plus(stray("stray.weight")), f"1 {NONE}'stray.weight'"),
    "seven strays": (plus(*(stray(f"x{i}") for i in range(7))), f"7 {NONE}'x0', 'x1', 'x2', 'x3', 'x4'"),
    "norms of queries and keys, as in Gemma 3": (
        plus(stray("blk.0.attn_q_norm.weight"), stray("blk.0.attn_k_norm.weight")),
        f"2 {NONE}'blk.0.attn_q_norm.weight', 'blk.0.attn_k_norm.weight'",
    ),
    **{
        f"named {name!r}": (plus(stray(name)), f"1 {NONE}{name!r}")
        for name in (
            "blk.0.attn_q.bias",
            "blk.00.attn_q.weight",
            "blk.-1.attn_q.weight",
            "blk.+1.attn_q.weight",
            "blk. 1.attn_q.weight",
            "blk.1_0.attn_q.weight",
            "blk.\u0661.attn_q.weight",
            "blk.1.attn_q.weight.lora_a",
            "blk.1.attn_q.weight ",
            "blk.1..attn_q.weight",
            "blk.1.weight",
            "blk.1",
            "blk",
            ".",
            "BLK.1.attn_q.weight",
            "blk.1.attn_qkv.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "token_embd",
            "rope_freqs.bias",
            "../../token_embd.weight",
            "\x1b[2J\n",
        )
    },
    "of a layer beyond": (plus(stray("blk.2.attn_norm.weight")), "1 unknown: blk.2.attn_norm.weight"),
    "of layer 10^50": (plus(stray(f"blk.1{'0' * 40}.ffn_up.weight")), f"1 unknown: blk.1{'0' * 40}.ffn_up.weight"),
    "names of Hugging Face": (renamed("blk.", "model.layers."), f"22 {NONE}'model.layers.0.attn_norm.weight'"),
    "head of other values": (
        plus(weight(HEAD, (4096, 32), "Q4_0")),
        "output.weight differs from the embedding; Gemma 2's head is tied",
    ),
    "head NaN": (
        plus(Entry(HEAD, (4096, 32), "Q4_0", spoilt("Q4_0", GOOD.tensor(EMBED).data, nan))),
        "output.weight differs from the embedding",
    ),
    "head of other shape": (plus(weight(HEAD, (4095, 32), "Q4_0")), "output.weight [4095, 32] instead of [4096, 32]"),
    "transposed": (shaped(DOWN, 64, 32), f"1 misshapen: {DOWN} [64, 32] instead of [32, 64]"),
    "as large as the queries": (
        shaped("blk.0.attn_k.weight", 32, 32),
        "blk.0.attn_k.weight [32, 32] instead of [16, 32]",
    ),
    "broadcastable row": (shaped(Q, 1, 32), f"1 misshapen: {Q} [1, 32] instead of [32, 32]"),
    "broadcastable vector": (shaped(Q, 32), f"1 misshapen: {Q} [32] instead of [32, 32]"),
    "broadcastable scalar": (shaped(NORM, 1), f"1 misshapen: {NORM} [1] instead of [32]"),
    "flattened": (shaped(Q, 1024), f"1 misshapen: {Q} [1024] instead of [32, 32]"),
    "an axis too many": (shaped(NORM, 1, 32), f"1 misshapen: {NORM} [1, 32] instead of [32]"),
    "axes that split": (shaped(Q, 4, 8, 32), f"1 misshapen: {Q} [4, 8, 32] instead of [32, 32]"),
    "norm a column": (shaped(NORM, 32, 1), f"1 misshapen: {NORM} [32, 1] instead of [32]"),
    "embedding transposed": (shaped(EMBED, 32, 4096), f"1 misshapen: {EMBED} [32, 4096] instead of [32, 32]"),
    "embedding flattened": (shaped(EMBED, 131_072), f"1 misshapen: {EMBED} [131072] instead of [131072, 32]"),
    "embedding a row short": (shaped(EMBED, 4095, 32), "4096 pieces, but the embedding has 4095 rows"),
    "embedding padded": (shaped(EMBED, 4160, 32), "4096 pieces, but the embedding has 4160 rows"),
    "another width": (key("embedding_length", "u32", 64), f"24 misshapen: {EMBED} [4096, 32] instead of [4096, 64], "),
    "another feed-forward width": (
        key("feed_forward_length", "u32", 65),
        "6 misshapen: blk.0.ffn_gate.weight [64, 32]",
    ),
    "other heads": (
        key("attention.head_count", "u32", 2),
        "4 misshapen: blk.0.attn_q.weight [32, 32] instead of [16, 32]",
    ),
    "other key/value heads": (
        key("attention.head_count_kv", "u32", 4),
        "4 misshapen: blk.0.attn_k.weight [16, 32] instead",
    ),
    "another width of heads": (both(16), "8 misshapen: blk.0.attn_q.weight [32, 32] instead of [64, 32]"),
    "names before words": (
        lambda: GOOD.without_tensors(NORM).without("tokenizer.ggml.tokens").write(),
        f"1 missing: {NORM}",
    ),
    "two kinds of trouble": (
        lambda: GOOD.without_tensors(NORM).with_tensor(Q, **vars(weight(Q, (16, 32), "Q4_0"))).write(),
        f"1 missing: {NORM}; 1 misshapen: {Q} [16, 32] instead of [32, 32]",
    ),
}

NONFINITE = "1 tensors hold NaN or infinity in"
SPOILABLE = [kind for kind in WEIGHTS if kind != "NVFP4"]  # whose every block is finite


def nonfinite(kind: str, number: float, which: int = 0, name: str = DOWN) -> Make:
    """A model of blocks of `kind`, one of which has a scale that is no finite number."""

    def make() -> bytes:
        model = tiny_model(kind)
        return model.with_tensor(name, data=spoilt(kind, model.tensor(name).data, number, which)).write()

    return make


def norm(name: str, number: float, places: Any) -> Make:
    """Some weights of a norm replaced."""

    def make() -> bytes:
        numbers = np.frombuffer(GOOD.tensor(name).data, "<f4").copy()
        numbers[places] = number
        return GOOD.with_tensor(name, data=numbers.tobytes()).write()

    return make


CENTRED = f"gemma2.norm_weight.{NORM}"
VALUES: dict[str, tuple[Make, str]] = {
    **{
        f"{kind} scale {which} {number}": (
            nonfinite(kind, number, which),
            f"{NONFINITE} {'float32' if kind == 'F32' else 'bfloat16'}: {DOWN} (",
        )
        for kind in SPOILABLE
        for which in range(len(SCALES.get(kind, (0,))))
        for number in ((inf,) if kind == "MXFP4" else (nan, -inf))  # its scales are powers of two
    },
    "NaN in the embedding": (nonfinite("Q4_0", nan, name=EMBED), f"{NONFINITE} bfloat16: {EMBED} (32)"),
    **{
        f"{number} in a norm": (norm(NORM, number, 7), f"{NONFINITE} bfloat16: {NORM} (1)")
        for number in (nan, inf, -inf)
    },
    "NaN in a norm of a layer": (norm("blk.1.ffn_norm.weight", nan, slice(None)), "blk.1.ffn_norm.weight (32)"),
    "NaN in eight tensors": (
        lambda: replace(
            GOOD,
            tensors=tuple(replace(t, data=b"\xff" * len(t.data)) if "ffn" in str(t.name) else t for t in GOOD.tensors),
        ).write(),
        "8 tensors hold NaN or infinity in bfloat16: blk.0.ffn_norm.weight (32), blk.0.ffn_gate.weight (2,048), ",
    ),
    "zero-centred norm a string": (pair(CENTRED, "str", "0"), f"{CENTRED} must be an f32[] of 32"),
    "zero-centred norm too short": (pair(CENTRED, "f32[]", (0.0,) * 31), f"{CENTRED} must be an f32[] of 32"),
    "zero-centred norm of f64": (pair(CENTRED, "f64[]", (0.0,) * 32), f"{CENTRED} must be an f32[] of 32"),
    "zero-centred norm of another": (pair(CENTRED, "f32[]", (0.5,) * 32), f"{CENTRED} plus 1 is not tensor {NORM}"),
    "zero-centred norm NaN": (pair(CENTRED, "f32[]", (nan,) * 32), f"{CENTRED} plus 1 is not tensor {NORM}"),
}


@pytest.mark.long
def test_tensors_that_are_no_gemma_2_are_named_at_once_and_in_little_memory(tmp_path: Path) -> None:
    assert faults(merged(TENSORS, VALUES), tmp_path) == {}


def test_a_file_that_is_cut_short_after_its_header_was_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GOOD.write())
    weights = GGUFWeights(read_header(path))
    name, place = "model.layers.1.mlp.down_proj.weight", torch.empty(32, 64)
    weights.read(name, 0, place)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(gemma2.BadModelFile, match=r"model\.gguf: ended while it was read"):
        weights.read(name, 0, place)
