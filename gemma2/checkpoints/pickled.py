"""PyTorch's own files: a pickle of tensors, in a zip or, in the older form, alone.

A pickle can run code, so it is read with `weights_only=True` and in no other way: then it can hold nothing but tensors
and plain containers. A zip is mapped, not read into memory.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma2.checkpoints.foreign import refuse_foreign, refuse_pickle, refuse_zip
from gemma2.errors import BadModelFile, first_line
from gemma2.memory import no_mapping

ZIP, PICKLE = b"PK\3\4", b"\x80"  # how the two forms begin
# Where training programs keep the weights among other things: gemma_pytorch, Lightning, others, DeepSpeed.
CONTAINERS = ("model_state_dict", "state_dict", "model", "module")
MOST_PICKLE = 4 * 2**20  # bytes of names and shapes; a Gemma 2 has 0.1 million of them, and each costs time
MOST_RECORDS = 2**14
MOST_IN_TUPLE = 10_000  # values in a tuple and all tuples inside it: hashing a name made of them takes as long
LEGACY_PICKLES = 4  # the older form begins with so many: a number, a version, the machine, and then the state
GOOGLE = (b"embedder.weight", b"qkv_proj")  # in the names of Google's tensors, and in no others


class PickledFile:
    """A `TensorFile` over one file that `torch.save` wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._state: dict[str, Tensor] | None = None
        self._mapped = is_zip(path)
        self.tensors = {name: (tuple(t.shape), t.dtype) for name, t in self.state().items()}
        self.release()

    def state(self) -> dict[str, Tensor]:
        state = self._state  # another thread may release it meanwhile, but not what is held here
        if state is None:
            state = self._state = _read(self.path)
        return state

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.state()[name][start:stop]

    def release(self) -> None:
        if self._mapped:  # the mapping goes with its last tensor; what was read into memory stays
            self._state = None


def is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(ZIP)) == ZIP


def names_are_googles(path: Path) -> bool:
    """Whether a PyTorch file's tensors have Google's names, as its pickle spells them. Nothing is unpickled."""
    try:
        text = _records(path)[1] if is_zip(path) else b""
    except BadModelFile:
        return False  # said when it is read
    if not text:
        with path.open("rb") as file:
            text = file.read(MOST_PICKLE)  # the older form has the names first
    return any(name in text for name in GOOGLE)


def _read(path: Path) -> dict[str, Tensor]:
    refuse_foreign(path, gguf=True)
    with path.open("rb") as file:
        head = file.read(2)
    mapped = is_zip(path)
    if not mapped and not head.startswith(PICKLE):
        raise BadModelFile(f"{path}: not a PyTorch checkpoint (neither a zip nor a pickle)")
    held = None
    if mapped:
        held, text = _records(path)
        _refuse_slow(path, text, 1)
    else:
        with path.open("rb") as file:
            _refuse_slow(path, file.read(MOST_PICKLE), LEGACY_PICKLES)
    try:
        raw: Any = torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
    except pickle.UnpicklingError as error:
        refuse_pickle(path, str(error))
        raise BadModelFile(
            f"{path}: holds more than tensors, so it is not read: a pickle can run code; save the model's state_dict "
            "alone, or as safetensors"
        ) from None
    except Exception as error:  # a damaged pickle fails in any way: IndexError, struct.error, AssertionError ...
        if "Cannot allocate memory" in str(error):
            raise no_mapping(path) from None
        raise BadModelFile(f"{path}: not a PyTorch checkpoint ({first_line(error)})") from None
    state = _state(raw)
    if state is None or not all(isinstance(value, Tensor) for value in state.values()):
        refuse_pickle(path, raw)
        odd = [f"{_said(name)} is of type {type(value).__name__}" for name, value in (state or {}).items()
               if not isinstance(value, Tensor)]  # fmt: skip
        raise BadModelFile(f"{path}: no model_state_dict of tensors in it{f': {odd[0]}' if odd else ''}")
    odd = [_said(name) for name, tensor in state.items() if not isinstance(name, str) or not _is_plain(tensor)]
    if odd:
        raise BadModelFile(f"{path}: {len(odd)} tensors without a name or without plain values: {', '.join(odd[:5])}")
    # PyTorch does not hold the size that the pickle states for a tensor's memory against the record in the zip.
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    if held is not None and sum(sizes.values()) > held:
        raise BadModelFile(f"{path}: not a PyTorch checkpoint (its tensors reach beyond the bytes stored for them)")
    return dict(state)


