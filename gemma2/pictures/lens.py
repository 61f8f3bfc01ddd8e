"""A lens as a page and as a picture: layers by positions, with the likeliest token in each cell."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from gemma2.config import Gemma2Config
from gemma2.pictures.data import script_json
from gemma2.pictures.drawing import figure, save, short
from gemma2.pictures.page import page, readable
from gemma2.research.lens import LensTable
from gemma2.tokenizer import Tokenizer

DRAWN = 24  # positions in a PNG: more cannot be read
TALL = 12  # layers, from which on the text stands below them too
STRENGTH = 0.62  # of a cell's colour at probability 1: the text on it stays readable in light and dark

STYLE = """
table.lens { border-collapse: separate; border-spacing: 1px; }
table.lens td, table.lens th { border: 0; padding: .12rem .38rem; height: 1.6rem; min-width: 3.4rem; max-width: 6.4rem;
  overflow: hidden; text-overflow: ellipsis; white-space: pre;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .8rem; vertical-align: middle; }
table.lens td { cursor: default; color: var(--ink); }
table.lens td:focus { outline: 2px solid var(--cool-line); outline-offset: -2px; }
table.lens td.hit { box-shadow: inset 0 -2px 0 var(--ink); }
table.lens th { color: var(--dim); } table.lens tr.text th { color: var(--ink); }
table.lens th.layer { position: sticky; left: 0; background: var(--paper); z-index: 1; min-width: 5.2rem;
  max-width: none; text-align: right; font-family: inherit; }
table.lens th.layer.local { color: var(--local); } table.lens th.layer.global { color: var(--global); }
:root { --cool-line: rgb(var(--cool)); }
#said { position: fixed; z-index: 5; display: none; min-width: 15rem; max-width: 22rem; padding: .6rem .8rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px; box-shadow: 0 4px 18px rgba(0,0,0,.22);
  font-size: .84rem; pointer-events: none; }
#said .row { display: grid; grid-template-columns: 1fr 6rem 3.4rem; gap: .5rem; align-items: center; }
#said .row code { white-space: pre; overflow: hidden; text-overflow: ellipsis; }
#said .bar { height: .6rem; background: rgba(var(--warm), .8); border-radius: 2px; min-width: 1px; }
#said .p { text-align: right; font-variant-numeric: tabular-nums; } #said .head { margin: 0 0 .35rem; }
#said .next { margin: .4rem 0 0; padding-top: .35rem; border-top: 1px solid var(--line); }
.key { display: inline-block; width: 8rem; height: .8rem; vertical-align: middle; border-radius: 2px;
  background: linear-gradient(90deg, rgba(var(--warm), 0), rgba(var(--warm), 0.62)); border: 1px solid var(--line); }
