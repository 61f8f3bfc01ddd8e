"""What `gemma2 compare` measured, as a page and as a picture: tables, KL against size, and the worst passages."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2.pictures.ablate_words import interval
from gemma2.pictures.atlas import STYLE as ATLAS_STYLE
from gemma2.pictures.atlas import Chart, draw_chart, in_html
from gemma2.pictures.drawing import figure, save
from gemma2.pictures.page import page, rows
from gemma2.research.ablation import Estimate

WIDE, TALL, LEFT, RIGHT, TOP, FLOOR = 720, 330, 62, 96, 14, 282  # of the chart, in pixels
LEAST = 1e-9  # nats of KL below which a point stands on the floor

STYLE = """
.chart text { font: 12px system-ui, sans-serif; fill: var(--dim); } .chart text.name { fill: var(--ink); }
.passage { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .9rem;
  margin: .7rem 0; max-width: 60rem; } .passage p { margin: .2rem 0; max-width: none; }
.passage .text { line-height: 1.9; overflow-wrap: anywhere; } .passage .token { padding: .1rem 0; border-bottom: 0;
  white-space: pre-wrap; } .passage .token.worst { box-shadow: inset 0 -2px 0 var(--ink); }
.key { display: inline-block; width: 8rem; height: .8rem; vertical-align: middle; border: 1px solid var(--line);
  background: linear-gradient(90deg, rgba(var(--warm), 0), rgba(var(--warm), .7)); }
"""


@dataclass(frozen=True)
class Table:
    """Text cells under a title; the first cell of each row is the model, the others stand at the right."""

    title: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Point:
    """A model in the chart: its bits a weight, and its KL from A in nats."""

    name: str
    bits: float
    kl: Estimate


@dataclass(frozen=True)
class Told:
    """A passage: a line about it, its tokens as text with the KL of each, which one is the worst, a line about that."""

    about: str
    tokens: Sequence[tuple[str, float]]
    worst: int
    said: str


@dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
        title: of the page.
        text: in words: which text, how it was cut.
        about: a line for the foot: versions, machine.
        tables: of all models.
        points: of all models but A.
        passages: the worst of each model, by its name.
        charts: the atlas of each model, or none.
    """

    title: str
    text: str
    about: str
    tables: Sequence[Table]
    points: Sequence[Point]
    passages: Sequence[tuple[str, Sequence[Told]]]
    charts: Sequence[Chart]


def in_page(report: Report) -> str:
    """The whole page."""
    tables = "\n".join(
        f"<h2>{html.escape(table.title)}</h2>\n{rows(table.head, table.lines, numbers=range(1, len(table.head)))}"
        for table in report.tables
    )
    chart = f"<h2>KL against size</h2>\n{_chart(report.points)}" if len(report.points) > 1 else ""
    passages = "".join(_passages(name, found) for name, found in report.passages if found)
    body = f"""<p>{html.escape(report.text)}</p>
<p>KL is KL(A || B): how far B's predictions are from A's, in nats for each token. 0 means that they are the same.</p>
{tables}
{chart}
{"".join(in_html(one) for one in report.charts)}
{passages}"""
    return page(report.title, body, style=STYLE + ATLAS_STYLE, foot=report.about)


def _span(points: Sequence[Point]) -> tuple[float, float, float, float]:
    """The axes as powers: of two for the bits, of ten for KL."""
    bits = [math.log2(point.bits) for point in points]
    found = [point.kl.value for point in points if point.kl.value >= LEAST] or [1.0]
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)) + 1e-9)
    first = math.floor(min(bits))
    return first, max(first + 1, math.ceil(max(bits) - 1e-9)), low, high


def _chart(points: Sequence[Point]) -> str:
    """KL against bits a weight, both on logarithmic axes. A KL of 0 stands on the floor."""
    first, last, low, high = _span(points)

    def x(bits: float) -> float:
        return LEFT + (math.log2(bits) - first) / max(last - first, 1) * (WIDE - LEFT - RIGHT)

    def y(kl: float) -> float:
        return FLOOR if kl < LEAST else FLOOR - 16 - (math.log10(kl) - low) / max(high - low, 1) * (FLOOR - 16 - TOP)

    drawn = [
        f'<line x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{y(10.0**p):.1f}" y2="{y(10.0**p):.1f}" stroke="var(--line)"/>'
        f'<text x="{LEFT - 8}" y="{y(10.0**p) + 4:.1f}" text-anchor="end">{10.0**p:g}</text>'
        for p in range(int(low), int(high) + 1)
    ]
    drawn += [
        f'<line x1="{x(2.0**p):.1f}" x2="{x(2.0**p):.1f}" y1="{TOP}" y2="{FLOOR}" stroke="var(--line)"/>'
        f'<text x="{x(2.0**p):.1f}" y="{FLOOR + 18}" text-anchor="middle">{2.0**p:g}</text>'
        for p in range(int(first), int(last) + 1)
    ]
    drawn.append(
        f'<text x="{LEFT - 8}" y="{FLOOR + 4}" text-anchor="end">0</text>'
        f'<text x="{(LEFT + WIDE - RIGHT) / 2}" y="{FLOOR + 38}" text-anchor="middle">bits a weight</text>'
        f'<text x="14" y="{(TOP + FLOOR) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {(TOP + FLOOR) / 2})">KL, nats</text>'
    )
    places = [(x(point.bits), y(point.kl.value)) for point in points]
    for point, (cx, cy), label in zip(points, places, _labels(places), strict=True):
        said = f"{point.name}: {point.bits:.2f} bits a weight, KL {interval(point.kl, '.3g')} nats"
        drawn.append(
            f'<g><title>{html.escape(said)}</title><circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" fill="var(--local)"/>'
            f'<text class="name" x="{cx + 9:.1f}" y="{label + 4:.1f}">{html.escape(point.name)}</text></g>'
        )
    return (
        f'<div class="scroll"><svg class="chart" width="{WIDE}" height="{TALL}" role="img" '
        f'aria-label="KL against bits a weight">{"".join(drawn)}</svg></div>'
    )


