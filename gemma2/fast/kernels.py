"""The arithmetic between the products: norm, rotation, gate, exponentials of capped scores.

Each is one function of tensors, in two forms: in steps through a buffer that fits a core's cache, and as one expression
for a compiler, which makes one loop of it. Both have the roundings of the model, or fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gemma2 import ops
from gemma2.feed import hooked

CHUNK = 1 << 18  # numbers of a buffer: more leave the second cache of a core, fewer cost more calls
FEWEST = 16  # rows that compiled code is called for


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


class Kernels(NamedTuple):
    """One form of each function."""

    normalize: Callable[[Tensor, Tensor, float], Tensor]  # x [n d], weight [d], eps -> [n d]
    turn: Callable[[Tensor, Tensor, Tensor], Tensor]  # x [n heads c], cos and sin [n c] -> [n heads c]
    gate_: Callable[[Tensor, Tensor], Any]  # gate, up [n f]: gate becomes gelu(gate) * up
    exponential_: Callable[[Tensor, float], Any]  # scores / cap [n s], cap: become exp(cap * tanh(scores / cap))


def normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    gain, out = 1.0 + ops.upcast(weight), torch.empty_like(x)
    for rows, into in _in_chunks(x, out):
        wide = _wide(rows)
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        into.copy_(wide.mul_(inverse).mul_(gain))
    return out


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x.chunk(2, dim=-1)
    cos, sin, out = cos[:, None, :half], sin[:, None, :half], torch.empty_like(x)  # every angle stands twice
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


def gate_(gate: Tensor, up: Tensor) -> None:
    k = math.sqrt(2 / math.pi)
    for x, y in _in_chunks(gate, up):
        half = _wide(x).mul_(0.5)
        inner = half.square().mul_(8 * 0.044715 * k).add_(2 * k).mul_(half)
        x.copy_(half.addcmul_(half, inner.tanh_())).mul_(y)


def exponential_(x: Tensor, cap: float) -> None:
    for (part,) in _in_chunks(x):
        if part.dtype in (torch.float32, torch.float64):
            part.tanh_().mul_(cap).exp_()
        else:  # PyTorch's tanh and exp are several times faster in float32 than in bfloat16
            part.copy_(part.float().tanh_().mul_(cap).exp_())


STEPS = Kernels(normalize, turn, gate_, exponential_)


def _wide(x: Tensor) -> Tensor:
    """A copy in the dtype to compute in."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32, copy=True)


def _in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    step = max(1, CHUNK // tensors[0].shape[-1])
    return zip(*(x.split(step) for x in tensors), strict=True)


def compiled() -> Kernels:
    """The same functions as loops that `torch.compile` writes, when each is first called; two seconds each, and less
    where its cache has them. They serve any number of rows."""
    return Kernels(
        _loop(_normalize, normalize, 1),
        _loop(_turn, turn, 3),
        _loop(_gate, gate_, 2),
        _loop(_exponential, exponential_, 1),
    )


def _normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = ops.upcast(x)
    return (wide * ops.inverse_rms(wide, eps) * (1.0 + ops.upcast(weight))).to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ops.apply_rotary(x[None], cos[None], sin[None])[0]


def _gate(gate: Tensor, up: Tensor) -> None:
    x = ops.upcast(gate)  # x / (1 + exp(-2 z)) is x / 2 (1 + tanh z), without the slow tanh
    z = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    gate.copy_((x / (1 + torch.exp(-2 * z))).to(gate.dtype) * up)


def _exponential(x: Tensor, cap: float) -> None:
    x.copy_(torch.exp(cap - 2 * cap / (1 + torch.exp(2 * ops.upcast(x)))))  # cap - 2 cap / (1 + exp 2x) is cap tanh x


def _loop(expression: Callable[..., Any], steps: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """`expression` compiled once for all lengths of its first `rows` arguments; `steps` where these are short."""
    loop = torch.compile(expression, fullgraph=True)

    def call(*args: Any) -> Any:
        if len(args[0]) < FEWEST:
            return steps(*args)
        for x in args[:rows]:
            torch._dynamo.mark_dynamic(x, 0)
        if steps is exponential_:
            torch._dynamo.mark_dynamic(args[0], 1)
        return loop(*args)

    return call
