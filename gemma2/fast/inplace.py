"""Twins of norm, rotary embedding and feed-forward layer that compute in buffers, a few rows at a time, on a CPU.

What limits these parts is how often memory is passed through, and on how much of it. In a buffer that fits a core's
cache a pass in float32 is cheap; PyTorch's tanh and exp are several times faster in float32 than in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gemma2 import ops
from gemma2.feed import hooked
from gemma2.model import MLP, ApplyRotary, GELUTanh, RMSNorm

CHUNK = 1 << 18  # numbers of a buffer: in float32 they fit the second cache of a core
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

    def __init__(self, plain: RMSNorm) -> None:
        nn.Module.__init__(self)
        self.eps, self.weight = plain.eps, plain.weight
        self.hook_inv_scale, self.hook_normalized = plain.hook_inv_scale, plain.hook_normalized

    def forward(self, x: Tensor) -> Tensor:
        if not may_reuse((x, self.weight), (self.hook_inv_scale, self.hook_normalized)):
            return super().forward(x)
        d, gain = x.shape[-1], 1.0 + ops.upcast(self.weight)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rows, into in in_chunks(x.reshape(-1, d), out.view(-1, d)):
            wide = ops.upcast(rows)
            inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(d).add_(self.eps).rsqrt_()
            # a buffer of its own, or, of the same dtype, where the result goes
            into.copy_(wide.mul_(inverse).mul_(gain) if wide is not rows else wide.mul(inverse).mul_(gain))
        return out


class FastRotary(ApplyRotary):
    """`ApplyRotary` with one rounding fewer, of the second product."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not may_reuse((x, cos, sin), ()):
            return super().forward(x, cos, sin)
        half = x.shape[-1] // 2
        (first, second), out = x.chunk(2, dim=-1), torch.empty_like(x, memory_format=torch.contiguous_format)
        cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]  # every angle stands twice
        torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
        return out


class FastMLP(MLP):
    """`MLP`, some rows at a time and in place. Where a part of it has a hook, or a gradient is wanted, it computes what
    the plain one computes."""

    def __init__(self, plain: MLP) -> None:
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = plain.gate_proj, plain.up_proj, plain.down_proj
        self.act_fn, self.hook_post = plain.act_fn, plain.hook_post

    def forward(self, x: Tensor) -> Tensor:
        inside = (self.gate_proj, self.up_proj, self.down_proj, self.act_fn, self.hook_post)
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if wanted or type(self.act_fn) is not GELUTanh or not may_reuse((x,), inside):
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        parts = [self._part(part) for part in rows.split(ROWS)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)

    def _part(self, rows: Tensor) -> Tensor:
        gate = self.gate_proj(rows)
        gelu_times_(gate, self.up_proj(rows))
        return self.down_proj(gate)


def gelu_times_(gate: Tensor, up: Tensor) -> None:
    """gate becomes gelu(gate) * up, in the tanh form: both [n f]. Rounded twice, as by two operations."""
    k = math.sqrt(2 / math.pi)
    for x, y in in_chunks(gate, up):
        half = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32, copy=True).mul_(0.5)
        inner = half.square().mul_(8 * 0.044715 * k).add_(2 * k).mul_(half)
        x.copy_(half.addcmul_(half, inner.tanh_())).mul_(y)


def in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [n d] in parts of as many rows as a buffer holds."""
    step = max(1, CHUNK // tensors[0].shape[-1])
    return zip(*(x.split(step) for x in tensors), strict=True)
