"""One compiled graph for a layer's decode step, which serves all layers of its kind."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gemma2.cache import LayerStore
from gemma2.fast.compiling import compiled
from gemma2.fast.static import StaticLayer
from gemma2.feed import any_hooked
from gemma2.model import Block


class CompiledBlock(Block):
    """`Block` whose single tokens are computed by a compiled graph, where a `StaticCache` holds what came before.

    Everything else is computed as before: prompts, passes with another cache or none, passes that want a gradient, and
    those of a layer that has a hook anywhere.
    """

    def __init__(self, plain: Block) -> None:
        nn.Module.__init__(self)
        for name, child in plain.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerStore) -> Tensor:
        single = x.shape[1] == 1 and isinstance(cache, StaticLayer) and not torch.is_grad_enabled()
        if single and not any_hooked(self):
            return _layer()(self, x, positions, rotary, cache)
        return super().forward(x, positions, rotary, cache)


@functools.cache
def _layer() -> Callable[..., Tensor]:
    return compiled(Block.forward)
