"""A matrix that is not there until something computes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


class Unmade(Tensor):
    """Stands for a matrix that is held in another form: `make()` gives its values at every operation.

    Its shape, dtype and device cost nothing, so whatever asks a model's weight only for those goes on working.
    """

    make: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, make: Callable[[], Tensor]
    ) -> Unmade:
        own: Unmade = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        own.make = make
        return own

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = _pytree.tree_map_only(Unmade, lambda unmade: unmade.make(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Unmade({list(self.shape)}, {self.dtype}, {self.device})"
