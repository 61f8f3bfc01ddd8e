"""When a twin may compute in place and into buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gemma2.feed import hooked


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
