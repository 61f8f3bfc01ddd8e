"""Products and sums in one order, whatever else is computed beside them: the ground of the profile `batch-invariant`.

A library chooses how it sums a product by the product's shape, so a row's last bits depend on how many rows there are.
Here a product always has one shape: so many rows at a time, and the last few are filled up with zeros. Sums that are no
products are made of additions of two tensors, which round alike on every device and in every place of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma2.ops import upcast

# Rows of the one shape. On processors with AMX, 32 rows in bfloat16 take as long as one; in float32 16 rows are the
# least that MKL sums as it sums many.
ROWS = {torch.bfloat16: 32}
FEWEST = 16
WIDER = (256, 128)  # rows of shapes that may take its place, where their bits are the same
TRIED: dict[tuple[object, ...], tuple[int, ...]] = {}  # what `sizes` has found, by shape, dtype, device and threads
LINE = 64  # bytes: libraries may sum in another order where a tensor does not begin at a multiple of it
MOST_TRIED = 2**16  # outputs: a head has more, and is read for few rows
PERIOD = 1009, 521  # primes, so that no row of what is tried repeats another


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [... n] times weight [m n] -> [... m], in tiles of rows; each row's bits depend on that row alone."""
    rows = _aligned(x.reshape(-1, x.shape[-1]))
    tile, done, parts = ROWS.get(x.dtype, FEWEST), 0, []
    for size in (*sizes(weight, len(rows)), tile):
        while len(rows) - done >= size:
            parts.append(_tile(rows[done : done + size], weight).contiguous())
            done += size
    if done < len(rows):
        rest = rows[done:]
        parts.append(_tile(F.pad(rest, (0, 0, 0, tile - len(rest))), weight)[: len(rest)])
    return (torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()).view(*x.shape[:-1], len(weight))


def _tile(rows: Tensor, weight: Tensor) -> Tensor:
    if rows.dtype == torch.bfloat16 and rows.device.type == "cpu":
        return torch.mm(weight, rows.t()).t()  # the faster way round: here the weight is not packed anew
    return F.linear(rows, weight)


def _aligned(rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    return rows.clone() if not torch.compiler.is_compiling() and rows.data_ptr() % LINE else rows


@torch.no_grad()
def sizes(weight: Tensor, rows: int) -> tuple[int, ...]:
    """Numbers of rows, at most `rows`, that this library sums with a weight of this shape in the very order of one
    tile: found once a shape, on random numbers, of which every bit must be equal."""
    wanted = [size for size in WIDER if size <= rows]
    if not wanted or len(weight) > MOST_TRIED or torch.compiler.is_compiling():
        return ()
    key = (weight.shape, weight.stride(), weight.dtype, weight.device, torch.get_num_threads(), tuple(wanted))
    if key not in TRIED:
        TRIED[key] = tuple(size for size in wanted if _same_order(weight, size))
    return TRIED[key]


def _same_order(like: Tensor, size: int) -> bool:
    tile, n = ROWS.get(like.dtype, FEWEST), like.shape[-1]
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(PERIOD[0] * PERIOD[1], device="cpu", dtype=torch.float32, generator=generator)
    count = -(-like.numel() // len(few))
    weight = few.repeat(count)[: like.numel()].view(like.shape).to(like.device, like.dtype)
    rows = torch.randn(size, n, device="cpu", dtype=torch.float32, generator=generator).to(like.device, like.dtype)
    expected = torch.cat([_tile(part, weight) for part in rows.split(tile)])
    return bool((_tile(rows, weight) == expected).all())


def halved_sum(x: Tensor) -> Tensor:
    """The sum over the last axis, kept as an axis of 1: the second half is added to the first until one is left."""
    while x.shape[-1] > 1:
        half = (x.shape[-1] + 1) // 2
        first, second = x[..., :half], x[..., half:]
        x = first + F.pad(second, (0, 2 * half - x.shape[-1]))
    return x


def in_tiles(q: Tensor, keys: Tensor, fewest: int, block: int) -> Tensor:
    """Scores of one row of the batch: q [g r c] times keys [g s c] -> [g r s], r a multiple of `fewest` and s of
    `block`; each product is [g fewest c] x [g c block]."""
    turned = [part.transpose(1, 2).contiguous() for part in keys.split(block, dim=1)]
    return torch.cat(
        [torch.cat([_batched(part.contiguous(), key) for key in turned], dim=2) for part in q.split(fewest, dim=1)],
        dim=1,
    )


def mixed_in_tiles(pattern: Tensor, values: Tensor, fewest: int, block: int) -> Tensor:
    """pattern [g r s] times values [g s c] -> [g r c] in float32: block after block of keys in the order of s."""
    wide = [part.contiguous() for part in upcast(values).split(block, dim=1)]
    return torch.cat([_mixed(part, wide, block) for part in upcast(pattern).split(fewest, dim=1)], dim=1)


def _mixed(pattern: Tensor, values: list[Tensor], block: int) -> Tensor:
    parts = [part.contiguous() for part in pattern.split(block, dim=2)]
    # What nothing is weighed in would add nothing but zeros: most of what a window or causality hides.
    seen: Callable[[Tensor], bool] = (lambda part: True) if torch.compiler.is_compiling() else (lambda p: bool(p.any()))
    total = pattern.new_zeros(*pattern.shape[:2], values[0].shape[2])
    for part, value in zip(parts, values, strict=True):
        if seen(part):
            total = total + _batched(part, value)
    return total


def _batched(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b)
