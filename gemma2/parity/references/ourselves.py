"""This model again, with another dtype, device, numerics profile or checkpoint (a quantized one, say)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from gemma2.cache import HybridCache
from gemma2.checkpoints.checkpoint import Checkpoint
from gemma2.checkpoints.dtypes import RUNNABLE, dtype_name
from gemma2.checkpoints.weights import build, shapes_of
from gemma2.config import Gemma2Config
from gemma2.load import parse_device
from gemma2.model import Gemma2
from gemma2.numerics import GGML, stored_kinds, with_numerics
from gemma2.numerics.changes import Kinds, Stored
from gemma2.parity.references import check_row, check_sites, left_padded, open_local, spans
from gemma2.research.capture import capture
from gemma2.research.sites import sites as all_sites

KEYS = ("dtype", "device", "numerics", "model")
WIDE = "llama.cpp"  # the profile whose activations are float32 whatever the weights are


def open_ourselves(spec: str, opened: Checkpoint, dtype: torch.dtype | None) -> Ourselves:
    """From `dtype=float32,device=cpu,numerics=gemma_pytorch,model=PATH`, any of these; the rest is as in `opened`.

    Raises:
        ValueError: another key, or a value that there is not.
        BadModelFile: the other checkpoint is not a Gemma 2.
    """
    asked: dict[str, str] = {}
    for part in re.split(rf",(?=(?:{'|'.join(KEYS)})=)", spec) if spec else []:
        key, equals, value = part.partition("=")
        if key not in KEYS or not equals or not value or key in asked:
            raise ValueError(f"self:{spec}: give {', '.join(f'{known}=...' for known in KEYS)}, each once, or none")
        asked[key] = value
    if "model" in asked:
        opened = open_local(Path(asked["model"]).expanduser())
    if "dtype" in asked:
        if asked["dtype"] not in RUNNABLE:
            raise ValueError(f"self:{spec}: dtype is not one of {', '.join(RUNNABLE)}")
        dtype = RUNNABLE[asked["dtype"]]
    return Ourselves(opened, dtype, asked.get("device", "cpu"), asked.get("numerics"))


class Ourselves:
    """A `Reference` over this package's own model.

    Args:
        dtype: default the checkpoint's, and float32 for a GGUF under llama.cpp's numerics, which dequantises to that.
        numerics: a profile of `gemma2/numerics/__init__.py`; default the model as it is.
        kinds: how llama.cpp's numerics take each parameter to be stored; default as the checkpoint has it, or as its
            dtype is called in ggml.
    Raises:
        ValueError: a device that is not here, or an unknown profile.
    """

    kinds: Kinds | None

    def __init__(
        self,
        opened: Checkpoint,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        numerics: str | None = None,
        kinds: Kinds | None = None,
    ) -> None:
        self.kinds = kinds or stored_kinds(opened.weights)
        if dtype is None:
            dtype = torch.float32 if self.kinds and numerics == WIDE else opened.weights.dtype
        self._device = parse_device(device)
        if numerics == WIDE and self.kinds is None:
            self.kinds = {name: Stored(GGML.get(dtype, "F32")) for name in shapes_of(opened.config)}
        self._numerics = numerics
        plain = build(opened.weights, opened.config, self._device, dtype, progress=False)
        self._arrange(plain, opened.config)
        said = f"gemma2 {version('gemma2')} in {dtype_name(dtype)} on {device}"
        self.system = f"{said}, numerics {numerics}" if numerics else said
        self.dtype = torch.float32 if numerics == WIDE else dtype
        self.versions: Mapping[str, str] = {"gemma2": version("gemma2"), "torch": torch.__version__}
        self.sites = frozenset(all_sites(opened.config))
        self.longest: int | None = opened.config.max_position_embeddings

    @property
    def model(self) -> Gemma2:
        """The model without any profile."""
        return self._plain

    @property
    def computing(self) -> Gemma2:
        """The model with the profile's arithmetic; without one it is `model`."""
        return self._model

    @torch.no_grad()
    def run(self, ids: Sequence[int], sites: Iterable[str]) -> dict[str, Tensor]:
        tokens, wanted = check_row(self, ids), check_sites(self, sites)
        with capture(self._model, wanted) as seen:
            self._model(tokens.to(self._device))
        return {name: seen[name][0].cpu() for name in wanted}

    def with_window(self, window: int) -> Ourselves:
        other = copy(self)
        other._arrange(self._plain, replace(self.config, sliding_window=window))
        return other

    @torch.no_grad()
    def cached(self, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        tokens = check_row(self, ids).to(self._device)
        cache = HybridCache(self.config, 1, len(ids), self.dtype, self._device)
        parts = [self._model(tokens[:, start:stop], cache=cache) for start, stop in spans(ids, chunks)]
        return torch.cat(parts, dim=1)[0].cpu()

    @torch.no_grad()
    def batched(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        for row in rows:
            check_row(self, row)
        tokens, positions = left_padded(rows)
        logits = self._model(tokens.to(self._device), positions.to(self._device))
        return [found[-len(row) :].cpu() for found, row in zip(logits, rows, strict=True)]

    def _arrange(self, plain: Gemma2, config: Gemma2Config) -> None:
        """A model of this config with the parameters of `plain`, and the profile's arithmetic."""
        with torch.device("meta"):
            model = Gemma2(config)
        model.load_state_dict(dict(plain.named_parameters()), strict=True, assign=True)
        self.config, self._plain = config, model.eval()
        self._model = with_numerics(model, self._numerics, kinds=self.kinds) if self._numerics else model
