"""The container safetensors, and the shard indexes that Hugging Face's folders have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma2.errors import BadModelFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ENDING = ".safetensors"
# How transformers names the files of a model that is in several: which one it is, and of how many.
SHARD = re.compile(r".+-(\d{5})-of-(\d{5})\.\w+")


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
    """The files an index names, in its folder or below it: an index is a stranger's, and must not reach elsewhere."""
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise BadModelFile(f"{where}: no weight_map from tensor names to file names")
    names = sorted(set(mapping.values()))
    for name in names:
        steps = name.split("/")
        plain = not {"", ".", ".."} & {*steps} and "\\" not in name and ":" not in name and "\0" not in name
        if not plain or not name.endswith(ending):
            raise BadModelFile(f"{where}: shard {name!r:.200} is not a plain {ending} file name")
    return names
