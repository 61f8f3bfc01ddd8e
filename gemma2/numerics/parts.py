"""The model in parts: twins of its leaves in which every operation that implementations do differently is a function of
its own.

`replaced(model, in_parts)` computes what the model computes, bit for bit, until such a function is replaced. The twins
keep the names of the parameters and taps they stand for. Shapes are in the letters of `ops.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2 import ops
from gemma2.model import (
    ApplyRotary,
    GELUTanh,
    RMSNorm,
    RotaryEmbedding,
    ScaledEmbedding,
    SoftCap,
    SoftcapAttention,
    TiedHead,
)
from gemma2.tied import check_same_device
from gemma2.tokens import check_tokens

Product = Callable[[Tensor, Tensor], Tensor]  # x [... n] and weight [m n] -> [... m]


def same(x: Tensor) -> Tensor:
    return x


def rounded_scale(scale: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(scale, dtype=dtype, device="cpu")


def multiplied(x: Tensor, weight: Tensor) -> Tensor:
    """In x's dtype, which is float64 where a product of `received` activations must be exact. What those have beside
    their values, after them, is left out."""
    return F.linear(x[..., : weight.shape[-1]], weight.to(x.dtype))


def divided(x: Tensor, cap: float) -> Tensor:
    return x / cap


def inverse_scale(x: Tensor, eps: float) -> Tensor:
    return ops.inverse_rms(ops.upcast(x), eps)


def normalized(x: Tensor, inverse: Tensor) -> Tensor:
    return ops.upcast(x) * inverse


def gain(weight: Tensor) -> Tensor:
    return 1.0 + ops.upcast(weight)


def cos_sin(positions: Tensor, c: int, theta: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    return ops.cos_sin(positions, ops.frequencies(c, theta, wide).to(positions.device), wide)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ops.apply_rotary(x, cos.to(x.dtype), sin.to(x.dtype))


def unscaled(q: Tensor, scale: float) -> Tensor:
    return q


def matched(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(2, 3)


def scaled_scores(scores: Tensor, scale: float) -> Tensor:
    return scores * scale


def masked(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min)


def softmaxed(scores: Tensor, dtype: torch.dtype) -> Tensor:
    return ops.upcast(scores).softmax(dim=-1).to(dtype)


def mixed(pattern: Tensor, v: Tensor) -> Tensor:
    return pattern @ v


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class EmbeddingInParts(ScaledEmbedding):
    def __init__(self, plain: ScaledEmbedding) -> None:
        nn.Module.__init__(self)
        self.scale, self.weight = plain.scale, plain.weight
        self.stream, self.rounded_scale = same, rounded_scale

    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens(tokens, len(self.weight))
        rows = self.stream(F.embedding(tokens, self.weight))
        scale = self.rounded_scale(self.scale, self.weight.dtype)
        return (ops.upcast(rows) * ops.upcast(scale)).to(rows.dtype)


class NormInParts(RMSNorm):
    def __init__(self, plain: RMSNorm) -> None:
        nn.Module.__init__(self)
        self.eps, self.weight = plain.eps, plain.weight
        self.hook_inv_scale, self.hook_normalized = plain.hook_inv_scale, plain.hook_normalized
        self.inverse_scale, self.normalized, self.gain = inverse_scale, normalized, gain

    def forward(self, x: Tensor) -> Tensor:
        inverse = self.hook_inv_scale(self.inverse_scale(x, self.eps))
        return (self.hook_normalized(self.normalized(x, inverse)) * self.gain(self.weight)).to(x.dtype)


class LinearInParts(nn.Module):
    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.weight = plain.weight
        self.received: Callable[[Tensor], Tensor] = same
        self.product: Product = multiplied

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.received(x), self.weight).to(x.dtype)


class HeadInParts(TiedHead):
    def __init__(self, plain: TiedHead) -> None:
        super().__init__()
        self.received: Callable[[Tensor], Tensor] = same
        self.product: Product = multiplied

    def forward(self, x: Tensor, embedding: ScaledEmbedding) -> Tensor:
        check_same_device(x, embedding.weight)
        return self.product(self.received(x), embedding.weight).to(x.dtype)


class CapInParts(SoftCap):
    def __init__(self, plain: SoftCap) -> None:
        super().__init__(plain.cap)
        self.divided, self.tanh = divided, torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        return self.tanh(self.divided(x, self.cap)) * self.cap


class ScoresInParts(SoftcapAttention):
    def __init__(self, plain: SoftcapAttention) -> None:
        nn.Module.__init__(self)
        self.scale, self.group, self.window = plain.scale, plain.group, plain.window
        self.softcap = CapInParts(plain.softcap)
        self.hook_key_positions = plain.hook_key_positions
        self.hook_scores_raw, self.hook_attn_scores = plain.hook_scores_raw, plain.hook_attn_scores
        self.hook_pattern, self.hook_z = plain.hook_pattern, plain.hook_z
        self.scaled_queries, self.product, self.scaled_scores = unscaled, matched, scaled_scores
        self.masked, self.softmaxed, self.mixed = masked, softmaxed, mixed
        self.steps = attended  # all of the above

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, key_positions: Tensor) -> Tensor:
        return self.steps(self, q, k, v, positions, key_positions)


def attended(part: ScoresInParts, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, key_positions: Tensor) -> Tensor:
    visible = ops.visible(positions, part.hook_key_positions(key_positions), part.window)
    dtype = q.dtype
    q = part.scaled_queries(q, part.scale).transpose(1, 2)
    k = k.transpose(1, 2).repeat_interleave(part.group, dim=1)
    v = v.transpose(1, 2).repeat_interleave(part.group, dim=1)
    scores = part.softcap(part.hook_scores_raw(part.scaled_scores(part.product(q, k), part.scale)))
    pattern = part.softmaxed(part.hook_attn_scores(part.masked(scores, visible)), dtype)
    z = part.mixed(part.hook_pattern(pattern), v)
    return part.hook_z(z.transpose(1, 2).contiguous())


class RotaryInParts(RotaryEmbedding):
    def __init__(self, plain: RotaryEmbedding) -> None:
        nn.Module.__init__(self)
        self.width, self.theta = plain.width, plain.theta
        self.cos_sin = cos_sin

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """In float32 (float64 for float64): `ApplyRotaryInParts` rounds them, or not."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return self.cos_sin(positions, self.width, self.theta, wide)


class ApplyRotaryInParts(ApplyRotary):
    def __init__(self, plain: ApplyRotary) -> None:
        super().__init__()
        self.apply_rotary = apply_rotary

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.apply_rotary(x, cos, sin)


class ActivationInParts(GELUTanh):
    def __init__(self, plain: GELUTanh) -> None:
        super().__init__()
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.gelu(x)


TWINS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    ScaledEmbedding: EmbeddingInParts,
    RotaryEmbedding: RotaryInParts,
    RMSNorm: NormInParts,
    nn.Linear: LinearInParts,
    ApplyRotary: ApplyRotaryInParts,
    SoftcapAttention: ScoresInParts,
    GELUTanh: ActivationInParts,
    TiedHead: HeadInParts,
    SoftCap: CapInParts,
}


def in_parts(path: str, module: nn.Module) -> nn.Module | None:
    """A leaf's twin in parts; None for containers and taps."""
    twin = TWINS.get(type(module))
    return twin(module) if twin else None
