"""The head with its cap, a slice of the vocabulary at a time: for whoever needs all logits and holds none.

The logits of 2,048 tokens of 256,000 pieces are 2 GB in float32. A slice fits a processor's caches, and each row
of the embedding is read once for all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2.feed import hooked
from gemma2.model import Gemma2, ScaledEmbedding, SoftCap, TiedHead
from gemma2.ops import softcap

AT_ONCE = 2**20  # logits of a slice: 4 MB in float32, and a few times that while they are worked on


def is_plain(model: Gemma2) -> bool:
    """Whether the head and the cap compute nothing but Gemma 2's own arithmetic with the embedding's parameter, so that
    `slices` has their values. Twins, hooks and adapters there make it False."""
    head, cap, embedding = model.lm_head, model.softcap, model.model.embed_tokens
    # A faster head says that it is the same product.
    own = (type(head) is TiedHead or getattr(head, "is_product", False)) and type(cap) is SoftCap
    free = not any(hooked(module) or "forward" in vars(module) for module in (head, cap))
    return own and free and isinstance(embedding, ScaledEmbedding) and type(embedding.weight) is nn.Parameter


def wide(x: Tensor) -> torch.dtype:
    """The dtype that softmax is computed in: float32, and float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def slices(states: Tensor, weight: Tensor, cap: float) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For states [n d] and an embedding [v d]: the first id of each slice of m ids, its rows of the embedding [m d] in
    the states' dtype, and its capped logits [n m] in float32 or wider."""
    width = max(64, AT_ONCE // max(1, len(states)))
    for start in range(0, len(weight), width):
        rows = weight[start : start + width].to(states.dtype)
        yield start, rows, softcap(F.linear(states, rows), cap).to(wide(states))


def inside(targets: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Which targets are among `count` ids from `start` on [n], and their columns there [n 1]: any for the others."""
    at = targets - start
    return (at >= 0) & (at < count), at.clamp(0, count - 1)[:, None]
