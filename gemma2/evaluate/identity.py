"""What a result belongs to: the weights as they are in memory, and what they were measured with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from gemma2.checkpoints.dtypes import dtype_name
from gemma2.gemma import Gemma

PIECE = 2**26  # bytes that are hashed at once


def fingerprint(gemma: Gemma, tick: Callable[[int], object] = lambda size: None) -> str:
    """A hash of a model's shape, tokenizer and every value that it holds, in the form that it holds it.

    The same file loaded in another dtype, or quantized, is another model. Weights that were offloaded count by name and
    shape alone, since they are not here.

    Args:
        tick: called with a number of bytes whenever so many were hashed.
    """
    found = hashlib.sha256(json.dumps(asdict(gemma.config), sort_keys=True).encode())
    found.update(gemma.tokenizer.to_proto())
    for name, tensor in _held(gemma):
        found.update(f"{name} {dtype_name(tensor.dtype)} {tuple(tensor.shape)}".encode())
        if tensor.device.type == "meta":
            continue
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        for piece in flat.split(PIECE):
            found.update(piece.cpu().numpy().data)
            tick(len(piece))
    return found.hexdigest()[:16]


def held_bytes(gemma: Gemma) -> int:
    """What `fingerprint` hashes."""
    return sum(t.numel() * t.element_size() for _, t in _held(gemma) if t.device.type != "meta")


def folder_hash(folders: list[Path]) -> str | None:
    """A hash of the tasks and data in folders; None for no folders."""
    if not folders:
        return None
    found = hashlib.sha256()
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
            found.update(str(file.relative_to(folder)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:16]


def _held(gemma: Gemma) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, in the order of their names."""
    model = gemma.model
    both = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return iter(sorted(both.items()))
