"""Which systems a run measures, from specs such as `llama.cpp:FILE.gguf` or `self:fast+compile`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma2.checkpoints.checkpoint import Checkpoint
from gemma2.checkpoints.dtypes import RUNNABLE, dtype_name
from gemma2.checkpoints.gguf import Value, read_header
from gemma2.errors import BadModelFile
from gemma2.load import parse_dtype
from gemma2.memory import free_host_memory

OURS, TRANSFORMERS, LLAMA, GOOGLE = "gemma2", "transformers", "llama.cpp", "gemma_pytorch"
PEERS = "transformers, llama.cpp, llama.cpp:FILE.gguf, gemma_pytorch:FOLDER, self, self:WORD+WORD"
SWITCHES = ("fast", "compile")  # of gemma2.load, which are on or off
# llama.cpp's names for what a file is mostly of (llama_ftype, by number).
FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    32: "BF16",
}


@dataclass(frozen=True)
class System:
    """What is measured: a name for tables, which implementation it is, its file, and what it is loaded with."""

    name: str
    kind: str
    path: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable


def our_system(path: Path, options: Mapping[str, Any]) -> System:
    """This package with options of `gemma2.load`; its name says those that are not the default."""
    words = [word for word in SWITCHES if options.get(word)]
    words += [str(options[key]) for key in ("weights", "dtype") if options.get(key)]
    return System(" ".join([OURS, *words]), OURS, path, dict(options))


def peers(specs: Sequence[str], opened: Checkpoint, options: Mapping[str, Any]) -> list[System]:
    """The systems to measure beside this package.

    Args:
        specs: as in PEERS.
        opened: MODEL, whose weights they run.
        options: what MODEL is loaded with. The peers have its dtype and device where they leave a choice.
    Raises:
        BadModelFile: a file or folder is not there, or is not what it must be.
        ValueError: a spec that names nothing, or a device that a peer is not measured on.
    """
    found = []
    for spec in specs:
        kind, colon, rest = spec.partition(":")
        if kind == "self":
            found.append(our_system(opened.path, _own_options(spec, rest, options)))
        elif spec == TRANSFORMERS:
            kept = {key: options[key] for key in ("dtype", "device") if options.get(key)}
            found.append(System("transformers eager", TRANSFORMERS, opened.path, kept))
        elif kind == LLAMA and (rest or not colon):
            path = Path(rest).expanduser() if rest else opened.path
            found.append(_llama_cpp(path, opened, options))
        elif kind == GOOGLE and rest:
            folder = Path(rest).expanduser()
            if not (folder / "gemma" / "model.py").is_file():
                raise BadModelFile(
                    f"{folder}: no gemma/model.py in it; give the folder of a checkout of google/gemma_pytorch"
                )
            _on_the_processor(kind, options)
            kept = {"folder": str(folder), **({"dtype": options["dtype"]} if options.get("dtype") else {})}
            found.append(System(GOOGLE, GOOGLE, opened.path, kept))
        else:
            raise ValueError(f"--against {spec!r} names no system; there are {PEERS}")
    return found


def distinct(systems: Sequence[System]) -> list[System]:
    """Raises ValueError for two that are the same."""
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is named twice: name each system once")
    return list(systems)


def check_room(systems: Sequence[System], opened: Checkpoint) -> None:
    """Raises MemoryError where the weights of all systems, which are in memory at once, do not fit into it."""
    needed, free = sum(_held(system, opened) for system in systems), free_host_memory()
    if free is not None and needed > free.bytes:
        raise MemoryError(
            f"the weights of {len(systems)} systems need {needed / 1e9:.3g} GB at once, and {free.bytes / 1e9:.3g} GB "
            f"are free ({free.limit}): name fewer systems in --against"
        )


def _held(system: System, opened: Checkpoint) -> int:
    """About the bytes of memory that a system's weights take, a mapped file included."""
    if system.options.get("device", "cpu") != "cpu":
        return 0
    if system.kind == LLAMA:
        return system.path.stat().st_size
    dtype = parse_dtype(system.options.get("dtype")) or opened.weights.dtype
    whole = opened.config.parameter_count * dtype.itemsize
    if not system.options.get("weights"):
        return whole
    files = [system.path] if system.path.is_file() else list(system.path.glob("*.safetensors"))
    return min(whole, sum(file.stat().st_size for file in files))


def _llama_cpp(path: Path, opened: Checkpoint, options: Mapping[str, Any]) -> System:
    _on_the_processor(LLAMA, options)
    if path == opened.path and opened.form != "gguf":
        raise ValueError(
            f"llama.cpp reads GGUF only, and {path} is none: name one of the same weights, llama.cpp:FILE.gguf "
            f"(gemma2 convert {path} FILE.gguf --type bf16 writes it)"
        )
    if not path.is_file():
        raise BadModelFile(f"{path}: no such file, named by --against llama.cpp:{path}")
    return System(f"llama.cpp {file_type(path)}", LLAMA, path)


def file_type(path: Path) -> str:
    """What a GGUF is mostly of, as llama.cpp calls it."""
    header = read_header(path)
    stated = header.metadata.get("general.file_type")
    if isinstance(stated, Value) and stated.value in FILE_TYPES:
        return FILE_TYPES[stated.value]
    return "/".join(sorted({info.type.name for info in header.tensors.values() if len(info.shape) > 1}))


def _own_options(spec: str, text: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`fast+compile+weights=packed+dtype=float32`, any of these; the device is MODEL's."""
    found: dict[str, Any] = {key: options[key] for key in ("device",) if options.get(key)}
    for word in text.split("+") if text else []:
        key, equals, value = word.partition("=")
        if word in SWITCHES:
            found[word] = True
        elif key in ("weights", "dtype") and equals and value:
            found[key] = value
        else:
            raise ValueError(f"--against {spec!r}: {word!r} is not fast, compile, weights=W or dtype=T")
    if "dtype" in found:
        parse_dtype(found["dtype"])
        found["dtype"] = dtype_name(RUNNABLE[found["dtype"]])
    return found


def _on_the_processor(kind: str, options: Mapping[str, Any]) -> None:
    if options.get("device", "cpu") != "cpu":
        raise ValueError(f"{kind} is measured on the CPU only: leave it out, or leave out --device")
