"""The mathematics of Gemma 2: pure functions, no state.

Shapes, in every file: b batch, t query positions, s key positions, d model width, h query heads, g key/value heads,
c head width, f feed-forward width, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """`x` in the dtype that norms, angles and softmax are computed in: float32, and float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis: [... d] -> [... 1]. Zhang & Sennrich 2019, arXiv:1910.07467."""
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): close to x when |x| is small, never beyond +-cap. Gemma 2 report, section 2."""
    return torch.tanh(x / cap) * cap


def frequencies(width: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Radians per position of each rotary pair: theta ** (-2i / c) for i in [0, c/2), in float32 or float64.

    They are made on the CPU, also under `torch.device("meta")`: pow differs by an ulp between devices.
    """
    return 1.0 / (theta ** (torch.arange(0, width, 2, dtype=dtype, device="cpu") / width))


def cos_sin(positions: Tensor, frequency: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embedding, both [b t c], for positions [b t] and frequencies [c/2].

    Angles have the frequencies' dtype and are rounded to `dtype` once, at the end. Gemma 2 turns the pair (i, i + c/2),
    not (2i, 2i + 1), so every angle stands twice. Su et al. 2021, arXiv:2104.09864.
    """
    angle = positions[..., None].to(frequency.dtype) * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (i, i + c/2) of x [b t heads c] by its angle; cos and sin are [b t c]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees: [b 1 t s] bool, from positions [b t] and [b s].

    A key is seen if it is real (position >= 0: padding and empty cache slots are negative), not later than the
    query and, in a local layer, fewer than `window` positions back. This one predicate makes every mask.
    """
    back = queries[:, :, None] - keys[:, None, :]
    seen = (back >= 0) & (keys >= 0)[:, None, :]
    if window is not None:
        seen = seen & (back < window)
    return seen[:, None]
