"""Writing a GGUF file: the header with a Gemma 2's config and tensor names, and weights as ggml's blocks."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma2.checkpoints.dtypes import PLAIN
from gemma2.checkpoints.ggml import TYPES, GGMLType
from gemma2.checkpoints.gguf import ARRAY, NUMBERS, STRING, Value
from gemma2.checkpoints.gguf_weights import (
    ARCHITECTURE,
    EPSILON,
    INTEGERS,
    LAYERS_27B,
    PATTERN,
    query_scale,
)
from gemma2.config import GLOBAL, LOCAL, Gemma2Config
from gemma2.errors import BadModelFile

BLOCKS = {type.name: type for type in TYPES.values()}
# The types that gguf-py can quantize to, and llama.cpp's number for a file mostly of that type (llama_ftype).
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q5_1": 9,
    "Q5_0": 8,
    "Q4_1": 3,
    "Q4_0": 2,
    "MXFP4": 38,
    "TQ2_0": 37,
    "TQ1_0": 36,
}
# The embedding is also the head and suffers most, so it is kept finer than the rest; ternary as llama.cpp's converter.
FINER = dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"), "Q8_0") | {"TQ1_0": "F16", "TQ2_0": "F16"}
PAD = 32  # bytes
NUMBER_OF = {name: (number, dtype) for number, (name, dtype) in NUMBERS.items()}


def architecture_metadata(config: Gemma2Config, where: str) -> dict[str, Value]:
    """The keys of a config, as llama.cpp's converter writes them, and the rotary base and the pattern of layers.

    Raises:
        BadModelFile: a query scale or a pattern of layers that GGUF has no key for, so that llama.cpp would run
            another model.
    """
    taken = query_scale(config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.head_dim)
    if config.query_pre_attn_scalar != taken:
        raise BadModelFile(
            f"{where}: query_pre_attn_scalar is {config.query_pre_attn_scalar:g}, which a GGUF cannot state: llama.cpp "
            f"takes {taken} for {config.num_hidden_layers} layers (all but {LAYERS_27B} layers: the width of a head)"
        )
    numbers = {key: Value("u32", getattr(config, field)) for field, key in INTEGERS.items()}
    numbers |= {
        "attention.value_length": Value("u32", config.head_dim),
        "attention.sliding_window": Value("u32", config.sliding_window),
        EPSILON: Value("f32", config.rms_norm_eps),
        "rope.freq_base": Value("f32", config.rope_theta),
        "attn_logit_softcapping": Value("f32", config.attn_logit_softcapping),
        "final_logit_softcapping": Value("f32", config.final_logit_softcapping),
    }
    period = _period(config, where)
    if period != 2:
        numbers[PATTERN] = Value("u32", period)
    return {"general.architecture": Value("str", ARCHITECTURE), "general.type": Value("str", "model")} | {
        f"{ARCHITECTURE}.{key}": value for key, value in numbers.items()
    }


def _period(config: Gemma2Config, where: str) -> int:
    """How many layers a pattern has: the last layer of each pattern is global; with 0 all layers are local.

    llama.cpp reads only this number for Gemma 2 (src/models/gemma2.cpp). It ignores an array of layers, and takes 2.
    """
    layers = config.layer_types
    for period in (2, 0, *range(1, len(layers) + 1)):
        if layers == tuple(GLOBAL if period and i % period == period - 1 else LOCAL for i in range(len(layers))):
            return period
    raise BadModelFile(
        f"{where}: a GGUF cannot state this pattern of layer_types: for llama.cpp the last of every n layers is global"
    )


def header_bytes(metadata: Mapping[str, Value], tensors: Sequence[tuple[str, tuple[int, ...], GGMLType, int]]) -> bytes:
    """A whole header, version 3, padded to where the data begins.

    Args:
        tensors: name, row-major shape, type and bytes of each, in the order in which their data follows, each padded
            to a whole 32 bytes.
    """
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for name, shape, type, size in tensors:
        described = struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), type.id, offset)
        parts.append(_string(name) + described)
        offset += size + padding(size)
    header = b"".join(parts)
    return header + bytes(padding(len(header)))


def padding(size: int) -> int:
    """Bytes from `size` to the next whole 32, GGUF's alignment unless a file states another."""
    return -size % PAD


def quantize(values: Tensor, type: GGMLType) -> bytes:
    """float32 rows as blocks of `type`, with gguf-py's arithmetic for what is not a plain float. F64 takes float64."""
    plain = PLAIN.get(type.name)
    if plain is not None:
        return values.to(plain).contiguous().view(torch.uint8).numpy().tobytes()
    quants = importlib.import_module("gguf.quants")  # 40 ms: only where blocks are made
    # A block of zeros is divided by its own zero scale there, and the result is not used.
    with np.errstate(divide="ignore", invalid="ignore"):
        blocks: np.ndarray[Any, Any] = getattr(quants, type.name).quantize(values.numpy())
    return blocks.tobytes()


def _string(text: str) -> bytes:
    raw = text.encode(errors="replace")  # a file's name need not be UTF-8
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    name = value.type.removesuffix("[]")
    number, dtype = (STRING, None) if name == "str" else NUMBER_OF[name]
    if not value.type.endswith("[]"):
        raw = _string(value.value) if dtype is None else np.array(value.value, dtype).tobytes()
        return struct.pack("<I", number) + raw
    raw = b"".join(map(_string, value.value)) if dtype is None else np.asarray(value.value).astype(dtype).tobytes()
    return struct.pack("<IIQ", ARRAY, number, len(value.value)) + raw
