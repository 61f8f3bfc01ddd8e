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
td { vertical-align: top } dt { font-weight: bold; float: left; clear: left; width: 9rem } dd { margin: 0 0 0 9rem }
tr.differs { background: #fdd } .difference { color: #b00 } .rounding, .equal { color: #060 }
"""
LEAST = 1e-2  # of an error in the chart; smaller ones are drawn as this
CAPTION = f"""Above: the relative distance of both systems to the same model in float64, with all errors made before;
the band reaches from 1/{SIZE_FACTOR:g} to {SIZE_FACTOR:g} times ours, and a line is broken where values are exact or
not finite. Below: the error made at each site alone, in multiples of what rounding explains there; above the dashed
line it is more than rounding, and points at {LEAST:g} stand for less. Sites are in the order of computation, and bands
are blocks."""
COLUMNS = ("site", "max abs", "relative", "ours", "cosine", "error / rounding", "")
MEANINGS = {
    "max abs": "the largest difference between a value of REF and of the float64 model",
    "relative": "root mean square of that difference, divided by that of the float64 values",
    "ours": "the same for our model in the dtype of REF",
    "cosine": "cosine similarity of REF's values and the float64 model's",
    "error / rounding": "the error that REF makes at this site, errors before it left out, divided by the most that "
    'rounding explains; above 1 the systems differ. "equal bits": every value of REF equals ours in the same dtype.',
}
LABELS = 24  # block numbers on the axis, at most


def check_page(path: Path) -> None:
    """Raises OSError where no page can be written, ImportError where matplotlib, which draws the chart, is missing."""
    check_target(path, force=True)
    _figure()


def write_report(found: Judgement, path: Path) -> None:
    """Write the page, whole or not at all, in the place of an older one. Raises as `check_page`."""
    check_page(path)
    model, system, dtype = (html.escape(name) for name in (found.model, found.system, found.dtype))
    profile = html.escape(f" MODEL is rounded as {found.numerics}.") if found.numerics else ""
    cases = [(case.name, case.outcome, case.detail) for case in found.cases]
    wrong = [case.outcome == DIFFERS for case in found.cases]
    rows = [(*cells(row), row.why) for row in found.rows]
    differ = [row.differs for row in found.rows]
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Parity of {model} with {system}</title>
<style>{STYLE}</style>
<h1>Parity of {model} with {system}</h1>
<p>MODEL is {model}. REF is {system}, computed in {dtype}. Text: {found.tokens} token ids {html.escape(found.text)}.
{len(found.rows)} of {found.sites} sites compared.{profile}</p>
<p>Verdict: <strong class="{found.verdict.split()[0]}">{html.escape(found.verdict)}</strong>{_where(found)}.
{_predictions(found)}</p>
{_chart(found.rows)}
<p>{CAPTION}</p>
<h2>Cases</h2>
{_table(("case", "outcome", "detail"), cases, wrong, "left") or "None was run."}
<h2>Sites</h2>
<dl>{"".join(f"<dt>{name}</dt><dd>{html.escape(meaning)}</dd>" for name, meaning in MEANINGS.items())}</dl>
{_table(COLUMNS, rows, differ)}</html>
"""
    with replacing(path) as (unfinished,):
        unfinished.write_text(page, encoding="utf-8")


def cells(row: Row) -> tuple[str, ...]:
    """What stands in all of `COLUMNS` but the last."""
    ratio = "equal bits" if row.bitwise else f"{row.ratio:.3g}"
    return row.site, f"{row.largest:.3g}", f"{row.relative:.2e}", f"{row.own_relative:.2e}", f"{row.cosine:.8f}", ratio


def _where(found: Judgement) -> str:
    if found.first is None:
        return ""
    times = [f", {row.ratio:.3g} times what rounding explains" for row in found.rows if row.site == found.first]
    return f", first at <code>{html.escape(found.first)}</code>{''.join(times)}"


def _predictions(found: Judgement) -> str:
    if (it := found.logits) is None:
        return ""
    margin = "" if it.margin is None else f", which led by {it.margin:.3g} at most"
    flips = f"{it.flips} of {it.positions} top tokens differ{margin}"
    return f"Predictions of REF against float64: KL {it.kl_mean:.3g} nats on average; {flips}."


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the chart needs matplotlib: pip install matplotlib") from None
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
    above.plot(depth, own, color="#357", lw=2.4, marker=".", ms=5, label="ours")  # wide: theirs may lie on it
    above.plot(depth, theirs, color="#e70", lw=1, marker=".", ms=2.5, label="theirs")
    above.set_yscale("log")
    above.set_ylabel("relative distance to float64")
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    finite = [row.ratio for row in rows if math.isfinite(row.ratio)]
    most = 10 * max([*finite, 1.0])
    ratios = [min(max(row.ratio, LEAST), most) for row in rows]
    below.axhline(1, color="#b00", lw=0.8, ls="--")
    below.scatter(depth, ratios, s=8, c=["#b00" if row.differs else "#888" for row in rows])
    below.set_yscale("log")
    below.set_ylabel("error here / rounding")
    top = max([*ratios, 1.0])
    below.set_ylim(LEAST / 2, top * (top / LEAST) ** 0.35)  # above the points there is room for a label
    below.set_xlim(-0.5, len(rows) - 0.5)
    _mark_blocks((above, below), rows)
    first = next((i for i, row in enumerate(rows) if row.differs), None)
    if first is not None:
        for axes in (above, below):
            axes.axvline(first, color="#b00", lw=0.6, zorder=0)
        side = "left" if first < len(rows) / 2 else "right"
        said = f" first: {rows[first].site} {rows[first].why}".rstrip() + " "
        below.text(first, 0.96, said, transform=below.get_xaxis_transform(), fontsize=9, ha=side, va="top")
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def _mark_blocks(both: Sequence[Any], rows: Sequence[Row]) -> None:
    """Every other block has a grey band; a block's number stands under the middle of its sites, whichever those are."""
    sites: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        inside = row.site.startswith("blocks.")
        name = row.site.split(".")[1] if inside else "embed" if row.site == "hook_embed" else "head"
        sites.setdefault(name, []).append(i)
    middles = {name: sum(found) / len(found) for name, found in sites.items()}
    blocks = [name for name in sites if name.isdigit()]
    for name in blocks[::2]:
        for axes in both:
            axes.axvspan(sites[name][0] - 0.5, sites[name][-1] + 0.5, color="#f2f2f2", zorder=-1, lw=0)
    shown = blocks[:: max(1, -(-len(blocks) // LABELS))]
    for name in ("embed", "head"):  # where they do not meet another label
        if name in sites and all(abs(middles[name] - middles[other]) > len(rows) / LABELS for other in shown):
            shown.append(name)
    both[-1].set_xticks([middles[name] for name in shown], shown)
    for axes in both:
        axes.tick_params(axis="x", length=0, labelsize=9)
    both[-1].set_xlabel("block")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool], kind: str = "") -> str:
    def line(cells: Sequence[str], tag: str, differs: bool = False) -> str:
        inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr{' class=differs' if differs else ''}>{inner}</tr>\n"

    body = "".join(line(row, "td", differs) for row, differs in zip(rows, marked, strict=True))
    return f'<table class="{kind}">\n{line(head, "th")}{body}</table>' if rows else ""
