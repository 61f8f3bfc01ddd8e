"""A judgement as a page: the verdict, one chart of the error by depth, and the tables."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma2.atomic import check_target, replacing
from gemma2.parity.cases import DIFFERS
from gemma2.parity.compare import SIZE_FACTOR, Row
from gemma2.parity.judge import Judgement

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 13px } td, th { padding: 2px 14px 2px 0; text-align: right }
.left td, .left th, td:first-child, th:first-child, td:last-child, th:last-child { text-align: left }
tr.parts { background: #fdd } .difference { color: #b00 } .rounding, .equal { color: #060 }
"""


CAPTION = f"""Above: the whole distance of both systems to the same model in float64, all that came before included; the
band reaches {SIZE_FACTOR:g} times above and below ours, and a line is broken where values are exact or not finite.
Below: the error made at each place alone, in multiples of what rounding explains there; above the dashed line it is
something else, and points at 0.01 stand for less."""


def check_page(path: Path) -> None:
    """Raises OSError where no page can be written, ImportError where matplotlib, which draws the chart, is missing."""
    check_target(path, force=True)
    _figure()


def write_report(found: Judgement, path: Path) -> None:
    """Write the page, whole or not at all, in the place of an older one. Raises as `check_page`."""
    check_page(path)
    system, dtype = html.escape(found.system), html.escape(found.dtype)
    profile = html.escape(f", held against our arithmetic as {found.numerics}") if found.numerics else ""
    cases = [(case.name, case.outcome, case.detail) for case in found.cases]
    wrong = [case.outcome == DIFFERS for case in found.cases]
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Parity with {system}</title>
<style>{STYLE}</style>
<h1>Parity with {system}</h1>
<p>{dtype}, {found.ids} ids{profile}; {len(found.rows)} of {found.places} sites shown.
Verdict: <strong class="{found.verdict.split()[0]}">{html.escape(found.verdict)}</strong>{_where(found)}.
{_predictions(found)}</p>
{_chart(found.rows)}
<p>{CAPTION}</p>
<h2>Cases</h2>
{_table(("case", "outcome", "detail"), cases, wrong, "left") or "None was run."}
<h2>Sites</h2>
{_sites(found.rows)}</html>
"""
    with replacing(path) as (unfinished,):
        unfinished.write_text(page, encoding="utf-8")


def _where(found: Judgement) -> str:
    return f", first at <code>{html.escape(found.first)}</code>" if found.first else ""


def _predictions(found: Judgement) -> str:
    if (it := found.logits) is None:
        return ""
    margin = "" if it.margin is None else f", which led by {it.margin:.3g} at most"
    return f"KL {it.kl_mean:.3g} nats on average; {it.flips} of {it.positions} top tokens flip{margin}."


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the chart needs matplotlib: pip install 'gemma2[plots]'") from None
    return Figure(figsize=(11, 6.5), layout="constrained")


def _chart(rows: Sequence[Row]) -> str:
    figure = _figure()
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    depth = range(len(rows))
    own, theirs = (
        [x if x > 0 and math.isfinite(x) else math.nan for x in line]  # a gap
        for line in ([row.own_relative for row in rows], [row.relative for row in rows])
    )
    low, high = [x / SIZE_FACTOR for x in own], [x * SIZE_FACTOR for x in own]
    above.fill_between(depth, low, high, color="#cde", label="rounding")
    above.plot(depth, own, color="#357", lw=1, marker=".", ms=2, label="ours")
    above.plot(depth, theirs, color="#c50", lw=1, marker=".", ms=2, label="theirs")
    above.set_yscale("log")
    above.set_ylabel("relative distance to float64")
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    finite = [row.ratio for row in rows if math.isfinite(row.ratio)]
    most = 10 * max([*finite, 1.0])
    ratios = [min(max(row.ratio, 1e-2), most) for row in rows]
    colours = ["#b00" if row.parts else "#888" for row in rows]
    below.axhline(1, color="#b00", lw=0.8, ls="--")
    below.scatter(depth, ratios, s=8, c=colours)
    below.set_yscale("log")
    below.set_ylabel("error here / rounding")
    starts = [(i, row.site.split(".")[1]) for i, row in enumerate(rows) if row.site.endswith("hook_resid_pre")]
    below.set_xticks([i for i, _ in starts], [layer for _, layer in starts], fontsize=8)
    below.set_xlabel("block")
    below.margins(y=0.2)
    for row, place, ratio in zip(rows, depth, ratios, strict=True):
        if row.parts:
            said = f"{row.site} {row.why}".strip()
            box = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1}  # other points may lie under it
            below.annotate(said, (place, ratio), fontsize=8, xytext=(4, 6), textcoords="offset points", bbox=box)
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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool], kind: str = "") -> str:
    def line(cells: Sequence[str], tag: str, parts: bool = False) -> str:
        inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr{' class=parts' if parts else ''}>{inner}</tr>\n"

    body = "".join(line(cells, "td", parts) for cells, parts in zip(rows, marked, strict=True))
    return f'<table class="{kind}">\n{line(head, "th")}{body}</table>' if rows else ""
