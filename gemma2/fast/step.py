"""One compiled decode step, for `generate_ids(feed=...)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma2.fast.static import StaticCache
from gemma2.feed import Feed, any_hooked
from gemma2.model import Gemma2


def compiled_step(model: Gemma2, cache: StaticCache, **options: Any) -> Feed:
    """A `Feed` that computes single tokens by one compiled graph, and prompts eagerly.

        cache = StaticCache(model, batch=1, capacity=1024)
        generate_ids(model, prompts, 100, cache=cache, feed=compiled_step(model, cache))

    The graph is compiled at the first token and serves all later ones, and after `cache.reset()` other prompts too.
    Hooks do not fire inside it: while the model has any, tokens are computed eagerly.

    Args:
        options: of `torch.compile`, beside `fullgraph=True` and `dynamic=False`.
    """

    def step(ids: Tensor, positions: Tensor) -> Tensor:
        return model(ids, positions, cache, last=1)[:, -1]

    compiled = torch.compile(step, fullgraph=True, dynamic=False, **options)

    def feed(ids: Tensor, positions: Tensor) -> Tensor:
        single = ids.shape[1] == 1 and not any_hooked(model)
        return compiled(ids, positions) if single else step(ids, positions)

    return feed
