"""Traces: what one system computed at named sites for given ids, in a file that any system can write.

A trace is a safetensors file. Its tensors are `ids`, int64 [t], and the sites under the names of `research/sites.py`,
each without the batch axis. Its metadata, all strings, say what it is of (`docs/traces.md` has an example):

    format   "gemma2-trace 1"
    system   who computed it, as "transformers 5.23.0 eager"
    dtype    in which dtype, as "bfloat16"
    config   the model's config.json, as JSON
    versions (optional) of what else matters, as JSON: name -> version
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemma2.atomic import replacing
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile
from gemma2.research.sites import chosen, sites

FORMAT = "gemma2-trace 1"
IDS = "ids"
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class About:
    """What a trace is of."""

    system: str
    dtype: str
    config: Gemma2Config
    versions: Mapping[str, str] = field(default_factory=dict)


class TraceWriter:
    """Writes a trace site by site, as they are computed, so that none stays in memory; whole or not at all.

        with TraceWriter(path, about, ids, "blocks.*.hook_resid_post", torch.float32) as trace:
            with watching(model, trace.add, trace.sites):
                model(tokens)

    Args:
        ids: of one row.
        patterns: the sites it will hold, each of which must be added once.
        dtype: of all sites, or by name.
    Raises:
        ValueError: a pattern that names no site.
        OSError: the file cannot be written, or there is no space for it.
    """

    def __init__(
        self, path: Path, about: About, ids: list[int], patterns: Iterable[str] | str, dtype: torch.dtype
    ) -> None:
        self.about, self.dtype = about, dtype
        self._ids = torch.tensor(ids)
        self._wanted = chosen(about.config, patterns)
        self._shapes = {name: site.sizes(about.config, len(ids))[1:] for name, site in self._wanted.items()}
        self._missing = set(self._wanted)
        self._path, self._stack = path, ExitStack()

    @property
    def sites(self) -> list[str]:
        return list(self._wanted)

    @property
    def bytes(self) -> int:
        """Of the data."""
        return sum(torch.Size(shape).numel() for shape in self._shapes.values()) * self.dtype.itemsize

    def __enter__(self) -> TraceWriter:
        described: dict[str, Any] = {"__metadata__": self._metadata()}
        end = self._ids.nbytes
        described[IDS] = {"dtype": NAMES[self._ids.dtype], "shape": list(self._ids.shape), "data_offsets": [0, end]}
        self._places: dict[str, int] = {}
        for name, shape in self._shapes.items():
            size = torch.Size(shape).numel() * self.dtype.itemsize
            described[name] = {"dtype": NAMES[self.dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            self._places[name], end = end, end + size
        header = json.dumps(described, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        (partial,) = self._stack.enter_context(replacing(self._path))
        self._file = self._stack.enter_context(partial.open("wb"))
        self._start = 8 + len(header)
        self._file.write(len(header).to_bytes(8, "little") + header + self._ids.numpy().tobytes())
        self._file.truncate(self._start + end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._missing:
            error = RuntimeError(f"{self._path}: nothing was added for {', '.join(sorted(self._missing)[:5])}")
            self._stack.__exit__(type(error), error, None)
            raise error
        self._stack.__exit__(kind, error, trace)

    def add(self, name: str, value: Tensor) -> None:
        """The value of a site: [1 ...] as the model has it, or without the batch axis.

        Raises:
            ValueError: another shape than the config gives.
        """
        shape = self._shapes[name]
        if tuple(value.shape) not in (shape, (1, *shape)):
            raise ValueError(f"{name} is {list(value.shape)}, and must be {list(shape)}")
        self._file.seek(self._start + self._places[name])
        plain = value.detach().to("cpu", self.dtype).contiguous()
        self._file.write(plain.view(torch.uint8).numpy().tobytes())
        self._missing.discard(name)

    def _metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "system": self.about.system,
            "dtype": self.about.dtype,
            "config": json.dumps(self.about.config.to_dict()),
            "versions": json.dumps(dict(self.about.versions)),
        }


class Trace:
    """An opened trace: `trace["blocks.0.hook_resid_post"]` reads one site, `trace.ids` are its ids.

    Raises:
        BadModelFile: not a trace, damaged, or with sites that its config does not have; says what and where.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = safe_open(self.path, framework="pt", device="cpu").__enter__()
            stated = self._file.metadata() or {}
            self.names = [name for name in self._file.keys() if name != IDS]  # noqa: SIM118  (no mapping)
            has_ids = IDS in self._file.keys()  # noqa: SIM118
        except FileNotFoundError:
            raise BadModelFile(f"{path}: no such file") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise BadModelFile(f"{path}: not a whole safetensors file ({error})") from None
        if stated.get("format") != FORMAT:
            raise BadModelFile(f"{path}: no trace: its metadata do not say format {FORMAT!r}")
        try:
            config = Gemma2Config.from_dict(json.loads(stated["config"]), where=f"{path}: config")
            versions = json.loads(stated.get("versions", "{}"))
            self.about = About(stated["system"], stated["dtype"], config, versions)
        except (KeyError, ValueError) as error:
            raise BadModelFile(f"{path}: its metadata must state system, dtype and config ({error})") from None
        if not has_ids:
            raise BadModelFile(f"{path}: no tensor {IDS!r}: what it was computed from is unknown")
        self.ids: list[int] = self._file.get_tensor(IDS).tolist()
        self._check()

    def __getitem__(self, name: str) -> Tensor:
        """The value of a site, without the batch axis. Raises KeyError for one that is not there."""
        if name not in self.names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def _check(self) -> None:
        known = sites(self.about.config)
        unknown = [name for name in self.names if name not in known]
        if unknown:
            raise BadModelFile(f"{self.path}: {len(unknown)} sites that no Gemma 2 of this config has: {unknown[0]}")
        for name in self.names:
            wanted = list(known[name].sizes(self.about.config, len(self.ids))[1:])
            found = self._file.get_slice(name).get_shape()
            if found != wanted:
                raise BadModelFile(f"{self.path}: {name} is {found}, and its ids and config make it {wanted}")
