"""What tests/golden/parity holds, the files that are made of its seed, and how much of a recording can be demanded."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import parity_model
import torch
from torch import Tensor

import gemma2
from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.numerics import storage_of
from gemma2.numerics.changes import Storage
from gemma2.parity.machine import other_bits
from gemma2.parity.trace import Trace

PARITY = Path(__file__).parents[1] / "golden" / "parity"
MADE = ("f32", "f16", "bf16")
WRITTEN = ("q8_0", "q4_k_m", "q2_k", "mixed")  # by llama.cpp's quantizer
FILES = (*MADE, *WRITTEN)
BITS, ROUNDING = "to the bit", "within rounding"
_PLACE = tempfile.TemporaryDirectory(prefix="gemma2-")


@cache
def folder(gguf: bool = False) -> Path:
    """The model in Hugging Face's format, with the query scale that a GGUF states or with another."""
    place = Path(_PLACE.name) / ("for_gguf" if gguf else "folder")
    place.mkdir()
    return parity_model.write_folder(place, gguf)


@cache
def file(name: str) -> Path:
    """A GGUF of the model."""
    if name in WRITTEN:
        return PARITY / f"{name}.gguf"
    return gemma2.convert(folder(gguf=True), Path(_PLACE.name) / f"{name}.gguf", type=name, progress=False).path


def opened(path: Path) -> tuple[gemma2.Gemma2, Storage | None]:
    """A file's model in float32, and the types in the file."""
    return gemma2.load(path, dtype="float32", device="cpu").model, storage_of(open_checkpoint(path).weights)


def prompt() -> Tensor:
    return torch.tensor([parity_model.ids()])


def demand(trace: Trace) -> str:
    """BITS where this machine's operations have the bits of the one that recorded a trace, else ROUNDING."""
    about = trace.about
    changed = other_bits(about.versions, about.config, len(trace.ids), getattr(torch, about.dtype))
    if changed:
        print(f"{trace.path.name}: other bits here than where it was recorded, in {', '.join(changed)}")
    return ROUNDING if changed else BITS
