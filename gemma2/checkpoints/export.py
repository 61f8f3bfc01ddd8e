"""Writing checkpoints: what each format holds under which name, and the one stream from a source into a file.

Every tensor goes once, in chunks and on all cores, from the source to the target; neither is ever whole in memory.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma2.checkpoints import google
from gemma2.checkpoints.checkpoint import Checkpoint
from gemma2.checkpoints.ggml import BlockType
from gemma2.checkpoints.gguf import Value
from gemma2.checkpoints.gguf_tokenizer import tokenizer_metadata
from gemma2.checkpoints.gguf_weights import NORM, ZERO_CENTRED, llama_cpp_name
from gemma2.checkpoints.gguf_write import (
    BLOCKS,
    FILE_TYPES,
    FINER,
    architecture_metadata,
    header_bytes,
    padding,
    quantize,
)
from gemma2.checkpoints.safetensors import SINGLE
from gemma2.checkpoints.weights import EMBEDDING, a_thread_a_core, chunks
from gemma2.errors import BadModelFile

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # what safetensors and .ckpt hold here
LARGEST_HALF = 65504.0  # float16's, in which blocks have their scales
ALIGNED = 64  # bytes, for tensors in one mapped file

Shapes = Mapping[str, tuple[int, ...]]
Advance = Callable[[int], object]  # told of the bytes written


@dataclass(frozen=True)
class Entry:
    """One tensor of the target. Its rows are those of one source tensor, or of several: Google fuses q, k and v."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    kind: BlockType

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape[:-1]).numel() * (self.shape[-1] // self.kind.values) * self.kind.bytes


def entries_for(form: str, opened: Checkpoint, shapes: Shapes, main: str) -> list[Entry]:
    """What a target of the form "safetensors", "ckpt" or "gguf" holds when its matrices are of the ggml type `main`.

    Raises:
        BadModelFile: rows that are no whole blocks, or a norm weight that the form cannot state exactly.
    """
    if form == "gguf":
        return [_gguf_entry(opened, name, shape, main) for name, shape in shapes.items()]
    grouped = google.fused(shapes) if form == "ckpt" else {name: (name,) for name in shapes}
    entries = []
    for name, sources in grouped.items():
        shape = (sum(shapes[own][0] for own in sources), *shapes[sources[0]][1:])
        entries.append(Entry(name, sources, shape, _float_kind(opened, sources[0], main)))
    return sorted(entries, key=lambda entry: -entry.kind.bytes)  # wider first, so that every tensor is aligned


def companions(opened: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, bytes]:
    """The files beside weights that do not state what they are: name -> content."""
    special = opened.tokenizer.special
    ids = {f"{name}_token_id": special[name] for name in ("bos", "eos", "pad")}
    kind = {} if dtype is None else {"torch_dtype": str(dtype).removeprefix("torch.")}
    words = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")},
        **({} if opened.chat_template is None else {"chat_template": opened.chat_template}),
    }
    files: dict[str, Any] = {"config.json": opened.config.to_dict() | ids | kind, "tokenizer_config.json": words}
    if opened.chat_tuned is not None and "end_of_turn" in special:
        stops = [special["eos"], special["end_of_turn"]] if opened.chat_tuned else special["eos"]
        files["generation_config.json"] = ids | {"eos_token_id": stops}
    texts = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}
    return texts | {"tokenizer.model": opened.tokenizer.to_proto()}


