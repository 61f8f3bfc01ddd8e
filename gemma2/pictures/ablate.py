"""What `gemma2 ablate` measured, as a picture and as a page: the effect of each change, and how near the caps are."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from gemma2.pictures.ablate_words import POCKET, Report, code, few_windows, interval, near_rows, windows_of
from gemma2.pictures.drawing import figure, save
from gemma2.pictures.page import page, rows
from gemma2.research.ablation import UNCHANGED, Estimate
from gemma2.research.saturation import BINS, END, Near

LEAST = 1e-6  # nats of KL: float32 knows no smaller ones
COLOURS = ("local", "global", "dim")  # of the contexts, by their names in the page's style
PLAIN = ("#1f77b4", "#c2571a", "#5f6570")  # the same on paper
WIDTH, HEIGHT, EDGE = 300, 22, 20  # of a row's picture

STYLE = """
td svg { display: block; } td.mark { padding: 0 .3rem; vertical-align: middle; } td.what code { color: var(--dim); }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .3em; }
.context { display: inline-block; margin-right: .9em; }
.panels { display: flex; flex-wrap: wrap; gap: 1rem; } .panels figure { margin: 0; width: 270px; }
.grid td { min-width: 3.1rem; text-align: right; } text { font: 11px system-ui, sans-serif; fill: var(--dim); }
"""
CAPS = (
    "A cap turns x into cap x tanh(x / cap). Its slope at x is 1 - tanh(x / cap)^2: where the slope is 1 the cap does "
    "nothing, and where it is near 0 large values can no longer be told apart. Bars show how often |x| / cap has a "
    "value (the height is the square root of the share, so that rare values can be seen); the line is the slope."
)


def in_page(report: Report) -> str:
    """The whole page."""
    keys = "".join(
        f'<span class="context"><span class="key" style="background: var(--{colour})"></span>context {context:,}: '
        f"{windows_of(effect)}, {effect.nats.value:.3f} nats per token unchanged</span> "
        for context, colour in zip(report.contexts, COLOURS, strict=False)
        for effect in [report.at(context)[UNCHANGED]]
    )
    grid = f"<h2>Each head silenced alone</h2>\n{_grids(report)}" if report.heads else ""
    warnings = [few_windows(report.at(context)[UNCHANGED]) for context in report.contexts]
    few = "".join(f"<p>{html.escape(line)}</p>" for line in warnings if line)
    pocket = f"<p>{html.escape(POCKET)}</p>" if report.pocket else ""
    body = f"""<p>Each row changes one thing in the model and leaves the weights as they are. {html.escape(report.text)}
