"""Files mean the same whatever the caller has set in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from gemma2.checkpoints.threads import settle

P = ParamSpec("P")
R = TypeVar("R")


def neutral(function: Callable[P, R]) -> Callable[P, R]:
    """A function during which this thread has no default device, no inference mode and no autograd.

    The default dtype is one for the whole process, so it is left alone: every tensor that files are read into states
    its own.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        settle()
        # Tensors made in inference mode could not be trained, nor written to by other threads.
        with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run
