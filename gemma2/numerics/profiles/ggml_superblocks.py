"""How ggml multiplies 8-bit activations with weights in super-blocks of 256, whose scales are integers themselves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gemma2.checkpoints.ggml import Scales
from gemma2.numerics.profiles.ggml_math import f32, fma, halved_sum

BLOCK, LANES = 256, 8
TILE = 8  # rows from which on there are tiles

Block = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]  # see `_blocks`


def summed_by_block(rows: Tensor, weight: Tensor, scales: Scales | None) -> Tensor:
    """A block's integers, times the weight's unit, less the minima's, times the activations' scale, onto the sum of the
    blocks. (tiled/tiled-kernel.cpp; the compiler makes one operation of the last product and sum)"""
    y = torch.zeros(len(rows), len(weight), dtype=torch.float32, device=rows.device)
    for x, scale, w, unit, minima, step in _blocks(rows, weight, scales):
        found = (x @ w.T).float() * unit
        if minima is not None:
            found = fma(-step, (x @ minima.T).float(), found)
        y = fma(found, scale, y)
    return y


def summed_apart(rows: Tensor, weight: Tensor, scales: Scales, group: int) -> Tensor:
    """Products and minima each in a sum of their own, subtracted at the end; so many integers at a time.
    (arch/x86/repack.cpp, ggml_gemm_q4_K_8x8_q8_K, ggml_gemm_q2_K_8x8_q8_K, and their ggml_gemv)"""
    y, less = (torch.zeros(len(rows), len(weight), dtype=torch.float32, device=rows.device) for _ in range(2))
    for x, scale, w, unit, minima, step in _blocks(rows, weight, scales):
        assert minima is not None
        for some in torch.arange(BLOCK, device=rows.device).split(group):
            y = fma((x[:, some] @ w[:, some].T).float(), unit * scale, y)
            less = fma((x[:, some] @ minima[:, some].T).float(), step * scale, less)
    return y - less


def summed_in_lanes(rows: Tensor, weight: Tensor, scales: Scales, offset: int) -> Tensor:
    """Four neighbours of every 32 in a lane, whole blocks as integers. Where q is stored with an offset, that is taken
    away again two groups of 16 a lane. (arch/x86/quants.c, ggml_vec_dot_q6_K_q8_K and its like)"""
    y, less = torch.zeros(LANES, len(rows), len(weight), dtype=torch.float32, device=rows.device), None
    groups = scales.scale.unflatten(-1, (scales.unit.shape[-1], -1))
    for number, (x, scale, w, unit, minima, step) in enumerate(_blocks(rows, weight, scales)):
        if minima is not None:
            less = fma((x @ minima.T).float(), step * -scale, y.new_zeros(()) if less is None else less)
        away = x.new_zeros(())
        if offset:
            every = offset * _quotient(groups[:, number].to(w.device), unit)
            every = every.repeat_interleave(BLOCK // every.shape[-1], dim=-1)
            w = w + every
            sums, factors = (part.unflatten(-1, (LANES, -1, 16)).movedim(-3, 0) for part in (x, every))
            away = sums.sum(-1) @ factors[..., 0].transpose(-1, -2)
        x, w = (part.unflatten(-1, (-1, LANES, 4)).movedim(-2, 0).flatten(-2) for part in (x, w))
        y = fma((x @ w.transpose(-1, -2) - away).float(), unit * scale, y)
    y = halved_sum(y.movedim(0, -1))
    return y if less is None else y + less


def _blocks(rows: Tensor, weight: Tensor, scales: Scales | None) -> Iterator[Block]:
    """For each block of 256: the activations' integers in float64 [t 256] and their float32 scale [t 1]; the weight's
    integers times their integer scales in float64 [m 256], and their unit [m]; the minima's integers [m 256], and
    theirs.

    The weight's are had back from the dequantised numbers, so that what was changed since counts. As long as a step is
    no more than some 60 units, those were not rounded, and the integers are exact.
    """
    for number, (x, w) in enumerate(zip(rows.double().split(BLOCK, -1), weight.double().split(BLOCK, -1), strict=True)):
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-149)
        x = x / scale
        if scales is None:
            yield x, scale.float(), w, f32(1.0), None, f32(0.0)
            continue
        unit, minima, step = scales.unit[:, number].to(w.device), None, f32(0.0)
        if scales.minimum is not None and scales.step is not None:
            step = scales.step[:, number].to(w.device)
            groups = scales.minimum.shape[-1] // scales.unit.shape[-1]
            minimum = scales.minimum.unflatten(-1, (-1, groups))[:, number].to(w.device).double()
            minimum = minimum.repeat_interleave(BLOCK // groups, dim=-1)
            w, minima = w + minimum, _quotient(minimum, step)
        yield x, scale.float(), _quotient(w, unit), unit, minima, step


def _quotient(x: Tensor, unit: Tensor) -> Tensor:
    """x [... n] by unit [...], and 0 where that is 0."""
    unit = unit[..., None].double()
    return torch.where(unit == 0, 0.0, x / unit)
