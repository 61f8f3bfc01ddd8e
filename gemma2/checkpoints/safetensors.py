"""The container safetensors, and the shard indexes that Hugging Face's folders have."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemma2.checkpoints.dtypes import SAFETENSORS
from gemma2.checkpoints.foreign import refuse_foreign
from gemma2.errors import BadModelFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ENDING = ".safetensors"


class SafetensorsFile:
    """A `TensorFile` over one safetensors file. The header is read at once, tensors when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: Any = None
        handle = self._handle()
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name in handle.keys():  # noqa: SIM118  (safe_open is no mapping)
            part = handle.get_slice(name)
            # A dtype that the table does not have is called uint8, and refused as that is.
            self.tensors[name] = (tuple(part.get_shape()), SAFETENSORS.get(part.get_dtype(), torch.uint8))
        self.release()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        rows: Tensor = self._handle().get_slice(name)[start:stop]
        return rows

    def release(self) -> None:
        # Closing unmaps the file; pages that stay mapped would count as memory beside the weights.
        self._open = None

    def _handle(self) -> Any:
        handle = self._open  # another thread may release it meanwhile, but not what is held here
        if handle is None:
            try:
                handle = self._open = safe_open(self.path, framework="pt", device="cpu").__enter__()
            except FileNotFoundError:
                raise BadModelFile(f"{self.path}: no such file") from None
            except (SafetensorError, TypeError, AttributeError, ValueError, OSError) as error:
                refuse_foreign(self.path, gguf=True)
                raise BadModelFile(f"{self.path}: not a whole safetensors file ({error})") from None
        return handle


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


def shard_names(index: Any, where: str, ending: str = ENDING) -> list[str]:
    """The files an index names, each a plain file name: an index is a stranger's, and must not reach elsewhere."""
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise BadModelFile(f"{where}: no weight_map from tensor names to file names")
    names = sorted(set(mapping.values()))
    for name in names:
        plain = name == Path(name).name and "\\" not in name and ":" not in name and "\0" not in name
        if not plain or not name.endswith(ending):
            raise BadModelFile(f"{where}: shard {name!r:.200} is not a plain {ending} file name")
    return names
