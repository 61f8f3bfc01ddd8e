"""Attention that computes only the scores that can be seen, a block of queries at a time, and never repeats a key.

Two facts about Gemma 2 make it short. Scores are capped, so `exp` needs no maximum subtracted: rows are summed as they
are, and divided at the end. And the mask comes from positions, so the slots that a block of queries cannot see are left
out of the products. The blocks go through one buffer, in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gemma2 import ops
from gemma2.fast.kernels import exponential_, may_reuse
from gemma2.model import SoftCap, SoftcapAttention

QUERIES = 256  # of a block: more waste scores above the diagonal, fewer make the products slower
EVERYTHING = 2**31 - 1  # the window of a global layer
FEW = 64  # queries x heads, up to which one product with all key heads is faster than one a head
LARGEST = 64.0  # of caps whose exponentials can be summed in float32
SLOTS = 256  # whose values one product mixes, for few queries
PARTS = 32  # values of so many slots are added up before these sums are: they stay in a cache


class FastAttention(SoftcapAttention):
    """`SoftcapAttention` on a CPU, in blocks. It keeps all taps: where one inside the scores has a hook, or a gradient
    is wanted, it computes what the plain one computes, bit for bit.

    In bfloat16, scores are rounded once and not five times. A query that sees nothing gives zeros, where the plain
    attention gives the mean of all values.
    """

    def __init__(self, plain: SoftcapAttention) -> None:
        nn.Module.__init__(self)
        self.window, self.scale, self.group, self.softcap = plain.window, plain.scale, plain.group, plain.softcap
        self.hook_key_positions, self.hook_z = plain.hook_key_positions, plain.hook_z
        self.hook_scores_raw, self.hook_attn_scores = plain.hook_scores_raw, plain.hook_attn_scores
        self.hook_pattern = plain.hook_pattern
        # The window as a tensor: compiled code takes it as a value, so that one graph serves both kinds of layer.
        self.back: Tensor
        back = torch.tensor(EVERYTHING if self.window is None else self.window, device="cpu")
        self.register_buffer("back", back, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, key_positions: Tensor) -> Tensor:
        capped = type(self.softcap) is SoftCap and self.softcap.cap <= LARGEST
        if capped and torch.compiler.is_compiling() and q.shape[1] == 1:
            visible = ops.visible(positions, self.hook_key_positions(key_positions), self.back)  # type: ignore[arg-type]
            return self.hook_z(one_query(q, k, v, visible, self.scale, self.softcap.cap))
        dtype, q = q.dtype, q.to(k.dtype)  # queries may be wider than what a cache stores
        inside = (self.softcap, self.hook_scores_raw, self.hook_attn_scores, self.hook_pattern)
        if not capped or q.dtype == torch.float16 or not may_reuse((q, k, v), inside):  # float16 overflows
            return super().forward(q, k, v, positions, key_positions).to(dtype)
        key_positions = self.hook_key_positions(key_positions)
        z = q.new_empty(q.shape)
        for row in range(len(q)):
            one = (q[row], k[row], v[row])
            if q.shape[1] * q.shape[2] <= FEW:
                visible = ops.visible(positions[row, None], key_positions[row, None], self.window)[0, 0]
                few_queries(*one, visible, self.scale, self.softcap.cap, z[row])
            else:
                seen = spans(positions[row], key_positions[row], self.window)
                in_blocks(*one, seen, self.scale, self.softcap.cap, z[row])
        return self.hook_z(z.to(dtype))


class Span(NamedTuple):
    """A block of queries, the slots that any of them sees, and where not all of them see each."""

    queries: slice
    slots: slice
    masked: list[tuple[slice, Tensor]]  # of the slots, counted from their first; and what is seen there [t s]


def spans(positions: Tensor, key_positions: Tensor, window: int | None) -> list[Span]:
    """The blocks of queries at `positions` [t] that see something of the keys at `key_positions` [s]."""
    keys = key_positions.long()
    starts = range(0, len(positions), QUERIES)
    blocks = [positions[start : start + QUERIES].long() for start in starts]
    highest = torch.stack([block.max() for block in blocks])[:, None]
    lowest = torch.stack([block.min() for block in blocks])[:, None]  # negative if there is padding: none sees all then
    real = torch.stack([torch.where(block < 0, highest[i], block).min() for i, block in enumerate(blocks)])[:, None]
    some, every = (keys >= 0) & (keys <= highest), (keys >= 0) & (keys <= lowest)  # [blocks s]
    if window is not None:
        some, every = some & (keys > real - window), every & (keys > highest - window)
    found = []
    for start, block, some_see, all_see in zip(starts, blocks, some, every, strict=True):
        slots = some_see.nonzero()[:, 0]
        if not len(slots):
            continue
        first, last = int(slots[0]), int(slots[-1]) + 1
        partly = _runs((~all_see[first:last]).nonzero()[:, 0].tolist())
        masked = [(x, ops.visible(block[None], keys[None, first:last][:, x], window)[0, 0]) for x in partly]
        found.append(Span(slice(start, start + len(block)), slice(first, last), masked))
    return found


def _runs(indices: list[int]) -> list[slice]:
    """Rising indices as the ranges that they fill."""
    ends = [i for i in range(1, len(indices)) if indices[i] != indices[i - 1] + 1]
    bounds = zip([0, *ends], [*ends, len(indices)], strict=True)
    return [slice(indices[a], indices[b - 1] + 1) for a, b in bounds if b > a]


def in_blocks(q: Tensor, k: Tensor, v: Tensor, seen: list[Span], scale: float, cap: float, z: Tensor) -> None:
    """Attention of one row: q [t h c], k and v [s g c] -> into z [t h c]. Queries that see nothing get zeros."""
    (t, h, c), g = q.shape, k.shape[1]
    r = h // g
    q = q.view(t, g, r, c).transpose(0, 1).reshape(g, t * r, c)
    k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
    z = z.view(t, g, r, c).zero_()
    wide = ops.upcast(q[:0]).dtype
    scores = q.new_empty(min(t, QUERIES) * r * max((span.slots.stop - span.slots.start for span in seen), default=0))
    for queries, slots, masked in seen:
        rows = slice(queries.start * r, queries.stop * r)
        x = scores[: (rows.stop - rows.start) * (slots.stop - slots.start)].view(rows.stop - rows.start, -1)
        masks = [(where, visible.repeat_interleave(r, dim=0).to(x.dtype)) for where, visible in masked]
        for i in range(g):
            torch.addmm(x, q[i, rows], k[i, slots].T, beta=0, alpha=scale / cap, out=x)
            exponential_(x, cap)
            for where, visible in masks:
                x[:, where].mul_(visible)
            total = x.sum(dim=1, keepdim=True, dtype=wide).clamp_min_(torch.finfo(wide).tiny)
            z[queries, i] = ops.upcast(x @ v[i, slots]).div_(total).view(-1, r, c)


@contextmanager
def onednn() -> Iterator[None]:
    """Products by oneDNN, also where it is switched off, as it is best for products of one row."""
    was = torch.backends.mkldnn.set_flags(_enabled=True, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=was[0], _fp32_precision=None)


def few_queries(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, cap: float, z: Tensor) -> None:
    """Attention of one row with few queries: q [t h c], k and v [s g c], visible [t s] -> into z [t h c].

    Keys and values are read once, in the order they have: one product with all heads of them, of which the scores of
    other heads are then dropped, is faster than one for each head, which would copy the head's keys first.
    """
    (t, h, c), (s, g, _) = q.shape, k.shape
    r = h // g
    wide = ops.upcast(q[:0]).dtype
    spread = q.new_zeros(g, c, t, g, r)  # each query beside zeros for the other heads' keys
    spread.diagonal(dim1=0, dim2=3).copy_(q.view(t, g, r, c).permute(3, 0, 2, 1))
    with onednn():
        scores = ops.upcast(k.reshape(s, g * c) @ spread.view(g * c, t * h))
        scores = scores.mul_(scale / cap).tanh_().mul_(cap).exp_().view(s, t, h).mul_(visible.T[:, :, None])
        total = scores.sum(dim=0).clamp_min_(torch.finfo(wide).tiny)
        pattern = scores.div_(total).to(q.dtype).view(s, t * h).T.contiguous()
        mixed = _mixed(pattern, v.reshape(s, g * c)).to(q.dtype)  # every head with the values of all
    z.view(t, g, r, c).copy_(mixed.view(t, g, r, g, c).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2))


def _mixed(pattern: Tensor, v: Tensor) -> Tensor:
    """pattern [n s] @ v [s d], in parts of the slots: oneDNN copies the second factor, and a part stays in a cache."""
    s = len(v) - len(v) % SLOTS
    rest = ops.upcast(pattern[:, s:] @ v[s:])
    if not s:
        return rest
    parts = torch.bmm(pattern[:, :s].unflatten(1, (-1, SLOTS)).transpose(0, 1), v[:s].unflatten(0, (-1, SLOTS)))
    return ops.upcast(parts).sum(dim=0).add_(rest)


def one_query(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, cap: float) -> Tensor:
    """Attention of one query a row, for a compiler: q [b 1 h c], k and v [b s g c], visible [b 1 1 s] -> [b 1 h c].

    Products and sums of static shapes, which become loops over keys and values as they lie, and nothing else. With the
    slots marked dynamic, one graph serves all multiples of `PARTS`: so a step can be given the slots in use alone.
    """
    (b, _, h, c), (s, g) = q.shape, k.shape[1:3]
    query = ops.upcast(q).view(b, 1, g, h // g, c) * (scale / cap)
    scores = (query * ops.upcast(k)[:, :, :, None]).sum(dim=-1)  # [b s g r]
    pattern = torch.where(visible.view(b, s, 1, 1), (torch.tanh(scores) * cap).exp(), 0.0)
    total = pattern.sum(dim=1).clamp_min(torch.finfo(pattern.dtype).tiny)

    def mix(pattern: Tensor, v: Tensor) -> Tensor:
        parts = pattern.unflatten(1, (-1, PARTS))[..., None] * ops.upcast(v).unflatten(1, (-1, PARTS))[..., None, :]
        return parts.sum(dim=2).sum(dim=1)

    whole = s - s % PARTS
    mixed = (pattern[:, whole:, ..., None] * ops.upcast(v[:, whole:])[..., None, :]).sum(dim=1)
    if whole:
        mixed = mixed + mix(pattern[:, :whole], v[:, :whole])
    return (mixed / total[..., None]).to(q.dtype).view(b, 1, h, c)
