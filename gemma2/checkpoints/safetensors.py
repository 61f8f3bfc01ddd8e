"""Hugging Face checkpoints: one `.safetensors` file, or shards listed in `model.safetensors.index.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma2.checkpoints.dtypes import SAFETENSORS
from gemma2.checkpoints.hf_config import read_json
from gemma2.checkpoints.safetensors_file import SafetensorsFile
from gemma2.checkpoints.weights import PlainWeights, refuse_foreign
from gemma2.errors import BadModelFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
REDUNDANT = ".rotary_emb.inv_freq"  # computed from the config; some exporters store it


class SafetensorsWeights(PlainWeights):
    """A `Weights` over one or more safetensors files. Headers are read at once, tensors when asked for."""

    def __init__(self, files: list[Path], where: str) -> None:
        self.where = where
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._file: dict[str, Path] = {}
        self._open: dict[Path, SafetensorsFile] = {}
        for path in files:
            for name, stored in self._handle(path).tensors.items():
                if name in self._file:
                    raise BadModelFile(f"{path}: tensor {name} is also in {self._file[name].name}")
                self._file[name] = path
                if name.endswith(REDUNDANT):
                    continue
                # A dtype that the table does not have is called uint8, and refused as that is.
                self.tensors[name] = (stored.shape, SAFETENSORS.get(stored.dtype, torch.uint8))

    def read(self, name: str, start: int, out: Tensor) -> None:
        path = self._file[name]
        try:
            self._handle(path).read(name, start, out)
        except (ValueError, OSError) as error:
            raise BadModelFile(f"{path}: cannot be read ({error})") from None

    def release(self) -> None:
        """Nothing is mapped."""

    def names_in(self, path: Path) -> set[str]:
        return {name for name, file in self._file.items() if file == path}

    def _handle(self, path: Path) -> SafetensorsFile:
        handle = self._open.get(path)
        if handle is None:
            try:
                handle = self._open[path] = SafetensorsFile(path)
            except FileNotFoundError:
                raise BadModelFile(f"{path}: no such file") from None
            except (ValueError, OSError) as error:
                refuse_foreign(path)
                raise BadModelFile(f"{path}: not a whole safetensors file ({error})") from None
        return handle


def open_folder(folder: Path) -> SafetensorsWeights:
    """The weights of a Hugging Face folder. Raises BadModelFile when there are none, or the index does not fit."""
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    if (folder / SINGLE).is_file():
        return SafetensorsWeights([folder / SINGLE], str(folder / SINGLE))
    quantized, pickled = (sorted(path.name for path in folder.glob(f"*.{kind}")) for kind in ("gguf", "bin"))
    seen = f"; it holds {', '.join(quantized[:3])}: give that file itself" if quantized else ""
    seen += f"; it holds {', '.join(pickled[:3])}, a pickle, which is not read" if pickled else ""
    raise BadModelFile(f"{folder}: neither {SINGLE} nor {INDEX}{seen}")


def open_file(path: Path) -> SafetensorsWeights:
    """The weights of one `.safetensors` file."""
    return SafetensorsWeights([path], str(path))


def header_bytes(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """What stands before the data in a safetensors file: a length, and as much JSON (the format's README on GitHub).

    Args:
        tensors: name, safetensors' name of the dtype, shape and bytes of each, in the order of their data, which
            follows without gaps.
    """
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape, size in tensors:
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_names(index: Any, where: str, ending: str = ".safetensors") -> list[str]:
    """The files an index names, each a plain file name: an index is a stranger's, and must not reach elsewhere."""
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise BadModelFile(f"{where}: no weight_map from tensor names to file names")
    names = sorted(set(mapping.values()))
    for name in names:
        plain = name == Path(name).name and "\\" not in name and ":" not in name and "\0" not in name
        if not plain or not name.endswith(ending):
            raise BadModelFile(f"{where}: shard {name!r} is not a plain {ending} file name")
    return names


def _open_shards(folder: Path) -> SafetensorsWeights:
    index = read_json(folder / INDEX)
    names = shard_names(index, str(folder / INDEX))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise BadModelFile(f"{folder}: {len(absent)} of {len(names)} shards missing: {', '.join(absent[:5])}")
    weights = SafetensorsWeights([folder / name for name in names], str(folder))
    for name in names:
        listed = {tensor for tensor, file in index["weight_map"].items() if file == name}
        differ = sorted(listed ^ weights.names_in(folder / name))
        if differ:
            raise BadModelFile(f"{folder / name}: index and shard disagree on {', '.join(differ[:5])}")
    return weights
