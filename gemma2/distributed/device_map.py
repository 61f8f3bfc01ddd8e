"""A model whose layers are on several devices, in memory and on the disk, moved and called by accelerate.

The embedding, the final norm and the head stay together on one device, the main one: the head reads the embedding.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from gemma2.checkpoints.weights import Weights, build, check_names, empty_model, shapes_of
from gemma2.config import Gemma2Config
from gemma2.distributed.offload import OffloadFolder
from gemma2.errors import said_of_device
from gemma2.memory import free_memory
from gemma2.model import Gemma2
from gemma2.tied import EMBEDDING

DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device]
MaxMemory = Mapping[Any, str | int]  # by GPU number, "cpu" or "mps"; a key of another type is refused
INFERRED = ("auto", "balanced", "balanced_low_0", "sequential")
DISK, META = "disk", torch.device("meta")
LAYER = "model.layers.{}"
TOGETHER = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "softcap")
AROUND = ("", "model", "model.layers")
SPARED = 0.9  # of what is free: the rest is for the cache and for activations


def build_spread(
    weights: Weights,
    config: Gemma2Config,
    dtype: torch.dtype,
    device_map: DeviceMap,
    max_memory: MaxMemory | None = None,
    offload_folder: Path | None = None,
    *,
    allow_nonfinite: bool = False,
    progress: bool | None = None,
) -> tuple[Gemma2, str]:
    """A model spread by a map, as `checkpoints.weights.build` makes one, and a line that says what is where.

    Each tensor is read straight to its device. What goes to the disk is written there in chunks, so memory never holds
    more than the shares of the devices and a few chunks. The files are removed when the model is gone.

    Args:
        device_map: "auto" or "balanced" spread the layers evenly over the GPUs, "balanced_low_0" leaves room on the
            first, "sequential" fills one after the other; what the GPUs do not hold is in memory, and then on the disk.
            A device, by name or number, takes all. Or a map from module paths to devices, "cpu" and "disk".
        max_memory: bytes, as a number or as "10GiB", by GPU number, "cpu" and "mps", for a map that is inferred.
            Default: nine tenths of what is free on each.
        offload_folder: where a folder for the disk's share is made; default where the system keeps temporary files.
    Raises:
        ImportError: accelerate is not installed.
        MemoryError: a device has too little memory for its share; or none has room for the embedding.
        OSError: the disk has too little space.
        ValueError: a map that cannot be.
        BadModelFile: as `build`.
    """
    shapes = shapes_of(config)
    check_names(weights, shapes)
    kept = {name: weights.dtype_for(name, dtype) for name in shapes}
    places = _places(weights.where, config, kept, device_map, max_memory)
    if {places.main, *places.layers} == {places.main}:
        model = build(
            weights, config, torch.device(places.main), dtype, allow_nonfinite=allow_nonfinite, progress=progress
        )
        return model, str(places)
    on_disk = {name: (torch.Size(shape), kept[name]) for name, shape in shapes.items() if places.of(name) == DISK}
    folder = OffloadFolder(offload_folder, on_disk) if on_disk else None
    try:
        model = build(
            weights,
            config,
            torch.device(places.main),
            dtype,
            places=_Spread(places, folder),
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
        _dispatch(model, places, folder)
    except BaseException:
        if folder:
            folder.remove()
        raise
    if folder:
        weakref.finalize(model, folder.remove)
    return model, f"{places}{f', in {folder.path}' if folder else ''}"


@dataclass(frozen=True)
class _Places:
    """Where the embedding is, and where each layer is: "cuda:0", "cpu", "disk"."""

    main: str
    layers: tuple[str, ...]

    def of(self, name: str) -> str:
        """The place of a parameter."""
        found = re.match(r"model\.layers\.(\d+)\.", name)
        return self.layers[int(found[1])] if found else self.main

    def __str__(self) -> str:
        runs, first = [], 0
        for place, run in groupby(self.layers):
            last = first + len(list(run)) - 1
            name = f"layer {first}" if first == last else f"layers {first} to {last}"
            runs.append(f"{name} on {'the disk' if place == DISK else place}")
            first = last + 1
        return f"device_map: the embedding on {self.main}, {', '.join(runs)}"


@dataclass(frozen=True)
class _Spread:
    """`Places` for `build`."""

    places: _Places
    folder: OffloadFolder | None

    def device_of(self, name: str) -> torch.device:
        place = self.places.of(name)
        return META if place == DISK else torch.device(place)

    def write(self, name: str, start: int, rows: Tensor) -> None:
        assert self.folder is not None  # as something is on the disk
        self.folder.write(name, start, rows)


def _places(
    where: str, config: Gemma2Config, kept: Mapping[str, torch.dtype], wanted: DeviceMap, max_memory: MaxMemory | None
) -> _Places:
    if isinstance(wanted, str) and wanted in INFERRED:
        return _inferred(where, config, kept, wanted, max_memory)
    if max_memory is not None:
        raise ValueError(f"max_memory is for a device_map that is inferred: {', '.join(INFERRED)}")
    if not isinstance(wanted, Mapping):
        wanted = {"": wanted}
    layers = [LAYER.format(number) for number in range(config.num_hidden_layers)]
    for path in wanted:
        if path not in (*AROUND, *TOGETHER, *layers):
            raise ValueError(
                f"device_map: {path!r} is none of {', '.join(map(repr, (*AROUND, *TOGETHER)))} and {layers[0]!r} to "
                f"{layers[-1]!r}: a layer stays whole"
            )
    named = {path: _place(place) for path, place in wanted.items()}
    main, head = _of(named, TOGETHER[0]), _of(named, "lm_head", must=False)
    if main == DISK:
        raise ValueError("device_map: the embedding cannot be on the disk, because the head reads it too")
    if head not in (None, main):
        raise ValueError(f"device_map: lm_head is on {head} and the embedding on {main}, but they are one tensor")
    return _Places(main, tuple(_of(named, layer) for layer in layers))


def _of(named: Mapping[str, str], path: str, must: bool = True) -> str:
    """The place of a module: its own in the map, or that of the innermost module around it."""
    parts = path.split(".")
    for count in range(len(parts), -1, -1):
        around = ".".join(parts[:count])
        if around in named:
            return named[around]
    if must:
        raise ValueError(f"device_map has no place for {path}")
    return named[TOGETHER[0]]


def _place(value: object) -> str:
    """A device's full name, or "disk". Raises ValueError for one that is not here."""
    if value == DISK:
        return DISK
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | torch.device):
            raise TypeError(f"a {type(value).__name__}")
        device = torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError, ImportError) as error:
        raise ValueError(
            f"device_map: {value!r} is neither {', '.join(map(repr, INFERRED))} nor a device that is here "
            f"({said_of_device(error)})"
        ) from None
    if device == META:
        raise ValueError("device_map: device 'meta' holds no values, so nothing can be loaded there")
    return str(device)


