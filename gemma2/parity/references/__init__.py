"""Other systems to hold this model against, one file each: each is a `Reference`, and imports its peer itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gemma2.config import Gemma2Config


class CannotDo(Exception):
    """A reference cannot do what was asked of it; the message says why, for people."""


class Reference(Protocol):
    """Another system with the same weights.

    Attributes:
        system: who computes, with version and what matters, as "transformers 5.23.0 eager".
        dtype: in which it computes (the narrowest that matters: float32 for llama.cpp on quantized weights).
        config: the model as this system sees it.
        versions: of what else matters, name -> version.
        sites: names of `research/sites.py` that it can show.
        longest: most ids it takes, or None.
    """

    system: str
    dtype: torch.dtype
    config: Gemma2Config
    versions: Mapping[str, str]
    sites: frozenset[str]
    longest: int | None

    def run(self, ids: Sequence[int], sites: Iterable[str]) -> dict[str, Tensor]:
        """One pass over one row: site -> value without the batch axis, on the CPU. A site that it shows only for the
        last positions may have fewer positions than ids."""

    def with_window(self, window: int) -> Reference:
        """The same with another sliding window, so that a short prompt leaves it. Raises CannotDo."""

    def cached(self, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        """Logits [t v] with the system's own cache, fed so many ids at a time (they sum to t). Raises CannotDo."""

    def batched(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits [t v] of every row, computed in one ragged batch as the system does it. Raises CannotDo."""
