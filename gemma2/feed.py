"""What computes the logits while generating: the model itself, or a compiled or captured step in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gemma2.cache import Cache

Feed = Callable[[Tensor, Tensor], Tensor]  # ids [b t], positions [b t] -> logits [b v] of the last column
Processor = Callable[[Tensor, Tensor], Tensor]  # ids so far [b n], logits [b v] -> logits; -inf bans an id


def model_feed(model: Any, cache: Cache) -> Feed:
    """A `Feed` that calls the model, or whatever wraps it. A compiled model that has hooks inside runs eagerly while it
    has them: compiled code would pass them by."""

    def feed(ids: Tensor, positions: Tensor) -> Tensor:
        if hasattr(model, "_orig_mod") and any(map(hooked, model.modules())):
            with torch.compiler.set_stance("force_eager"):
                return model(ids, positions, cache, last=1)[:, -1]
        return model(ids, positions, cache, last=1)[:, -1]

    return feed


def hooked(module: nn.Module) -> bool:
    """Whether a forward or backward hook is set on this module itself."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