.whole { white-space: nowrap; } .hitkey { box-shadow: inset 0 -2px 0 var(--ink); padding: 0 .3rem; }
.localkey { color: var(--local); } .globalkey { color: var(--global); }
"""
SCRIPT = """
const table = document.querySelector("table.lens"), said = document.getElementById("said");
const percent = p => p >= .9995 ? "100 %" : p >= .0005 ? (100 * p).toFixed(1) + " %" : p.toExponential(0);
function add(parent, tag, kind, text) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}
function show(cell) {
  const r = Number(cell.parentNode.dataset.r), c = cell.cellIndex - 1, k = D.k, at = (r * D.n + c) * k;
  said.replaceChildren();
  const head = add(said, "p", "head");
  add(head, "code", "", D.text[c]); head.append(" (position " + D.at[c] + "), " + D.rows[r]);
  for (let i = 0; i < k; i++) {
    const row = add(said, "div", "row"), p = D.p[at + i];
    add(row, "code", "", D.words[D.top[at + i]]);
    add(add(row, "div"), "div", "bar").style.width = (100 * p) + "%";
    add(row, "span", "p", percent(p));
  }
  if (D.next[c] !== null) {
    const next = add(said, "p", "next"), rank = D.rank[r * D.n + c];
    next.append("next in the text: "); add(next, "code", "", D.next[c]);
    next.append(", " + percent(D.own[r * D.n + c]) + (rank ? ", rank " + (rank + 1).toLocaleString("en") : ", first"));
  }
  said.style.display = "block";
  const box = cell.getBoundingClientRect(), own = said.getBoundingClientRect();
  const left = Math.min(box.left, innerWidth - own.width - 8);
  const below = box.bottom + 6 + own.height < innerHeight;
  said.style.left = Math.max(8, left) + "px";
  said.style.top = (below ? box.bottom + 6 : Math.max(8, box.top - own.height - 6)) + "px";
}
const hide = () => { said.style.display = "none"; };
const cellOf = event => event.target.closest("td");
table.addEventListener("pointerover", event => { const cell = cellOf(event); if (cell) show(cell); else hide(); });
table.addEventListener("pointerleave", hide);
table.addEventListener("focusin", event => { const cell = cellOf(event); if (cell) show(cell); });
table.addEventListener("focusout", hide);
addEventListener("scroll", () => {
  const cell = document.activeElement.closest("table.lens td:focus-visible");
  if (cell) show(cell); else hide();
}, true);
addEventListener("keydown", event => {
  const cell = document.activeElement.closest("table.lens td"), step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (event.key === "Escape") hide();
  if (!cell) return;
  const row = {ArrowUp: cell.parentNode.previousElementSibling, ArrowDown: cell.parentNode.nextElementSibling};
  const to = step ? cell.parentNode.cells[cell.cellIndex + step] : row[event.key]?.cells[cell.cellIndex];
  if (to?.tagName === "TD") { to.focus({preventScroll: true}); to.scrollIntoView({block: "nearest", inline: "nearest"});
    event.preventDefault(); show(to); }
});
"""


def lens_page(
    table: LensTable,
    ids: Sequence[int],
    config: Gemma2Config,
    tokenizer: Tokenizer,
    *,
    title: str,
    lens: str = "logit",
    foot: str = "",
) -> str:
    """The page for the first row of a table. Its cells are plain HTML; a script adds what shows on hover.

    Args:
        ids: the whole text's tokens, of which the table shows some.
        lens: which: "logit", "jacobian" or "tuned".
    """
    words = {token: readable(tokenizer, token) for token in {*table.ids[:, 0].flatten().tolist(), *ids}}
    at = table.positions[0].tolist()
    own = table.target_probabilities[:, 0]
    numbers = {token: i for i, token in enumerate(words)}
    data = {
        "k": table.ids.shape[-1],
        "n": len(at),
        "at": at,
        "text": [words[ids[i]] for i in at],
        "next": [words[token] if token >= 0 else None for token in table.targets[0].tolist()],
        "rows": [said(name, config) for name in table.names],
        "words": list(words.values()),
        "top": [numbers[token] for token in table.ids[:, 0].flatten().tolist()],
        "p": [_digits(p) for p in table.probabilities[:, 0].flatten().tolist()],
        "own": [_digits(p) for p in own.nan_to_num(nan=0.0).flatten().tolist()],
        "rank": table.target_ranks[:, 0].flatten().tolist(),
    }
    lines = [_text_line(at, ids, words)]
    for r in reversed(range(len(table.names))):
        lines.append(_line(table, r, config, words))
    if len(table.names) > TALL:
        lines.append(lines[0])
    body = f"""<p>{explained(lens, config, table.names)}</p>
<p class="dim">{html.escape(shown(len(ids), at))} Colour is the probability of the token in the cell:
<span class="whole">0 <span class="key"></span> 1.</span> <span class="hitkey">A line below</span> marks a token that
is the next one in the text.
Layers are <span class="localkey">local</span>, which see {config.sliding_window:,} tokens, the last
one their own, or <span class="globalkey">global</span>. Point at a cell, or move with the arrow keys, to see the
likeliest tokens.</p>
<div class="scroll"><table class="lens">
{chr(10).join(lines)}
</table></div>
<div id="said"></div>"""
    script = f"const D = {script_json(data)};\n{SCRIPT}"
    return page(title, body, style=STYLE, script=script, foot=foot)


def draw_lens(
    table: LensTable, ids: Sequence[int], config: Gemma2Config, tokenizer: Tokenizer, path: Path, *, force: bool = False
) -> None:
    """A PNG of the last positions of the table's first row. Raises ImportError without matplotlib, OSError."""
    at = table.positions[0, -DRAWN:].tolist()
    rows = len(table.names)
    drawn = figure(1.6 + 0.78 * len(at), 1.5 + 0.3 * rows)
    axes = drawn.subplots()
    best = table.probabilities[:, 0, -DRAWN:, 0]
    picture = axes.imshow(best.float().numpy(), vmin=0, vmax=1, cmap="OrRd", aspect="auto", origin="lower")
    for r in range(rows):
        for c in range(len(at)):
            token = int(table.ids[r, 0, table.ids.shape[2] - len(at) + c, 0])
            colour = "white" if best[r, c] > 0.6 else "#1d1f23"
            text = short(readable(tokenizer, token))
            axes.text(c, r, text, ha="center", va="center", fontsize=7, color=colour, parse_math=False)
    labels = [f"{short(readable(tokenizer, ids[i]))}\n{i}" for i in at]
    for axis, ticks, names in (
        (axes.xaxis, range(len(at)), labels),
        (axes.yaxis, range(rows), [_label(name) for name in table.names]),
    ):
        axis.set_ticks(list(ticks), names, fontsize=7, parse_math=False)
    axes.set_xlabel("token at each position", fontsize=8)
    axes.set_title(f"The likeliest next token after each layer. {shown(len(ids), at)}", fontsize=9, loc="left")
    axes.tick_params(length=0)
    drawn.colorbar(picture, ax=axes, label="probability", pad=0.01, fraction=0.03)
    save(drawn, path, force=force)


