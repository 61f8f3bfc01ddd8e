"""How ggml multiplies activations with a weight of each type: what it rounds them to, and in which order it adds."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2.checkpoints.ggml import Scales
from gemma2.numerics.profiles.ggml_math import f32, fma, lane_product, over
from gemma2.numerics.profiles.ggml_superblocks import TILE, summed_apart, summed_by_block, summed_in_lanes

# ggml-cpu.c, type_traits_cpu: what the activations become. Q8_K for all other types.
PARTNERS = {"F32": "F32", "F16": "F16", "BF16": "BF16", "Q4_1": "Q8_1", "Q5_1": "Q8_1"} | dict.fromkeys(
    ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4", "Q1_0"), "Q8_0"
)

# Eight rows of such a weight are interleaved while loading, if their number allows; and how many products at a time
# are added as integers.
REPACKED = {"Q4_0": 32, "IQ4_NL": 32, "MXFP4": 32, "Q4_K": 64, "Q2_K": 128}
OFFSETS = {"Q6_K": 32, "TQ1_0": 1, "TQ2_0": 1}  # of q as it is stored
UNTILED = ("TQ1_0", "TQ2_0")


def partner(kind: str) -> str:
    return PARTNERS.get(kind, "Q8_K")


def rounded(x: Tensor, to: str) -> Tensor:
    """x [... n] as a partner type holds it: exactly, so in float64 for Q8_K; for Q8_1 with the sums of its blocks of 32
    behind, [... n + n / 32]."""
    if to == "F32":
        return x
    if to in ("F16", "BF16"):
        return x.to(torch.float16 if to == "F16" else torch.bfloat16).float()
    return _rounded_to_q8_k(x) if to == "Q8_K" else _rounded_to_q8_0(x, sums=to == "Q8_1")


def _rounded_to_q8_0(x: Tensor, sums: bool) -> Tensor:
    """Blocks of 32, the largest becomes 127, and scales and sums are stored in float16. (x86/quants.c,
    quantize_row_q8_0, quantize_row_q8_1)"""
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest == 0, 0.0, over(f32(127.0), largest))
    q, scale = (blocks * inverse).round(), over(largest, f32(127.0))
    values = (q * scale.half().float()).flatten(-2)
    return torch.cat((values, (scale[..., 0] * q.sum(-1)).half().float()), dim=-1) if sums else values


def _rounded_to_q8_k(x: Tensor) -> Tensor:
    """Blocks of 256, the largest becomes -127, and the scale stays float32. (ggml-quants.c, quantize_row_q8_K_ref)"""
    blocks = x.unflatten(-1, (-1, 256))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(largest == 0, 0.0, over(f32(-127.0), largest))
    scale = torch.where(largest == 0, 0.0, over(f32(1.0), inverse))
    return ((blocks * inverse).round().clamp(max=127).double() * scale.double()).flatten(-2)


def summed(x: Tensor, weight: Tensor, kind: str, scales: Scales | None = None) -> Tensor:
    """x [b t n], as `rounded` leaves it, times weight [m n] -> [b t m] in ggml's order of float32 sums.

    Without the `scales` that the weight's integers have in the file, types with minima or super-blocks are met but for
    roundings in between.
    """
    rows, beside = x.flatten(0, -2).tensor_split((weight.shape[-1],), dim=-1)
    to = partner(kind)
    repacked = kind in REPACKED and len(weight) % 8 == 0
    # One row goes to ggml_vec_dot_*, more to llamafile's sgemm.cpp.
    if to in ("F32", "F16"):
        y = lane_product(rows, weight, lanes=64 if len(rows) == 1 else 16)
    elif to == "BF16" and (len(rows) == 1 or rows.shape[-1] % 32):
        y = _dots_of_bf16(rows, weight)
    elif to == "BF16":
        y = lane_product(_turned_pairs(rows), _turned_pairs(weight), lanes=16)
    elif to == "Q8_K" and repacked and scales is not None:  # fours of rows, and what is left of them
        fours = len(rows) - len(rows) % 4
        parts = (rows[:fours], REPACKED[kind]), (rows[fours:], 256)
        y = torch.cat([summed_apart(some, weight, scales, group) for some, group in parts])
    elif to == "Q8_K" and scales is not None and (len(rows) < TILE or kind in UNTILED):
        y = summed_in_lanes(rows, weight, scales, offset=OFFSETS.get(kind, 0))
    elif to == "Q8_K":
        y = summed_by_block(rows, weight, scales)
    elif to == "Q8_1" and scales is not None:
        y = _summed_beside_minima(rows, beside, weight, scales)
    elif repacked:  # arch/x86/repack.cpp, gemm_q4_b32_8x8_q8_0_lut_avx: a lane a column, a block a step
        y = lane_product(rows, weight, lanes=1, group=REPACKED[kind])
    else:
        y = lane_product(rows, weight, lanes=8, group=4)
    return y.unflatten(0, x.shape[:-1])


def _summed_beside_minima(rows: Tensor, sums: Tensor, weight: Tensor, scales: Scales) -> Tensor:
    """Minima times the activations' own sums, a block after the other, and then onto the rest. (arch/x86/quants.c,
    ggml_vec_dot_q4_1_q8_1, ggml_vec_dot_q5_1_q8_1)"""
    assert scales.minimum is not None
    minimum = scales.minimum.to(weight.device)
    least = torch.zeros((), dtype=torch.float32, device=rows.device)
    for m, s in zip(minimum.T, sums.T if sums.numel() else rows.unflatten(-1, (-1, 32)).sum(-1).T, strict=True):
        least = fma(s[:, None], -m, least)
    return lane_product(rows, weight + minimum.repeat_interleave(32, dim=-1), lanes=8, group=4) + least


def _turned_pairs(x: Tensor) -> Tensor:
    """[.. n] with neighbours 16 apart, the second of a pair first, in which order vdpbf16ps adds their products."""
    return x.unflatten(-1, (-1, 16, 2)).flip(-1).transpose(-1, -2).flatten(-3)


def _dots_of_bf16(rows: Tensor, weight: Tensor) -> Tensor:
    """Every other 32 in sums of their own, what is left of 64 in float64. (vec.cpp, ggml_vec_dot_bf16)"""
    whole = rows.shape[-1] - rows.shape[-1] % 64
    y = rows[:, whole:].double() @ weight[:, whole:].double().T
    for half in range(2) if whole else ():
        x, w = (part[:, :whole].unflatten(-1, (-1, 2, 32))[:, :, half].flatten(-2) for part in (rows, weight))
        y = y + lane_product(_turned_pairs(x), _turned_pairs(w), lanes=16)
    return y.float()
