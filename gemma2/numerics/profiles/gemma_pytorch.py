"""google/gemma_pytorch, revision 014acb7: gemma/model.py."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2 import ops
from gemma2.numerics.changes import Change, replacing
from gemma2.numerics.parts import ApplyRotaryInParts, RotaryInParts, ScoresInParts

HIDDEN = -2.3819763e38  # what masked scores are added to: not quite the lowest bfloat16


def polar_cos_sin(positions: Tensor, c: int, theta: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """`torch.polar` takes cosines and sines from another library than `torch.cos`: one in twenty differs by an ulp."""
    frequency = 1.0 / (theta ** (torch.arange(0, c, 2, dtype=wide, device=positions.device) / c))
    angle = positions[..., None].to(wide) * frequency
    turn = torch.polar(torch.ones_like(angle), angle)  # [b t c/2]
    turn = torch.cat((turn, turn), dim=-1)
    return turn.real, turn.imag


def apply_rotary_wide(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As a complex product computes it."""
    return ops.apply_rotary(ops.upcast(x), cos, sin).to(x.dtype)


def scaled_queries(q: Tensor, scale: float) -> Tensor:
    return q * scale


def unscaled_scores(scores: Tensor, scale: float) -> Tensor:
    return scores


def masked(scores: Tensor, visible: Tensor) -> Tensor:
    return scores + torch.where(visible, 0.0, HIDDEN)


CHANGES = (
    Change(
        "rope_mul=float32",
        "rotation is computed in float32 and rounded once; transformers rounds cosines, sines, products and sum",
        "apply_rotary_emb",
        replacing(ApplyRotaryInParts, apply_rotary=apply_rotary_wide),
    ),
    Change(
        "rope_turn=polar",
        "cosines and sines are those of torch.polar, an ulp from torch.cos and torch.sin here and there",
        "precompute_freqs_cis",
        replacing(RotaryInParts, cos_sin=polar_cos_sin),
    ),
    Change(
        "q_scale=before",
        "rotated queries are scaled, and rounded, before they meet the keys; transformers scales the products",
        "GemmaAttention.forward, q.mul_(self.scaling)",
        replacing(ScoresInParts, scaled_queries=scaled_queries, scaled_scores=unscaled_scores),
    ),
    Change(
        "mask=-2.38e38",
        "the mask is a float32 number that is added, so scores become float32; transformers fills in a lowest",
        "GemmaForCausalLM.generate, mask_tensor",
        replacing(ScoresInParts, masked=masked),
    ),
)
