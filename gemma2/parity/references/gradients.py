"""The gradients of a PyTorch model by its parameters, without a change of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from gemma2.ops import upcast


def gradients_of(
    model: nn.Module,
    tokens: Tensor,
    logits: Callable[[Any], Tensor] = lambda output: output,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor | None]:
    """The gradient of the mean next-token loss by each parameter, on the CPU; None where none arrives.

    Args:
        tokens: [1 t].
        logits: what of the model's output is logits [1 t v].
        dtype: to compute in; default the parameters' own.
        options: for the model, beside the tokens.
    """
    own = {name: parameter.detach().to(dtype or parameter.dtype) for name, parameter in model.named_parameters()}
    for parameter in own.values():
        parameter.requires_grad_()
    with torch.enable_grad():
        found = logits(functional_call(model, own, (tokens,), options))
        loss = F.cross_entropy(upcast(found)[0, :-1], tokens[0, 1:])
        gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
    return {name: None if gradient is None else gradient.cpu() for name, gradient in zip(own, gradients, strict=True)}
