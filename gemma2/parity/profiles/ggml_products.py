"""How ggml multiplies activations with a weight of each type: what it rounds them to, and in which order it adds."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2.parity.profiles.ggml_math import f32, lane_product, over

# ggml-cpu.c, type_traits_cpu: what the activations become. Q8_K for all other types.
PARTNERS = {"F32": "F32", "F16": "F16", "BF16": "BF16", "Q4_1": "Q8_1", "Q5_1": "Q8_1"} | dict.fromkeys(
    ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4", "Q1_0"), "Q8_0"
)

REPACKED = ("Q4_0", "IQ4_NL")  # eight rows of the weight are interleaved while loading, if their number allows


def partner(kind: str) -> str:
    return PARTNERS.get(kind, "Q8_K")


def rounded(x: Tensor, to: str) -> Tensor:
    """x [... n] as a partner type holds it: exactly, so in float64 for Q8_K."""
    if to == "F32":
        return x
    if to in ("F16", "BF16"):
        return x.to(torch.float16 if to == "F16" else torch.bfloat16).float()
    return _rounded_to_q8_k(x) if to == "Q8_K" else _rounded_to_q8_0(x)


def _rounded_to_q8_0(x: Tensor) -> Tensor:
    """Blocks of 32, the largest becomes 127, and the scale is stored in float16. (x86/quants.c, quantize_row_q8_0;
    Q8_1 holds the same values, and their sum beside them)"""
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest == 0, 0.0, over(f32(127.0), largest))
    scale = over(largest, f32(127.0)).half().float()
    return ((blocks * inverse).round() * scale).flatten(-2)


def _rounded_to_q8_k(x: Tensor) -> Tensor:
    """Blocks of 256, the largest becomes -127, and the scale stays float32. (ggml-quants.c, quantize_row_q8_K_ref)"""
    blocks = x.unflatten(-1, (-1, 256))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(largest == 0, 0.0, over(f32(-127.0), largest))
    scale = torch.where(largest == 0, 0.0, over(f32(1.0), inverse))
    return ((blocks * inverse).round().clamp(max=127).double() * scale.double()).flatten(-2)


def summed(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    """x [b t n], as `rounded` leaves it, times weight [m n] -> [b t m] in ggml's order of float32 sums."""
    rows = x.flatten(0, -2)
    to = partner(kind)
    if to in ("F32", "F16"):  # one row goes to ggml_vec_dot_f32, more to llamafile's sgemm.cpp
        y = lane_product(rows, weight, lanes=64 if len(rows) == 1 else 16)
    elif to == "BF16":  # of a pair, vdpbf16ps adds the second product first
        rows, weight = (
            part.unflatten(-1, (-1, 16, 2)).flip(-1).transpose(-1, -2).flatten(-3) for part in (rows, weight)
        )
        y = lane_product(rows, weight, lanes=16)
    elif to == "Q8_K":
        y = _summed_by_256(rows, weight)
    elif kind in REPACKED:  # arch/x86/repack.cpp, gemm_q4_b32_8x8_q8_0_lut_avx: a lane a column, a block a step
        y = lane_product(rows, weight, lanes=1, group=32)
    else:
        y = lane_product(rows, weight, lanes=8, group=4)
    return y.unflatten(0, x.shape[:-1])


def _summed_by_256(rows: Tensor, weight: Tensor) -> Tensor:
    """A block's integer sum times the weight's scale, times the activations' scale, then onto the sum of the blocks
    (tiled/tiled-kernel.cpp). Types with minima round once more in between, which dequantised weights do not show."""
    y = torch.zeros((), device=rows.device)
    for x, w in zip(rows.double().split(256, dim=-1), weight.double().split(256, dim=-1), strict=True):
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-149)
        y = y + (((x @ w.T) / scale).float().double() * scale).float()
    return y
