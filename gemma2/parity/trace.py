"""Traces: what one system computed at named sites for given token ids, in a file that any system can write.

A trace is a safetensors file. Its tensors are `ids`, int64 [t], and the sites under the names of `research/sites.py`,
each without the batch axis, in whatever float type it was computed. Its metadata, all strings, say what it is of
(`docs/traces.md` has an example):

    format   "gemma2-trace 1"
    system   who computed it, as "transformers 5.23.0 eager"
    dtype    in which dtype, as "bfloat16"
    config   the model's config.json, as JSON
    versions (optional) of what else matters, as JSON: name -> version
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemma2.atomic import check_space, check_target, replacing, reserve
from gemma2.checkpoints.dtypes import RUNNABLE, dtype_name, stored_name
from gemma2.checkpoints.foreign import refuse_foreign
from gemma2.checkpoints.hf_config import config_dict, read_config
from gemma2.checkpoints.safetensors import header_bytes
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile, NonFiniteError
from gemma2.model import Gemma2
from gemma2.research import capture
from gemma2.research.sites import chosen, sites

FORMAT = "gemma2-trace 1"
IDS = "ids"
STORED = [stored_name(dtype) for dtype in RUNNABLE.values()]


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
        ids: token ids of one row.
        patterns: the sites it will hold, each of which must be added.
        dtype: of all sites, or by site (see `dtypes`).
        force: replace a file that is there.
    Raises:
        ValueError: a pattern that names no site, or token ids outside the vocabulary.
        FileExistsError: the file is there, on entering.
        OSError: the file cannot be written, or there is no space for it, on entering.
        RuntimeError: a site was not added, on leaving.
    """

    def __init__(
        self,
        path: Path,
        about: About,
        ids: Sequence[int],
        patterns: Iterable[str] | str,
        dtype: torch.dtype | Mapping[str, torch.dtype],
        force: bool = False,
    ) -> None:
        wrong = [i for i in ids if not 0 <= i < about.config.vocab_size]
        if wrong or not len(ids):
            raise ValueError(
                f"token id {wrong[0]} is outside the vocabulary" if wrong else "a trace needs at least one token id"
            )
        self.about, self.force = about, force
        self._ids = torch.tensor(list(ids), dtype=torch.int64, device="cpu")
        wanted = chosen(about.config, patterns)
        self._shapes = {name: torch.Size(site.sizes(about.config, len(ids))[1:]) for name, site in wanted.items()}
        self._dtypes = {name: dtype if isinstance(dtype, torch.dtype) else dtype[name] for name in wanted}
        self._missing = set(wanted)
        self._path, self._stack = Path(path), ExitStack()

    @property
    def sites(self) -> list[str]:
        return list(self._shapes)

    @property
    def bytes(self) -> int:
        """Of the data."""
        return self._ids.nbytes + sum(self._size(name) for name in self._shapes)

    def __enter__(self) -> TraceWriter:
        check_target(self._path, force=self.force)
        check_space(self._path.parent, self.bytes)
        tensors: list[tuple[str, str, Sequence[int], int]] = [(IDS, "I64", self._ids.shape, self._ids.nbytes)]
        tensors += [
            (name, _stored(self._dtypes[name]), shape, self._size(name)) for name, shape in self._shapes.items()
        ]
        header = header_bytes(tensors, self._metadata())
        starts = accumulate((size for *_, size in tensors), initial=len(header))
        self._starts = dict(zip((name for name, *_ in tensors), starts, strict=False))
        with self._stack:  # undone if what follows fails
            (unfinished,) = self._stack.enter_context(
                replacing(self._path, last=partial(check_target, self._path, force=self.force))
            )
            self._file = self._stack.enter_context(unfinished.open("wb"))
            self._file.write(header + self._ids.numpy().tobytes())
            reserve(self._file, len(header) + self.bytes, self._path)
            self._stack = self._stack.pop_all()
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
            NonFiniteError: NaN, which no reader would take.
        """
        shape = self._shapes[name]
        if value.shape not in (shape, (1, *shape)):
            raise ValueError(f"{name} is {list(value.shape)}, and must be {list(shape)}")
        if value.isnan().any():
            raise NonFiniteError(f"{self._path}: {name} was computed as NaN, so no trace is written")
        plain = value.detach().to("cpu", self._dtypes[name]).contiguous()
        self._file.seek(self._starts[name])
        self._file.write(plain.flatten().view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def _size(self, name: str) -> int:
        return self._shapes[name].numel() * self._dtypes[name].itemsize

    def _metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "system": self.about.system,
            "dtype": self.about.dtype,
            "config": json.dumps(config_dict(self.about.config)),
            "versions": json.dumps(dict(self.about.versions)),
        }


class Trace:
    """An opened trace: `trace["blocks.0.hook_resid_post"]` reads one site, `trace.ids` are its token ids.

    Raises:
        BadModelFile: not a trace, damaged, or with sites that its config does not have; says what and where.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = safe_open(self.path, framework="pt", device="cpu").__enter__()
            stated = self._file.metadata() or {}
            kept = set(self._file.keys())
        except FileNotFoundError:
            raise BadModelFile(f"{path}: no such file") from None
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            refuse_foreign(self.path)
            raise BadModelFile(f"{path}: not a whole safetensors file ({error})") from None
        if stated.get("format") != FORMAT:
            raise BadModelFile(f"{path}: no trace: its metadata do not say format {FORMAT!r}")
        self.about = self._read_about(stated)
        if IDS not in kept:
            raise BadModelFile(f"{path}: no tensor {IDS!r}: the token ids that it was computed from are unknown")
        self.ids = self._read_ids()
        known = sites(self.about.config)
        unknown = sorted(kept - known.keys() - {IDS})
        if unknown:
            raise BadModelFile(
                f"{path}: {unknown[0]!r} is not a site of a Gemma 2 of this config (gemma2 trace --list shows all)"
            )
        self.names = [name for name in known if name in kept]  # in the order of computation
        for name in self.names:
            part = self._file.get_slice(name)
            wanted = list(known[name].sizes(self.about.config, len(self.ids))[1:])
            if part.get_shape() != wanted:
                raise BadModelFile(f"{path}: {name} is {part.get_shape()}, and its ids and config make it {wanted}")
            if part.get_dtype() not in STORED:
                raise BadModelFile(f"{path}: {name} is {part.get_dtype()}, and must be one of {', '.join(RUNNABLE)}")

    def __getitem__(self, name: str) -> Tensor:
        """The value of a site, without the batch axis.

        Raises:
            KeyError: a site that is not there.
            BadModelFile: it holds NaN.
        """
        if name not in self.names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        if tensor.isnan().any():
            where = tensor.isnan().nonzero()[0].tolist()
            raise BadModelFile(f"{self.path}: {name} is NaN at {where}: {self.about.system} failed to compute it")
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def _read_about(self, stated: Mapping[str, str]) -> About:
        missing = [name for name in ("system", "dtype", "config") if name not in stated]
        if missing:
            raise BadModelFile(f"{self.path}: its metadata do not state {', '.join(missing)}")
        if stated["dtype"] not in RUNNABLE:
            raise BadModelFile(f"{self.path}: dtype {stated['dtype'][:50]!r} is not one of {', '.join(RUNNABLE)}")
        config = read_config(self._json("config", stated["config"]), where=f"{self.path}: config")
        versions = self._json("versions", stated.get("versions", "{}"))
        if not isinstance(versions, dict) or not all(isinstance(value, str) for value in versions.values()):
            raise BadModelFile(f"{self.path}: its versions must be a JSON object of strings")
        return About(stated["system"], stated["dtype"], config, versions)

    def _json(self, name: str, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadModelFile(f"{self.path}: its {name} is not valid JSON ({error})") from None

    def _read_ids(self) -> list[int]:
        part, vocab = self._file.get_slice(IDS), self.about.config.vocab_size
        shape, kind = part.get_shape(), part.get_dtype()
        if kind != "I64" or len(shape) != 1 or not shape[0]:
            raise BadModelFile(f"{self.path}: ids are {kind} {shape}, and must be I64 [t], at least one")
        ids: list[int] = self._file.get_tensor(IDS).tolist()
        wrong = [i for i in ids if not 0 <= i < vocab]
        if wrong:
            raise BadModelFile(f"{self.path}: token id {wrong[0]} is outside the vocabulary [0, {vocab})")
        return ids


@torch.no_grad()
def dtypes(model: Gemma2, patterns: Iterable[str] | str = "*") -> dict[str, torch.dtype]:
    """The dtype in which a model computes each site (what a norm holds inside is wider than what comes out of it).
    It runs the model over one token."""
    with capture(model, patterns) as seen:
        model(torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    return {name: value.dtype for name, value in seen.items()}


def _stored(dtype: torch.dtype) -> str:
    if dtype not in RUNNABLE.values():
        raise ValueError(f"a trace holds {', '.join(RUNNABLE)}, not {dtype_name(dtype)}")
    return stored_name(dtype)
