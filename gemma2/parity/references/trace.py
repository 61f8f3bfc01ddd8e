"""A trace file as a reference: what another system computed once, for the token ids in the file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from gemma2.checkpoints.dtypes import RUNNABLE
from gemma2.numerics.changes import Storage
from gemma2.parity.references import CannotDo, Reference, parse_sites
from gemma2.parity.trace import Trace


class Recorded:
    """A `Reference` over a trace. It can answer for the token ids in the file (`ids`) alone.

    Raises:
        BadModelFile: not a trace, or damaged.
    """

    storage: Storage | None = None

    def __init__(self, path: Path) -> None:
        self._path, self._trace = path, Trace(path)
        about = self._trace.about
        self.system, self.config, self.versions = about.system, about.config, about.versions
        self.dtype = RUNNABLE[about.dtype]
        self.ids = self._trace.ids
        self.sites = frozenset(self._trace.names)
        self.longest: int | None = len(self.ids)

    @property
    def states_config(self) -> bool:
        """Whether `config` is what the record says, and not what it is compared with."""
        return True

    def run(self, ids: Sequence[int], sites: Iterable[str]) -> dict[str, Tensor]:
        self._check_ids(ids)
        return {name: self._trace[name] for name in parse_sites(self, sites)}

    def with_window(self, window: int) -> Reference:
        raise self._cannot("its window cannot be changed")

    def cached(self, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        raise self._cannot("it has no cache to feed")

    def batched(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        raise self._cannot("it has one row")

    def _check_ids(self, ids: Sequence[int]) -> None:
        if list(ids) != self.ids:
            given = f"it holds values for its own {len(self.ids)} token ids, not for these {len(ids)}"
            raise self._cannot(f"{given}; leave out --prompt, --ids and --file")

    def _cannot(self, why: str) -> CannotDo:
        return CannotDo(f"{self._path}: a trace is a record: {why}")