Every token was predicted once at each context, in windows with a BOS in front.</p>
<p>KL is the distance of the changed predictions from the unchanged ones, in nats: 0 means that nothing changed. In
the last column it is a dot on a logarithmic axis; the lines are 95 % intervals of a bootstrap over windows.</p>
<h2>One change at a time</h2>
<p class="dim">{keys}</p>{few}
{_effects(report)}
{pocket}
{grid}
<h2>How near the caps are</h2>
<p>{html.escape(CAPS)}</p>
<div class="panels">{"".join(_histogram(near) for near in report.near if "layer " not in near.name)}</div>
{_near(report.near)}"""
    return page(report.title, body, style=STYLE, foot=report.about)


def _effects(report: Report) -> str:
    low, high = _span(report)
    ticks = "".join(
        f'<text x="{_x(10.0**p, low, high):.1f}" y="12" text-anchor="middle">{_power(p)}</text>'
        for p in range(math.ceil(low), math.floor(high) + 1)
    )
    head = (
        "<tr><th>change</th><th>context</th><th>nats more</th><th>perplexity ratio</th><th>KL, nats</th>"
        f'<th>other top token</th><th><svg width="{WIDTH}" height="16" role="img" '
        f'aria-label="KL in nats, a logarithmic axis">{ticks}</svg>'
        "</th></tr>"
    )
    lines = []
    for name in report.listed:
        made = code(report.switches[name])
        for i, context in enumerate(report.contexts):
            effect = report.at(context)[name]
            span = len(report.contexts)
            what = f"{html.escape(name)}<br><code>{html.escape(made)}</code>"
            first = f'<td class="what" rowspan="{span}">{what}</td>' if i == 0 else ""
            ratio = "x " + format(effect.ratio, ".3f" if effect.ratio < 10 else ".1f" if effect.ratio < 1000 else ".3g")
            texts = (f"{context:,}", f"{effect.more.value:+.3f}", ratio, _kl(effect.kl.value))
            numbers = "".join(f'<td class="number">{text}</td>' for text in (*texts, f"{effect.top.value:.1%}"))
            mark = _mark(effect.kl, low, high, COLOURS[min(i, len(COLOURS) - 1)])
            lines.append(f'<tr>{first}{numbers}<td class="mark">{mark}</td></tr>')
    return f'<div class="scroll"><table class="effects">\n{head}\n' + "\n".join(lines) + "\n</table></div>"


def _span(report: Report) -> tuple[float, float]:
    """The axis of KL, as powers of ten."""
    found = [effect.kl for effect in report.effects if effect.name in report.listed]
    ends = [x for kl in found for x in (kl.low, kl.value, kl.high) if x is not None and LEAST <= x < math.inf]
    return math.floor(math.log10(min(ends, default=0.01))), math.ceil(math.log10(max(ends, default=1.0)) + 1e-9)


def _x(value: float, low: float, high: float) -> float:
    place = (math.log10(max(value, LEAST)) - low) / max(high - low, 1)
    return EDGE + min(max(place, 0.0), 1.0) * (WIDTH - 2 * EDGE)


def _mark(kl: Estimate, low: float, high: float, colour: str) -> str:
    said = f"KL {interval(kl, '.3g')} nats"
    drawn = f'<text x="{EDGE}" y="15">no change</text>'
    if kl.value >= LEAST:
        ends = [_x(kl.value if x is None else x, low, high) for x in (kl.low, kl.high)]
        drawn = (
            f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="11" y2="11" stroke="var(--{colour})" stroke-width="2"/>'
            f'<circle cx="{_x(kl.value, low, high):.1f}" cy="11" r="4.5" fill="var(--{colour})"/>'
        )
    grid = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT}" stroke="var(--line)"/>'
        for p in range(int(low), int(high) + 1)
        for x in [_x(10.0**p, low, high)]
    )
    return f'<svg width="{WIDTH}" height="{HEIGHT}" role="img"><title>{html.escape(said)}</title>{grid}{drawn}</svg>'


def _power(p: int) -> str:
    return f"{10.0**p:g}" if p >= -3 else f"1e{p}"


def _kl(value: float) -> str:
    return "0" if value < LEAST else f"{value:.3g}"


def _grids(report: Report) -> str:
    """A table for each context: heads x layers, the colour is the KL."""
    made = []
    for context in report.contexts:
        found = {pair: report.at(context)[name].kl.value for pair, name in report.heads.items()}
        most = max(max(found.values()), LEAST)
        layers, heads = sorted({pair[0] for pair in found}), sorted({pair[1] for pair in found})
        first = "".join(f"<th>head {head}</th>" for head in heads)
        lines = [
            f"<tr><th>layer {i}</th>" + "".join(_cell(found.get((i, j), 0.0), most) for j in heads) + "</tr>"
            for i in layers
        ]
        made.append(
            f'<p class="dim">KL in nats, context {context:,}</p><div class="scroll"><table class="grid">\n'
            f"<tr><th></th>{first}</tr>\n" + "\n".join(lines) + "\n</table></div>"
        )
    return "\n".join(made)


def _cell(value: float, most: float) -> str:
    return f'<td class="number" style="background: rgba(var(--warm), {0.75 * value / most:.3f})">{_kl(value)}</td>'


def _histogram(near: Near) -> str:
    wide, tall, floor = 270, 130, 108
    step = (wide - 2 * EDGE) / BINS
    top = math.sqrt(max(near.shares))
    bars = "".join(
        f'<rect x="{EDGE + i * step:.1f}" y="{floor - 92 * math.sqrt(share) / top:.1f}" width="{step - 1:.1f}" '
        f'height="{92 * math.sqrt(share) / top:.1f}" fill="rgba(var(--cool), .6)"/>'
        for i, share in enumerate(near.shares)
        if share
    )
    points = " ".join(
        f"{EDGE + x / END * (wide - 2 * EDGE):.1f},{floor - 92 * (1 - math.tanh(x) ** 2):.1f}"
        for x in (i * END / 60 for i in range(61))
    )
    ticks = "".join(
        f'<text x="{EDGE + x / END * (wide - 2 * EDGE):.1f}" y="123" text-anchor="middle">{label}</text>'
        for x, label in ((0, "0"), (0.5, "0.5"), (1, "1 (the cap)"), (1.5, "1.5"), (2, "2"))
    )
    return (
        f'<figure><svg width="{wide}" height="{tall}" role="img" aria-label="{html.escape(near.name)}">{bars}'
        f'<polyline points="{points}" fill="none" stroke="rgb(var(--warm))" stroke-width="2"/>'
        f'<line x1="0" x2="{wide}" y1="{floor}" y2="{floor}" stroke="var(--dim)"/>{ticks}</svg>'
        f"<figcaption>{html.escape(near.name)}, cap {near.cap:g}<br>mean slope {near.slope:.3f}, "
        f"largest |x| {near.largest:.1f}</figcaption></figure>"
    )


def _near(found: Sequence[Near]) -> str:
    head, *lines = near_rows(found)
    return rows(head, lines, numbers=range(1, len(head)))


def draw(report: Report, path: Path) -> None:
    """Write the picture as a PNG, whole or not at all. Raises ImportError without matplotlib, OSError."""
    names = [*report.listed][::-1]
    drawn = figure(11.0, 3.6 + 0.3 * len(names))
    above, below = drawn.subfigures(2, 1, height_ratios=(0.6 + 0.3 * len(names), 2.6))
    kl, more = above.subplots(1, 2, sharey=True)
    for i, (context, colour) in enumerate(zip(report.contexts, PLAIN, strict=False)):
        at, places = report.at(context), [y + 0.13 - 0.26 * i for y in range(len(names))]
        for axes, kind in ((kl, "kl"), (more, "more")):
            found = [getattr(at[name], kind) for name in names]
            values = [x.value if kind == "more" or x.value >= LEAST else math.nan for x in found]
            sides = [
                [max(0.0, x.value - (x.value if x.low is None else x.low)) for x in found],
                [max(0.0, (x.value if x.high is None else x.high) - x.value) for x in found],
            ]
            axes.errorbar(values, places, xerr=sides, fmt="o", ms=4, lw=1.2, color=colour, label=f"context {context:,}")
    kl.set_xscale("log")
    more.set_xscale("symlog", linthresh=0.01)
    more.margins(x=0.06)
    more.axvline(0, color="#999", lw=0.6)
    kl.set_yticks(range(len(names)), names)
    kl.set_xlabel("KL from the unchanged model, nats (no dot: no change)")
    more.set_xlabel("nats per token more (the axis is linear within 0.01)")
    for axes in (kl, more):
        axes.grid(axis="x", color="#ddd", lw=0.5)
        axes.set_ylim(-0.6, len(names) - 0.4)
    above.suptitle(report.title, fontsize=11, parse_math=False)
    kl.legend(loc="best", fontsize=8, frameon=True)
    shown = [near for near in report.near if "layer " not in near.name]
    edges = [i * END / BINS for i in range(BINS + 1)]
    for axes, near in zip(below.subplots(1, len(shown)), shown, strict=True):
        axes.stairs([math.sqrt(x / max(near.shares)) for x in near.shares], edges, fill=True, color="#8fbbdc")
        axes.plot(edges, [1 - math.tanh(x) ** 2 for x in edges], color="#c44d1c")
        axes.set_title(f"{near.name}\nmean slope {near.slope:.3f}", fontsize=8)
        axes.set_xlabel(f"|x| / cap ({near.cap:g})", fontsize=8)
        axes.set_yticks([])
        axes.tick_params(labelsize=8)
    below.suptitle("How often values come near their cap (bars: square root of the share), and its slope", fontsize=9)
    save(drawn, path, force=True)
