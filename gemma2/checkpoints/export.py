"""Writing checkpoints: what each format holds under which name, and the one stream from a source into a file.

A target is laid out before anything is written: what it cannot hold is refused then. After that every tensor goes
once, in chunks and on all cores, from the source to the target. Neither is ever whole in memory.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gemma2.checkpoints import google, google_write, safetensors
from gemma2.checkpoints.checkpoint import CHAT_TUNED, Checkpoint
from gemma2.checkpoints.companions import small_files
from gemma2.checkpoints.dtypes import PLAIN
from gemma2.checkpoints.ggml import GGMLType
from gemma2.checkpoints.gguf import Value
from gemma2.checkpoints.gguf_tokenizer import END_IDS, llama_cpp_end_ids
from gemma2.checkpoints.gguf_tokenizer_write import tokenizer_metadata
from gemma2.checkpoints.gguf_weights import NORM, ZERO_CENTRED, llama_cpp_name
from gemma2.checkpoints.gguf_write import (
    BLOCKS,
    FILE_TYPES,
    FINER,
    PAD,
    architecture_metadata,
    header_bytes,
    quantize,
)
from gemma2.checkpoints.threads import one_thread_per_core
from gemma2.checkpoints.weights import RELEASE_BYTES, check_head, check_names, chunks, shapes_of
from gemma2.errors import BadModelFile
from gemma2.tied import EMBEDDING

FOLDER = "safetensors"  # the form of a target that is a folder; the others are "gguf" and "ckpt"
AROUND = 512  # bytes, and more than any format has around a tensor: padding, headers
FLOAT64 = GGMLType(28, "F64", 1, 8)  # in a folder or .ckpt; no program runs a GGUF with it
LARGEST_HALF = 65504.0  # float16's, in which blocks have their scales

Shapes = Mapping[str, tuple[int, ...]]
Advance = Callable[[int], object]  # told of the bytes written


@dataclass(frozen=True)
class Entry:
    """One tensor of the target. Its rows are those of one source tensor, or of several: Google fuses q, k and v."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    type: GGMLType

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape[:-1]).numel() * (self.shape[-1] // self.type.values) * self.type.bytes


@dataclass(frozen=True)
class Layout:
    """What a target will be.

    Attributes:
        header: what stands before the tensors' data, or for a `.ckpt` describes them.
        beside: small files that belong to it, name -> content: in the folder, or in the one a `.ckpt` stands in.
        notes: a line for everything that other programs will not see in it.
    """

    form: str
    entries: tuple[Entry, ...]
    header: bytes
    beside: Mapping[str, bytes]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of the tensors' data."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def space(self) -> int:
        """Bytes that it takes on the disk, at most."""
        return self.bytes + len(self.header) + sum(map(len, self.beside.values())) + AROUND * (len(self.entries) + 8)


def layout_for(form: str, opened: Checkpoint, main: str, title: str) -> Layout:
    """A target whose matrices are of the ggml type `main`. `title` is a name for the model in a GGUF.

    Raises:
        BadModelFile: tensors that a Gemma 2 does not have, rows that are not whole blocks, or a config that the form
            cannot state.
    """
    shapes = shapes_of(opened.config)
    check_names(opened.weights, shapes)
    check_head(opened.weights, shapes[EMBEDDING])
    if form == "gguf":
        entries = [_gguf_entry(opened, name, shape, main) for name, shape in shapes.items()]
        header, notes = _gguf_header(opened, entries, main, title)
        return Layout(form, tuple(entries), header, {}, notes)
    grouped = google.fused(shapes) if form == "ckpt" else {name: (name,) for name in shapes}
    entries = []
    for name, sources in grouped.items():
        shape = (sum(shapes[own][0] for own in sources), *shapes[sources[0]][1:])
        entries.append(Entry(name, sources, shape, _float_type(opened, sources[0], main)))
    entries.sort(key=lambda entry: -entry.type.bytes)  # wider first, so that every tensor is aligned
    if form == "ckpt":
        header = google_write.state_pickle({entry.name: (entry.type.name, entry.shape) for entry in entries})
        return Layout(form, tuple(entries), header, small_files(opened))
    described = [(entry.name, entry.type.name, entry.shape, entry.bytes) for entry in entries]
    header = safetensors.header_bytes(described, {"format": "pt"})
    return Layout(form, tuple(entries), header, small_files(opened, PLAIN[main]))


def write(layout: Layout, opened: Checkpoint, path: Path, advance: Advance) -> None:
    """Write the layout with the weights of `opened` at `path`, an empty file or folder.

    Raises:
        BadModelFile: NaN, infinity, or a value beyond what its type can hold.
        OSError: a file cannot be read or written.
    """
    with contextlib.closing(_encoded(opened, layout.entries)) as parts:

        def told(pieces: Iterator[tuple[Entry, bytes]]) -> Iterator[bytes]:
            for _, data in pieces:
                yield data
                advance(len(data))

        tensors = (told(pieces) for _, pieces in groupby(parts, key=itemgetter(0)))
        if layout.form == "ckpt":
            google_write.write_archive(path, layout.header, tensors)
        elif layout.form == "gguf":
            _write_flat(path, layout.header, tensors, PAD)
        else:
            _write_flat(path / safetensors.SINGLE, layout.header, tensors)
            for name, content in layout.beside.items():
                (path / name).write_bytes(content)


def _write_flat(path: Path, header: bytes, tensors: Iterator[Iterator[bytes]], alignment: int = 1) -> None:
    with path.open("wb") as file:
        file.write(header)
        for pieces in tensors:
            for data in pieces:
                file.write(data)
            file.write(bytes(-file.tell() % alignment))


def _gguf_header(opened: Checkpoint, entries: list[Entry], main: str, title: str) -> tuple[bytes, tuple[str, ...]]:
    """A GGUF's header: the keys that llama.cpp has, and keys of this project for what llama.cpp has none for. And a
    line for what llama.cpp will not do."""
    metadata = architecture_metadata(opened.config, opened.weights.where)
    metadata["general.name"] = Value("str", title)
    metadata["general.file_type"] = Value("u32", FILE_TYPES[main])
    metadata["general.quantization_version"] = Value("u32", 2)
    tokenizer = opened.tokenizer
    metadata |= tokenizer_metadata(
        tokenizer.to_proto(), tokenizer.where, opened.config.vocab_size, opened.end_ids, tokenizer.added
    )
    if opened.chat_template is not None:
        metadata["tokenizer.chat_template"] = Value("str", opened.chat_template)
    if opened.chat_tuned is not None:
        metadata[CHAT_TUNED] = Value("bool", opened.chat_tuned)
    notes: tuple[str, ...] = ()
    ends = frozenset(id for id in opened.end_ids if id < opened.config.vocab_size)
    gemmas = tokenizer.end_ids
    if missed := sorted(ends - llama_cpp_end_ids(metadata) - gemmas):
        metadata[END_IDS] = Value("u32[]", np.array(sorted(ends), np.uint32))
        listed = f"{', '.join(map(str, missed)):.200}"
        notes = (f"llama.cpp will not end a text at {listed}: a GGUF names two at most, both control tokens",)
    metadata |= _lost_in_the_sum(opened, entries)
    described = [(entry.name, entry.shape, entry.type, entry.bytes) for entry in entries]
    return header_bytes(metadata, described), notes


def _gguf_entry(opened: Checkpoint, name: str, shape: tuple[int, ...], main: str) -> Entry:
    type = BLOCKS["F32" if len(shape) == 1 else FINER.get(main, main) if name == EMBEDDING else main]
    if shape[-1] % type.values:
        raise BadModelFile(
            f"{opened.weights.where}: {opened.weights.in_file(name)} has rows of {shape[-1]}, not a whole number of "
            f"{type.name} blocks of {type.values}; choose bf16, f16 or f32"
        )
    return Entry(llama_cpp_name(name), (name,), shape, type)


def _float_type(opened: Checkpoint, name: str, main: str) -> GGMLType:
    """The type for a tensor among plain floats: `main`, or float32 for a norm that `main` does not hold exactly."""
    if main == FLOAT64.name:
        return FLOAT64
    if not name.endswith(NORM):
        return BLOCKS[main]
    w = _norm(opened, name)
    if w.dtype == torch.float64:
        raise BadModelFile(
            f"{opened.weights.where}: {opened.weights.in_file(name)} holds a gain that 1 + w gives for no float32 w, "
            'so only GGUF can state it, or a model that is float64 throughout (type="f64", --type f64)'
        )
    return BLOCKS[main if torch.equal(w.to(PLAIN[main]).float(), w) else "F32"]


def _lost_in_the_sum(opened: Checkpoint, entries: list[Entry]) -> dict[str, Value]:
    """The norm weights w that are also written as they are, by key of the metadata.

    A GGUF's norm tensor holds 1 + w in float32, in which a small w loses bits. Other readers ignore these keys; reading
    them back gives w itself.
    """
    beside = {}
    for entry in entries:
        if entry.name.endswith(NORM):
            w = _norm(opened, *entry.sources)
            # In bits, since -0.0 and 0.0 are equal.
            if w.dtype == torch.float32 and not torch.equal(((1.0 + w) - 1.0).view(torch.int32), w.view(torch.int32)):
                beside[ZERO_CENTRED + entry.name] = Value("f32[]", w.numpy())
    return beside


def _norm(opened: Checkpoint, name: str) -> Tensor:
    """A whole norm weight, rounded to float32, or in float64 where only that states a GGUF's gain."""
    dtype = opened.weights.dtype_for(name, torch.float32)
    w = torch.empty(opened.weights.tensors[name][0], dtype=dtype, device="cpu")
    opened.weights.read(name, 0, w)
    return w


def _encoded(opened: Checkpoint, entries: tuple[Entry, ...]) -> Generator[tuple[Entry, bytes], None, None]:
    """The data of every tensor in order, chunk by chunk. Chunks are made on all cores, a few ahead of their turn."""
    weights = opened.weights

    def encode(entry: Entry, name: str, start: int, stop: int) -> tuple[Entry, bytes, int]:
        if entry.name == llama_cpp_name(name) and name.endswith(NORM):
            values = (1.0 + _norm(opened, name)[start:stop]).float()
        else:
            wide = torch.float64 if entry.type == FLOAT64 else torch.float32
            values = torch.empty(stop - start, *entry.shape[1:], dtype=wide, device="cpu")
            weights.read(name, start, values)
        _check_values(values, opened, name, entry.type)
        return entry, quantize(values, entry.type), values.numel() * weights.tensors[name][1].itemsize

    def jobs() -> Iterator[tuple[Entry, str, int, int]]:
        for entry in entries:
            for name in entry.sources:
                for start, stop in chunks(weights.tensors[name][0], torch.float32):
                    yield entry, name, start, stop

    waiting, most, mapped = jobs(), 2 * torch.get_num_threads(), 0
    ahead: deque[Future[tuple[Entry, bytes, int]]] = deque()
    with one_thread_per_core() as pool:
        while True:
            for job in islice(waiting, most - len(ahead)):
                ahead.append(pool.submit(encode, *job))
            if not ahead:
                break
            entry, data, read = ahead.popleft().result()
            yield entry, data
            mapped += read
            if mapped >= RELEASE_BYTES:
                weights.release()
                mapped = 0
    weights.release()


def _check_values(values: Tensor, opened: Checkpoint, name: str, type: GGMLType) -> None:
    where = f"{opened.weights.where}: {opened.weights.in_file(name)}"
    if not values.sum().isfinite() and not values.isfinite().all():
        raise BadModelFile(f"{where} holds NaN or infinity, and is not passed on")
    if type.name not in ("F64", "F32", "BF16", "MXFP4") and values.abs().max() > LARGEST_HALF:
        raise BadModelFile(f"{where} holds {values.abs().max():g}, and {type.name} goes up to 65504: choose bf16")
    if type.name == "BF16" and not values.bfloat16().isfinite().all():
        raise BadModelFile(f"{where} holds {values.abs().max():g}, and BF16 goes up to 3.39e+38: choose f32")
