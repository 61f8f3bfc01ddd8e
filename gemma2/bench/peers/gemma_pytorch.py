"""google/gemma_pytorch, from a folder with its source, whose code is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.load import parse_dtype
from gemma2.parity.references.gemma_pytorch import MASKED, GemmaPyTorch


class GemmaPyTorchRunner:
    """A `Runner` over its `GemmaForCausalLM`, fed as its `generate` feeds it: masks and caches of full size are made
    once, and it chooses an id itself at every step."""

    def __init__(self, path: Path, folder: str, dtype: str | None = None) -> None:
        opened = open_checkpoint(path)
        final = parse_dtype(dtype) or opened.weights.dtype
        reference = GemmaPyTorch(Path(folder), opened, final)
        self._model, self._dtype, self._config = reference.model, final, opened.config
        self.versions: Mapping[str, str] = dict(reference.versions)
        self.notes: tuple[str, ...] = ()
        held = {tensor.data_ptr(): tensor.nbytes for tensor in self._model.parameters()}
        self.weights = sum(held.values())
        self.cache_bytes = final.itemsize

    def start(self, batch: int, capacity: int) -> None:
        config = self._config
        shape = (2, batch, capacity, config.num_key_value_heads, config.head_dim)
        self._caches = [
            tuple(torch.zeros(shape, dtype=self._dtype, device="cpu")) for _ in range(config.num_hidden_layers)
        ]
        hidden = torch.full((1, 1, capacity, capacity), MASKED, dtype=torch.float32, device="cpu")
        self._mask = hidden.triu(1)
        self._local = self._mask + hidden.tril(-config.sliding_window)
        self._fed = 0

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        t = ids.shape[1]
        positions = torch.arange(self._fed, self._fed + t, device="cpu")
        _, logits = self._model(
            input_token_ids=ids,
            input_positions=positions,
            kv_write_indices=None,
            kv_caches=self._caches,
            mask=self._mask.index_select(2, positions),
            output_positions=torch.tensor([t - 1], device="cpu"),
            temperatures=None,
            top_ps=None,
            top_ks=None,
            local_mask=self._local.index_select(2, positions),
        )
        self._fed += t
        return logits
