"""All the faster twins at once: what `gemma2.load(..., fast=True)` and `compile=True` put into a model."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from gemma2.fast.attention import FastAttention
from gemma2.fast.embedding import HeldEmbedding
from gemma2.fast.layer import CompiledBlock
from gemma2.fast.linear import FastHead, FastLinear, WideAttention, WideEmbedding, WideHeldEmbedding
from gemma2.model import Attention, Block, Gemma2, ScaledEmbedding, SoftcapAttention, TiedHead
from gemma2.twins import replaced


def speed_up(model: Gemma2, *, compile: bool = False) -> None:
    """Put the faster twins into a model, in place. Its parameters stay the same objects under the same names.

    Args:
        compile: compile the decode step, layer by layer, for a `GrowingCache`.
    """
    if any(_plain(path, module) for path, module in model.named_modules()):
        replaced(model, _plain)
    if compile:
        replaced(model, partial(_wide, dtype=model.dtype))
        replaced(model, _compiled)


def _plain(path: str, module: nn.Module) -> nn.Module | None:
    if type(module) is nn.Linear:
        return FastLinear(module)
    if type(module) is SoftcapAttention:
        return FastAttention(module)
    return FastHead() if type(module) is TiedHead else None


def _wide(path: str, module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    if type(module) is ScaledEmbedding:
        return WideEmbedding(module)
    if type(module) is HeldEmbedding:
        return WideHeldEmbedding(module)
    return WideAttention(module, dtype) if type(module) is Attention else None


def _compiled(path: str, module: nn.Module) -> nn.Module | None:
    return CompiledBlock(module) if type(module) is Block else None
