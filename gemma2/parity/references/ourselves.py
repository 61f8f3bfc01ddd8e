"""This model again, with another dtype, device, numerics profile or checkpoint (a quantized one, say)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from importlib.metadata import version

import torch
from torch import Tensor

from gemma2.cache import HybridCache
from gemma2.checkpoints.checkpoint import Checkpoint, open_checkpoint
from gemma2.checkpoints.dtypes import RUNNABLE, stored_name
from gemma2.checkpoints.weights import build, shapes_of
from gemma2.config import Gemma2Config
from gemma2.fast.forms import check_form
from gemma2.load import locate, parse_device
from gemma2.model import Gemma2
from gemma2.numerics import storage_of, with_numerics
from gemma2.numerics.changes import Storage, Stored
from gemma2.parity.references import CannotDo, parse_row, parse_sites, spans
from gemma2.parity.references.gradients import gradients_of
from gemma2.research import capture
from gemma2.research.sites import sites as all_sites
from gemma2.tokens import left_padded
from gemma2.twins import sharing

KEYS = ("model", "dtype", "device", "numerics", "weights")
WIDE = "llama.cpp"  # the profile whose activations are float32 whatever the weights are


def open_ourselves(spec: str, opened: Checkpoint, dtype: torch.dtype | None) -> Ourselves:
    """From `model=PATH,dtype=float32,device=cpu,numerics=gemma_pytorch`, any of these; the rest is as in `opened`.

    Raises:
        ValueError: an unknown key or value.
        BadModelFile: the other checkpoint is not a Gemma 2.
    """
    asked: dict[str, str] = {}
    for part in re.split(rf",(?=(?:{'|'.join(KEYS)})=)", spec) if spec else []:
        key, equals, value = part.partition("=")
        if key not in KEYS or not equals or not value or key in asked:
            raise ValueError(f"self:{spec}: give {', '.join(f'{known}=...' for known in KEYS)}, each once, or none")
        asked[key] = value
    if "model" in asked:
        opened = open_checkpoint(locate(asked["model"]))
    if "dtype" in asked:
        if asked["dtype"] not in RUNNABLE:
            raise ValueError(f"self:{spec}: dtype is not one of {', '.join(RUNNABLE)}")
        dtype = RUNNABLE[asked["dtype"]]
    reference = Ourselves(
        opened, dtype, asked.get("device", "cpu"), asked.get("numerics"), weights=asked.get("weights")
    )
    if "model" in asked:
        reference.system += f", model {asked['model']}"
    return reference


class Ourselves:
    """A `Reference` over this package's own model.

    Args:
        dtype: default the checkpoint's, and float32 for a GGUF under llama.cpp's numerics, which dequantises to that.
        numerics: a profile of `gemma2/numerics/__init__.py`; default the model as it is.
        storage: how each parameter is stored, for llama.cpp's numerics; default as in the checkpoint, or the ggml type
            of its dtype.
        weights: a form to hold them in, one of `gemma2/fast/forms.py`.
    Raises:
        ValueError: a device that is not here, or an unknown profile.
    """

    storage: Storage | None

    def __init__(
        self,
        opened: Checkpoint,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        numerics: str | None = None,
        storage: Storage | None = None,
        weights: str | None = None,
    ) -> None:
        self.storage = storage or storage_of(opened.weights)
        if dtype is None:
            dtype = torch.float32 if self.storage and numerics == WIDE else opened.weights.dtype
        self._device = parse_device(device)
        if numerics == WIDE and self.storage is None:
            self.storage = {name: Stored(stored_name(dtype)) for name in shapes_of(opened.config)}
        self._numerics = numerics
        if weights is not None and numerics is not None:
            raise ValueError("weights and numerics both replace modules: give one of them")
        make = None if weights is None else check_form(weights)(opened, self._device, dtype)[0]
        plain = build(opened.weights, opened.config, self._device, dtype, make=make, progress=False)
        self._arrange(plain, opened.config)
        self.dtype = torch.float32 if numerics == WIDE else dtype
        self.system = f"gemma2 {version('gemma2')} on {device}"
        if numerics:
            self.system += f", numerics {numerics}"
        if weights:
            self.system += f", weights {weights}"
        if dtype != self.dtype:
            self.system += f", weights in {str(dtype).removeprefix('torch.')}"
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
        tokens, wanted = parse_row(self, ids), parse_sites(self, sites)
        with capture(self._model, wanted) as seen:
            self._model(tokens.to(self._device))
        return {name: seen[name][0].cpu() for name in wanted}

    def with_window(self, window: int) -> Ourselves:
        other = copy(self)
        other._arrange(self._plain, replace(self.config, sliding_window=window))
        return other

    @torch.no_grad()
    def cached(self, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        tokens = parse_row(self, ids).to(self._device)
        cache = HybridCache(self.config, 1, len(ids))
        parts = [self._model(tokens[:, start:stop], cache=cache) for start, stop in spans(ids, chunks)]
        return torch.cat(parts, dim=1)[0].cpu()

    @torch.no_grad()
    def batched(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        for row in rows:
            parse_row(self, row)
        tokens, positions = left_padded(rows)
        logits = self._model(tokens.to(self._device), positions.to(self._device))
        return [found[-len(row) :].cpu() for found, row in zip(logits, rows, strict=True)]

    def gradients(self, ids: Sequence[int]) -> dict[str, Tensor | None]:
        """Of the mean next-token loss, by each weight, see `gemma2.parity.gradients`. Raises CannotDo."""
        held = [name for name, module in self._model.named_modules() if hasattr(module, "held_bytes")]
        if held:
            raise CannotDo(f"{self.system} holds {held[0]} in a form that has no gradient")
        return gradients_of(self._model, parse_row(self, ids).to(self._device))

    def _arrange(self, plain: Gemma2, config: Gemma2Config) -> None:
        """A model of this config with the parameters of `plain`, and the profile's arithmetic."""
        model = sharing(plain, config)
        self.config, self._plain = config, model.eval()
        self._model = with_numerics(model, self._numerics, storage=self.storage) if self._numerics else model
