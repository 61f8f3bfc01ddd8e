"""Gradient checkpointing: a layer keeps its input alone, and is computed once more for the gradient.

    with recomputed(model):  # or recomputed(model), for good
        cross_entropy(model, model.model(tokens), targets).backward()

Chen et al. 2016, arXiv:1604.06174. Gradients have the same bits; a training step takes about a third longer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemma2.cache import LayerStore, NoCache
from gemma2.model import Block, Gemma2
from gemma2.twins import replaced


class RecomputedBlock(Block):
    """A twin of `Block` with the same modules inside. A hook in it is called again when the gradient is computed."""

    def __init__(self, plain: Block) -> None:
        nn.Module.__init__(self)
        for name, child in plain.named_children():
            self.add_module(name, child)
        self.compute = type(plain).forward

    def forward(self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerStore) -> Tensor:
        if not torch.is_grad_enabled():
            return self.compute(self, x, positions, rotary, cache)
        if not isinstance(cache, NoCache):
            raise ValueError(
                "gradient checkpointing computes layers twice and takes no cache: leave the cache out, or generate "
                "under torch.no_grad()"
            )
        again: Tensor = checkpoint(self.compute, self, x, positions, rotary, cache, use_reentrant=False)
        return again


def recomputed(model: Gemma2) -> replaced[Gemma2]:
    """Put a `RecomputedBlock` in every layer's place, until `restore()` or the end of a `with`.

    Parameters, their names and the model's values stay the same. Passes without gradients, and so generation, are as
    before.

    Raises:
        ValueError: the model's layers are recomputed already, or are no `Block`s.
    """
    if any(isinstance(layer, RecomputedBlock) for layer in model.model.layers):
        raise ValueError("the layers of this model are recomputed already")
    return replaced(model, lambda path, module: RecomputedBlock(module) if isinstance(module, Block) else None)
