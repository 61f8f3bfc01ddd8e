"""All the faster twins at once: what `gemma2.load(..., fast=True)` and `compile=True` put into a model."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from gemma2.fast.embedding import HeldEmbedding
from gemma2.fast.growing import GrowingCache
from gemma2.fast.layer import CompiledBlock
from gemma2.fast.linear import FastHead, FastLinear, WideAttention, WideEmbedding, WideHead, WideHeldEmbedding
from gemma2.fast.prefill import short
from gemma2.feed import any_hooked
from gemma2.model import Attention, Block, Gemma2, ScaledEmbedding, TiedHead
from gemma2.twins import replaced


def speed_up(model: Gemma2, *, compile: bool = False) -> None:
    """Put the faster twins into a model, in place. Its parameters stay the same objects under the same names.

    Args:
        compile: compile the decode step, layer by layer, for the caches that `caches_of` makes.
    """
    replaced(model, short())
    if any(_product(path, module) for path, module in model.named_modules()):
        replaced(model, _product)
    if compile:
        replaced(model, partial(_wide, dtype=model.dtype))
        replaced(model, _compiled)


class Caches:
    """Makes the caches of a compiled model. At the first one for a number of rows it computes a token that nobody sees:
    so the decode step is compiled then, and not in the middle of a text. A model that has hooks is left alone: they
    would see that token."""

    def __init__(self) -> None:
        self.compiled: set[int] = set()

    @torch.no_grad()
    def __call__(self, model: Gemma2, batch: int, capacity: int, slack: int = 0) -> GrowingCache:
        cache = GrowingCache(model, batch, capacity, slack)
        if batch not in self.compiled and not any_hooked(model):
            model(torch.zeros(batch, 1, dtype=torch.int64, device=model.device), cache=cache, last=1)
            cache.reset()
            self.compiled.add(batch)
        return cache


def caches_of(model: Gemma2) -> Caches | None:
    """What makes the caches that a model's compiled layers compute with; None for a model without any."""
    return Caches() if any(type(layer) is CompiledBlock for layer in model.model.layers) else None


def _product(path: str, module: nn.Module) -> nn.Module | None:
    if type(module) is nn.Linear:
        return FastLinear(module)
    return FastHead() if type(module) is TiedHead else None


def _wide(path: str, module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    if type(module) is ScaledEmbedding:
        return WideEmbedding(module)
    if type(module) is HeldEmbedding:
        return WideHeldEmbedding(module)
    if type(module) is FastHead:
        return WideHead()
    return WideAttention(module, dtype) if type(module) is Attention else None


def _compiled(path: str, module: nn.Module) -> nn.Module | None:
    return CompiledBlock(module) if type(module) is Block else None
