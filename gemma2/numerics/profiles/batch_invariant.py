"""One order of every sum: a row's bits do not depend on how many rows or positions are computed with it.

The plain model is batch-variant, as PyTorch is: its libraries sum a product in one order for one row and in another for
thirty-two. Under this profile a row alone has the bits that it has in a batch, in any slot, behind any padding; a
prompt has the bits of the same ids one by one, in chunks, or through a ring of the local layers that has wrapped. All
of it holds on one device, in one dtype, with one number of threads, outside `torch.compile`. After He and Thinking
Machines Lab, "Defeating Nondeterminism in LLM Inference" (2025); every product and sum here is PyTorch's own.

What makes it so:

- A product has one shape, of so many rows (`tiles.py`).
- A norm adds halves; so does softmax within a block of keys.
- A block is BLOCK positions that begin at a multiple of BLOCK, whatever slots hold them, and blocks are added in the
  order of positions. A key that a query does not see adds an exact zero, so it does not matter which ones are there.
- GELU is made of tanh: PyTorch's own kernel gives the last few elements of a tensor to another function, and their bits
  differ. tanh, exp, cos and sin do not differ (tests/test_batch_invariant.py tries them).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma2 import ops
from gemma2.numerics.changes import Change, replacing
from gemma2.numerics.parts import ActivationInParts, HeadInParts, LinearInParts, NormInParts, ScoresInParts
from gemma2.numerics.profiles.tiles import halved_sum, in_tiles, mixed_in_tiles, product

BLOCK = 128  # positions
PIECE = 32  # rows of GELU computed at once
TILE = 16  # queries of all heads of a key head that are multiplied at once
IDEAS = "Thinking Machines Lab 2025, Defeating Nondeterminism in LLM Inference"


def inverse_scale(x: Tensor, eps: float) -> Tensor:
    wide = ops.upcast(x)
    return torch.rsqrt(halved_sum(wide * wide) / x.shape[-1] + eps)


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) in float32, rounded once."""
    if x.ndim < 2:
        return _gelu(x)
    # A few rows at a time, which stay in the processor's cache from one operation to the next.
    pieces = [_gelu(piece) for piece in x.flatten(0, -2).split(PIECE)]
    return torch.cat(pieces).view(x.shape) if len(pieces) > 1 else pieces[0].view(x.shape)


def _gelu(x: Tensor) -> Tensor:
    wide, scale = ops.upcast(x), math.sqrt(2 / math.pi)
    inner = wide * (wide * wide * (scale * 0.044715) + scale)
    return (wide * 0.5 * (torch.tanh(inner) + 1.0)).to(x.dtype)


