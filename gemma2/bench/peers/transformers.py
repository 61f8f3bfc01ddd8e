"""Hugging Face transformers, eager attention, with its own cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.load import parse_device, parse_dtype


class TransformersRunner:
    """A `Runner` over `transformers.Gemma2ForCausalLM`, fed as its `generate` feeds it: a whole prompt at once."""

    def __init__(self, path: Path, dtype: str | None = None, device: str = "cpu") -> None:
        from gemma2.parity.references.transformers import VERSION, loaded

        opened = open_checkpoint(path)
        self._device = parse_device(device)
        final = parse_dtype(dtype) or opened.weights.dtype
        self._model = loaded(opened, final, "eager").to(self._device)
        self.versions: Mapping[str, str] = {"transformers": VERSION, "torch": str(torch.__version__)}
        self.notes: tuple[str, ...] = ()
        held = {tensor.data_ptr(): tensor.nbytes for tensor in self._model.parameters()}
        self.weights = sum(held.values())
        self.cache_bytes = final.itemsize

    def start(self, batch: int, capacity: int) -> None:
        self._cache: Any = None

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        found = self._model(ids.to(self._device), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = found.past_key_values
        return found.logits[:, -1]
