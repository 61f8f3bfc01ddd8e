"""The quantization atlas as a picture: layers by kinds of matrices as a heat map, and sites as lines over depth."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma2.pictures.page import rows

COLOURS = ("#1f77b4", "#c2571a", "#4f9d4f", "#8f5fbf", "#5f6570", "#c2a01a")  # of lines, on paper
THEMED = (
    "var(--local)",
    "var(--global)",
    "rgb(var(--green))",
    "rgb(var(--violet))",
    "var(--dim)",
    "rgb(var(--yellow))",
)  # the same in a page
WIDE, TALL, LEFT, FLOOR, TOP = 640, 260, 62, 216, 12  # of the lines, in pixels
STRENGTH = 0.62  # of a cell's colour at the largest value: the text on it stays readable

STYLE = """
:root { --green: 60, 130, 60; --violet: 120, 80, 170; --yellow: 150, 120, 10; }
@media (prefers-color-scheme: dark) {
  :root { --green: 130, 200, 130; --violet: 190, 150, 235; --yellow: 225, 195, 90; } }
table.heat td { min-width: 4.6rem; text-align: right; } table.heat tr.sum td, table.heat td.sum { color: var(--dim); }
table.heat td span { display: block; font-size: .86em; opacity: .75; }
.lines text { font: 12px system-ui, sans-serif; fill: var(--dim); }
.one { white-space: nowrap; margin-right: .9em; }
.line { display: inline-block; width: 1.2em; height: .25em; margin: 0 .4em .2em 0; vertical-align: middle; }
details { margin: .6rem 0; } summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class Cell:
    """A matrix: the KL that it alone causes, and the relative error of its values."""

    kl: float
    error: float


@dataclass(frozen=True)
class Chart:
    """The atlas of one model, ready to be drawn.

    Attributes:
        name: of the model.
        text: in words: the text, the whole KL.
        layers: how many there are.
        kinds: of the matrices in a layer.
        cells: (layer, kind) -> a matrix. The embedding is apart.
        embedding: that.
        layer_kl, kind_kl: KL of all matrices of a layer, and of a kind in all layers.
        ranked: a table of the matrices that are worth more bits, its head first.
        lines: kind of site -> (layer, relative error).
        sites: a table of all sites, its head first.
    """

    name: str
    text: str
    layers: int
    kinds: Sequence[str]
    cells: Mapping[tuple[int, str], Cell]
    embedding: Cell
    layer_kl: Sequence[float]
    kind_kl: Mapping[str, float]
    ranked: Sequence[Sequence[str]]
    lines: Mapping[str, Sequence[tuple[int, float]]]
    sites: Sequence[Sequence[str]]

    @property
    def height(self) -> float:
        """Of its picture, in inches."""
        return 1.6 + max(2.6, 0.34 * (self.layers + 1))


def in_html(chart: Chart) -> str:
    """Headings, tables and drawings, for a page with this `STYLE`."""
    ranked, sites = (
        rows(table[0], table[1:], numbers=range(1, len(table[0]))) for table in (chart.ranked, chart.sites)
    )
    return f"""<h2>Atlas of {html.escape(chart.name)}</h2>
<p>{html.escape(chart.text)}</p>
<p>Each cell is one matrix: above, the KL in nats that it alone causes when it is put into A; below, the relative error
of its values. The last column and row are the KL of all matrices of a layer, and of a kind in all layers, put into A
together.</p>
{_heat(chart)}
<h2>Matrices of {html.escape(chart.name)} that are worth more bits</h2>
<p>"Saved" is by how much the KL of the whole quantized model falls when the error of this matrix alone is halved, as
one more bit a weight does. The list is in the order of KL saved by a megabyte of more bits.</p>
{ranked}
<h2>Activations of {html.escape(chart.name)} over depth</h2>
{_lines(chart)}
<details><summary>All sites</summary>{sites}</details>
"""


def _heat(chart: Chart) -> str:
    most = max((cell.kl for cell in chart.cells.values()), default=0.0)
    head = "".join(f"<th>{html.escape(kind)}</th>" for kind in chart.kinds)
    lines = [
        f"<tr><th>layer {i}</th>{''.join(_cell(chart.cells[i, kind], most) for kind in chart.kinds)}"
        f'<td class="number sum">{_short(chart.layer_kl[i])}</td></tr>'
        for i in range(chart.layers)
    ]
    sums = "".join(f'<td class="number">{_short(chart.kind_kl[kind])}</td>' for kind in chart.kinds)
    return (
        f'<div class="scroll"><table class="heat">\n<tr><th></th>{head}<th>the layer</th></tr>\n'
        + "\n".join(lines)
        + f'\n<tr class="sum"><th>all layers</th>{sums}<td></td></tr>\n<tr><th>embedding</th>'
        f"{_cell(chart.embedding, most)}</tr>\n</table></div>"
    )