def _inferred(
    where: str, config: Gemma2Config, kept: Mapping[str, torch.dtype], wanted: str, max_memory: MaxMemory | None
) -> _Places:
    utils = accelerate().utils
    model = empty_model(config)
    # accelerate takes the narrower of a tensor's dtype and the one asked for, so every tensor's is stated.
    sizes: dict[str, Any] = {"no_split_module_classes": ["Block"], "special_dtypes": dict(kept)}
    limits = _limits(utils, max_memory)
    if wanted != "sequential":
        limits = utils.get_balanced_memory(model, limits, low_zero=wanted == "balanced_low_0", **sizes)
    found = utils.infer_auto_device_map(model, limits, **sizes)
    named = {path: DISK if place == DISK else _place(place) for path, place in found.items()}
    if _of(named, TOGETHER[0]) == DISK:
        taken = {name: model.get_parameter(name).numel() * dtype.itemsize for name, dtype in kept.items()}
        layer = sum(size for name, size in taken.items() if name.startswith(LAYER.format("0.")))
        most = max(limits, key=lambda place: limits[place], default="cpu")
        raise MemoryError(
            f"{where}: the embedding, which is also the head, and one layer need {(taken[EMBEDDING] + layer) / 1e9:.3g}"
            f" GB on one device, and the most is {limits.get(most, 0) / 1e9:.3g} GB on {most}; take a narrower dtype"
        )
    return _Places(_of(named, TOGETHER[0]), tuple(_of(named, LAYER.format(i)) for i in range(config.num_hidden_layers)))


def _limits(utils: Any, max_memory: MaxMemory | None) -> dict[str | int, int]:
    """Bytes for weights on each device: what is asked for, but no more than is free."""
    given = None if max_memory is None else {place: size for place, size in max_memory.items() if place != DISK}
    limits: dict[str | int, int] = utils.get_max_memory(given)
    for place, most in limits.items():
        free = free_memory(torch.device("cuda", place) if isinstance(place, int) else torch.device(place))
        limits[place] = int(min(most, free.bytes if free else most) * (SPARED if given is None else 1))
    return limits


def _dispatch(model: Gemma2, places: _Places, folder: OffloadFolder | None) -> None:
    """Let accelerate bring each layer and its inputs together when it is called."""
    device_map = dict.fromkeys(TOGETHER, places.main)
    device_map |= {LAYER.format(number): place for number, place in enumerate(places.layers)}
    with _quiet("accelerate.big_modeling", "on the meta device"):  # which the line about the map says
        accelerate().dispatch_model(
            model, device_map, main_device=places.main, offload_dir=str(folder.path) if folder else None
        )
    state = {"_not_pickled": _NotPickled(), **model.__dict__}  # first, so that pickle meets it before a hook
    model.__dict__.clear()
    model.__dict__.update(state)


class _NotPickled:
    """In the state of a model with accelerate's hooks, it says what to do where pickle would name a local function."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a model spread by device_map cannot be pickled: its weights are on other devices or the disk; load it in "
            "the other process, or without device_map"
        )

    def __deepcopy__(self, memo: object) -> _NotPickled:
        return self


@contextmanager
def _quiet(logger: str, words: str) -> Iterator[None]:
    """Drop messages with these words in them."""

    def wanted(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    log = logging.getLogger(logger)
    log.addFilter(wanted)
    try:
        yield
    finally:
        log.removeFilter(wanted)


def accelerate() -> Any:
    """The package accelerate. Raises ImportError, naming the extra."""
    try:
        import accelerate as found
        import accelerate.utils
    except ImportError as error:
        raise ImportError(
            f"device_map needs accelerate, which is not installed: pip install accelerate ({error})"
        ) from None
    return found


def check_alone(**others: object) -> None:
    """Raises ValueError for an argument of `load` that is given beside a device_map and cannot be."""
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"device_map and {name} cannot be combined: give one of them")
