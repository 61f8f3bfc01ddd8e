"""Google's own `.ckpt` (gemma_pytorch): fused q/k/v, an `embedder`, and perhaps int8 weights with row scales.

A `.ckpt` is a pickle, read as `pickled.py` says. It may hold Hugging Face's names instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gemma2.checkpoints.hf_config import PUBLISHED, published_config
from gemma2.checkpoints.names import REDUNDANT as TABLE
from gemma2.checkpoints.names import own_names
from gemma2.checkpoints.pickled import PickledFile
from gemma2.checkpoints.weights import PlainWeights
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile
from gemma2.tied import EMBEDDING

REDUNDANT = "freqs_cis"  # the rotary table, computed from the config
SCALER = "_scaler"  # int8: weight * weight_scaler[:, None], one scale a row
EMBEDDER, FUSED = "embedder.weight", "self_attn.qkv_proj.weight"


class GoogleWeights(PlainWeights):
    """A `Weights` over a `.ckpt`. `config` states the heads, so where q ends and k begins in a fused tensor; without a
    config, the published model of this shape gives it."""

    def __init__(self, path: Path, config: Gemma2Config | None = None) -> None:
        self.where, self._file = str(path), PickledFile(path)
        self._names = own_names((name for name in self._file.tensors if not name.endswith(TABLE)), self.where)
        state = {own: self._file.state()[name] for own, name in self._names.items()}
        self.config = config or _published(state, self.where)
        c = self.config.head_dim
        q, kv = self.config.num_attention_heads * c, self.config.num_key_value_heads * c
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._source: dict[str, tuple[str, int]] = {}  # Hugging Face's name -> Google's name and first row
        for name, tensor in state.items():
            if name.endswith(SCALER) or name.split(".")[-1] == REDUNDANT:
                continue
            scale = self._scale(name, tensor, state.get(name + SCALER))
            dtype = tensor.dtype if scale is None else scale.dtype
            if name.endswith(FUSED):
                if tensor.ndim != 2 or tensor.shape[0] != q + 2 * kv:
                    raise BadModelFile(
                        f"{path}: {name} is {list(tensor.shape)}, the config needs {q} + 2 x {kv} rows in a matrix"
                    )
                for letter, first, rows in (("q", 0, q), ("k", q, kv), ("v", q + kv, kv)):
                    self._add(name.replace("qkv_proj", f"{letter}_proj"), name, first, (rows, *tensor.shape[1:]), dtype)
            else:
                own = EMBEDDING if name == EMBEDDER else name
                self._add(own, name, 0, tuple(tensor.shape), dtype)
        stray = sorted(name for name in state if name.endswith(SCALER) and name.removesuffix(SCALER) not in state)
        if stray:
            raise BadModelFile(f"{path}: scales without weights: {', '.join(stray[:5])}")
        self.release()

    def read(self, name: str, start: int, out: Tensor) -> None:
        google, first = self._source[name]
        state, names = self._file.state(), self._names
        rows = slice(first + start, first + start + len(out))
        tensor = state[names[google]]
        scale = self._scale(google, tensor, state[names[google + SCALER]] if google + SCALER in names else None)
        part = tensor[rows]
        out.copy_(part if scale is None else part.to(scale.dtype) * scale[rows, None])

    def release(self) -> None:
        self._file.release()

    def _add(self, own: str, google: str, first: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if own in self._source:
            raise BadModelFile(f"{self.where}: {self._source[own][0]} and {google} are the same tensor")
        self._source[own], self.tensors[own] = (google, first), (shape, dtype)

    def _scale(self, name: str, tensor: Tensor, scale: Tensor | None) -> Tensor | None:
        if scale is None:
            return None
        if tensor.dtype != torch.int8 or scale.shape != tensor.shape[:1] or not scale.is_floating_point():
            raise BadModelFile(
                f"{self.where}: {name} ({tensor.dtype}, {list(tensor.shape)}) and its scales {list(scale.shape)} "
                "are not int8 rows with one scale each"
            )
        return scale


def fused(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Google's names, in order, each with the Hugging Face names whose rows it holds one after the other."""
    grouped: dict[str, tuple[str, ...]] = {}
    for name in names:
        own = EMBEDDER if name == EMBEDDING else re.sub(r"self_attn\.[qkv]_proj", "self_attn.qkv_proj", name)
        grouped[own] = (*grouped.get(own, ()), name)
    return grouped


def _published(state: Mapping[str, Tensor], where: str) -> Gemma2Config:
    """The published size whose embedding and depth this file has: a `.ckpt` states no config of its own."""
    embedding = state.get(EMBEDDER)
    depth = sum(name.endswith(FUSED) for name in state)
    for config in map(published_config, PUBLISHED):
        size = (config.vocab_size, config.hidden_size)
        if embedding is not None and tuple(embedding.shape) == size and depth == config.num_hidden_layers:
            return config
    raise BadModelFile(f"{where}: not the shape of a published Gemma 2, so put its config.json beside it")
