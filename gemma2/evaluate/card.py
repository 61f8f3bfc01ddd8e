"""A card: benchmarks with the harness's task, shots and metric for each, and the values that were published for them.

`configs/evaluation/model_card.json` is Gemma 2's. docs/evaluation.md says what a card file holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma2.checkpoints.hf_config import configs
from gemma2.checks import check_count, check_number
from gemma2.config import Gemma2Config

BETTER = ("higher", "lower", None)
ROW = {
    "name", "task", "shots", "metric", "filter", "scale", "better", "needs", "runs_code", "protocol", "published",
    "spread", "differs", "missing",
}  # fmt: skip
SECTION, CARD = {"name", "about", "tuned", "rows"}, {"name", "sources", "sizes", "spread", "sections"}


@dataclass(frozen=True)
class Row:
    """One benchmark.

    Attributes:
        name: as its source calls it.
        task: the harness's name for it, a task or a group; None where the harness has none.
        shots: examples before each question; None for as many as the task says.
        metric, filter: which of the task's numbers is compared; metric None for all of them.
        scale: what the harness's number is multiplied with, to be read beside the published one.
        better: "higher", "lower", or None where neither is better.
        needs: an environment variable without which the task cannot be scored.
        runs_code: whether scoring runs what the model wrote.
        protocol: source -> how it says that it measured.
        published: size -> source -> value.
        spread: size -> how far two sound measurements of this benchmark may lie apart.
        differs: what differs from the published protocol.
        missing: why there is no task.
    """

    name: str
    task: str | None = None
    shots: int | None = None
    metric: str | None = None
    filter: str = "none"
    scale: float = 1.0
    better: str | None = "higher"
    needs: str | None = None
    runs_code: bool = False
    protocol: Mapping[str, str] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    differs: str = ""
    missing: str = ""

    @property
    def key(self) -> tuple[str, int | None]:
        """What is run for this row. Rows of one key share a run."""
        return str(self.task), self.shots


@dataclass(frozen=True)
class Section:
    """Benchmarks of which the values were published for one kind of checkpoint.

    Attributes:
        tuned: whether that kind is tuned for chat; None where it does not matter.
    """

    name: str
    rows: Sequence[Row]
    about: str = ""
    tuned: bool | None = None


@dataclass(frozen=True)
class Card:
    """A table of benchmarks.

    Attributes:
        sources: name -> where its values are from; a column each.
        sizes: name -> fields of `Gemma2Config` by which a model of this size is known.
        spread: size -> what stands for benchmarks without a spread of their own.
        spread_said: where that is from.
    """

    name: str
    sections: Sequence[Section]
    sources: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    spread_said: str = ""

    @property
    def rows(self) -> list[Row]:
        return [row for section in self.sections for row in section.rows]

    def size_of(self, config: Gemma2Config) -> str | None:
        """The size that a model of this shape has, or None."""
        fits = [
            name
            for name, shape in self.sizes.items()
            if all(getattr(config, key) == value for key, value in shape.items())
        ]
        return fits[0] if fits else None

    def only(self, names: Sequence[str]) -> Card:
        """The sections of these names. Raises ValueError for others."""
        there = [section.name for section in self.sections]
        for name in names:
            if name not in there:
                raise ValueError(f"{self.name} has no section {name!r}; it has {', '.join(there)}")
        chosen = [section for section in self.sections if not names or section.name in names]
        return Card(self.name, chosen, self.sources, self.sizes, self.spread, self.spread_said)


def default_card() -> Path:
    return configs() / "evaluation" / "model_card.json"


def read_card(path: Path) -> Card:
    """A card from its file.

    Raises:
        ValueError: it is no card; says where, and what is wrong.
        OSError: it cannot be read.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error.msg} in line {error.lineno}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deep to be a card") from None
    try:
        return _card(given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _card(given: Any) -> Card:
    _check(given, "the file", CARD, {"name", "sections"})
    sources, sizes = given.get("sources", {}), given.get("sizes", {})
    _check(sources, "sources", None, set())
    _check(sizes, "sizes", None, set())
    fields = set(Gemma2Config.__dataclass_fields__)
    for name, shape in sizes.items():
        _check(shape, f"size {name}", fields, set())
        for key, value in shape.items():
            check_number(f"size {name}: {key}", value, "that is finite", _finite)
    _check(given.get("spread", {}), "spread", {*sizes, "said"}, set())
    spread = dict(given.get("spread", {}))
    said = _text(spread.pop("said", ""), "spread: said")
    if not isinstance(given["sections"], list) or not given["sections"]:
        raise ValueError("sections must be a list with at least one section")
    sections = []
    for section in given["sections"]:
        _check(section, "a section", SECTION, {"name", "rows"})
        if section.get("tuned") not in (True, False, None):
            raise ValueError(f"section {section['name']!r}: tuned must be true, false or null")
        name = _text(section["name"], "the name of a section")
        if not isinstance(section["rows"], list) or not section["rows"]:
            raise ValueError(f"section {name!r}: rows must be a list with at least one row")
        rows = [_row(row, sources, sizes) for row in section["rows"]]
        about = _text(section.get("about", ""), f"section {name!r}: about")
        sections.append(Section(name, rows, about, section.get("tuned")))
    return Card(_text(given["name"], "name"), sections, sources, sizes, _numbers(spread, "spread", sizes), said)


def _row(given: Any, sources: Mapping[str, Any], sizes: Mapping[str, Any]) -> Row:
    _check(given, "a row", ROW, {"name", "task"})
    where, values = f"row {given['name']!r}", dict(given)
    _text(given["name"], "the name of a row")
    if given["task"] is None:
        if not given.get("missing"):
            raise ValueError(f"{where} has no task: say why under missing")
    elif not given.get("metric"):
        raise ValueError(f"{where} has no metric: name the harness's, as acc")
    for name in ("task", "metric", "needs"):
        if given.get(name) is not None:
            _text(given[name], f"{where}: {name}")
    for name in ("filter", "differs", "missing"):
        _text(given.get(name, ""), f"{where}: {name}")
    if given.get("shots") is not None:
        check_count(f"{where}: shots", given["shots"])
    if given.get("better", "higher") not in BETTER:
        raise ValueError(f'{where}: better must be "higher", "lower" or null')
    if not isinstance(given.get("runs_code", False), bool):
        raise ValueError(f"{where}: runs_code must be true or false")
    check_number(f"{where}: scale", given.get("scale", 1), "above 0", lambda x: 0 < x < 1e9)
    _check(given.get("protocol", {}), f"{where}: protocol", sources, set())
    _check(given.get("published", {}), f"{where}: published", sizes, set())
    values["published"] = {
        size: _numbers(by, f"{where}: published for {size}", sources) for size, by in given.get("published", {}).items()
    }
    values["spread"] = _numbers(given.get("spread", {}), f"{where}: spread", sizes)
    return Row(**values)


def _numbers(given: Any, where: str, known: Iterable[str]) -> dict[str, float]:
    """Names with numbers; null, where a value is not known, is left out."""
    _check(given, where, known, set())
    there = {name: value for name, value in given.items() if value is not None}
    return {name: check_number(f"{where}: {name}", value, "that is finite", _finite) for name, value in there.items()}


def _finite(x: float) -> bool:
    return abs(x) < 1e300


def _text(given: Any, what: str) -> str:
    if not isinstance(given, str):
        raise ValueError(f"{what} must be a text, not {given!r:.60}")
    return given


def _check(given: Any, where: str, known: Iterable[str] | None, required: set[str]) -> None:
    """Raises ValueError unless it is an object with these keys."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be an object, not {given!r:.60}")
    missing = required - given.keys()
    if missing:
        raise ValueError(f"{where} has no {', '.join(sorted(missing))}")
    other = [] if known is None else sorted(given.keys() - set(known))
    if other:
        raise ValueError(f"{where} has {other[0]!r}, which is none of {', '.join(sorted(known or ()))}")
