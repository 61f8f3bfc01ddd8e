"""Twins of norm, rotary embedding and feed-forward layer for many tokens on a CPU.

What limits these parts is how often memory is passed through, so they compute in place and a few rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gemma2.fast.kernels import STEPS, Kernels
from gemma2.feed import hooked
from gemma2.model import MLP, ApplyRotary, GELUTanh, RMSNorm

ROWS = 1024  # of the feed-forward layer at once: more need memory, fewer make its products slower


def may_reuse(tensors: tuple[Tensor, ...], inside: tuple[nn.Module, ...]) -> bool:
    """Whether nobody asks for what is between `tensors` and the result: no gradient, forward or backward, no transform
    of `torch.func`, no compiler, no hook on the modules inside. Only for plain tensors on a CPU."""
    if torch.compiler.is_compiling() or any(map(hooked, inside)):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    if any(type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu" for x in tensors):
        return False
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return not transformed and forward_ad._current_level < 0


class FastNorm(RMSNorm):
    """`RMSNorm` with its roundings, but for the order of the sum."""

    def __init__(self, plain: RMSNorm, kernels: Kernels = STEPS) -> None:
        nn.Module.__init__(self)
        self.kernels, self.eps, self.weight = kernels, plain.eps, plain.weight
        self.hook_inv_scale, self.hook_normalized = plain.hook_inv_scale, plain.hook_normalized

    def forward(self, x: Tensor) -> Tensor:
        if not may_reuse((x, self.weight), (self.hook_inv_scale, self.hook_normalized)):
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        return self.kernels.normalize(rows, self.weight, self.eps).view(x.shape)


class FastRotary(ApplyRotary):
    """`ApplyRotary`, a rounding or two fewer."""

    def __init__(self, plain: ApplyRotary, kernels: Kernels = STEPS) -> None:
        super().__init__()
        self.kernels = kernels

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not may_reuse((x, cos, sin), ()):
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
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if wanted or type(self.act_fn) is not GELUTanh or not may_reuse((x,), tuple(self.modules())[1:]):
            return super().forward(x)
        parts = [self._part(part) for part in x.reshape(-1, x.shape[-1]).split(ROWS)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)

    def _part(self, rows: Tensor) -> Tensor:
        gate = self.gate_proj(rows)
        self.kernels.gate_(gate, self.up_proj(rows))
        return self.down_proj(gate)
