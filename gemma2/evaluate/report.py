"""What was measured beside what was published, as rows of text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gemma2.evaluate.card import Card, Row, Section
from gemma2.evaluate.results import Result

ERRORS = 2.0  # standard errors that the choice of documents explains


@dataclass(frozen=True)
class Report:
    """A card and what is known of its rows.

    Attributes:
        model: its name.
        size: of which published values are shown; None for all sizes.
        results: (task, shots) -> what was measured.
        reasons: (task, shots) or a row's name -> why there is no result.
        limit: documents a task at most, or None.
        notes: what the reader should know before the numbers.
        about: a line for the foot: versions, machine, settings.
    """

    card: Card
    model: str
    size: str | None
    results: Mapping[tuple[str, int | None], Result]
    reasons: Mapping[tuple[str, int | None] | str, str] = field(default_factory=dict)
    limit: int | None = None
    notes: Sequence[str] = ()
    about: str = ""

    @property
    def sizes(self) -> list[str]:
        return [self.size] if self.size else list(self.card.sizes)

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Size and source of each column of published values."""
        return [(size, source) for size in self.sizes for source in self.card.sources]


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        how: task, shots and metric.
        value, error: measured, and its standard error, on the published scale; None where there is none.
        published: (size, source) -> value.
        verdict: how the value lies to the published ones, or why there is no value.
    """

    row: Row
    name: str
    how: str
    value: float | None
    error: float | None
    published: Mapping[tuple[str, str], float]
    verdict: str


def lines(report: Report, section: Section) -> Iterator[Line]:
    """The lines of a section: one for a row, or one for each metric of a row that names none."""
    for row in section.rows:
        published = {
            (size, source): value
            for size, source in report.columns
            for value in [row.published.get(size, {}).get(source)]
            if value is not None
        }
        result = report.results.get(row.key) if row.task else None
        if result is None:
            why = row.missing or report.reasons.get(row.name) or report.reasons.get(row.key) or "not run yet"
            yield Line(row, row.name, _how(row, row.metric), None, None, published, why)
            continue
        metrics = result.metrics if row.metric is None else [(row.metric, row.filter)]
        for metric, filter in metrics:
            value, error = result.value(metric, filter)
            value, error = (None if x is None else x * row.scale for x in (value, error))
            how = _how(row, metric if filter == "none" else f"{metric} ({filter})")
            if value is None:
                there = ", ".join(name if kind == "none" else f"{name} ({kind})" for name, kind in result.metrics)
                verdict = f"no {metric} among the task's numbers: {there}"
            else:
                verdict = _verdict(report, row, value, error or 0.0)
            yield Line(row, row.name, how, value, error, published, verdict)


def measured(line: Line) -> str:
    """The value with its standard error."""
    if line.value is None:
        return ""
    error = f" ± {line.error:.2g}" if line.error else ""
    return (f"{line.value:.4g}" if abs(line.value) < 1 else f"{line.value:.2f}") + error


def as_published(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def heads(report: Report) -> list[str]:
    """The table's head."""
    columns = [source if report.size else f"{source}, {size}" for size, source in report.columns]
    return ["benchmark", "task, shots, metric", "measured", *columns, "verdict"]


def table(report: Report, section: Section) -> list[list[str]]:
    """A section as rows of text, the head first."""
    found = [heads(report)]
    for line in lines(report, section):
        values = [as_published(line.published.get(column)) for column in report.columns]
        found.append([line.name, line.how, measured(line), *values, line.verdict])
    return found


def preface(report: Report) -> list[str]:
    """What is said before the tables."""
    said = [*report.notes]
    if report.limit is not None:
        said.append(f"Only the first {report.limit:,} documents of a task were used: nothing here can be compared.")
    if report.card.sources and report.size is None and report.card.sizes:
        said.append("The model has none of the published sizes, so all of their values are shown and none compared.")
    return said


def markdown(report: Report) -> str:
    """The whole report."""
    parts = [f"# {report.card.name}: {report.model}", *preface(report)]
    for section in report.card.sections:
        head, *rest = table(report, section)
        rule = ["---:" if 1 < i < len(head) - 1 else "---" for i in range(len(head))]
        written = [f"| {' | '.join(_cell(cell) for cell in cells)} |" for cells in (head, rule, *rest)]
        parts += [f"## {section.name}", section.about, "\n".join(written)]
        differ = [f"- {row.name}: {protocols(row)}{row.differs}" for row in section.rows if row.differs]
        if differ:
            parts += ["What differs from the published measurement:", "\n".join(differ)]
    parts += sources(report)
    parts.append(report.about)
    return "\n\n".join(part for part in parts if part) + "\n"


def sources(report: Report) -> list[str]:
    """Where published values are from, and how far they are trusted."""
    said = [f"{name}: {where}" for name, where in report.card.sources.items()]
    if report.card.spread:
        numbers = ", ".join(f"{size} {value:g}" for size, value in report.card.spread.items())
        said.append(
            f"Spread ({numbers}): {report.card.spread_said} A value agrees if it is no farther from the nearest "
            f"published one than the spread and {ERRORS:g} of its own standard errors together."
        )
    return said


def _verdict(report: Report, row: Row, value: float, error: float) -> str:
    size = report.size
    there = dict(row.published.get(size, {})) if size else {}
    if not there:
        return ""
    if report.limit is not None:
        return "a part only: not compared"
    spread = row.spread.get(str(size), report.card.spread.get(str(size), 0.0))
    nearest = min(there.values(), key=lambda published: abs(published - value))
    off = value - nearest
    if abs(off) <= spread + ERRORS * error:
        return f"agrees ({off:+.2f})"
    return f"{abs(off):.2f} {'above' if off > 0 else 'below'} the nearest"


def _how(row: Row, metric: str | None) -> str:
    if row.task is None:
        return ""
    shots = [] if row.shots is None else [f"{row.shots}-shot"]
    return ", ".join([row.task, *shots, *([metric] if metric else [])])


def protocols(row: Row) -> str:
    """How each source says that it measured."""
    said = [f"{source} says {how}" for source, how in row.protocol.items() if how]
    return f"{'; '.join(said)}. " if said else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
