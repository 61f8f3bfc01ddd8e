"""ggml's blocks, the quantized weights inside a GGUF file, back to numbers.

A tensor is rows of blocks, a block is a few scales and many small integers. However the bits are packed, the value is
one of `scale * q` and `scale * q - minimum`; so each format has one function that unpacks q, scale and minimum, and
`dequantize_into` does the arithmetic once for all. float32 results have the bits of gguf-py's
`gguf.quants.dequantize`, whose layouts these are, and which follow ggml's `ggml-quants.c`; signs of zero included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from gemma2.checkpoints import ggml_blocks, ggml_grids
from gemma2.checkpoints.ggml_blocks import Parts

# Values unpacked at once. On a CPU a call costs microseconds, so a piece must be long, and its 3 MB of temporaries
# should stay in the cache; elsewhere a call costs as much and there is no cache to keep to.
CPU_PIECE, DEVICE_PIECE = 2**19, 2**24


@dataclass(frozen=True)
class GGMLType:
    """A ggml type.

    Attributes:
        id: ggml's number for it, as in a GGUF file.
        name: ggml's name for it, as "Q4_K".
        values: weights in a block.
        bytes: bytes of a block.
    """

    id: int
    name: str
    values: int
    bytes: int


def dequantize(raw: Tensor, type: GGMLType) -> Tensor:
    """The float32 numbers that blocks stand for, on the device of the blocks.

    Args:
        raw: uint8 [..., n * type.bytes], little-endian as in a file.
        type: one of `TYPES`.

    Returns:
        float32 [..., n * type.values].

    Raises:
        ValueError: the last axis of `raw` is not a whole number of blocks.
    """
    out = torch.empty((*raw.shape[:-1], _values(raw, type)), dtype=torch.float32, device=raw.device)
    dequantize_into(raw, type, out)
    return out


def dequantize_into(raw: Tensor, type: GGMLType, out: Tensor) -> None:
    """Write the numbers that blocks stand for into `out`, rounded once from float32 to its dtype.

    Args:
        raw: uint8 [..., n * type.bytes], little-endian as in a file.
        type: one of `TYPES`.
        out: [..., n * type.values] of any float dtype; overwritten.

    Raises:
        ValueError: the last axis of `raw` is not a whole number of blocks, or `out` does not fit.
    """
    wanted = (*raw.shape[:-1], _values(raw, type))
    if tuple(out.shape) != wanted or not out.is_floating_point():
        raise ValueError(f"out is {list(out.shape)} of {out.dtype}: {type.name} needs {list(wanted)} of a float dtype")
    if raw.ndim > 1 and not (raw.is_contiguous() and out.is_contiguous()):
        for some, some_out in zip(raw, out, strict=True):
            dequantize_into(some, type, some_out)
        return
    blocks, rows = raw.reshape(-1, type.bytes), out.unflatten(-1, (-1, type.values)).flatten(0, -2)
    step = max(1, (CPU_PIECE if raw.device.type == "cpu" else DEVICE_PIECE) // type.values)
    direct = out.dtype == torch.float32 and out.device == raw.device
    size = (0 if direct else min(step, len(blocks)), type.values)
    scratch = torch.empty(size, dtype=torch.float32, device=raw.device)
    for start in range(0, len(blocks), step):
        piece, target = blocks[start : start + step], rows[start : start + step]
        q, scale, minimum = _UNPACK[type.name](piece)
        values = target if direct else scratch[: len(piece)]
        values.view(q.shape).copy_(q)
        if scale is not None:
            values.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.unsqueeze(-1))
        if minimum is not None:
            values.unflatten(-1, (minimum.shape[-1], -1)).sub_(minimum.unsqueeze(-1))
        if not direct:
            target.copy_(values)


class Scales(NamedTuple):
    """What the integers of blocks are multiplied with: a value is scale * q - minimum, and in a block each scale is an
    integer times a unit, each minimum of a super-block an integer times a step. float32."""

    unit: Tensor  # [..., blocks]
    scale: Tensor  # [..., blocks * groups]
    step: Tensor | None = None  # [..., blocks]
    minimum: Tensor | None = None  # [..., blocks * groups]


def scales(raw: Tensor, type: GGMLType) -> Scales | None:
    """The scales of blocks, as for `dequantize`; None for a format that is not among `_UNITS`."""
    if type.name not in _UNITS:
        return None
    _values(raw, type)
    blocks = raw.reshape(-1, type.bytes)
    unit, step = (None if at is None else ggml_blocks.half(blocks, at) for at in _UNITS[type.name])
    _, scale, minimum = _UNPACK[type.name](blocks)
    found = (None if part is None else part.reshape(*raw.shape[:-1], -1) for part in (unit, scale, step, minimum))
    return Scales(*found)  # type: ignore[arg-type]


def integers(raw: Tensor, type: GGMLType) -> Tensor:
    """The integers q of blocks, as for `dequantize`: [..., n * type.values], in the dtype of the format."""
    _values(raw, type)
    return _UNPACK[type.name](raw.reshape(-1, type.bytes)).q.reshape(*raw.shape[:-1], -1)


def _values(raw: Tensor, type: GGMLType) -> int:
    """Numbers in a row of `raw`."""
    if raw.dtype != torch.uint8 or raw.ndim == 0 or raw.shape[-1] % type.bytes:
        raise ValueError(
            f"raw is {list(raw.shape)} of {raw.dtype}: {type.name} needs uint8 with whole blocks of {type.bytes} bytes "
            "in the last axis"
        )
    return raw.shape[-1] // type.bytes * type.values


# ggml's enum ggml_type, and what unpacks each.
_FORMATS: tuple[tuple[GGMLType, Callable[[Tensor], Parts]], ...] = (
    (GGMLType(0, "F32", 1, 4), ggml_blocks.f32),
    (GGMLType(1, "F16", 1, 2), ggml_blocks.f16),
    (GGMLType(2, "Q4_0", 32, 18), ggml_blocks.q4_0),
    (GGMLType(3, "Q4_1", 32, 20), ggml_blocks.q4_1),
    (GGMLType(6, "Q5_0", 32, 22), ggml_blocks.q5_0),
    (GGMLType(7, "Q5_1", 32, 24), ggml_blocks.q5_1),
    (GGMLType(8, "Q8_0", 32, 34), ggml_blocks.q8_0),
    (GGMLType(10, "Q2_K", 256, 84), ggml_blocks.q2_k),
    (GGMLType(11, "Q3_K", 256, 110), ggml_blocks.q3_k),
    (GGMLType(12, "Q4_K", 256, 144), ggml_blocks.q4_k),
    (GGMLType(13, "Q5_K", 256, 176), ggml_blocks.q5_k),
    (GGMLType(14, "Q6_K", 256, 210), ggml_blocks.q6_k),
    (GGMLType(16, "IQ2_XXS", 256, 66), ggml_grids.iq2_xxs),
    (GGMLType(17, "IQ2_XS", 256, 74), ggml_grids.iq2_xs),
    (GGMLType(18, "IQ3_XXS", 256, 98), ggml_grids.iq3_xxs),
    (GGMLType(19, "IQ1_S", 256, 50), ggml_grids.iq1_s),
    (GGMLType(20, "IQ4_NL", 32, 18), ggml_grids.iq4_nl),
    (GGMLType(21, "IQ3_S", 256, 110), ggml_grids.iq3_s),
    (GGMLType(22, "IQ2_S", 256, 82), ggml_grids.iq2_s),
    (GGMLType(23, "IQ4_XS", 256, 136), ggml_grids.iq4_xs),
    (GGMLType(29, "IQ1_M", 256, 56), ggml_grids.iq1_m),
    (GGMLType(30, "BF16", 1, 2), ggml_blocks.bf16),
    (GGMLType(34, "TQ1_0", 256, 54), ggml_blocks.tq1_0),
    (GGMLType(35, "TQ2_0", 256, 66), ggml_blocks.tq2_0),
    (GGMLType(39, "MXFP4", 32, 17), ggml_grids.mxfp4),
    (GGMLType(40, "NVFP4", 64, 36), ggml_grids.nvfp4),
)
_UNPACK = {type.name: unpack for type, unpack in _FORMATS}
TYPES: Mapping[int, GGMLType] = MappingProxyType({type.id: type for type, _ in _FORMATS})
# At which byte of a block the scale of its scales is, and that of its minima, where that is another number.
_UNITS: Mapping[str, tuple[int, int | None]] = {
    "Q4_1": (0, None),
    "Q5_1": (0, None),
    "Q2_K": (80, 82),
    "Q3_K": (108, None),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208, None),
    "IQ3_S": (0, None),
    "IQ4_XS": (0, None),
    "TQ1_0": (52, None),
    "TQ2_0": (64, None),
}
