"""Google's own `.ckpt` (gemma_pytorch): fused q/k/v, an `embedder`, and perhaps int8 weights with row scales.

A `.ckpt` is a pickle. It is read with `weights_only=True, mmap=True` and in no other way, so it can hold nothing but
tensors and plain containers.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma2.checkpoints.hf_config import PUBLISHED, published_config
from gemma2.checkpoints.weights import EMBEDDING, PlainWeights, refuse_foreign
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile, first_line
from gemma2.memory import no_mapping

REDUNDANT = "freqs_cis"  # the rotary table, computed from the config
SCALER = "_scaler"  # int8: weight * weight_scaler[:, None], one scale a row
EMBEDDER, FUSED = "embedder.weight", "self_attn.qkv_proj.weight"


class GoogleWeights(PlainWeights):
    """A `Weights` over a `.ckpt`. `config` states the heads, so where q ends and k begins in a fused tensor; without a
    config, the published model of this shape gives it."""

    def __init__(self, path: Path, config: Gemma2Config | None = None) -> None:
        self.where, self._path = str(path), path
        self._state: dict[str, Tensor] | None = None
        state = self._tensors()
        self.config = config or _published(state, self.where)
        c = self.config.head_dim
        q, kv = self.config.num_attention_heads * c, self.config.num_key_value_heads * c
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._source: dict[str, tuple[str, int]] = {}  # Hugging Face's name -> Google's name and first row
        for name, tensor in state.items():
            if name.endswith(SCALER) or name.split(".")[-1] == REDUNDANT:
                continue
            scale = self._scale(state, name, tensor)
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
        state = self._tensors()
        rows = slice(first + start, first + start + len(out))
        scale = self._scale(state, google, state[google])
        part = state[google][rows]
        out.copy_(part if scale is None else part.to(scale.dtype) * scale[rows, None])

    def release(self) -> None:
        self._state = None  # the mapping goes with its last tensor

    def _add(self, own: str, google: str, first: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if own in self._source:
            raise BadModelFile(f"{self.where}: {self._source[own][0]} and {google} are the same tensor")
        self._source[own], self.tensors[own] = (google, first), (shape, dtype)

    def _scale(self, state: Mapping[str, Tensor], name: str, tensor: Tensor) -> Tensor | None:
        scale = state.get(name + SCALER)
        if scale is None:
            return None
        if tensor.dtype != torch.int8 or scale.shape != tensor.shape[:1] or not scale.is_floating_point():
            raise BadModelFile(
                f"{self.where}: {name} ({tensor.dtype}, {list(tensor.shape)}) and its scales {list(scale.shape)} "
                "are not int8 rows with one scale each"
            )
        return scale

    def _tensors(self) -> dict[str, Tensor]:
        state = self._state  # another thread may release it meanwhile, but not what is held here
        if state is None:
            state = self._state = _read(self._path)
        return state


def fused(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Google's names, in order, each with the Hugging Face names whose rows it holds one after the other."""
    grouped: dict[str, tuple[str, ...]] = {}
    for name in names:
        own = EMBEDDER if name == EMBEDDING else re.sub(r"self_attn\.[qkv]_proj", "self_attn.qkv_proj", name)
        grouped[own] = (*grouped.get(own, ()), name)
    return grouped


def _read(path: Path) -> dict[str, Tensor]:
    refuse_foreign(path)
    try:
        raw: Any = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise BadModelFile(f"{path}: holds more than tensors, so it is not read: a pickle can run code") from None
    except Exception as error:  # a damaged pickle fails in any way: IndexError, struct.error, AssertionError ...
        if "Cannot allocate memory" in str(error):
            raise no_mapping(path) from None
        raise BadModelFile(f"{path}: not a PyTorch checkpoint ({first_line(error)})") from None
    state = raw.get("model_state_dict", raw) if isinstance(raw, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadModelFile(f"{path}: no model_state_dict of tensors in it")
    odd = [repr(name) for name, tensor in state.items() if not isinstance(name, str) or not _is_plain(tensor)]
    if odd:
        raise BadModelFile(f"{path}: {len(odd)} tensors without a name or without plain values: {', '.join(odd[:5])}")
    return dict(state)


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values lie in memory one by one: not sparse, quantized by PyTorch, or absent (meta)."""
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized


def _published(state: Mapping[str, Tensor], where: str) -> Gemma2Config:
    """The published size whose embedding and depth this file has: a `.ckpt` states no config of its own."""
    embedding = state.get(EMBEDDER)
    depth = sum(name.endswith(FUSED) for name in state)
    for config in map(published_config, PUBLISHED):
        size = (config.vocab_size, config.hidden_size)
        if embedding is not None and tuple(embedding.shape) == size and depth == config.num_hidden_layers:
            return config
    raise BadModelFile(f"{where}: not the shape of a published Gemma 2, so put its config.json beside it")
