"""The interface of every checkpoint format, and the one way from a file into a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from gemma2.checkpoints.dtypes import FLOAT8, PLAIN, dtype_name, stored_name
from gemma2.checkpoints.names import shown
from gemma2.checkpoints.threads import one_thread_per_core
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile
from gemma2.memory import Others, check_memory
from gemma2.model import Gemma2
from gemma2.tied import EMBEDDING, HEAD
from gemma2.twins import Make, replaced

# Together they bound what is in memory beside the final weights. Mapping a file anew takes milliseconds: not too often.
CHUNK_BYTES = 4 * 2**20  # of the final weights, copied at once
RELEASE_BYTES = 32 * 2**20  # of the file, read before it is unmapped
FIRST_LAYER = "model.layers.0."


class _Uninitialised(TorchFunctionMode):
    """Random initial values are skipped: on the meta device they would be nothing, at 80 MB and a second of imports."""

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        if func is nn.init.kaiming_uniform_:  # what a Linear calls; inside it this mode no longer sees what is done
            return args[0] if args else kwargs["tensor"]
        return args[0] if func in (Tensor.normal_, Tensor.uniform_) else func(*args, **(kwargs or {}))


class Weights(Protocol):
    """An opened checkpoint. Tensors have Hugging Face's names and come a few rows at a time, from several threads."""

    where: str

    @property
    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> shape and stored dtype."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to run in unless another is asked for."""

    def dtype_for(self, name: str, wanted: torch.dtype) -> torch.dtype:
        """The dtype for one tensor of a model in `wanted`: that, unless it cannot hold what the file states."""

    def in_file(self, name: str) -> str:
        """What the file calls a tensor, for error messages."""

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` with as many rows of a tensor's first axis as it has, from row `start` on."""

    def stored(self, name: str) -> str:
        """The type in which the file holds a tensor, by ggml's name where ggml has it: "Q4_K", "BF16", "F32"."""

    def raw(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor as the file holds them, uint8 [rows, bytes of a row]; a vector is one row."""

    def release(self) -> None:
        """Let go of the mapped pages read so far."""


class Places(Protocol):
    """Where the tensors of a model go that is not on one device."""

    def device_of(self, name: str) -> torch.device:
        """Where a tensor is to be; "meta" for the disk."""

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Keep rows of a tensor that is on the disk, from row `start` on."""


class TensorFile(Protocol):
    """One file of plain tensors under the names that it has for them."""

    path: Path

    @property
    def metadata(self) -> Mapping[str, str]:
        """Text that the file has beside its tensors, as safetensors files can."""

    @property
    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> shape and stored dtype."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor's first axis."""

    def release(self) -> None:
        """Let go of the mapped pages read so far."""


class PlainWeights:
    """The part of `Weights` that formats of plain floats have in common.

    A `.ckpt` may hold int8 rows with a scale each: those count as the floats that they are multiplied out to.
    """

    where: str
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    notes: tuple[str, ...] = ()  # what was chosen where the files leave a choice

    def read(self, name: str, start: int, out: Tensor) -> None:
        raise NotImplementedError  # each format's own

    def release(self) -> None:
        raise NotImplementedError  # each format's own

    @property
    def dtype(self) -> torch.dtype:
        # float32 holds all values of float16, in which Gemma 2 overflows. Without an embedding the file is refused.
        stored = self.tensors[EMBEDDING][1] if EMBEDDING in self.tensors else torch.float32
        return torch.float32 if stored == torch.float16 else torch.bfloat16 if stored in FLOAT8.values() else stored

    def dtype_for(self, name: str, wanted: torch.dtype) -> torch.dtype:
        return wanted

    def in_file(self, name: str) -> str:
        return name

    def stored(self, name: str) -> str:
        return stored_name(self.tensors[name][1])

    def raw(self, name: str, start: int, stop: int) -> Tensor:
        shape, dtype = self.tensors[name]
        whole = len(shape) == 1  # a vector
        out = torch.empty(shape if whole else (stop - start, *shape[1:]), dtype=dtype, device="cpu")
        self.read(name, 0 if whole else start, out)
        return out.reshape(1 if whole else stop - start, -1).view(torch.uint8)


def build(
    weights: Weights,
    config: Gemma2Config,
    device: torch.device,
    dtype: torch.dtype,
    *,
    make: Make | None = None,
    places: Places | None = None,
    others: Others | None = None,
    views: Mapping[str, Tensor] | None = None,
    allow_nonfinite: bool = False,
    progress: bool | None = None,
) -> Gemma2:
    """A model with every tensor of the checkpoint in its place, and nothing left over.

    The model is built on the meta device; each tensor then goes once, in chunks and on all cores, from the file to
    memory of its final dtype on its final device, and is checked to be finite on the way.

    Args:
        make: puts twins in before anything is read, see `gemma2.twins.replaced`. A twin that has a method
            `fill(weights, path, device)` fills itself, say with the stored blocks of `weights.raw`. Any other twin
            keeps the parameters of the module it stands for, and gets them as that does.
        others: forms that the weights could have instead, named where there is too little memory; see `check_memory`.
        places: where each tensor goes, if not to `device`. Those on the disk are on the meta device in the model.
        views: tensors that are in memory already, as `mapped.map_weights` gives them. They are taken as they are: their
            values are not read.
    Raises:
        MemoryError: a device has too little memory for what goes there. A twin that fills itself is counted where it
            says in `held_bytes` how many it will hold.
        BadModelFile: missing, extra, misshapen or non-finite tensors, by name (the first five).
        ValueError: `make` gives no twin, or one with other parameters and no `fill`.
    """
    shapes = shapes_of(config)
    check_names(weights, shapes)
    model = empty_model(config)
    twins = replaced(model, make).twins if make else {}
    own = {path: twin for path, twin in twins.items() if hasattr(twin, "fill")}
    inside = tuple(f"{path}." for path in own)
    _check_parameters(model, {name for name in shapes if not name.startswith(inside)}, inside)
    outside = {name: torch.Size(shape) for name, shape in shapes.items() if not name.startswith(inside)}
    there = {name: view for name, view in (views or {}).items() if name in outside}
    outside = {name: shape for name, shape in outside.items() if name not in there}
    where = {name: places.device_of(name) if places else device for name in outside}
    for one in dict.fromkeys(where.values()):
        sizes = {name: shape.numel() for name, shape in outside.items() if where[name] == one}
        check_memory(weights.where, dtype, one, partial(_bytes_of, weights, sizes, own), others)
    filled: dict[str, Tensor] = {}
    for name, shape in outside.items():
        kept = weights.dtype_for(name, dtype)
        if kept == torch.float64 and where[name].type == "mps":
            raise BadModelFile(
                f"{weights.where}: {weights.in_file(name)} needs float64, which mps does not have; use cpu"
                f"{' or float32' if dtype == torch.float64 else ''}"
            )
        filled[name] = torch.empty(shape, dtype=kept, device=where[name])

    def fill(name: str, start: int, stop: int) -> tuple[str, int, int]:
        out = filled[name][start:stop]
        if places is None or not out.is_meta:
            weights.read(name, start, out)
            return name, out.nbytes, _nonfinite(out)
        rows = torch.empty(out.shape, dtype=out.dtype, device="cpu")
        weights.read(name, start, rows)
        places.write(name, start, rows)
        return name, rows.nbytes, _nonfinite(rows)

    total = sum(tensor.nbytes for tensor in filled.values())
    bad: dict[str, int] = {}
    mapped = 0
    with (
        tqdm(total=total, desc="loading", unit="B", unit_scale=True, disable=hidden(progress), leave=False) as bar,
        one_thread_per_core() as pool,
    ):
        jobs = [(name, *rows) for name, tensor in filled.items() for rows in chunks(tensor.shape, tensor.dtype)]
        for name, done, nonfinite in pool.map(fill, *zip(*jobs, strict=True)) if jobs else ():
            bad[name] = bad.get(name, 0) + nonfinite
            bar.update(done)
            mapped += done * weights.tensors[name][1].itemsize // filled[name].itemsize
            if mapped >= RELEASE_BYTES:
                weights.release()
                mapped = 0
    weights.release()
    bad = {name: count for name, count in bad.items() if count}
    if bad and not allow_nonfinite:
        named = ", ".join(f"{weights.in_file(name)} ({count:,})" for name, count in list(bad.items())[:5])
        raise BadModelFile(f"{weights.where}: {len(bad)} tensors hold NaN or infinity in {dtype_name(dtype)}: {named}")
    check_head(weights, shapes[EMBEDDING])
    held = tqdm(own.items(), desc="packing", unit="matrix", disable=hidden(progress), leave=False)
    for path, twin in held:
        twin.fill(weights, path, device)
        weights.release()
        empty = [name for name, tensor in twin.state_dict().items() if tensor.is_meta]
        if empty:
            raise ValueError(f"{path}: fill() of {type(twin).__name__} left {empty[0]} without values")
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(inside)}
    model.load_state_dict(state | filled | there, strict=True, assign=True)
    model.model.rotary_emb.to(device)
    return model.eval()


def _check_parameters(model: Gemma2, wanted: set[str], inside: tuple[str, ...]) -> None:
    """Raises ValueError unless the model's parameters are those `wanted`, twins that fill themselves left aside."""
    there = {name for name in model.state_dict() if not name.startswith(inside)}
    other = sorted(there ^ wanted)
    if other:
        raise ValueError(f"a twin has other parameters than the module it stands for and no fill(): {other[0]}")


def count_nonfinite(weights: Weights, *, progress: bool | None = None) -> dict[str, int]:
    """Name -> how many values are NaN or infinite, for tensors that have any. Reads everything and keeps nothing."""

    def count(name: str, start: int, stop: int) -> tuple[str, int, int]:
        shape = (stop - start, *weights.tensors[name][0][1:])
        values = torch.empty(shape, dtype=_wide_enough(weights, name), device="cpu")
        weights.read(name, start, values)
        return name, values.numel(), _nonfinite(values)

    bad: dict[str, int] = {}
    total = sum(torch.Size(shape).numel() for shape, _ in weights.tensors.values())
    with (
        tqdm(total=total, desc="checking", unit_scale=True, disable=hidden(progress), leave=False) as bar,
        one_thread_per_core() as pool,
    ):
        shapes = {name: shape for name, (shape, _) in weights.tensors.items()}
        jobs = [(name, *rows) for name, shape in shapes.items() for rows in chunks(shape, torch.float32)]
        for name, done, nonfinite in pool.map(count, *zip(*jobs, strict=True)):
            bad[name] = bad.get(name, 0) + nonfinite
            bar.update(done)
            weights.release()
    return {name: count for name, count in bad.items() if count}


def _wide_enough(weights: Weights, *names: str) -> torch.dtype:
    """A dtype that holds every value of these tensors."""
    return torch.float64 if any(weights.tensors[name][1] == torch.float64 for name in names) else torch.float32


def _nonfinite(values: Tensor) -> int:
    """How many values are NaN or infinite. A sum that is finite shows that none is; otherwise they are counted."""
    return 0 if values.sum().isfinite() else int((~values.isfinite()).sum())


def bytes_in(weights: Weights, sizes: Mapping[str, int], dtype: torch.dtype) -> int:
    """Bytes of parameters (name -> number of values) in a model in `dtype`, those included that stay wider."""
    return sum(size * weights.dtype_for(name, dtype).itemsize for name, size in sizes.items())


def bytes_with(weights: Weights, empty: Gemma2, dtype: torch.dtype, make: Make) -> int:
    """Bytes of the weights of an empty model if the twins of `make` were in it. No weight is read."""
    made = {path: make(path, module) for path, module in empty.named_modules() if path}
    own = {path: twin for path, twin in made.items() if twin is not None and hasattr(twin, "fill")}
    sizes = {name: p.numel() for name, p in empty.named_parameters() if name.rpartition(".")[0] not in own}
    return _bytes_of(weights, sizes, own, dtype)


def _bytes_of(weights: Weights, sizes: Mapping[str, int], own: Mapping[str, nn.Module], dtype: torch.dtype) -> int:
    """Bytes of parameters (name -> number of values) in `dtype`, and of twins that fill themselves."""
    return bytes_in(weights, sizes, dtype) + sum(getattr(twin, "held_bytes", 0) for twin in own.values())


def shapes_of(config: Gemma2Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, in the model's order.

    One layer is built and stands for all, since a file may claim a thousand: building those takes seconds.
    """
    one = empty_model(replace(config, num_hidden_layers=1, layer_types=config.layer_types[:1]))
    own = {name: tuple(parameter.shape) for name, parameter in one.named_parameters()}
    inside = {name: shape for name, shape in own.items() if name.startswith(FIRST_LAYER)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in own.items():
        if name not in inside:
            shapes[name] = shape
        elif name not in shapes:
            for layer in range(config.num_hidden_layers):
                prefix = FIRST_LAYER.replace("0", str(layer))
                shapes |= {prefix + part.removeprefix(FIRST_LAYER): size for part, size in inside.items()}
    return shapes


def empty_model(config: Gemma2Config) -> Gemma2:
    with torch.device("meta"), _Uninitialised():
        return Gemma2(config)


def check_names(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor asked for is there in its shape and a float dtype, and every tensor there is asked for."""
    found = weights.tensors

    def said(name: str) -> str:
        return shown(weights.in_file(name))

    problems = {
        "missing": [said(name) for name in shapes if name not in found],
        "unknown": [said(name) for name in found if name not in shapes and name != HEAD],
        "misshapen": [
            f"{said(name)} {list(found[name][0])} instead of {list(shape)}"
            for name, shape in ({HEAD: shapes[EMBEDDING]} | dict(shapes)).items()
            if name in found and found[name][0] != shape
        ],
        "not floating-point": [
            f"{said(name)} ({dtype_name(dtype)})"
            for name, (_, dtype) in found.items()
            if dtype not in (*PLAIN.values(), *FLOAT8.values())
        ],
    }
    lines = [
        f"{len(names)} {problem}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for problem, names in problems.items()
        if names
    ]
    if lines:
        raise BadModelFile(f"{weights.where}: tensors do not fit the config: {'; '.join(lines)}")


def check_head(weights: Weights, shape: tuple[int, ...]) -> None:
    """An `lm_head.weight` is redundant in Gemma 2: allowed only when it is the embedding, value for value."""
    if HEAD not in weights.tensors:
        return
    wide = _wide_enough(weights, HEAD, EMBEDDING)
    for start, stop in chunks(shape, wide):
        head, embedding = torch.empty(2, stop - start, *shape[1:], dtype=wide, device="cpu")
        weights.read(HEAD, start, head)
        weights.read(EMBEDDING, start, embedding)
        if not torch.equal(head, embedding):
            raise BadModelFile(
                f"{weights.where}: {weights.in_file(HEAD)} differs from the embedding; Gemma 2's head is tied"
            )
        weights.release()


def chunks(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[int, int]]:
    """The rows of a tensor in runs [start, stop) of `CHUNK_BYTES` in `dtype`, at least one row each."""
    row = max(1, torch.Size(shape[1:]).numel() * dtype.itemsize)
    step = max(1, CHUNK_BYTES // row)
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def hidden(progress: bool | None) -> bool | None:
    """tqdm's `disable`, where None hides the bar unless on a terminal."""
    return None if progress is None else not progress