def _state(raw: Any) -> Mapping[Any, Any] | None:
    """What maps names to tensors: the whole, or what it holds under a name that training programs use."""
    if not isinstance(raw, Mapping):
        return None
    inner = (raw[name] for name in CONTAINERS if isinstance(raw.get(name), Mapping))
    return next(inner, None if "model_state_dict" in raw else raw)


def _records(path: Path) -> tuple[int, bytes]:
    """The bytes of tensors that a zip of `torch.save` holds, and its pickle.

    Raises:
        BadModelFile: it is damaged, compressed or far too large for one: what it would cost is known beforehand.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            named = next((entry for entry in entries if entry.filename.endswith("data.pkl")), None)
            packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            if packed and named is not None:
                raise BadModelFile(f"{path}: not a PyTorch checkpoint ({packed[0]!r:.100} in it is compressed)")
            if named is None:
                refuse_zip(path, (entry.filename for entry in entries))
                raise BadModelFile(f"{path}: not a PyTorch checkpoint (a zip without data.pkl)")
            if named.file_size > MOST_PICKLE or len(entries) > MOST_RECORDS:
                raise BadModelFile(
                    f"{path}: not a PyTorch checkpoint ({len(entries):,} records, and {named.file_size:,} bytes for "
                    "names and shapes)"
                )
            held = sum(entry.file_size for entry in entries if "/data/" in entry.filename)
            return held, archive.read(named)
    except BadModelFile:
        raise
    except Exception as error:  # zipfile raises what the fields that it reads bring: struct.error, OverflowError ...
        raise BadModelFile(f"{path}: not a PyTorch checkpoint ({first_line(error)})") from None


def _refuse_slow(path: Path, content: bytes, count: int) -> None:
    """Refuse pickles with tuples that hold each other twice over, so that hashing one would take hours."""
    stream = io.BytesIO(content)
    heaviest = max(_heaviest_tuple(stream) for _ in range(count))
    if heaviest > MOST_IN_TUPLE:
        raise BadModelFile(f"{path}: not a PyTorch checkpoint (a tuple of {heaviest:.2g} values in its pickle)")


def _heaviest_tuple(stream: io.BytesIO) -> float:
    """The most values in one tuple of a pickle, those in tuples inside it counted each time.

    Nothing is unpickled. Where the pickle is damaged, unpickling ends too.
    """
    stack: list[float | None] = []  # how many values each object on the pickle's stack holds; None is a mark
    memo: dict[object, float] = {}
    heaviest = 0.0
    with contextlib.suppress(Exception):  # ValueError from pickletools, and what a wrong stack or memo brings
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "MARK":
                stack.append(None)
            elif "PUT" in opcode.name or opcode.name == "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1] or 1
            elif "GET" in opcode.name:
                stack.append(memo[argument])
            else:
                taken: list[float] = []
                before = [kind.name for kind in opcode.stack_before]
                if "mark" in before:
                    while (top := stack.pop()) is not None:
                        taken.append(top)
                    before = before[: before.index("mark")]
                taken += [stack.pop() or 1 for _ in before]
                weight = 1.0 + sum(taken) if opcode.name.startswith("TUPLE") else 1.0
                heaviest = max(heaviest, weight)
                stack += [weight] * len(opcode.stack_after)
    return heaviest


def _said(name: object) -> str:
    """A key of a state for a message. Only small ones are spelled: others can be made to fill memory."""
    small = isinstance(name, str | float) or (isinstance(name, int) and name.bit_length() < 64)
    return repr(name[:100] if isinstance(name, str) else name) if small else f"one of type {type(name).__name__}"


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values lie in memory one by one: not sparse, quantized by PyTorch, or absent (meta)."""
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
