"""What computes the logits while generating: the model itself, or a compiled or captured step in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gemma2.cache import Cache
from gemma2.ops import upcast

Feed = Callable[[Tensor, Tensor], Tensor]  # ids [b t], positions [b t] -> logits [b v] of the last column
Processor = Callable[[Tensor, Tensor], Tensor]  # ids so far [b n], logits [b v] -> logits; -inf bans an id


def model_feed(model: Any, cache: Cache) -> Feed:
    """A `Feed` that calls the model, or whatever wraps it. A compiled model that has hooks inside runs eagerly while it
    has them: compiled code would pass them by."""

    def feed(ids: Tensor, positions: Tensor) -> Tensor:
        if hasattr(model, "_orig_mod") and any_hooked(model):
            with torch.compiler.set_stance("force_eager"):
                return model(ids, positions, cache, last=1)[:, -1]
        return model(ids, positions, cache, last=1)[:, -1]

    return feed


def parse_processors(processors: Iterable[Processor]) -> list[Processor]:
    """The processors as a list. Raises ValueError for anything but several functions."""
    found = list(processors) if isinstance(processors, Iterable) else [None]
    if not all(map(callable, found)):
        raise ValueError(f"processors must be a list of functions (ids, logits) -> logits, not {processors!r}")
    return found


def processed(processors: Iterable[Processor], ids: Tensor, logits: Tensor) -> Tensor:
    """Logits [b v] after each processor in turn, in float32 (float64 stays), and in a tensor of their own: some write
    into what they get, and a hook may hold it. Raises ValueError for what is no logits of this shape."""
    for number, process in enumerate(processors):
        found = process(ids, logits if number else upcast(logits).clone())
        if not isinstance(found, Tensor) or found.shape != logits.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"processor {number} must return logits {list(logits.shape)}, not {shape}")
        logits = found
    return logits


def any_hooked(module: nn.Module) -> bool:
    """Whether a hook is set on a module or anywhere inside it. `modules()` takes three times as long."""
    left = [module]
    while left:
        one = left.pop()
        if hooked(one):
            return True
        left.extend(child for child in one._modules.values() if child is not None)
    return False


def hooked(module: nn.Module) -> bool:
    """Whether a forward or backward hook is set on this module itself."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