def _cell(cell: Cell, most: float) -> str:
    share = max(cell.kl, 0.0) / most if most > 0 else 0.0
    return (
        f'<td class="number" style="background: rgba(var(--warm), {STRENGTH * min(share, 1.0):.3f})">{_short(cell.kl)}'
        f"<span>{cell.error:.2%}</span></td>"
    )


def _short(kl: float) -> str:
    return "~0" if abs(kl) < 1e-8 else f"{kl:.2g}"


def _lines(chart: Chart) -> str:
    most = max((error for line in chart.lines.values() for _, error in line), default=0.0) or 1.0
    step, top = _ticks(most)

    def x(layer: float) -> float:
        return LEFT + layer / max(chart.layers - 1, 1) * (WIDE - LEFT - 20)

    def y(error: float) -> float:
        return FLOOR - error / top * (FLOOR - TOP)

    drawn = [
        f'<line x1="{LEFT}" x2="{WIDE - 20}" y1="{y(i * step):.1f}" y2="{y(i * step):.1f}" stroke="var(--line)"/>'
        f'<text x="{LEFT - 8}" y="{y(i * step) + 4:.1f}" text-anchor="end">{100 * i * step:.3g} %</text>'
        for i in range(round(top / step) + 1)
    ]
    every = max(1, math.ceil(chart.layers / 14))
    drawn += [
        f'<text x="{x(i):.1f}" y="{FLOOR + 18}" text-anchor="middle">{i}</text>' for i in range(0, chart.layers, every)
    ]
    drawn.append(f'<text x="{(LEFT + WIDE) / 2}" y="{FLOOR + 36}" text-anchor="middle">layer</text>')
    key = ""
    for (name, line), colour in zip(chart.lines.items(), THEMED, strict=False):
        points = " ".join(f"{x(layer):.1f},{y(error):.1f}" for layer, error in line)
        dots = "".join(
            f'<circle cx="{x(layer):.1f}" cy="{y(error):.1f}" r="3.5" fill="{colour}"><title>{html.escape(name)}, '
            f"layer {layer}: {error:.2%}</title></circle>"
            for layer, error in line
        )
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}')
        mark = f'<span class="line" style="background: {colour}"></span>'
        key += f' <span class="one">{mark}<code>{html.escape(name)}</code></span>'
    return (
        f'<p class="dim">Relative error ||B - A|| / ||A|| of what flows through a site.<br>{key}</p>'
        f'<div class="scroll"><svg class="lines" width="{WIDE}" height="{TALL}" role="img" '
        'aria-label="relative error of sites over depth">'
        f"{''.join(drawn)}</svg></div>"
    )


def _ticks(most: float) -> tuple[float, float]:
    """A round step for an axis from 0, and where it ends."""
    rough = most / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return step, step * math.ceil(most / step - 1e-9)


def draw_chart(drawn: Any, chart: Chart) -> None:
    """The heat map and the lines side by side, in a (sub)figure of matplotlib."""
    heat, lines = drawn.subplots(1, 2, width_ratios=(1.25, 1))
    blank = math.nan
    values = [[chart.cells[i, kind].kl for kind in chart.kinds] for i in range(chart.layers)]
    values.append([chart.embedding.kl, *[blank] * (len(chart.kinds) - 1)])
    most = max(cell.kl for cell in chart.cells.values())  # the embedding may be far above the layers
    heat.imshow(values, cmap="Oranges", vmin=0, vmax=max(most, 1e-12) * 1.25, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value == value:
                heat.text(j, i, _short(value), ha="center", va="center", fontsize=7)
    heat.set_xticks(range(len(chart.kinds)), chart.kinds, fontsize=8, rotation=20)
    heat.set_yticks(range(chart.layers + 1), [*(f"layer {i}" for i in range(chart.layers)), "embedding"], fontsize=8)
    heat.set_title("KL that each matrix alone causes, nats", fontsize=9)
    for (name, line), colour in zip(chart.lines.items(), COLOURS, strict=False):
        lines.plot(
            [layer for layer, _ in line], [100 * error for _, error in line], "o-", ms=3, color=colour, label=name
        )
    lines.set_ylim(bottom=0)
    lines.set_xlabel("layer", fontsize=8)
    lines.set_title("relative error of activations, %", fontsize=9)
    lines.tick_params(labelsize=8)
    lines.grid(color="#ddd", lw=0.5)
    lines.legend(fontsize=7)
    drawn.suptitle(f"Atlas of {chart.name}", fontsize=10)
