"""Lightning-AI/litgpt 0.5.13, litgpt/model.py: one pass without its cache, whose mask is broken for Gemma 2
(litgpt#1672), and its rotary table left in float32, as `GPT(config)` makes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma2.numerics.changes import Change, Storage, replacing
from gemma2.numerics.parts import ApplyRotaryInParts, NormInParts, ScoresInParts
from gemma2.numerics.profiles.gemma_pytorch import apply_rotary_wide
from gemma2.numerics.profiles.llama_cpp import masked as hidden_by_infinity


def gain(weight: Tensor) -> Tensor:
    return 1 + weight


def hidden_by_sum(scores: Tensor, visible: Tensor) -> Tensor:
    return scores + torch.zeros_like(scores).masked_fill(~visible, torch.finfo(scores.dtype).min)


def add_masks(path: str, module: nn.Module, storage: Storage) -> None:
    if isinstance(module, ScoresInParts):
        module.masked = hidden_by_sum if module.window is None else hidden_by_infinity


CHANGES = (
    Change(
        "norm_1p=param_dtype",
        "1 + w is rounded to the weights' dtype; transformers adds in float32",
        "RMSNorm.forward",
        replacing(NormInParts, gain=gain),
    ),
    Change(
        "rope_mul=float32",
        "rotation is computed in float32 and rounded once; transformers rounds cosines, sines, products and sum",
        "apply_rope",
        replacing(ApplyRotaryInParts, apply_rotary=apply_rotary_wide),
    ),
    Change(
        "mask=added",
        "global layers add the lowest finite number to hidden scores, local ones minus infinity; transformers fills in",
        "CausalSelfAttention.forward and scaled_dot_product_attention",
        add_masks,
    ),
)
