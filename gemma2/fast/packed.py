"""Weights kept as a GGUF file has them: `gemma2.load(..., weights="packed")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gemma2.checkpoints import ggml, ggml_blocks
from gemma2.checkpoints.ggml import GGMLType
from gemma2.checkpoints.ggml_blocks import field
from gemma2.checkpoints.threads import one_thread_per_core
from gemma2.checkpoints.weights import Weights
from gemma2.errors import BadModelFile
from gemma2.fast.blocks import LANES, LAYOUTS, Packed, by_tiles, columns, few_rows, pack_words, values_of
from gemma2.fast.compiling import can_compile
from gemma2.fast.held import READ, HeldMatrix
from gemma2.fast.rows import FEW

MANY = 16  # rows of x beyond which tiles of the matrix are made, and multiplied by
NAMES = ("words", "scales", "units", "minima", "steps")
BY_NAME = {type.name: type for type in ggml.TYPES.values()}


class Numbers(NamedTuple):
    """What the codes of n blocks are multiplied with, in the dtypes in which the file has them: [n, groups]."""

    scales: Tensor
    units: Tensor | None = None  # [n, 1], of the scales
    minima: Tensor | None = None
    steps: Tensor | None = None  # [n, 1], of the minima


def _half(blocks: Tensor, start: int) -> Tensor:
    return field(blocks, start, start + 2, torch.float16)


def _with_six_bits(blocks: Tensor) -> Numbers:
    scales, minima = ggml_blocks.six_bits(blocks)
    return Numbers(scales, _half(blocks, 0), minima, _half(blocks, 2))


NUMBERS: dict[str, Callable[[Tensor], Numbers]] = {
    "Q4_0": lambda blocks: Numbers(_half(blocks, 0)),
    "Q4_1": lambda blocks: Numbers(_half(blocks, 0), None, -_half(blocks, 2)),
    "Q4_K": _with_six_bits,
    "Q5_0": lambda blocks: Numbers(_half(blocks, 0)),
    "Q5_1": lambda blocks: Numbers(_half(blocks, 0), None, -_half(blocks, 2)),
    "Q5_K": _with_six_bits,
    "Q6_K": lambda blocks: Numbers(field(blocks, 192, 208, torch.int8), _half(blocks, 208)),
    "Q8_0": lambda blocks: Numbers(_half(blocks, 0)),
}


def pack(raw: Tensor, format: GGMLType) -> Packed:
    """Rows of blocks, uint8 [rows, bytes of a row], rows a multiple of 16, in the layout of `blocks.py`."""
    layout, (rows, _) = LAYOUTS[format.name], raw.shape
    q = ggml.integers(raw, format).view(rows, -1, layout.group)
    codes = q.contiguous().view(torch.uint8)
    if layout.zero:
        codes = codes + layout.zero  # 255 and one more are 0, and so 256 is taken off what was negative
    found = NUMBERS[format.name](raw.view(-1, format.bytes))
    empty = torch.empty(0, device="cpu")

    def placed(numbers: Tensor | None) -> Tensor:
        if numbers is None:
            return empty
        each = numbers.shape[1]  # of a block
        return by_tiles(numbers.view(rows, -1, each) if each > 1 else numbers.view(rows, -1))

    return pack_words(codes, layout), *(placed(numbers) for numbers in found)  # type: ignore[return-value]


class PackedMatrix(HeldMatrix):
    """A matrix in the blocks of one ggml type, exactly as the file states it, laid out for fast products."""

    step = LANES
    takes_any = True

    def __init__(self, rows: int, width: int, dtype: torch.dtype, type: str) -> None:
        super().__init__(rows, width, dtype)
        self.format, self.layout = BY_NAME[type], LAYOUTS[type]
        self.padded = -(-rows // LANES) * LANES

    @property
    def held_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._empty(torch.device("meta")))

    @property
    def packed(self) -> Packed:
        return tuple(getattr(self, name) for name in NAMES)

    def _empty(self, device: torch.device) -> Packed:
        """Buffers for the whole matrix, by the shapes that a tile of it has."""
        size = self.width // self.format.values * self.format.bytes
        tile = pack(torch.zeros(LANES, size, dtype=torch.uint8, device="cpu"), self.format)
        tiles = self.padded // LANES
        sizes = [(tiles if len(part) else 0, *part.shape[1:]) for part in tile]
        parts = (torch.empty(size, dtype=part.dtype, device=device) for size, part in zip(sizes, tile, strict=True))
        return tuple(parts)  # type: ignore[return-value]

    def reserve(self, device: torch.device) -> None:
        for name, tensor in zip(NAMES, self._empty(device), strict=True):
            self.register_buffer(name, tensor)

    def fill(self, weights: Weights, name: str, device: torch.device) -> None:
        self.like = self.like.to(device)
        self.reserve(device)

        def take(start: int, stop: int) -> None:
            raw = weights.raw(name, start, stop)
            if (stop - start) % LANES:
                raw = torch.cat((raw, raw.new_zeros(-(stop - start) % LANES, raw.shape[1])))
            for own, part in zip(self.packed, pack(raw, self.format), strict=True):
                if len(own):
                    own[start // LANES : start // LANES + len(part)] = part

        with one_thread_per_core() as pool:
            for _ in pool.map(take, *zip(*self.tiles(READ), strict=True)):
                pass
        numbers = [tensor for tensor in self.packed[1:] if tensor.is_floating_point()]
        if not all(bool(tensor.isfinite().all()) for tensor in numbers):
            raise BadModelFile(f"{weights.where}: {weights.in_file(name)} holds NaN or infinity among its scales")

    def _part(self, start: int, stop: int) -> Packed:
        first, last = start // LANES, -(-stop // LANES)
        return tuple(part[first:last] if len(part) else part for part in self.packed)  # type: ignore[return-value]

    def values(self, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        return columns(self._part(start, stop), self.layout, self.like.dtype)[:, : stop - start].t()

    def at(self, ids: Tensor) -> Tensor:
        flat = ids.flatten()
        tile, lane = flat // LANES, flat % LANES
        # A tile of one lane for each id.
        parts = tuple(part[tile, ..., lane][..., None] if len(part) else part for part in self.packed)
        return values_of(parts, self.layout).reshape(*ids.shape, self.width)  # type: ignore[arg-type]

    def kernel(self, x: Tensor) -> Tensor | None:
        if x.device.type != "cpu" or len(x) > MANY or x.dtype == torch.float64:
            return None
        # Outside of a compiled step every count of rows would wait for a graph of its own.
        if not torch.compiler.is_compiling() and (len(x) > 1 or not can_compile()):
            return None
        parts = [few_rows(self.packed, self.layout, some) for some in x.float().split(FEW)]
        return torch.cat(parts)[:, : self.rows].to(x.dtype)


class Blocks(HeldMatrix):
    """A matrix in the blocks of a ggml type that has no layout here: tiles of it are dequantised at every product."""

    blocks: Tensor

    def __init__(self, rows: int, width: int, dtype: torch.dtype, type: str) -> None:
        super().__init__(rows, width, dtype)
        self.format = BY_NAME[type]

    @property
    def held_bytes(self) -> int:
        return self.rows * self.width // self.format.values * self.format.bytes

    def reserve(self, device: torch.device) -> None:
        blocks = torch.empty(self.rows, self.held_bytes // self.rows, dtype=torch.uint8, device=device)
        self.register_buffer("blocks", blocks)

    def fill(self, weights: Weights, name: str, device: torch.device) -> None:
        self.like = self.like.to(device)
        self.reserve(device)

        def take(start: int, stop: int) -> bool:
            raw = weights.raw(name, start, stop)
            self.blocks[start:stop] = raw
            return bool(ggml.dequantize(raw, self.format).sum().isfinite())

        with one_thread_per_core() as pool:
            if not all(pool.map(take, *zip(*self.tiles(READ), strict=True))):
                raise BadModelFile(f"{weights.where}: {weights.in_file(name)} holds NaN or infinity")

    def values(self, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        shape = (stop - start, self.width)
        out = torch.empty(shape, dtype=self.like.dtype, device=self.like.device) if room is None else _in(room, shape)
        ggml.dequantize_into(self.blocks[start:stop], self.format, out)
        return out

    def at(self, ids: Tensor) -> Tensor:
        return ggml.dequantize(self.blocks[ids], self.format)


def _in(room: Tensor, shape: tuple[int, int]) -> Tensor:
    return room[: shape[0] * shape[1]].view(shape)