def write_safetensors(opened: Checkpoint, entries: list[Entry], folder: Path, advance: Advance) -> None:
    """A Hugging Face folder. Layout of the file: github.com/huggingface/safetensors, README."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        described[entry.name] = {
            "dtype": entry.kind.name,
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.bytes],
        }
        end += entry.bytes
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    folder.mkdir()
    with (folder / SINGLE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, data in _encoded(opened, entries):
            advance(file.write(data))
    widest = max((FLOATS[entry.kind.name] for entry in entries if len(entry.shape) > 1), key=lambda d: d.itemsize)
    for name, content in companions(opened, widest).items():
        (folder / name).write_bytes(content)


def write_gguf(opened: Checkpoint, entries: list[Entry], path: Path, advance: Advance, main: str) -> None:
    """A GGUF file that llama.cpp reads, and that says everything llama.cpp has a key for."""
    metadata = architecture_metadata(opened.config, opened.weights.where)
    metadata["general.name"] = Value("str", opened.path.stem if opened.path.is_file() else opened.path.resolve().name)
    metadata["general.file_type"] = Value("u32", FILE_TYPES[main])
    metadata["general.quantization_version"] = Value("u32", 2)
    metadata |= tokenizer_metadata(opened.tokenizer.to_proto())
    if opened.chat_template is not None:
        metadata["tokenizer.chat_template"] = Value("str", opened.chat_template)
    metadata |= _lost_in_the_sum(opened, entries)
    header = header_bytes(metadata, [(entry.name, entry.shape, entry.kind, entry.bytes) for entry in entries])
    with path.open("wb") as file:
        file.write(header)
        last = None
        for entry, data in _encoded(opened, entries):
            if entry != last:
                file.write(bytes(padding(file.tell())))
            advance(file.write(data))
            last = entry
        file.write(bytes(padding(file.tell())))


def write_google(opened: Checkpoint, entries: list[Entry], path: Path, advance: Advance) -> None:
    """Google's `.ckpt`: {"model_state_dict": tensors}, pickled by torch.save, which wants all of them at once. They lie
    in a file without a name meanwhile, as large as the target, rather than in memory."""
    places, end = {}, 0
    for entry in entries:
        places[entry] = slice(end, end + entry.bytes)
        end += entry.bytes + -entry.bytes % ALIGNED
    backing = path.with_name(path.name + ".data")
    try:
        mapped = np.memmap(backing, np.uint8, "w+", shape=(end,))
    finally:
        backing.unlink(missing_ok=True)
    filled = dict.fromkeys(entries, 0)
    for entry, data in _encoded(opened, entries):
        start = places[entry].start + filled[entry]
        mapped[start : start + len(data)] = np.frombuffer(data, np.uint8)
        filled[entry] += len(data)
        advance(len(data))
    state = {
        entry.name: torch.from_numpy(mapped[place]).view(FLOATS[entry.kind.name]).view(entry.shape)
        for entry, place in places.items()
    }
    torch.save({"model_state_dict": state}, path)


def _float_kind(opened: Checkpoint, name: str, main: str) -> BlockType:
    """The type for a tensor among plain floats: `main`, or float32 for a norm that `main` cannot hold exactly."""
    found = opened.weights.dtype_for(name, FLOATS[main])
    if found == torch.float64:
        raise BadModelFile(
            f"{opened.weights.where}: {opened.weights.in_file(name)} holds a gain that 1 + w gives for no float32 w, "
            "so only GGUF can state it"
        )
    return BLOCKS["F32" if found == torch.float32 else main]


def _gguf_entry(opened: Checkpoint, name: str, shape: tuple[int, ...], main: str) -> Entry:
    kind = BLOCKS["F32" if len(shape) == 1 else FINER.get(main, main) if name == EMBEDDING else main]
    if shape[-1] % kind.values:
        raise BadModelFile(
            f"{opened.weights.where}: {name} has rows of {shape[-1]}, no whole {kind.name} blocks of {kind.values}; "
            "choose bf16, f16 or f32"
        )
    return Entry(llama_cpp_name(name), (name,), shape, kind)


def _lost_in_the_sum(opened: Checkpoint, entries: list[Entry]) -> dict[str, Value]:
    """A GGUF's norms hold 1 + w in float32, in which a small w loses bits. Such w are written beside it, under names
    that other readers do not know and so leave alone, and reading back gives w itself."""
    beside = {}
    for entry in entries:
        if entry.name.endswith(NORM):
            w = _norm(opened, entry)
            if w.dtype == torch.float32 and not torch.equal((1.0 + w) - 1.0, w):
                beside[ZERO_CENTRED + entry.name] = Value("f32[]", w.numpy())
    return beside


def _norm(opened: Checkpoint, entry: Entry) -> Tensor:
    (name,) = entry.sources
    w = torch.empty(entry.shape, dtype=opened.weights.dtype_for(name, torch.float32))
    opened.weights.read(name, 0, w)
    return w


def _encoded(opened: Checkpoint, entries: list[Entry]) -> Iterator[tuple[Entry, bytes]]:
    """The data of every tensor in order, chunk by chunk. Chunks are made on all cores, a few ahead of their turn."""

    def encode(entry: Entry, name: str, start: int, stop: int) -> tuple[Entry, bytes]:
        if entry.name.endswith(NORM) and entry.name == llama_cpp_name(name):
            values = (1.0 + _norm(opened, entry)).float()
        else:
            values = torch.empty(stop - start, *entry.shape[1:])
            opened.weights.read(name, start, values)
        _check_values(values, opened, name, entry.kind)
        return entry, quantize(values, entry.kind)

    def jobs() -> Iterator[tuple[Entry, str, int, int]]:
        for entry in entries:
            for name in entry.sources:
                for start, stop in chunks(opened.weights.tensors[name][0], torch.float32):
                    yield entry, name, start, stop

    waiting = jobs()
    with a_thread_a_core() as pool:
        ahead: deque[Future[tuple[Entry, bytes]]] = deque()
        while True:
            for job in islice(waiting, 2 * torch.get_num_threads() - len(ahead)):
                ahead.append(pool.submit(encode, *job))
            if not ahead:
                break
            yield ahead.popleft().result()
            opened.weights.release()


def _check_values(values: Tensor, opened: Checkpoint, name: str, kind: BlockType) -> None:
    where = f"{opened.weights.where}: {opened.weights.in_file(name)}"
    if not values.sum().isfinite() and not values.isfinite().all():
        raise BadModelFile(f"{where} holds NaN or infinity, and is not passed on")
    if kind.name not in ("F32", "BF16", "MXFP4") and values.abs().max() > LARGEST_HALF:
        raise BadModelFile(
            f"{where} holds {values.abs().max():g}, beyond what float16 and {kind.name} can: choose bf16"
        )
    if kind.name == "BF16" and not values.bfloat16().isfinite().all():
        raise BadModelFile(f"{where} holds {values.abs().max():g}, beyond what bfloat16 can: choose f32")
