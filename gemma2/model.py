"""Gemma 2, whole. Read it top to bottom; nothing is defined later than it is needed, and nothing is switched by a flag.

Parameters have Hugging Face's names, so a checkpoint loads without a map. Everything that can be observed or edited is
the output of a module; where it would not be, a `Tap` with TransformerLens's name stands in its way. Shapes are in the
letters of `ops.py`. In bfloat16 and float32 the arithmetic is bit for bit that of transformers' eager Gemma 2; in
float64 everything is float64. Source of the architecture: Gemma 2 report, arXiv:2408.00118.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2 import ops
from gemma2.cache import HybridCache, LayerCache, NoCache
from gemma2.config import Gemma2Config

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [b t c] each


class Tap(nn.Identity):
    """A named place: it computes nothing, a hook on it sees or replaces what flows through."""


class SoftCap(nn.Module):
    """cap * tanh(x / cap), in x's own dtype."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        return ops.softcap(x, self.cap)


class ScaledEmbedding(nn.Module):
    """Rows of the embedding times sqrt(d), which is first rounded to the weights' dtype (9B in bfloat16: 59.75)."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.scale = config.hidden_size**0.5
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size).normal_(std=1 / self.scale))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight) * torch.tensor(self.scale, dtype=self.weight.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32 inside and rounded once. The stored weight is the gain minus one."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))
        self.hook_inv_scale = Tap()  # [b t 1]; TransformerLens's hook_scale is its reciprocal
        self.hook_normalized = Tap()  # [b t d], before the gain

    def forward(self, x: Tensor) -> Tensor:
        wide = ops.widened(x)
        normalized = self.hook_normalized(wide * self.hook_inv_scale(ops.inverse_rms(wide, self.eps)))
        return (normalized * (1.0 + ops.widened(self.weight))).to(x.dtype)


class SoftcapAttention(nn.Module):
    """From queries, keys and values to each head's output. No parameters: a faster twin can take its place."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.scale = config.query_pre_attn_scalar**-0.5
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.softcap = SoftCap(config.attn_logit_softcapping)
        self.hook_scores_raw = Tap()  # [b h t s], scaled, before the cap
        self.hook_attn_scores = Tap()  # [b h t s], capped and masked
        self.hook_pattern = Tap()  # [b h t s]
        self.hook_z = Tap()  # [b t h c]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """q [b t h c], k and v [b s g c], visible [b 1 t s] -> [b t h c]. Head i reads key/value head i // group."""
        q = q.transpose(1, 2)  # [b h t c]
        k = k.transpose(1, 2).repeat_interleave(self.group, dim=1)  # [b h s c]
        v = v.transpose(1, 2).repeat_interleave(self.group, dim=1)
        scores = self.hook_scores_raw(q @ k.transpose(2, 3) * self.scale)
        # The cap comes before the mask, and the fill is finite: a row of padding, which sees nothing, stays finite.
        scores = self.softcap(scores).masked_fill(~visible, torch.finfo(scores.dtype).min)
        pattern = ops.widened(self.hook_attn_scores(scores)).softmax(dim=-1).to(q.dtype)
        z = self.hook_pattern(pattern) @ v
        return self.hook_z(z.transpose(1, 2).contiguous())


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; `window` is None in a global layer."""

    def __init__(self, config: Gemma2Config, window: int | None) -> None:
        super().__init__()
        d, c = config.hidden_size, config.head_dim
        self.head_dim, self.window = c, window
        self.q_proj = nn.Linear(d, config.num_attention_heads * c, bias=False)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * c, bias=False)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * c, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * c, d, bias=False)
        self.hook_q, self.hook_k, self.hook_v = Tap(), Tap(), Tap()  # [b t heads c], before rotation
        self.hook_rot_q, self.hook_rot_k = Tap(), Tap()
        self.attend = SoftcapAttention(config)

    def forward(self, x: Tensor, positions: Tensor, rotation: Rotation, cache: LayerCache | NoCache) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.hook_q(self.q_proj(x).view(heads))
        k = self.hook_k(self.k_proj(x).view(heads))
        v = self.hook_v(self.v_proj(x).view(heads))
        q = self.hook_rot_q(ops.rotate(q, *rotation))
        k = self.hook_rot_k(ops.rotate(k, *rotation))
        k, v, key_positions = cache.update(k, v, positions)
        z = self.attend(q, k, v, ops.visible(positions, key_positions, self.window))
        return self.o_proj(z.flatten(2))


class MLP(nn.Module):
    """GeGLU: down(gelu(gate(x)) * up(x)), with the tanh form of GELU."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)
        self.hook_post = Tap()  # [b t f]

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.gate_proj(x), approximate="tanh")
        return self.down_proj(self.hook_post(gate * self.up_proj(x)))


class Block(nn.Module):
    """One layer. Each half is normalised going in and coming out; only the sums touch the residual stream."""

    def __init__(self, config: Gemma2Config, window: int | None) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(config, window)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.hook_resid_mid = Tap()  # [b t d]
        self.pre_feedforward_layernorm = RMSNorm(d, eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(d, eps)

    def forward(self, x: Tensor, positions: Tensor, rotation: Rotation, cache: LayerCache | NoCache) -> Tensor:
        attention = self.self_attn(self.input_layernorm(x), positions, rotation, cache)
        x = self.hook_resid_mid(x + self.post_attention_layernorm(attention))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma2Model(nn.Module):
    """Everything below the head: tokens [b t] -> the normalised residual stream [b t d]."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = ScaledEmbedding(config)
        self.layers = nn.ModuleList(Block(config, config.window(i)) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache: HybridCache | None = None) -> Tensor:
        store = cache or NoCache(self.config, tokens.device)
        following = store.next_positions(*tokens.shape)  # also refuses what would not fit
        positions = following if positions is None else positions
        x = self.embed_tokens(tokens)
        rotation = ops.rotation(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for layer, slots in zip(self.layers, store.layers, strict=True):
            x = layer(x, positions, rotation, slots)
        return self.norm(x)


class TiedHead(nn.Module):
    """The embedding read backwards: [b t d] -> [b t v], before the cap."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return F.linear(x, embedding)


class Gemma2(nn.Module):
    """Gemma 2 with its head.

    Args of `forward`:
        tokens: ids [b t], int64 or int32.
        positions: [b t]; negative marks padding, which goes on the left. Default: 0, 1, 2 ... continuing the cache.
        cache: a `HybridCache` to read and extend, or None for one pass over `tokens` alone.
    Returns:
        Logits [b t v] in the weights' dtype, within +-final_logit_softcapping.
    """

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.config = config
        self.model = Gemma2Model(config)
        self.lm_head = TiedHead()
        self.softcap = SoftCap(config.final_logit_softcapping)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [... v] of normalised hidden states [... d]; generation asks only for the last position's."""
        return self.softcap(self.lm_head(hidden, self.model.embed_tokens.weight))

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache: HybridCache | None = None) -> Tensor:
        ops.check_ids(tokens, self.config.vocab_size)
        return self.unembed(self.model(tokens, positions, cache))
