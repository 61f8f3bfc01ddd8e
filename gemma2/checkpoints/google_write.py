"""Writing Google's `.ckpt` in the format of `torch.save`, one tensor after another: `torch.save` needs all at once.

It is a zip file of uncompressed records: a pickle that describes the tensors, and the bytes of each storage (PyTorch's
notes on serialization, "Serialized file format for torch.save").
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STORAGES = {
    "F32": torch.FloatStorage,
    "BF16": torch.BFloat16Storage,
    "F16": torch.HalfStorage,
    "F64": torch.DoubleStorage,
}
ALIGNED = 64  # bytes, for storages in a mapped file
PADDING = struct.Struct("<2sH")  # an extra field of a record's header: its name, as PyTorch calls it, and its length
HEADER, SIZES = 30, 20  # bytes of a record's header without name and extra fields, and of the field for 8-byte sizes


def state_pickle(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The pickle of {"model_state_dict": tensors}, of name -> ggml type and shape; the n-th tensor has storage n."""
    out = io.BytesIO()
    state = {name: _Tensor(str(n), *described) for n, (name, described) in enumerate(tensors.items())}
    _Pickler(out, protocol=2).dump({"model_state_dict": state})
    return out.getvalue()


def write_archive(path: Path, pickled: bytes, storages: Iterable[Iterable[bytes]]) -> None:
    """Write a whole `.ckpt`. The bytes of a storage come in pieces."""
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr(_record("data.pkl"), pickled)
        archive.writestr(_record("byteorder"), "little")
        for number, pieces in enumerate(storages):
            record = _record(f"data/{number}")
            gap = -(file.tell() + HEADER + len(record.filename) + PADDING.size + SIZES) % ALIGNED
            record.extra = PADDING.pack(b"FB", gap) + bytes(gap)
            with archive.open(record, "w", force_zip64=True) as opened:
                for piece in pieces:
                    opened.write(piece)
        archive.writestr(_record("version"), "3\n")


def _record(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"archive/{name}")  # with a date that is always the same


@dataclass(frozen=True)
class _Tensor:
    key: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Storage:
    of: _Tensor


class _Pickler(pickle.Pickler):
    """Writes the descriptions as tensors, and refers to their storages by key."""

    def reducer_override(self, thing: Any) -> Any:
        if not isinstance(thing, _Tensor):
            return NotImplemented
        strides = tuple(torch.Size(thing.shape[axis + 1 :]).numel() for axis in range(len(thing.shape)))
        return torch._utils._rebuild_tensor_v2, (_Storage(thing), 0, thing.shape, strides, False, OrderedDict())

    def persistent_id(self, thing: Any) -> Any:
        if not isinstance(thing, _Storage):
            return None
        return "storage", STORAGES[thing.of.type], thing.of.key, "cpu", torch.Size(thing.of.shape).numel()
