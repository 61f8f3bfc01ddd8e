"""The model in parts: twins of its modules in which all that implementations do differently has a place of its own.

`in_parts` computes what the model computes, bit for bit, until a part is replaced. Parts are plain functions; the twins
keep the names of the modules, parameters and taps they stand for. Shapes are in the letters of `ops.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2 import ops
from gemma2.cache import LayerCache, NoCache
from gemma2.model import (
    MLP,
    Attention,
    Gemma2,
    RMSNorm,
    Rotation,
    ScaledEmbedding,
    SoftCap,
    SoftcapAttention,
    TiedHead,
)

Product = Callable[[Tensor, Tensor], Tensor]  # x [... n] and weight [m n] -> [... m]


def same(x: Tensor) -> Tensor:
    return x


def rounded_scale(scale: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(scale, dtype=dtype)


def multiplied(x: Tensor, weight: Tensor) -> Tensor:
    """In x's dtype, which is float64 where a product of `received` activations must be exact. What those have beside
    their values, after them, is left out."""
    return F.linear(x[..., : weight.shape[-1]], weight.to(x.dtype))


def divided(x: Tensor, cap: float) -> Tensor:
    return x / cap


def inverse_scale(x: Tensor, eps: float) -> Tensor:
    return ops.inverse_rms(ops.widened(x), eps)


def normalized(x: Tensor, inverse: Tensor) -> Tensor:
    return ops.widened(x) * inverse


def gain(weight: Tensor) -> Tensor:
    return 1.0 + ops.widened(weight)


def turns(positions: Tensor, c: int, theta: float, wide: torch.dtype) -> Rotation:
    return ops.rotation(positions, c, theta, wide)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ops.rotate(x, cos.to(x.dtype), sin.to(x.dtype))


def unscaled(q: Tensor, scale: float) -> Tensor:
    return q


def matched(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(2, 3)


def scaled_scores(scores: Tensor, scale: float) -> Tensor:
    return scores * scale


def masked(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min)


def softmaxed(scores: Tensor, dtype: torch.dtype) -> Tensor:
    return ops.widened(scores).softmax(dim=-1).to(dtype)


def mixed(pattern: Tensor, v: Tensor) -> Tensor:
    return pattern @ v


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


class EmbeddingInParts(ScaledEmbedding):
    def __init__(self, plain: ScaledEmbedding) -> None:
        nn.Module.__init__(self)
        self.scale, self.weight = plain.scale, plain.weight
        self.stream, self.rounded_scale = same, rounded_scale

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.stream(F.embedding(tokens, self.weight))
        scale = self.rounded_scale(self.scale, self.weight.dtype)
        return (ops.widened(rows) * ops.widened(scale)).to(rows.dtype)


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
    def __init__(self) -> None:
        super().__init__()
        self.received: Callable[[Tensor], Tensor] = same
        self.product: Product = multiplied

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.product(self.received(x), embedding).to(x.dtype)


class CapInParts(SoftCap):
    def __init__(self, plain: SoftCap) -> None:
        super().__init__(plain.cap)
        self.divided, self.tanh = divided, torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        return self.tanh(self.divided(x, self.cap)) * self.cap


class ScoresInParts(SoftcapAttention):
    def __init__(self, plain: SoftcapAttention) -> None:
        nn.Module.__init__(self)
        self.scale, self.group = plain.scale, plain.group
        self.softcap = CapInParts(plain.softcap)
        self.hook_scores_raw, self.hook_attn_scores = plain.hook_scores_raw, plain.hook_attn_scores
        self.hook_pattern, self.hook_z = plain.hook_pattern, plain.hook_z
        self.scaled_queries, self.product, self.scaled_scores = unscaled, matched, scaled_scores
        self.masked, self.softmaxed, self.mixed = masked, softmaxed, mixed

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        dtype = q.dtype
        q = self.scaled_queries(q, self.scale).transpose(1, 2)
        k = k.transpose(1, 2).repeat_interleave(self.group, dim=1)
        v = v.transpose(1, 2).repeat_interleave(self.group, dim=1)
        scores = self.softcap(self.hook_scores_raw(self.scaled_scores(self.product(q, k), self.scale)))
        pattern = self.softmaxed(self.hook_attn_scores(self.masked(scores, visible)), dtype)
        z = self.mixed(self.hook_pattern(pattern), v)
        return self.hook_z(z.transpose(1, 2).contiguous())


class AttentionInParts(Attention):
    def __init__(self, plain: Attention, theta: float) -> None:
        nn.Module.__init__(self)
        self.head_dim, self.window, self.theta = plain.head_dim, plain.window, theta
        self.q_proj, self.k_proj = LinearInParts(plain.q_proj), LinearInParts(plain.k_proj)  # type: ignore[assignment]
        self.v_proj, self.o_proj = LinearInParts(plain.v_proj), LinearInParts(plain.o_proj)  # type: ignore[assignment]
        self.hook_q, self.hook_k, self.hook_v = plain.hook_q, plain.hook_k, plain.hook_v
        self.hook_rot_q, self.hook_rot_k = plain.hook_rot_q, plain.hook_rot_k
        self.attend = ScoresInParts(plain.attend)
        self.turns, self.rotated = turns, rotated

    def forward(self, x: Tensor, positions: Tensor, rotation: Rotation, cache: LayerCache | NoCache) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.hook_q(self.q_proj(x).view(heads))
        k = self.hook_k(self.k_proj(x).view(heads))
        v = self.hook_v(self.v_proj(x).view(heads))
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = self.turns(positions, self.head_dim, self.theta, wide)
        q, k = self.hook_rot_q(self.rotated(q, cos, sin)), self.hook_rot_k(self.rotated(k, cos, sin))
        k, v, key_positions = cache.update(k, v, positions)
        z = self.attend(q, k, v, ops.visible(positions, key_positions, self.window))
        return self.o_proj(z.flatten(2))


class MLPInParts(MLP):
    def __init__(self, plain: MLP) -> None:
        nn.Module.__init__(self)
        self.gate_proj = LinearInParts(plain.gate_proj)  # type: ignore[assignment]
        self.up_proj = LinearInParts(plain.up_proj)  # type: ignore[assignment]
        self.down_proj = LinearInParts(plain.down_proj)  # type: ignore[assignment]
        self.hook_post = plain.hook_post
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.hook_post(self.gated(self.gate_proj(x), self.up_proj(x))))


def in_parts(model: Gemma2) -> Gemma2:
    """Put the twins into `model` itself, and return it."""
    inner = model.model
    inner.embed_tokens = EmbeddingInParts(inner.embed_tokens)
    for layer in inner.layers:
        assert isinstance(layer.self_attn, Attention) and isinstance(layer.mlp, MLP)
        layer.self_attn = AttentionInParts(layer.self_attn, model.config.rope_theta)
        layer.mlp = MLPInParts(layer.mlp)
        for name, child in list(layer.named_children()):
            if isinstance(child, RMSNorm):
                setattr(layer, name, NormInParts(child))
    inner.norm = NormInParts(inner.norm)
    model.lm_head = HeadInParts()
    model.softcap = CapInParts(model.softcap)
    return model
