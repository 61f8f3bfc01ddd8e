"""Gemma 2, whole. Read it top to bottom; nothing is defined later than it is needed, and nothing is switched by a flag.

Parameters have Hugging Face's names, so a checkpoint loads without a map. Everything that can be observed or edited is
the output of a module; where it would not be, a `Tap` with TransformerLens's name stands in its way. Shapes are in the
letters of `ops.py`. In bfloat16 and float32 the arithmetic is bit for bit that of transformers' eager Gemma 2; in
float64 everything is float64. Source of the architecture: Gemma 2 report, arXiv:2408.00118.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2 import ops
from gemma2.cache import Cache, LayerStore, NoCache
from gemma2.config import Gemma2Config
from gemma2.tied import check_same_device, drop_equal_head
from gemma2.tokens import check_last, check_tokens
from gemma2.warmup import warm_up


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
        check_tokens(tokens, len(self.weight))
        return F.embedding(tokens, self.weight) * torch.tensor(self.scale, dtype=self.weight.dtype, device="cpu")


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32 inside and rounded once. The stored weight is the gain minus one."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))
        self.hook_inv_scale = Tap()  # [b t 1]; TransformerLens's hook_scale is its reciprocal
        self.hook_normalized = Tap()  # [b t d], before the gain

    def forward(self, x: Tensor) -> Tensor:
        wide = ops.upcast(x)
        normalized = self.hook_normalized(wide * self.hook_inv_scale(ops.inverse_rms(wide, self.eps)))
        return (normalized * (1.0 + ops.upcast(self.weight))).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Positions [b t] -> cosines and sines of their angles, [b t c] each, for all layers of a pass."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        warm_up()  # else the first cosines of a process may be wrong
        self.width, self.theta = config.head_dim, config.rope_theta
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", ops.frequencies(self.width, self.theta, torch.float32), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequency = self.inv_freq
        if dtype == torch.float64:  # the dtype of truth has frequencies of its own
            frequency = ops.frequencies(self.width, self.theta, dtype)
        return ops.cos_sin(positions, frequency.to(positions.device), dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        # The frequencies move with the model but keep their dtype: bfloat16 would put far positions a radian off.
        return super()._apply(lambda x: ops.frequencies(self.width, self.theta, x.dtype).to(fn(x).device), recurse)


class ApplyRotary(nn.Module):
    """Turn queries or keys [b t heads c] by their positions' angles."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ops.apply_rotary(x, cos, sin)


