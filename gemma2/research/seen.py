"""Seeing what flows through a model: `capture`, and the values that it keeps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemma2.atomic import naming_a_full_disk, replacing
from gemma2.memory import free_memory
from gemma2.model import Gemma2
from gemma2.research.aliases import canonical
from gemma2.research.sites import Site, chosen, in_table, missing
from gemma2.research.watch import Passes, acting, check_shown, model_of
from gemma2.research.where import Met, Where, check_where, columns, marked

LARGE = 2**30  # bytes of one pass, from which on a capture says what it keeps
POSITIONS = "positions"  # their name in a file


@dataclass
class Pass:
    """One pass of the model.

    Attributes:
        positions: of the tokens that were kept, [b t]; negative for padding.
        values: site -> value; read from the disk where the capture streams to it.
    """

    positions: Tensor
    values: Mapping[str, Tensor]


class _Stored(Mapping[str, Tensor]):
    """The values in a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "pt") as file:
            self.names = [name for name in file.keys() if name != POSITIONS]  # noqa: SIM118  (it has no __iter__)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        with safe_open(self.path, "pt") as file:
            value: Tensor = file.get_tensor(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Seen(Mapping[str, Tensor]):
    """What the passes inside a `capture` block computed at the chosen sites.

    As a mapping it is the last pass: site -> value. A name may be an alias, and a short name with a layer stands for
    the whole one: `seen["resid_post", 5]`.

    Attributes:
        passes: all of them, in order; in a generation with a cache, the prompt and then one for each token.
    """

    def __init__(self, names: Iterable[str], passes: Iterable[Pass] = ()) -> None:
        self.names, self.passes = list(names), list(passes)

    def __getitem__(self, name: str | tuple[Any, ...]) -> Tensor:
        return self._value(-1, canonical(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.passes[-1].values if self.passes else ())

    def __len__(self) -> int:
        return len(self.passes[-1].values) if self.passes else 0

    @property
    def positions(self) -> Tensor:
        """The positions of all passes, joined: [b t]. Raises KeyError before the first pass."""
        if not self.passes:
            raise KeyError("there was no pass yet")
        return torch.cat([one.positions for one in self.passes], dim=1)

    def stacked(self, name: str | tuple[Any, ...]) -> Tensor:
        """A site's values of all passes, joined along their positions, as one pass over the whole text would give them.

        In scores and patterns [b h t s], keys that a pass did not have are filled in: 0 in a pattern, NaN in
        hook_scores_raw, the least number in hook_attn_scores.

        Raises:
            KeyError: the site was not captured.
            ValueError: the passes do not continue each other; stack `Seen(seen.names, seen.passes[a:b])` then.
        """
        name = canonical(name)
        if not self.passes:
            raise KeyError(f"{name}: there was no pass yet")
        values = [self._value(number, name) for number in range(len(self.passes))]
        for number, (before, after) in enumerate(zip(self.passes, self.passes[1:], strict=False)):
            if not torch.equal(before.positions[:, -1:] + 1, after.positions[:, :1]):
                raise ValueError(f"pass {number + 1} does not continue pass {number}: it begins another text")
        site = in_table(name)
        if "s" not in site.shape.split():
            return torch.cat(values, dim=site.axis)
        ends = torch.tensor([one.positions.shape[1] for one in self.passes]).cumsum(0).tolist()
        before = max(0, *(value.shape[-1] - end for value, end in zip(values, ends, strict=True)))
        shape = (*values[0].shape[:2], ends[-1], before + ends[-1])
        wide = values[0].new_full(shape, _fill(name, values[0].dtype))
        start = 0
        for value, end in zip(values, ends, strict=True):
            wide[:, :, start:end, before + end - value.shape[-1] : before + end] = value
            start = end
        return wide

    def _value(self, number: int, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(missing(name, self.names))
        if not self.passes:
            raise KeyError(f"{name}: there was no pass yet")
        try:
            return self.passes[number].values[name]
        except KeyError:
            raise KeyError(f"{name}: the pass was broken off before it, or did not reach it") from None


@contextmanager
def capture(
    model: Any,
    sites: Iterable[str] | str = "*",
    *,
    positions: Where = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    to: str | Path | None = None,
) -> Iterator[Seen]:
    """Keep the values at the chosen sites of every pass inside the block, detached.

        with capture(model, "blocks.*.hook_resid_post") as seen:
            model(tokens)
        seen["blocks.3.hook_resid_post"]    # [b t d]

    Args:
        model: a `Gemma2`, a `Gemma`, or one of them in a wrapper.
        sites: names, globs or aliases, see `gemma2.research.sites.chosen`.
        positions: which tokens to keep: positions in the text (0 is the BOS), a slice of them, or negative numbers,
            which count from the end of each pass. Default all. Of scores, queries are chosen and never keys. A
            position that no pass had is told in a warning at the end of the block.
        device, dtype: to keep the values in; default as they are.
        to: a folder for the values, one safetensors file a pass, instead of the memory. It is made, and must not exist.
    Raises:
        ValueError: a name that is no site, a site that a twin hides, positions that are none.
        MemoryError: a pass would keep more than the memory that is free; raised before it computes.
        OSError: the folder is there, or cannot be written.
    """
    inner = model_of(model)
    picked, where = chosen(inner.config, sites), check_where(positions)
    check_shown(inner, picked)
    folder = None if to is None else Path(to).expanduser()
    if folder is not None:
        folder.mkdir(parents=True)
    seen, met = Seen(picked), Met(where, "position")
    with Passes(inner) as passes:

        def begin(tokens: Tensor) -> None:
            _store(seen, folder)
            if tokens.shape[1] > 1:
                _say_memory(inner, picked.values(), tokens, where, device, dtype, streams=folder is not None)
            seen.passes.append(Pass(torch.empty(len(tokens), 0, dtype=torch.int64, device="cpu"), {}))

        def keep(site: Site, value: Tensor) -> None:
            now, at, value = seen.passes[-1], passes.located(value.shape[site.axis]), value.detach()
            if where is not None:
                met.meet(at)
                value = site.take(value, columns(where, at))
            if not now.positions.numel():
                now.positions = passes.located().cpu() if where is None else at.gather(1, columns(where, at)).cpu()
            now.values[site.name] = value.to(device=device, dtype=dtype)  # type: ignore[index]

        passes.begun = begin
        try:
            with acting(model, picked, keep):
                yield seen
        finally:
            _store(seen, folder)
    met.warn()


def opened(folder: str | Path) -> Seen:
    """What a capture has written to a folder."""
    files = sorted(Path(folder).expanduser().glob("pass-*.safetensors"))
    passes = []
    for file in files:
        with safe_open(file, "pt") as held:
            passes.append(Pass(held.get_tensor(POSITIONS), _Stored(file)))
    if not passes:
        raise FileNotFoundError(f"{folder}: no capture was written here (pass-000000.safetensors is missing)")
    return Seen(passes[0].values, passes)


def _store(seen: Seen, folder: Path | None) -> None:
    """Write the last pass to the disk, if that is where values go and it is not there yet."""
    if folder is None or not seen.passes or isinstance(seen.passes[-1].values, _Stored):
        return
    last, path = seen.passes[-1], folder / f"pass-{len(seen.passes) - 1:06}.safetensors"
    # Sites may share memory, as a stream after one block does with that before the next: a file holds each apart.
    values = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in last.values.items()}
    with replacing(path) as (partial,), naming_a_full_disk(path):
        save_file({**values, POSITIONS: last.positions}, partial)
    last.values = _Stored(path)


def _say_memory(
    model: Gemma2,
    sites: Iterable[Site],
    tokens: Tensor,
    where: Where,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    *,
    streams: bool,
) -> None:
    """Say how much a large pass keeps. Raises MemoryError for more than is free."""
    (b, t), size = tokens.shape, (dtype or model.dtype).itemsize
    kept = t if where is None else int(marked(where, torch.arange(t, device="cpu")[None]).sum())
    bytes_ = sum(math.prod(site.sizes(model.config, t)) * b * kept // t * size for site in sites)
    if bytes_ < LARGE:
        return
    said = f"capturing keeps {bytes_ / 1e9:.3g} GB of a pass of {b} x {t:,} tokens"
    cure = "choose sites, positions= or dtype=, or write to a folder with to="
    free = free_memory(model.device if device is None else torch.device(device))
    if not streams and free is not None and free.bytes < bytes_:
        raise MemoryError(f"{said}, and {free.bytes / 1e9:.3g} GB are free ({free.limit}): {cure}")
    warnings.warn(said if streams else f"{said}: {cure}", stacklevel=2)


def _fill(name: str, dtype: torch.dtype) -> float:
    """What stands for keys that a pass did not have."""
    if name.endswith("hook_scores_raw"):
        return math.nan
    return torch.finfo(dtype).min if name.endswith("hook_attn_scores") else 0.0
