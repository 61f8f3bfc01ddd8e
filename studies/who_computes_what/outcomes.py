"""What was found, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gemma2.atomic import replacing

FILE = Path(__file__).with_name("outcomes.json")
LONGEST = 120  # characters of an error that are kept


@dataclass(frozen=True)
class Outcome:
    """One run: what was found, how far the worst logit is off, and where the difference begins, if there is one."""

    run: str
    verdict: str  # "equal bits", "rounding", "differs", "fails", "refuses" (to build its model) or "not run"
    first: str = ""  # the first site that differs
    ratio: float = 0.0  # there, how many times what rounding explains
    apart: float = 0.0  # the largest difference of a logit to the exact one
    said: str = ""  # the error, or why the site differs
    position: int = -1  # the first whose logits are visibly off

    @property
    def small(self) -> bool:
        """Whether no logit is visibly off, though more than rounding is."""
        return self.verdict == "differs" and self.position < 0

    def cell(self) -> str:
        if self.verdict == "differs":
            return f"**differs**, {self.apart:.2g}"
        return f"**{self.verdict}**" if self.verdict in ("fails", "refuses") else self.verdict


@dataclass(frozen=True)
class Again:
    """The traces compared once more, with our model changed as a finding says.

    Attributes:
        finding: its key.
        agree, of: how many traces agree to rounding.
        left: the others, each with how far it is beyond rounding.
        ratio: of the worst of them, how many times what rounding explains.
    """

    finding: str
    agree: int
    of: int
    left: tuple[str, ...] = ()
    ratio: float = 0.0


@dataclass(frozen=True)
class Found:
    """What the runs of one implementation gave.

    Attributes:
        outcomes: by dtype.
        again: of the first dtype; None where nothing differs or the runs alone are the evidence.
        arithmetic: dtype -> run -> verdict, against our model in the implementation's own arithmetic.
    """

    name: str
    system: str
    date: str
    machine: str
    outcomes: dict[str, list[Outcome]]
    again: Again | None = None
    arithmetic: dict[str, dict[str, str]] = field(default_factory=dict)


def differing(outcomes: Iterable[Outcome]) -> frozenset[str]:
    return frozenset(outcome.run for outcome in outcomes if outcome.verdict in ("differs", "fails"))


def read(path: Path = FILE) -> dict[str, Found]:
    return (
        {entry["name"]: _found(entry) for entry in json.loads(path.read_text(encoding="utf-8"))}
        if path.exists()
        else {}
    )


def write(found: Iterable[Found], path: Path = FILE) -> None:
    entries = [_entry(one) for one in found]
    with replacing(path) as (place,):
        place.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _entry(one: Found) -> dict[str, Any]:
    entry = asdict(one)
    entry["outcomes"] = {dtype: [_short(it) for it in outcomes] for dtype, outcomes in one.outcomes.items()}
    return {key: value for key, value in entry.items() if value}


def _short(outcome: Outcome) -> dict[str, Any]:
    """What is not the default, numbers to six digits."""
    stated = {it.name: getattr(outcome, it.name) for it in fields(outcome)}
    rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in stated.items()}
    return {it.name: rounded[it.name] for it in fields(outcome) if rounded[it.name] != it.default}


def _found(entry: dict[str, Any]) -> Found:
    outcomes = {dtype: [Outcome(**it) for it in them] for dtype, them in entry["outcomes"].items()}
    again = entry.get("again")
    made = Again(**{**again, "left": tuple(again["left"])}) if again else None
    return Found(**{**entry, "outcomes": outcomes, "again": made})