class SoftcapAttention(nn.Module):
    """From queries, keys and values to each head's output. No parameters: a faster twin can take its place."""

    def __init__(self, config: Gemma2Config, window: int | None) -> None:
        super().__init__()
        self.window = window  # None in a global layer
        self.scale = config.query_pre_attn_scalar**-0.5
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.softcap = SoftCap(config.attn_logit_softcapping)
        self.hook_key_positions = Tap()  # [b s]: the s axis is in the order of the cache's slots, not of positions
        self.hook_scores_raw = Tap()  # [b h t s], scaled, before the cap
        self.hook_attn_scores = Tap()  # [b h t s], capped and masked
        self.hook_pattern = Tap()  # [b h t s]
        self.hook_z = Tap()  # [b t h c]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, key_positions: Tensor) -> Tensor:
        """q [b t h c], k and v [b s g c], positions [b t] and [b s] -> [b t h c]. Head i reads key head i // group."""
        visible = ops.visible(positions, self.hook_key_positions(key_positions), self.window)
        q = q.transpose(1, 2)  # [b h t c]
        k = k.transpose(1, 2).repeat_interleave(self.group, dim=1)  # [b h s c]
        v = v.transpose(1, 2).repeat_interleave(self.group, dim=1)
        scores = self.hook_scores_raw(q @ k.transpose(2, 3) * self.scale)
        # The cap comes before the mask, and the fill is finite: a row of padding, which sees nothing, stays finite.
        scores = self.softcap(scores).masked_fill(~visible, torch.finfo(scores.dtype).min)
        pattern = ops.upcast(self.hook_attn_scores(scores)).softmax(dim=-1).to(q.dtype)
        z = self.hook_pattern(pattern) @ v
        return self.hook_z(z.transpose(1, 2).contiguous())


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; `window` is None in a global layer."""

    def __init__(self, config: Gemma2Config, window: int | None) -> None:
        super().__init__()
        d, c = config.hidden_size, config.head_dim
        self.head_dim = c
        self.q_proj = nn.Linear(d, config.num_attention_heads * c, bias=False)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * c, bias=False)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * c, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * c, d, bias=False)
        self.hook_q, self.hook_k, self.hook_v = Tap(), Tap(), Tap()  # [b t heads c], before rotation
        self.apply_rotary = ApplyRotary()
        self.hook_rot_q, self.hook_rot_k = Tap(), Tap()
        self.attend = SoftcapAttention(config, window)

    def forward(self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerStore) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.hook_q(self.q_proj(x).view(heads))
        k = self.hook_k(self.k_proj(x).view(heads))
        v = self.hook_v(self.v_proj(x).view(heads))
        q = self.hook_rot_q(self.apply_rotary(q, *rotary))
        k = self.hook_rot_k(self.apply_rotary(k, *rotary))
        k, v, key_positions = cache.update(k, v, positions)
        z = self.attend(q, k, v, positions, key_positions)
        return self.o_proj(z.flatten(2))


class GELUTanh(nn.Module):
    """The tanh form of GELU. Hendrycks & Gimpel 2016, arXiv:1606.08415."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """GeGLU: down(gelu(gate(x)) * up(x))."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)
        self.act_fn = GELUTanh()
        self.hook_post = Tap()  # [b t f]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.hook_post(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Block(nn.Module):
    """One layer. Each half is normalised going in and coming out; only the sums touch the residual stream."""

    def __init__(self, config: Gemma2Config, window: int | None) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.hook_resid_pre = Tap()  # [b t d]
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(config, window)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.hook_resid_mid = Tap()  # [b t d]
        self.pre_feedforward_layernorm = RMSNorm(d, eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(d, eps)

    def forward(self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerStore) -> Tensor:
        x = self.hook_resid_pre(x)
        attention = self.self_attn(self.input_layernorm(x), positions, rotary, cache)
        x = self.hook_resid_mid(x + self.post_attention_layernorm(attention))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma2Model(nn.Module):
    """Everything below the head: tokens [b t] -> the normalised residual stream [b t d]."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = ScaledEmbedding(config)
        self.rotary_emb = RotaryEmbedding(config)
        self.layers = nn.ModuleList(Block(config, config.window(i)) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        store = NoCache(self.config) if cache is None else cache
        x = self.embed_tokens(tokens)
        positions = store.next_positions(tokens, positions)  # also refuses what would not fit
        rotary = self.rotary_emb(positions, x.dtype)
        for layer, slots in zip(self.layers, store.layers, strict=True):
            x = layer(x, positions, rotary, slots)
        return self.norm(x)


class TiedHead(nn.Module):
    """The embedding read backwards: [b t d] -> [b t v], before the cap. It is given the embedding's module."""

    def forward(self, x: Tensor, embedding: ScaledEmbedding) -> Tensor:
        check_same_device(x, embedding.weight)
        return F.linear(x, embedding.weight)


class Gemma2(nn.Module):
    """Gemma 2 with its head.

    Args of `forward`:
        tokens: ids [b t], int64 or int32.
        positions: [b t]; negative marks padding, which goes on the left. Default: 0, 1, 2 ... or, with a cache, those
            that follow in each row. `gemma2.left_padded` makes tokens and positions from rows of unequal length.
        cache: a `HybridCache` to read and extend, or None for one pass over `tokens` alone.
        last: compute logits for so many of the last positions only; default all.
    Returns:
        Logits [b t v] in the weights' dtype, within +-final_logit_softcapping; [b last v] where `last` is given.
    """

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.config = config
        self.model = Gemma2Model(config)
        self.lm_head = TiedHead()
        self.softcap = SoftCap(config.final_logit_softcapping)
        self.register_load_state_dict_pre_hook(drop_equal_head)  # transformers' state_dict() has `lm_head.weight` too

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: Cache | None = None, last: int | None = None
    ) -> Tensor:
        check_last(last, tokens)
        hidden = self.model(tokens, positions, cache)
        hidden = hidden if last is None else hidden[:, -last:]
        return self.softcap(self.lm_head(hidden, self.model.embed_tokens))

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and so where token ids go."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding."""
        return self.model.embed_tokens.weight.dtype
