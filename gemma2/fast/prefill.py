"""Fast prefill on a CPU: twins of norm, rotary embedding and feed-forward layer.

What limits these parts is how often memory is passed through, so they compute in place and a few rows at a time.

    with replaced(model, short()):
        logits = model(tokens)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma2.fast.attention import FastAttention
from gemma2.fast.kernels import gate_, may_reuse, normalize, turn
from gemma2.model import MLP, ApplyRotary, GELUTanh, RMSNorm, SoftcapAttention
from gemma2.twins import Make

ROWS = 1024  # of the feed-forward layer at once: more need memory, fewer make its products slower


class FastNorm(RMSNorm):
    """`RMSNorm` with its roundings, but for the order of the sum."""

    def __init__(self, plain: RMSNorm) -> None:
        nn.Module.__init__(self)
        self.eps, self.weight = plain.eps, plain.weight
        self.hook_inv_scale, self.hook_normalized = plain.hook_inv_scale, plain.hook_normalized

    def forward(self, x: Tensor) -> Tensor:
        if few(x) or not may_reuse((x, self.weight), (self.hook_inv_scale, self.hook_normalized)):
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        return normalize(rows, self.weight, self.eps).view(x.shape)


class FastRotary(ApplyRotary):
    """`ApplyRotary`, a rounding or two fewer."""

    def __init__(self, plain: ApplyRotary) -> None:
        super().__init__()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if few(x) or not may_reuse((x, cos, sin), ()):
            return super().forward(x, cos, sin)
        angles = cos.expand(len(x), -1, -1).flatten(0, 1), sin.expand(len(x), -1, -1).flatten(0, 1)
        return turn(x.flatten(0, 1), *angles).view(x.shape)


class FastMLP(MLP):
    """`MLP`, some rows at a time and in place. Where a part of it has a hook, or a gradient is wanted, it computes what
    the plain one computes."""

    def __init__(self, plain: MLP) -> None:
        nn.Module.__init__(self)
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
        gate_(gate, self.up_proj(rows))
        return self.down_proj(gate)


def few(x: Tensor) -> bool:
    """Whether x [b t ...] is too short for a gain: then the plain code has less to decide."""
    return x.shape[1] == 1


def short() -> Make:
    """What makes the twins of this file and of `fast.attention`, for `replaced`."""
    twins = {SoftcapAttention: FastAttention, RMSNorm: FastNorm, ApplyRotary: FastRotary, MLP: FastMLP}

    def make(path: str, module: nn.Module) -> nn.Module | None:
        twin = twins.get(type(module))
        return twin(module) if twin else None

    return make