def places(key_positions: Tensor) -> Tensor:
    """Where the keys of each row are, in blocks of positions: [b n] slots, n a multiple of BLOCK.

    Element j of a row is the slot of one position, element j + 1 that of the next, and element 0 is of a multiple of
    BLOCK; the number of slots where none is held.

    Raises:
        ValueError: the positions of a row are not consecutive, so that blocks of them would leave some out.
    """
    held = key_positions.shape[1]
    count = (-(-held // BLOCK) + 1) * BLOCK
    end = (key_positions.amax(dim=1, keepdim=True).div(BLOCK, rounding_mode="floor") + 1) * BLOCK
    real = key_positions >= 0
    at = (key_positions - (end - count)).masked_fill(~real, count).long()
    if not torch.compiler.is_compiling() and bool((at < 0).any()):
        raise ValueError('numerics "batch-invariant" needs the positions of a row to rise by one')
    slots = torch.arange(held, device=at.device).expand_as(at)
    found = at.new_full((len(at), count + 1), held).scatter(1, at, slots)[:, :count]
    if not torch.compiler.is_compiling():
        if bool(((found < held).sum(dim=1) != real.sum(dim=1)).any()):
            raise ValueError('numerics "batch-invariant" needs the positions of a row to differ')
        first = int((found < held).any(dim=0).int().argmax()) // BLOCK  # blocks before it are empty in every row
        found = found[:, first * BLOCK :]
    return found


def ordered(x: Tensor, slots: Tensor) -> Tensor:
    """x [h t s], or [... s], of one row of the batch, in the order of `places` [n]: zero where nothing is held."""
    if torch.compiler.is_compiling():
        return F.pad(x, (0, 1)).index_select(-1, slots)
    nothing, number = slots == x.shape[-1], torch.arange(len(slots), device=slots.device)
    # Slots that follow each other are copied together, which is many times as fast: a ring has two such stretches.
    shift = (slots - number).masked_fill(nothing, len(slots) + x.shape[-1])
    shifts, counts = torch.unique_consecutive(shift, return_counts=True)
    parts, done = [], 0
    for by, count in zip(shifts.tolist(), counts.tolist(), strict=True):
        first, held = done + by, by <= x.shape[-1]
        parts.append(x[..., first : first + count] if held else x.new_zeros(*x.shape[:-1], count))
        done += count
    return torch.cat(parts, dim=-1)


def softmaxed(scores: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    wide = ops.upcast(scores)
    powers = torch.exp(wide - wide.amax(dim=-1, keepdim=True))
    sums = [_block_by_block(ordered(row, where)) for row, where in zip(powers, slots, strict=True)]
    return (powers / torch.stack(sums)).to(dtype)


def _block_by_block(powers: Tensor) -> Tensor:
    blocks = halved_sum(powers.unflatten(-1, (-1, BLOCK)))[..., 0]
    first, *others = blocks.split(1, dim=-1)
    return sum(others, first)


def grouped(x: Tensor, group: int, tile: int) -> Tensor:
    """x [t h c] of one row as [g r c], queries that share a key head together, r filled up to a multiple of `tile`."""
    rows = x.unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2)
    return F.pad(rows, (0, 0, 0, -rows.shape[1] % tile))


def ungrouped(x: Tensor, t: int, group: int) -> Tensor:
    """[g r s] of one row, without what filled it up, as [h t s]."""
    return x[:, : t * group].unflatten(1, (t, group)).transpose(1, 2).flatten(0, 1)


def attended(part: ScoresInParts, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, key_positions: Tensor) -> Tensor:
    """`SoftcapAttention.forward`, row by row, with its taps: their axis s stays in the order of the slots."""
    key_positions = part.hook_key_positions(key_positions)
    visible = ops.visible(positions, key_positions, part.window)
    t, s, group, slots = q.shape[1], k.shape[1], part.group, places(key_positions)
    keys = F.pad(k, (0, 0, 0, 0, 0, -s % BLOCK)).transpose(1, 2)
    products = [
        ungrouped(in_tiles(grouped(row, group, TILE), key, TILE, BLOCK), t, group)[..., :s]
        for row, key in zip(q, keys, strict=True)
    ]
    scores = part.softcap(part.hook_scores_raw(torch.stack(products) * part.scale))
    scores = part.hook_attn_scores(scores.masked_fill(~visible, torch.finfo(scores.dtype).min))
    pattern = part.hook_pattern(softmaxed(scores, slots, q.dtype))
    mixed = []
    for row, value, where in zip(pattern, v, slots, strict=True):
        weights = grouped(ordered(row, where).transpose(0, 1), group, TILE)
        values = F.pad(value, (0, 0, 0, 0, 0, 1)).index_select(0, where).transpose(0, 1)
        mixed.append(ungrouped(mixed_in_tiles(weights, values, TILE, BLOCK), t, group).transpose(0, 1))
    return part.hook_z(torch.stack(mixed).to(q.dtype).contiguous())


def tiled_products(path: str, module: torch.nn.Module, storage: object) -> None:
    if isinstance(module, LinearInParts | HeadInParts):
        module.product = product


CHANGES = (
    Change(
        "products=tiles",
        "a product with a weight is of so many rows at a time, the last ones filled up, so that all are summed alike",
        IDEAS,
        tiled_products,
    ),
    Change(
        "norm_sum=halves",
        "the squares of a norm are summed by adding the second half to the first, until one is left",
        IDEAS,
        replacing(NormInParts, inverse_scale=inverse_scale),
    ),
    Change(
        "gelu=tanh",
        "GELU is made of tanh, products and sums in float32; PyTorch's kernel treats the end of a tensor otherwise",
        "aten/src/ATen/native/cpu/Activation.cpp, GeluKernelImpl: a vector and a scalar function",
        replacing(ActivationInParts, gelu=gelu),
    ),
    Change(
        "keys=positions",
        "attention sums over blocks of keys in the order of their positions, in float32, products in tiles",
        IDEAS,
        replacing(ScoresInParts, steps=attended),
    ),
)
