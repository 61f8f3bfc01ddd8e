"""How ggml packs integers and scales into bytes: the formats whose numbers are the integers themselves.

One function a format: blocks as uint8 [n, bytes of a block] in, `Parts` out. Layouts as in ggml's `ggml-quants.c`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    """What n blocks hold. A scale or minimum belongs to `values // groups` neighbours."""

    q: Tensor  # integers or floats, [n, ...] with type.values numbers a block, in their order
    scale: Tensor | None = None  # float32 [n, groups]
    minimum: Tensor | None = None  # float32 [n, groups]


# Small pieces that formats share. Bits that stand for neighbours lie far apart: a byte of a run of 32 holds the number
# at its place in this run and that at the same place in the next.


def field(blocks: Tensor, start: int, stop: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Bytes [start, stop) of every block as [n, numbers of dtype], contiguous: only such are converted fast."""
    return blocks[:, start:stop].clone(memory_format=torch.contiguous_format).view(dtype)


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of every block, as float32 [n, 1]."""
    return field(blocks, start, start + 2, torch.float16).float()


def nibbles(raw: Tensor, run: int) -> Tensor:
    """[n, m] bytes -> [n, m / run, 2, run]: the low halves of a run of bytes, then its high halves."""
    return torch.stack(((raw & 15).unflatten(1, (-1, run)), (raw >> 4).unflatten(1, (-1, run))), 2)


def crumbs(raw: Tensor, run: int) -> Tensor:
    """[n, m] bytes -> [n, m / run, 4, run]: four 2-bit numbers a byte, the lowest bits first."""
    return torch.stack([((raw >> shift) & 3).unflatten(1, (-1, run)) for shift in (0, 2, 4, 6)], 2)


def halves(raw: Tensor) -> Tensor:
    """[n, m] bytes -> [n, 2 m]: the low half of a byte, then its high half."""
    return torch.stack((raw & 15, raw >> 4), 2).flatten(1)


def planes(raw: Tensor) -> Tensor:
    """[n, m] bytes -> [n, 8, m]: bit i of every byte is plane i."""
    return torch.stack([(raw >> shift) & 1 for shift in range(8)], 1)


def bits(raw: Tensor) -> Tensor:
    """[n, m] bytes -> [n, m, 8]: the bits of a byte one after another, the lowest first."""
    return torch.stack([(raw >> shift) & 1 for shift in range(8)], 2)


def _float(blocks: Tensor, dtype: torch.dtype) -> Parts:
    return Parts(field(blocks, 0, blocks.shape[1], dtype))


def f32(blocks: Tensor) -> Parts:
    return _float(blocks, torch.float32)


def f16(blocks: Tensor) -> Parts:
    return _float(blocks, torch.float16)


def bf16(blocks: Tensor) -> Parts:
    return _float(blocks, torch.bfloat16)


# Blocks of 32: one scale d, and a minimum m in the "_1" formats.


def q4_0(blocks: Tensor) -> Parts:
    return Parts(signed(nibbles(field(blocks, 2, 18), 16), 8), half(blocks, 0))


def q4_1(blocks: Tensor) -> Parts:
    return Parts(nibbles(field(blocks, 4, 20), 16), half(blocks, 0), -half(blocks, 2))


def _five(blocks: Tensor, start: int) -> Tensor:
    """32 fifth bits, then 16 bytes with four bits of two numbers each: [n, 32], 0 to 31."""
    high = bits(field(blocks, start, start + 4)).flatten(1)
    return nibbles(field(blocks, start + 4, start + 20), 16).flatten(1) | high << 4


def q5_0(blocks: Tensor) -> Parts:
    return Parts(signed(_five(blocks, 2), 16), half(blocks, 0))


def q5_1(blocks: Tensor) -> Parts:
    return Parts(_five(blocks, 4), half(blocks, 0), -half(blocks, 2))


def q8_0(blocks: Tensor) -> Parts:
    return Parts(field(blocks, 2, 34, torch.int8), half(blocks, 0))


def signed(q: Tensor, zero: int) -> Tensor:
    """uint8 numbers below 128, less `zero`, as int8."""
    return q.sub_(zero).view(torch.int8)


# Super-blocks of 256: the scales of 8 or 16 groups are themselves small integers, times one float16.


def q2_k(blocks: Tensor) -> Parts:
    both = field(blocks, 0, 16)
    q = crumbs(field(blocks, 16, 80), 32)
    return Parts(q, half(blocks, 80) * (both & 15), half(blocks, 82) * (both >> 4))


def q3_k(blocks: Tensor) -> Parts:
    # Sixteen scales of 6 bits: 4 low bits each in 8 bytes, 2 high bits each in 4.
    low = nibbles(field(blocks, 96, 104), 8).flatten(1)
    high = crumbs(field(blocks, 104, 108), 4).flatten(1)
    scale = half(blocks, 108) * signed(low | high << 4, 32)
    # A bit of the mask that is NOT set takes 4 away.
    mask = planes(field(blocks, 0, 32)).flatten(1)
    return Parts(signed(crumbs(field(blocks, 32, 96), 32).flatten(1) | mask << 2, 4), scale)


def six_bits(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and the eight minima of 6 bits at byte 4 of Q4_K and Q5_K: uint8 [n, 8] both."""
    first, second, mixed = field(blocks, 4, 16).split(4, dim=1)
    scale = torch.cat((first & 63, (mixed & 15) | (first >> 2 & 48)), 1)
    minimum = torch.cat((second & 63, (mixed >> 4) | (second >> 2 & 48)), 1)
    return scale, minimum


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [n, 8] both: d, dmin and `six_bits` are at the start of Q4_K and Q5_K."""
    scale, minimum = six_bits(blocks)
    return half(blocks, 0) * scale, half(blocks, 2) * minimum


def q4_k(blocks: Tensor) -> Parts:
    return Parts(nibbles(field(blocks, 16, 144), 32), *_scales_and_minima(blocks))


def q5_k(blocks: Tensor) -> Parts:
    high = planes(field(blocks, 16, 48)).flatten(1)
    return Parts(nibbles(field(blocks, 48, 176), 32).flatten(1) | high << 4, *_scales_and_minima(blocks))


def q6_k(blocks: Tensor) -> Parts:
    low = nibbles(field(blocks, 0, 128), 64).flatten(1)
    high = crumbs(field(blocks, 128, 192), 32).flatten(1)
    return Parts(signed(low | high << 4, 32), half(blocks, 208) * field(blocks, 192, 208, torch.int8))


# Ternary: five digits to base 3 in a byte, or four in 2 bits each.


def tq1_0(blocks: Tensor) -> Parts:
    def digits(start: int, stop: int, count: int) -> Tensor:
        raw = field(blocks, start, stop)
        # A byte is ceil(256 / 243 * number): times 3^i it wraps, which drops the digits before, and times 3 its upper
        # half is the digit.
        powers = torch.stack([raw * 3**i for i in range(count)], 1)
        return (powers.to(torch.int16) * 3 >> 8).flatten(1)

    q = torch.cat((digits(0, 32, 5), digits(32, 48, 5), digits(48, 52, 4)), 1) - 1
    return Parts(q, half(blocks, 52))


def tq2_0(blocks: Tensor) -> Parts:
    return Parts(signed(crumbs(field(blocks, 0, 64), 32), 1), half(blocks, 64))
