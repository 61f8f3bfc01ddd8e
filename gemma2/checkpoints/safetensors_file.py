"""One safetensors file, read and not mapped unless asked for: a mapped file takes address space, and counts as memory
where that is scarce. The format: its README at https://github.com/huggingface/safetensors."""

from __future__ import annotations

import errno
import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gemma2.checkpoints.dtypes import SAFETENSORS
from gemma2.checkpoints.foreign import refuse_foreign
from gemma2.errors import BadModelFile

MOST_HEADER = 100_000_000  # bytes of the header, as the library takes
# Bits of a value, of every dtype that the format has.
BITS = {name: 8 * dtype.itemsize for name, dtype in SAFETENSORS.items()} | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "U32": 32,
    "U64": 64,
}
BIGGEST = 2**63  # beyond any number in a header


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. `dtype` is safetensors' name, `start` is from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


class SafetensorsFile:
    """A `TensorFile` over one safetensors file. The header is read at once, tensors when asked for.

    Raises:
        BadModelFile: the file is not whole, or not a safetensors file; says why.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: mmap.mmap | None = None
        try:
            with path.open("rb") as file:
                self.metadata, self._stored = _described(file, path.stat().st_size)
        except FileNotFoundError:
            raise BadModelFile(f"{path}: no such file") from None
        except (ValueError, OSError) as error:
            refuse_foreign(path, gguf=True)
            raise BadModelFile(f"{path}: not a whole safetensors file ({error})") from None
        # A dtype that the table does not have is called uint8, and refused as that is.
        self.tensors = {
            name: (stored.shape, SAFETENSORS.get(stored.dtype, torch.uint8)) for name, stored in self._stored.items()
        }

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        stored, (shape, dtype) = self._stored[name], self.tensors[name]
        rows = torch.empty(stop - start, *shape[1:], dtype=dtype, device="cpu")
        size = rows.nbytes // max(1, stop - start)
        view, done = rows.view(-1).view(torch.uint8).numpy().data, 0
        with self.path.open("rb", buffering=0) as file:
            file.seek(stored.start + start * size)
            while done < len(view):  # Linux gives 2 GB at a time
                count = file.readinto(view[done:])
                if not count:
                    raise BadModelFile(f"{self.path}: it ended while it was read: it has become shorter")
                done += count
        return rows

    def view(self, name: str) -> Tensor | None:
        """A whole tensor over the file's own pages, private to this process; None where its values do not begin at a
        multiple of their size. The mapping goes with its last tensor and this object."""
        stored, (shape, dtype) = self._stored[name], self.tensors[name]
        if stored.start % dtype.itemsize or not stored.bytes:
            return None
        if self._mapped is None:
            self._mapped = self._map()
        count = stored.bytes // dtype.itemsize
        return torch.frombuffer(self._mapped, dtype=dtype, count=count, offset=stored.start).view(shape)

    def _map(self) -> mmap.mmap:
        end = max(stored.start + stored.bytes for stored in self._stored.values())
        try:
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            kind = MemoryError if error.errno == errno.ENOMEM else BadModelFile
            raise kind(
                f"{self.path}: the system does not map its {end / 1e9:.3g} GB ({error.strerror}): leave mapped out "
                "(--mapped)"
            ) from None
        if len(mapped) < end:
            raise BadModelFile(f"{self.path}: it has become shorter since its header was read")
        return mapped

    def release(self) -> None:
        """What is mapped stays, since tensors are over it."""


def _described(file: BinaryIO, size: int) -> tuple[dict[str, str], dict[str, Stored]]:
    """The metadata of a header, and its tensors."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"the header of {length:,} bytes does not fit into a file of {size:,}")
    if length > MOST_HEADER:
        raise ValueError(f"a header of {length:,} bytes; at most {MOST_HEADER:,} are taken")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError("the header is not a JSON object")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("the header is nested too deeply") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not a map from text to text")
    tensors = {name: _tensor(name, entry) for name, entry in header.items()}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if tensor.start != end:
            raise ValueError(f"tensor {name} begins at {tensor.start:,} of the data, where {end:,} is expected")
        end += tensor.bytes
    if 8 + length + end != size:
        raise ValueError(f"{8 + length + end:,} bytes are described, and the file has {size:,}")
    moved = {name: (tensor, 8 + length + tensor.start) for name, tensor in tensors.items()}
    return metadata, {name: Stored(was.dtype, was.shape, start, was.bytes) for name, (was, start) in moved.items()}


def _tensor(name: str, entry: Any) -> Stored:
    """One entry of the header; here `start` is from the beginning of the data."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {name} has the dtype {dtype!r}, which the format does not have")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name} has the shape {shape!r} and the data_offsets {offsets!r}")
    start, end = offsets
    if prod(shape) * BITS[dtype] != 8 * (end - start):
        raise ValueError(f"tensor {name} of shape {shape} in {dtype} does not take {end - start:,} bytes")
    return Stored(dtype, tuple(shape), start, end - start)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < BIGGEST for value in values)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands twice in the header")
        found[name] = value
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} in the header")
