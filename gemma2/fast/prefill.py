"""Fast prefill on a CPU: twins of norm, rotary embedding and feed-forward layer, and a prompt fed in pieces.

What limits these parts is how often memory is passed through, so they compute in place and a few rows at a time.

    with replaced(model, short(compiled())):
        logits = fed_in_pieces(model, cache)(ids, positions)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma2.cache import Cache
from gemma2.fast.attention import FastAttention
from gemma2.fast.kernels import STEPS, Kernels, may_reuse
from gemma2.feed import Feed, any_hooked
from gemma2.model import MLP, ApplyRotary, GELUTanh, Gemma2, RMSNorm, SoftcapAttention
from gemma2.twins import Make

ROWS = 1024  # of the feed-forward layer at once: more need memory, fewer make its products slower


class FastNorm(RMSNorm):
    """`RMSNorm` with its roundings, but for the order of the sum."""

    def __init__(self, plain: RMSNorm, kernels: Kernels = STEPS) -> None:
        nn.Module.__init__(self)
        self.kernels, self.eps, self.weight = kernels, plain.eps, plain.weight
        self.hook_inv_scale, self.hook_normalized = plain.hook_inv_scale, plain.hook_normalized

    def forward(self, x: Tensor) -> Tensor:
        if few(x) or not may_reuse((x, self.weight), (self.hook_inv_scale, self.hook_normalized)):
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        return self.kernels.normalize(rows, self.weight, self.eps).view(x.shape)


class FastRotary(ApplyRotary):
    """`ApplyRotary`, a rounding or two fewer."""

    def __init__(self, plain: ApplyRotary, kernels: Kernels = STEPS) -> None:
        super().__init__()
        self.kernels = kernels

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if few(x) or not may_reuse((x, cos, sin), ()):
            return super().forward(x, cos, sin)
        angles = cos.expand(len(x), -1, -1).flatten(0, 1), sin.expand(len(x), -1, -1).flatten(0, 1)
        return self.kernels.turn(x.flatten(0, 1), *angles).view(x.shape)


class FastMLP(MLP):
    """`MLP`, some rows at a time and in place. Where a part of it has a hook, or a gradient is wanted, it computes what
    the plain one computes."""

    def __init__(self, plain: MLP, kernels: Kernels = STEPS) -> None:
        nn.Module.__init__(self)
        self.kernels = kernels
        self.gate_proj, self.up_proj, self.down_proj = plain.gate_proj, plain.up_proj, plain.down_proj
        self.act_fn, self.hook_post = plain.act_fn, plain.hook_post

    def forward(self, x: Tensor) -> Tensor:
        if few(x):
            return super().forward(x)
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if wanted or type(self.act_fn) is not GELUTanh or not may_reuse((x,), tuple(self.modules())[1:]):
            return super().forward(x)
        parts = [self._part(part) for part in x.reshape(-1, x.shape[-1]).split(ROWS)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)

    def _part(self, rows: Tensor) -> Tensor:
        gate = self.gate_proj(rows)
        self.kernels.gate_(gate, self.up_proj(rows))
        return self.down_proj(gate)


def few(x: Tensor) -> bool:
    """Whether x [b t ...] is too short for a gain: then the plain code has less to decide."""
    return x.shape[1] == 1


def short(kernels: Kernels = STEPS) -> Make:
    """What makes the twins of this file and of `fast.attention`, for `replaced`."""
    twins = {SoftcapAttention: FastAttention, RMSNorm: FastNorm, ApplyRotary: FastRotary, MLP: FastMLP}

    def make(path: str, module: nn.Module) -> nn.Module | None:
        twin = twins.get(type(module))
        return twin(module, kernels) if twin else None

    return make


def fed_in_pieces(model: Gemma2, cache: Cache, columns: int = ROWS) -> Feed:
    """A `Feed` that computes a prompt so many columns at a time, so that what a pass needs beside the cache does not
    grow with the prompt. A model that has hooks is given the whole prompt: they see it as in one pass."""

    def feed(ids: Tensor, positions: Tensor) -> Tensor:
        size = ids.shape[1] if any_hooked(model) else columns
        pieces = list(zip(ids.split(size, dim=1), positions.split(size, dim=1), strict=True))
        for piece, at in pieces[:-1]:
            model.model(piece, at, cache)  # without the head
        return model(*pieces[-1], cache, last=1)[:, -1]

    return feed
