"""A folder of tensors that wait on the disk, as accelerate keeps them: raw values in NAME.dat, and an index.json."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from torch import Tensor

from gemma2.atomic import check_space, naming_a_full_disk, reserve
from gemma2.checkpoints.dtypes import dtype_name

IN_MEMORY = ("tmpfs", "ramfs")  # file systems that are no disk
LASTING = Path("/var/tmp")  # for large files on systems that keep /tmp in memory
INDEX = "index.json"


class OffloadFolder:
    """A new folder with room for some tensors, in `parent` or where the system keeps temporary files.

    Args:
        parent: is made where it is missing.
        tensors: name -> shape and dtype of each tensor.
    Attributes:
        path: the folder. `remove` takes it away, in the process that made it.
    Raises:
        OSError: it cannot be made, or the disk has too little space.
    """

    def __init__(self, parent: Path | None, tensors: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
        parent = _temporary() if parent is None else parent
        parent.mkdir(parents=True, exist_ok=True)
        sizes = {name: shape.numel() * dtype.itemsize for name, (shape, dtype) in tensors.items()}
        check_space(parent, sum(sizes.values()))
        self.path, self._maker = Path(tempfile.mkdtemp(prefix="gemma2-", dir=parent)), os.getpid()
        try:
            for name, size in sizes.items():
                with self._file(name).open("wb") as file:
                    reserve(file, size, self.path)
            index = {
                name: {"dtype": dtype_name(dtype), "shape": list(shape)} for name, (shape, dtype) in tensors.items()
            }
            (self.path / INDEX).write_text(json.dumps(index), encoding="utf-8")
        except BaseException:
            self.remove()
            raise

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Keep rows of a tensor, from row `start` on."""
        raw = rows.contiguous().view(-1).view(torch.uint8).numpy().data
        with naming_a_full_disk(self.path), self._file(name).open("rb+") as file:
            file.seek(start * (rows.nbytes // len(rows)))
            file.write(raw)

    def remove(self) -> None:
        if os.getpid() == self._maker:  # a forked child that ends must leave it
            shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.dat"


def _temporary() -> Path:
    """Where the system keeps temporary files, if that is on a disk."""
    found = Path(tempfile.gettempdir())
    if not _in_memory(found):
        return found
    if os.access(LASTING, os.W_OK) and not _in_memory(LASTING):
        return LASTING
    raise OSError(f"{found} is kept in memory here: give offload_folder (--offload-folder), a folder on a disk")


def _in_memory(folder: Path) -> bool:
    """Whether files in a folder take memory, as far as the system says."""
    try:
        kinds = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    except (psutil.Error, OSError, RuntimeError):
        return False
    around = [path for path in (folder.resolve(), *folder.resolve().parents) if path in kinds]
    return bool(around) and kinds[around[0]] in IN_MEMORY
