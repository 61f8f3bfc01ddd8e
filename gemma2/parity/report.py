"""A judgement as a page: the verdict, one chart of the error by depth, and the tables."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from pathlib import Path

from gemma2.atomic import replacing
from gemma2.parity.compare import Row
from gemma2.parity.judge import Judgement

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px } td, th { padding: 2px 10px; text-align: right }
td:first-child, th:first-child, td.l { text-align: left } tr.parts { background: #fdd } svg { max-width: 100% }
.difference { color: #b00 } .rounding, .equal { color: #060 }
"""


def write_report(found: Judgement, path: Path) -> None:
    """Write the page. Raises ImportError where matplotlib, which draws the chart, is not installed."""
    system, dtype = html.escape(found.system), html.escape(found.dtype)
    profile = html.escape(f", our arithmetic as {found.numerics}") if found.numerics else ""
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Parity with {system}</title>
<style>{STYLE}</style>
<h1>Parity with {system}</h1>
<p>{dtype}, {found.ids} ids{profile}.
Verdict: <strong class="{found.verdict.split()[0]}">{html.escape(found.verdict)}</strong>{_where(found)}.</p>
{_chart(found.rows)}
<p>Above: the whole distance to the same model in float64, of both systems; the band is what rounding explains. Below:
the error made at each place alone, in multiples of what rounding explains there; above 1 it is something else.</p>
<h2>Cases</h2>{_table(("case", "outcome", "detail"), [(c.name, c.outcome, c.detail) for c in found.cases])}
<h2>Sites</h2>{_sites(found.rows)}</html>
"""
    with replacing(path) as (unfinished,):
        unfinished.write_text(page, encoding="utf-8")


def _where(found: Judgement) -> str:
    return f", first at <code>{html.escape(found.first)}</code>" if found.first else ""


def _chart(rows: Sequence[Row]) -> str:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the chart needs matplotlib: pip install 'gemma2[plots]'") from None
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    depth = range(len(rows))
    own = [max(row.own_relative, 1e-18) for row in rows]
    above.fill_between(depth, [x / 3 for x in own], [3 * x for x in own], color="#cde", label="rounding")
    above.plot(depth, own, color="#357", lw=1, label="ours")
    above.plot(depth, [max(row.relative, 1e-18) for row in rows], color="#c50", lw=1, label="theirs")
    above.set_yscale("log")
    above.set_ylabel("relative distance to float64")
    above.legend(loc="lower right")
    finite = [row.ratio for row in rows if math.isfinite(row.ratio)]
    most = 10 * max([*finite, 1.0])
    ratios = [min(max(row.ratio, 1e-2), most) for row in rows]
    colours = ["#b00" if row.parts else "#888" for row in rows]
    below.axhline(1, color="#b00", lw=0.8, ls="--")
    below.scatter(depth, ratios, s=8, c=colours)
    below.set_yscale("log")
    below.set_ylabel("error here / rounding")
    starts = [(i, row.site.split(".")[1]) for i, row in enumerate(rows) if row.site.endswith("hook_resid_pre")]
    below.set_xticks([i for i, _ in starts], [f"block {layer}" for _, layer in starts], fontsize=8)
    for row, place, ratio in zip(rows, depth, ratios, strict=True):
        if row.parts:
            below.annotate(row.site, (place, ratio), fontsize=8, xytext=(4, -10), textcoords="offset points")
            break
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def _sites(rows: Sequence[Row]) -> str:
    head = ("site", "max abs", "relative", "ours", "cosine", "here / rounding", "")
    cells = [
        (
            row.site,
            f"{row.largest:.3g}",
            f"{row.relative:.2e}",
            f"{row.own_relative:.2e}",
            f"{row.cosine:.8f}",
            "equal bits" if row.bitwise else f"{row.ratio:.3g}",
            row.why,
        )
        for row in rows
    ]
    return _table(head, cells, [row.parts for row in rows])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool] = ()) -> str:
    def line(cells: Sequence[str], tag: str, parts: bool = False) -> str:
        inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr{' class=parts' if parts else ''}>{inner}</tr>"

    flags = marked or [False] * len(rows)
    body = "".join(line(cells, "td", parts) for cells, parts in zip(rows, flags, strict=True))
    return f"<table>{line(head, 'th')}{body}</table>"