def _labels(places: Sequence[tuple[float, float]], apart: float = 14, wide: float = 90) -> list[float]:
    """Heights at which names can stand beside points, a little above them, without covering each other."""
    found: dict[int, float] = {}
    for i in sorted(range(len(places)), key=lambda i: places[i][1]):
        x, y = places[i][0], places[i][1] - 0.6 * apart
        near = [height for j, height in found.items() if abs(places[j][0] - x) < wide and abs(height - y) < apart]
        while near:
            y = max(near) + apart
            near = [height for j, height in found.items() if abs(places[j][0] - x) < wide and abs(height - y) < apart]
        found[i] = y
    return [found[i] for i in range(len(places))]


def _passages(name: str, found: Sequence[Told]) -> str:
    """The worst passages of a model; the colours are on a scale of its own."""
    most = max(kl for told in found for _, kl in told.tokens)
    key = (
        f'<p class="dim">The colour of a token is the KL where it is predicted: 0 <span class="key"></span> {most:.3g} '
        "nats. The worst token of each passage is underlined.</p>"
    )
    told = "\n".join(_passage(one, most) for one in found)
    return f"<h2>Where {html.escape(name)} differs most</h2>\n{key}\n{told}"


def _passage(told: Told, most: float) -> str:
    tokens = "".join(
        f'<span class="token{" worst" if i == told.worst else ""}" title="{kl:.4g} nats" '
        f'style="background: rgba(var(--warm), {0.7 * max(kl, 0.0) / most:.3f})">{html.escape(text)}</span>'
        for i, (text, kl) in enumerate(told.tokens)
    )
    return (
        f'<div class="passage"><p class="dim">{html.escape(told.about)}</p><p class="text">{tokens}</p>'
        f"<p>{html.escape(told.said)}</p></div>"
    )


def draw(report: Report, path: Path) -> None:
    """Write the picture as a PNG, whole or not at all: KL against size, and below it the atlas of each model. Raises
    ImportError without matplotlib, OSError."""
    heights = [4.2] * (len(report.points) > 1 or not report.charts) + [chart.height for chart in report.charts]
    drawn = figure(11.0, sum(heights))
    parts = drawn.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if len(parts) > len(report.charts):
        _draw_points(parts[0], report)
        parts = parts[1:]
    for part, chart in zip(parts, report.charts, strict=True):
        draw_chart(part, chart)
    save(drawn, path, force=True)


def _draw_points(drawn: Any, report: Report) -> None:
    axes = drawn.subplots()
    shown = [point for point in report.points if point.kl.value >= LEAST]
    none = [point.name for point in report.points if point.kl.value < LEAST]
    first, last, low, high = _span(report.points)
    wide, tall = 690.0, 200.0  # of the axes, in points, about
    places = [
        (
            (math.log2(point.bits) - first) / max(last - first, 1) * wide,
            -(math.log10(point.kl.value) - low) / max(high - low, 1) * tall,
        )
        for point in shown
    ]
    for point, (_, y), height in zip(shown, places, _labels(places, apart=11), strict=True):
        ends = [point.kl.value if end is None else max(end, LEAST) for end in (point.kl.low, point.kl.high)]
        axes.plot([point.bits] * 2, ends, color="#1f77b4", lw=1.5)
        axes.plot(point.bits, point.kl.value, "o", ms=5, color="#1f77b4")
        at = (point.bits, point.kl.value)
        axes.annotate(point.name, at, (7, y - height), textcoords="offset points", va="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.minorticks_off()
    ticks = [2.0**p for p in range(int(first), int(last) + 1)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(ticks[0], ticks[-1] * 1.02 if len(ticks) > 1 else ticks[0] * 2)
    axes.set_ylim(10.0**low, 10.0 ** max(high, low + 1))
    title = f"{report.title}\n{report.text}" + (f"\nNo KL at all: {', '.join(none)}" if none else "")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("KL(A || B), nats a token")
    axes.grid(color="#ddd", lw=0.5)
