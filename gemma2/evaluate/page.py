"""The report as a page: bars of what was measured beside what was published."""

from __future__ import annotations

import html
from collections.abc import Sequence

from gemma2.evaluate.card import Section
from gemma2.evaluate.report import Line, Report, as_published, heads, lines, measured, preface, protocols, sources
from gemma2.pictures.page import page

WIDTH, BAR, GAP, EDGE = 260, 9, 3, 4
PERCENT = 100.0  # the scale of a row that is read as percent
COLOURS = ("local", "global", "dim", "line")  # measured, then a source each, by their names in the page's style

STYLE = """
td svg { display: block; } td.bars { padding: .3rem; vertical-align: middle; } td.how { color: var(--dim); }
td.what { font-weight: 600; } tr.none td { color: var(--dim); } tr.none td.what { font-weight: normal; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 .9em; }
.key:first-child { margin-left: 0; } text { font: 11px system-ui, sans-serif; fill: var(--dim); }
details { margin: .6rem 0; max-width: 60rem; } summary { cursor: pointer; color: var(--dim); }
li { margin: .25rem 0; } td.number { white-space: nowrap; } td.verdict { overflow-wrap: anywhere; min-width: 9rem; }
"""


def in_page(report: Report) -> str:
    """The whole page."""
    said = "".join(f"<p>{html.escape(line)}</p>\n" for line in preface(report))
    body = said + "\n".join(_section(report, section) for section in report.card.sections)
    where = "".join(f'<p class="dim">{html.escape(line)}</p>\n' for line in sources(report))
    return page(
        f"{report.card.name}: {report.model}",
        f"{body}\n<h2>Sources</h2>\n{where}" if where else body,
        style=STYLE,
        foot=report.about,
    )


def _section(report: Report, section: Section) -> str:
    found = list(lines(report, section))
    drawn = [column for column in report.columns if report.size]
    names = heads(report)
    first = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    scale = "0 to 100" if all(line.row.scale == PERCENT for line in found) else "percent to 100, others to the largest"
    bars = f"<th>{scale}</th>" if drawn else ""
    made = "\n".join(_line(report, line, drawn) for line in found)
    legend = _legend(["measured", *(source for _, source in drawn)]) if drawn else ""
    differ = "".join(
        f"<li><b>{html.escape(row.name)}</b>: {html.escape(protocols(row))}{html.escape(row.differs)}</li>"
        for row in section.rows
        if row.differs
    )
    more = f"<details><summary>What differs from the published measurement</summary><ul>{differ}</ul></details>"
    about = f"<p>{html.escape(section.about)}</p>" if section.about else ""
    return (
        f'<h2>{html.escape(section.name)}</h2>\n{about}{legend}\n<div class="scroll"><table>\n'
        f"<tr>{first}{bars}</tr>\n{made}\n</table></div>\n{more if differ else ''}"
    )


def _line(report: Report, line: Line, drawn: Sequence[tuple[str, str]]) -> str:
    values = [measured(line), *(as_published(line.published.get(column)) for column in report.columns)]
    numbers = "".join(f'<td class="number">{html.escape(value)}</td>' for value in values)
    kind = ' class="none"' if line.value is None else ""
    picture = f'<td class="bars">{_bars(line, drawn)}</td>' if drawn else ""
    return (
        f'<tr{kind}><td class="what">{html.escape(line.name)}</td><td class="how">{html.escape(line.how)}</td>'
        f'{numbers}<td class="verdict">{html.escape(line.verdict)}</td>{picture}</tr>'
    )


def _axis(line: Line) -> float:
    """Where the bars' axis ends: 100 for percent, else beyond the row's largest value."""
    if line.row.scale == PERCENT:
        return PERCENT
    values = [value for value in (line.value, *line.published.values()) if value is not None]
    return 1.1 * max(values, default=0.0) or 1.0


def _bars(line: Line, drawn: Sequence[tuple[str, str]]) -> str:
    """One bar for each value, under each other; the thin line is the standard error."""
    axis = _axis(line)
    values = [("measured", line.value), *((source, line.published.get((size, source))) for size, source in drawn)]
    made = []
    for place, (name, value) in enumerate(values):
        if value is None:
            continue
        y, width, colour = GAP + place * (BAR + GAP), _x(value, axis) - EDGE, COLOURS[min(place, len(COLOURS) - 1)]
        made.append(
            f'<rect x="{EDGE}" y="{y}" width="{max(width, 1):.1f}" height="{BAR}" rx="1.5" fill="var(--{colour})">'
            f"<title>{html.escape(name)} {value:g}</title></rect>"
        )
        if name == "measured" and line.error:
            low, high = (_x(value + sign * line.error, axis) for sign in (-1, 1))
            middle = y + BAR / 2
            made.append(
                f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="var(--ink)" '
                'stroke-width="1.5"/>'
            )
    tall = GAP + len(values) * (BAR + GAP)
    said = ", ".join(f"{name} {value:g}" for name, value in values if value is not None) or "no value"
    return f'<svg width="{WIDTH}" height="{tall}" role="img" aria-label="{html.escape(said)}">{"".join(made)}</svg>'


def _x(value: float, axis: float) -> float:
    return EDGE + min(max(value / axis, 0.0), 1.0) * (WIDTH - 2 * EDGE)


def _legend(names: Sequence[str]) -> str:
    colours = [COLOURS[min(place, len(COLOURS) - 1)] for place in range(len(names))]  # as the bars have them
    keys = "".join(
        f'<span class="key" style="background: var(--{colour})"></span>{html.escape(name)}'
        for name, colour in zip(names, colours, strict=True)
    )
    return f'<p class="dim">{keys}</p>'
