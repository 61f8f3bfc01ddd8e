"""The verdict on a port by a pack: the first site at which it is farther from the model in float64 than rounding takes
it. A pack holds no values to go on from, so errors add up: of the sites that differ, the first is where to look."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemma2.checkpoints.dtypes import dtype_name
from gemma2.errors import BadModelFile
from gemma2.load import locate
from gemma2.parity.judge import DIFFERENCE, EQUAL, ROUNDING
from gemma2.parity.pack import Pack, Site, parse_port, port_of, read_port
from gemma2.parity.references import SHAPE, Reference, open_local
from gemma2.parity.references.ourselves import open_ourselves
from gemma2.parity.references.trace import Recorded
from gemma2.parity.summary import distance
from gemma2.research.sites import chosen
from gemma2.strict_json import finite

PORTS = "port.json, a trace (FILE.safetensors) or self:model=MODEL"


@dataclass(frozen=True)
class PackRow:
    """One site.

    Attributes:
        rms, largest: the port's; `pack_rms`, `pack_largest` those of the model in float64.
        relative: how far the port is from the model in float64, by the rms of the values, as the projections say.
        own_relative: the same of our model in the port's dtype, by the values themselves.
        ratio: how many times the distance that is allowed; infinite where `why` says something.
        bitwise: whether the hashes of all bits are equal.
        why: what is wrong beyond a distance: other keys are masked, or values are not finite; else empty.
    """

    site: str
    rms: float
    pack_rms: float
    largest: float
    pack_largest: float
    relative: float
    own_relative: float
    ratio: float
    bitwise: bool
    why: str = ""

    @property
    def differs(self) -> bool:
        return not self.ratio <= 1

    @property
    def moved(self) -> bool:
        """Whether it differs although rms and the largest value are right: the same values, in other places."""
        pairs = (self.rms, self.pack_rms), (self.largest, self.pack_largest)
        same = all(math.isclose(one, other, rel_tol=1e-2) for one, other in pairs)
        return self.differs and not self.why and same and self.relative > 0.1


@dataclass(frozen=True)
class PackJudgement:
    """What came of comparing a port with a pack.

    Attributes:
        pack, made_by: the file, and the system that made it.
        port, system, dtype: the file or the system that is compared, who computed, and in which dtype.
        tokens: how many token ids.
        sites: how many sites the pack has; `rows` has those that the port has too.
        rows: in the order of computation.
    """

    pack: str
    made_by: str
    port: str
    system: str
    dtype: str
    tokens: int
    sites: int
    rows: list[PackRow]

    @property
    def first(self) -> str | None:
        return next((row.site for row in self.rows if row.differs), None)

    @property
    def verdict(self) -> str:
        """ "equal to the bit", "rounding" or "difference"."""
        if self.first is not None:
            return DIFFERENCE
        return EQUAL if all(row.bitwise for row in self.rows) else ROUNDING

    def to_dict(self) -> dict[str, Any]:
        """For machines; what is not finite is None."""
        rows = [dataclasses.asdict(row) | {"differs": row.differs} for row in self.rows]
        plain: dict[str, Any] = finite(
            dataclasses.asdict(self) | {"rows": rows, "first": self.first, "verdict": self.verdict}
        )
        return plain


def open_port(spec: str, pack: Pack, sites: Iterable[str] | str = "*", dtype: torch.dtype | None = None) -> Pack:
    """What is compared with a pack: a port's file, a trace, or this package's own model.

    Raises:
        BadModelFile: a file that is none of these, or of other token ids.
        ValueError: a spec that names neither.
    """
    kind, _, rest = spec.partition(":")
    reference: Reference
    if kind == "self":
        named = re.match(r"(?:.*,)?model=(.+?)(?:,(?:dtype|device|numerics|weights)=.*)?$", rest)
        if named is None:
            raise ValueError(f"{spec}: a pack holds no weights: say of which model, as self:model=pocket")
        reference = open_ourselves(rest, open_local(locate(named[1])), dtype)
    elif spec.endswith(".safetensors") or (kind == "trace" and rest):
        reference = Recorded(Path(spec.removeprefix("trace:")))
    elif spec.endswith(".json"):
        return read_port(Path(spec), pack)
    else:
        raise ValueError(f"{spec}: a pack is compared with {PORTS}")
    assert pack.config is not None
    for name in SHAPE:
        theirs, ours = getattr(reference.config, name), getattr(pack.config, name)
        if theirs != ours:
            raise BadModelFile(f"{spec}: another model than that of {pack.path}: its {name} is {theirs}, not {ours}")
    if isinstance(reference, Recorded) and reference.ids != pack.ids:
        raise BadModelFile(f"{spec}: its ids are not those of {pack.path}, of which there are {len(pack.ids)}")
    names = [name for name in chosen(pack.config, sites) if name in reference.sites and name in pack.sites]
    values = reference.run(pack.ids, names)
    stated = port_of(reference.system, dtype_name(reference.dtype), pack.ids, values.items())
    return parse_port(Path(spec), stated, pack)


def judge_pack(pack: Pack, port: Pack, sites: Iterable[str] | str = "*") -> PackJudgement:
    """Every site that both have.

    Raises:
        ValueError: a pattern that names no site.
        BadModelFile: they have no such site in common, or the pack has no allowance for the port's dtype.
    """
    assert pack.config is not None
    names = [name for name in chosen(pack.config, sites) if name in pack.sites and name in port.sites]
    if not names:
        raise BadModelFile(f"{port.path}: it has none of the sites asked for; it has {len(port.sites)}")
    rows = [_row(name, pack.sites[name], port.sites[name], pack, port) for name in names]
    return PackJudgement(
        pack.path, pack.system, port.path, port.system, port.dtype, len(pack.ids), len(pack.sites), rows
    )


def _row(name: str, right: Site, found: Site, pack: Pack, port: Pack) -> PackRow:
    if port.dtype not in right.allowed:
        raise BadModelFile(
            f"{pack.path}: has no errors of {port.dtype}, in which the port computes, but of {', '.join(right.allowed)}"
        )
    allowed, ours, theirs = right.allowed[port.dtype], right.seen, found.seen
    apart = distance(ours.projection, theirs.projection)
    ratios = [apart / allowed[0] if allowed[0] else (math.inf if apart else 0.0)]
    if ours.channels and theirs.channels:
        beside = distance(ours.channels, theirs.channels)
        ratios.append(beside / allowed[1] if allowed[1] else (math.inf if beside else 0.0))
    length = ours.rms * math.sqrt(math.prod(ours.shape))
    numbers = (theirs.rms, theirs.largest, *theirs.projection, *theirs.channels)
    why = "" if all(map(math.isfinite, numbers)) else "values are not finite"
    if not why and None not in (ours.masked, theirs.masked) and ours.masked != theirs.masked:
        why = f"{theirs.masked:,} scores are masked, and must be {ours.masked:,}"
    return PackRow(
        name,
        theirs.rms,
        ours.rms,
        theirs.largest,
        ours.largest,
        apart / length if length else apart,
        right.error.get(port.dtype, 0.0),
        math.inf if why else max(ratios),
        port.dtype == pack.dtype and bool(ours.bits) and ours.bits == theirs.bits,
        why,
    )
