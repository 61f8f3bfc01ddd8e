"""This package: `gemma2.load`, its cache, and the feed that its generation uses."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma2.cache import Cache
from gemma2.feed import Feed, model_feed
from gemma2.gemma import Gemma
from gemma2.generate import PREFILL_CHUNK
from gemma2.load import load


class OurRunner:
    """A `Runner` over a `Gemma`. `options` are those of `gemma2.load`."""

    def __init__(self, path: Path, **options: Any) -> None:
        self._gemma = load(path, progress=False, **options)
        model = self._gemma.model
        self.versions: Mapping[str, str] = {"gemma2": version("gemma2"), "torch": str(torch.__version__)}
        self.notes = self._gemma.notes
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in chain(model.parameters(), model.buffers())
        }
        self.weights = sum(held.values())
        self.cache_bytes = model.dtype.itemsize

    def start(self, batch: int, capacity: int) -> None:
        self._feed, self._cache = feeding(self._gemma, batch, capacity)

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        ids = ids.to(self._gemma.model.device)
        for part in ids.split(PREFILL_CHUNK, dim=1):
            logits = self._feed(part, self._cache.next_positions(part))
        return logits


def feeding(gemma: Gemma, batch: int, capacity: int) -> tuple[Feed, Cache]:
    """What computes the logits while `gemma` generates, and an empty cache for it."""
    cache = gemma.new_cache(batch, capacity)
    return model_feed(gemma.model, cache), cache