def shown(length: int, at: Sequence[int]) -> str:
    """Which part of a text a picture has."""
    if len(at) == length:
        return f"All {length:,} tokens are shown."
    return f"The last {len(at):,} of {length:,} tokens are shown; the model has read them all."


def explained(lens: str, config: Gemma2Config, names: Sequence[str]) -> str:
    """What the cells are, in a sentence or two, as HTML."""
    stream = all(name == "hook_embed" or ".hook_resid_" in name for name in names)
    what = "a layer's residual stream" if stream else "the value at a site, as if it were the residual stream,"
    cap = f"{config.final_logit_softcapping:g}"
    tail = f"through the final norm, the head and the final cap (logits within ±{cap})"
    if lens == "logit":
        how = f"{what} goes {tail}, as if the layers after it did nothing"
    else:
        way = {"jacobian": "multiplied by the average Jacobian", "tuned": "changed by a trained affine map"}[lens]
        how = f"{what} is {way}, and then goes {tail}"
    ends = names[-1] == f"blocks.{config.num_hidden_layers - 1}.hook_resid_post"
    end = " The top row is the model's own prediction." if ends else ""
    return f"Each cell is the likeliest next token at one layer and one position: {how}.{end}"


def said(name: str, config: Gemma2Config) -> str:
    """A site in words: "after layer 3 (local)"."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return "the embedding" if name == "hook_embed" else name
    kind = "global" if config.window(int(parts[1])) is None else "local"
    place = {"hook_resid_post": "after", "hook_resid_pre": "before", "hook_resid_mid": "after attention of"}
    rest = ".".join(parts[2:])
    return f"{place[rest]} layer {parts[1]} ({kind})" if rest in place else f"{name} ({kind})"


def _text_line(at: Sequence[int], ids: Sequence[int], words: dict[int, str]) -> str:
    cells = "".join(f'<th title="position {i}">{html.escape(words[ids[i]])}</th>' for i in at)
    return f'<tr class="text"><th class="layer">text</th>{cells}</tr>'


def _line(table: LensTable, r: int, config: Gemma2Config, words: dict[int, str]) -> str:
    name, best = table.names[r], table.ids[r, 0, :, 0].tolist()
    shares, targets = table.probabilities[r, 0, :, 0].tolist(), table.targets[0].tolist()
    parts = name.split(".")
    kind = "" if parts[0] != "blocks" else "global" if config.window(int(parts[1])) is None else "local"
    cells = []
    for token, share, target in zip(best, shares, targets, strict=True):
        hit = ' class="hit"' if token == target else ""
        colour = f"background:rgba(var(--warm),{STRENGTH * share:.3f})"
        cells.append(f'<td tabindex="-1"{hit} style="{colour}">{html.escape(words[token])}</td>')
    if r == len(table.names) - 1:  # where the tab key enters
        cells[0] = cells[0].replace('tabindex="-1"', 'tabindex="0"')
    head = f'<th class="layer {kind}" title="{html.escape(name)}">{html.escape(_label(name))}</th>'
    return f'<tr data-r="{r}">{head}{"".join(cells)}</tr>'


def _label(name: str) -> str:
    """A short name of a site for a row: its layer where that is enough."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return "embedding" if name == "hook_embed" else name
    rest = ".".join(parts[2:]).removeprefix("hook_")
    return f"layer {parts[1]}" if rest == "resid_post" else f"{parts[1]} {rest}"


def _digits(p: float) -> float:
    """A probability with what a page shows of it: fewer digits make a smaller page."""
    return float(f"{p:.4g}")
