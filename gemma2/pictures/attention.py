"""Attention as a page and as a picture: heads by layers as thumbnails, each of which opens large."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemma2.config import Gemma2Config
from gemma2.pictures.data import packed, script_json
from gemma2.pictures.drawing import figure, save
from gemma2.pictures.page import page, readable, rows
from gemma2.research.attention import AttentionStats
from gemma2.tokenizer import Tokenizer

STYLE = """
#heads { display: grid; gap: 3px; align-items: center; justify-content: start; margin: .8rem 0; }
#heads .layer { font-size: .8rem; text-align: right; padding-right: .4rem; white-space: nowrap; }
#heads .layer.local, .localkey { color: var(--local); } #heads .layer.global, .globalkey { color: var(--global); }
#heads .head { font-size: .78rem; text-align: center; color: var(--dim); }
#heads button { padding: 0; border: 1px solid var(--line); background: var(--card); cursor: zoom-in; line-height: 0;
  width: 100%; border-radius: 2px; }
#heads button:focus-visible, #heads button:hover { border-color: var(--ink); }
#heads canvas { width: 100%; aspect-ratio: 1; image-rendering: pixelated; }
dialog { background: var(--paper); color: var(--ink); border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem 1.2rem; max-width: 96vw; max-height: 96vh; }
dialog:focus { outline: none; }
dialog::backdrop { background: rgba(0, 0, 0, .45); }
dialog h2 { margin: 0; } dialog p { margin: .2rem 0 .6rem; font-size: .9rem; }
dialog .bar { display: flex; gap: .5rem; align-items: baseline; justify-content: space-between; }
dialog button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 4px; padding: .1rem .6rem; cursor: pointer; }
#cell { min-height: 1.6rem; } #large { display: block; cursor: crosshair; }
"""
SCRIPT = """
const bytes = Uint8Array.from(atob(D.maps), c => c.charCodeAt(0)), rows = D.rows.length, cols = D.keys.length;
const grid = document.getElementById("heads"), dialog = document.querySelector("dialog");
const large = document.getElementById("large"), cell = document.getElementById("cell");
const before = r => r * D.extra + r * (r + 1) / 2;  // a row has the columns that its token sees, and no others
const weight = (l, h, r, c) => {
  if (c > r + D.extra) return 0;
  const i = 2 * ((l * D.heads + h) * before(rows) + before(r) + c);
  return (bytes[i] + 256 * bytes[i + 1]) / 65535;
};
const percent = p => p >= .9995 ? "100 %" : p >= .0005 ? (100 * p).toFixed(1) + " %" : p > 0 ? "< 0.1 %" : "0";
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const name = (l, h) => "layer " + l + " (" + (D.windows[l] ? "local" : "global") + "), head " + h;
let open = null;
// A square root shows faint attention: a tenth of the weight has a third of the colour.
function paint(canvas, l, h) {
  const ink = css("--cool").split(",").map(Number), context = canvas.getContext("2d");
  const image = context.createImageData(cols, rows);
  for (let r = 0; r < rows; r++) for (let c = 0; c < cols; c++) {
    const at = 4 * (r * cols + c);
    for (let i = 0; i < 3; i++) image.data[at + i] = ink[i];
    image.data[at + 3] = 255 * Math.sqrt(weight(l, h, r, c));
  }
  context.putImageData(image, 0, 0);
}
function each(make) { for (let l = D.windows.length - 1; l >= 0; l--) for (let h = 0; h < D.heads; h++) make(l, h); }
const small = new Map();
function build() {
  grid.style.gridTemplateColumns = "max-content repeat(" + D.heads + ", minmax(0, 6rem))";
  each((l, h) => {
    if (h === 0) {
      const label = document.createElement("div");
      label.className = "layer " + (D.windows[l] ? "local" : "global");
      label.textContent = "layer " + l;
      grid.append(label);
    }
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    canvas.width = cols; canvas.height = rows;
    button.title = name(l, h) + ": " + D.stats[l][h];
    button.setAttribute("aria-label", button.title);
    button.append(canvas);
    button.addEventListener("click", () => enlarge(l, h));
    grid.append(button);
    small.set(l + "," + h, canvas);
    paint(canvas, l, h);
  });
  grid.append(document.createElement("div"));
  for (let h = 0; h < D.heads; h++) {
    const label = document.createElement("div");
    label.className = "head"; label.textContent = D.heads > 16 ? h : "head " + h;
    grid.append(label);
  }
}
let side = 10, left = 0, top_ = 0;
function enlarge(l, h) {
  open = [l, h];
  document.getElementById("which").textContent = name(l, h);
  document.getElementById("about").textContent = D.stats[l][h];
  cell.textContent = "Point at a cell.";
  draw();
  if (!dialog.open) { dialog.showModal(); dialog.focus(); }
}
function draw(row = -1, column = -1) {
  const [l, h] = open, context = large.getContext("2d"), scale = devicePixelRatio || 1;
  context.font = "11px ui-monospace, Menlo, Consolas, monospace";
  const widest = texts => Math.min(120, Math.max(...texts.map(text => context.measureText(text).width)));
  left = widest(D.rows) + 8; top_ = widest(D.keys) + 8;
  const room = Math.min(innerWidth * .92 - left - 40, innerHeight * .9 - top_ - 150);
  side = Math.max(9, Math.min(28, Math.floor(room / Math.max(rows, cols))));
  const width = left + side * cols + 2, height = top_ + side * rows + 2;
  large.width = width * scale; large.height = height * scale;
  large.style.width = width + "px"; large.style.height = height + "px";
  context.scale(scale, scale);
  context.font = Math.min(11, side) + "px ui-monospace, Menlo, Consolas, monospace";
  context.textBaseline = "middle";
  const dim = css("--dim"), ink = css("--ink"), cool = css("--cool");
  context.textAlign = "right";
  D.rows.forEach((text, r) => {
    context.fillStyle = r === row ? ink : dim;
    context.fillText(text, left - 5, top_ + side * (r + .5), left - 6);
  });
  context.textAlign = "left";
  D.keys.forEach((text, c) => {
    context.save();
    context.translate(left + side * (c + .5), top_ - 5);
    context.rotate(-Math.PI / 2);
    context.fillStyle = c === column ? ink : dim;
    context.fillText(text, 0, 0, top_ - 6);
    context.restore();
  });
  for (let r = 0; r < rows; r++) for (let c = 0; c < cols; c++) {
    context.fillStyle = "rgba(" + cool + "," + Math.sqrt(weight(l, h, r, c)) + ")";
    context.fillRect(left + side * c, top_ + side * r, side - (side > 11), side - (side > 11));
  }
  context.strokeStyle = css("--line");
  context.strokeRect(left - .5, top_ - .5, side * cols + 1, side * rows + 1);
  if (row >= 0) {
    context.strokeStyle = ink;
    context.strokeRect(left + side * column, top_ + side * row, side, side);
  }
}
large.addEventListener("pointermove", event => {
  const box = large.getBoundingClientRect();
  const c = Math.floor((event.clientX - box.left - left) / side);
  const r = Math.floor((event.clientY - box.top - top_) / side);
  if (r < 0 || c < 0 || r >= rows || c >= cols) return;
  draw(r, c);
  point(r, c);
});
function point(r, c) {
  cell.replaceChildren();
  const code = text => { const made = document.createElement("code"); made.textContent = text; return made; };
  const several = D.extra === 2 && c === 1, back = D.at[r] - D.places[c], window = D.windows[open[0]];
  const sees = back >= 0 && (!window || back < window);  // of several tokens, the last: it is the nearest
  const far = several ? "not shown here" : "position " + D.places[c];
  cell.append(code(D.rows[r]), " (position " + D.at[r] + ") looks at ", code(D.keys[c]), " (" + far + "): ");
  cell.append(sees ? percent(weight(...open, r, c)) : "out of sight");
}
function move(layers, heads) {
  const [l, h] = open;
  enlarge(Math.max(0, Math.min(D.windows.length - 1, l + layers)), Math.max(0, Math.min(D.heads - 1, h + heads)));
}
document.getElementById("close").addEventListener("click", () => dialog.close());
document.getElementById("back").addEventListener("click", () => move(0, -1));
document.getElementById("on").addEventListener("click", () => move(0, 1));
dialog.addEventListener("keydown", event => {
  const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0]}[event.key];
  if (step) { move(...step); event.preventDefault(); }
});
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const [key, canvas] of small) paint(canvas, ...key.split(",").map(Number));
  if (dialog.open) draw();
});
build();
"""


@dataclass(frozen=True)
class Maps:
    """What is shown of a text's attention.

    Attributes:
        weights: [layers h n m], of n queries on m columns.
        at: positions of the queries.
        places: positions of the columns: the text's, or 0, one for all that is not shown, and those of the queries.
        extra: how many columns come before the queries' own: 0, or 2 where a part of the text is not shown.
    """

    weights: Tensor
    at: list[int]
    places: list[int]
    extra: int

    def sees(self) -> Tensor:
        """Which columns each query has before it: bool [n m]. The rest is zero, and is not written."""
        n, m = self.weights.shape[2:]
        return torch.ones(n, m, dtype=torch.bool).tril(self.extra)


def shown_maps(found: Mapping[int, Tensor], length: int) -> Maps:
    """The maps of `attention_maps`, with the last n positions as queries. Where the text is longer, keys before them
    are put together in a column of their own, and position 0 keeps its own."""
    weights = torch.stack([value[0].float() for value in found.values()])  # [layers h n t]
    n = weights.shape[2]
    at = list(range(length - n, length))
    first = length - n
    if first < 2:
        return Maps(weights, at, list(range(length)), first)
    between = weights[..., 1:first].sum(dim=-1, keepdim=True)
    return Maps(torch.cat((weights[..., :1], between, weights[..., first:]), dim=-1), at, [0, first - 1, *at], 2)


def attention_page(
    maps: Maps,
    stats: AttentionStats,
    ids: Sequence[int],
    config: Gemma2Config,
    tokenizer: Tokenizer,
    *,
    title: str,
    foot: str = "",
) -> str:
    """The page for one text. A script draws the maps on canvases from numbers of 16 bits.

    Args:
        ids: the whole text's tokens, of which the maps show some.
    """
    words = [readable(tokenizer, token) for token in ids]
    keys = [words[place] for place in maps.places]
    if maps.extra == 2:
        keys[1] = f"({maps.at[0] - 1} more)"
    data = {
        "heads": maps.weights.shape[1],
        "rows": [words[i] for i in maps.at],
        "keys": keys,
        "at": maps.at,
        "places": maps.places,
        "extra": maps.extra,
        "windows": [window or 0 for window in stats.windows],
        "stats": [_lines(stats, layer) for layer in range(len(stats.windows))],
        "maps": packed(maps.weights[..., maps.sees()]),
    }
    table = stats.rows()
    body = f"""<p>Each square is one head: a row is a token that looks, a column a token that it looks at, and colour
is the square root of its share of the attention, so that faint attention can be seen. Layers are
<span class="localkey">local</span>, which see {config.sliding_window:,} tokens, the last one their own,
or <span class="globalkey">global</span>. Click a square to enlarge it; then the arrow keys go to the next head and
layer.</p>
<p class="dim">{html.escape(shown(len(ids), maps))}</p>
<div id="heads"></div>
<h2>How far each layer looks</h2>
<p>Means over heads and over all {len(ids):,} tokens of the text but the first. “{html.escape(table[0][3])}” counts the
queries that have such keys. Scores are those before the cap of {config.attn_logit_softcapping:g}; the slope of the cap
is 1 where it changes nothing.</p>
{rows(table[0], table[1:], numbers=range(2, 8))}
<dialog tabindex="-1"><div class="bar"><h2 id="which"></h2>
<span><button id="back" aria-label="head before">←</button>
<button id="on" aria-label="next head">→</button> <button id="close">close</button></span></div>
<p class="dim" id="about"></p><canvas id="large"></canvas><p id="cell"></p></dialog>"""
    return page(title, body, style=STYLE, script=f"const D = {script_json(data)};\n{SCRIPT}", foot=foot)


def draw_attention(maps: Maps, stats: AttentionStats, length: int, path: Path, *, force: bool = False) -> None:
    """A PNG of all heads. Raises ImportError without matplotlib, OSError."""
    layers, heads, n, m = maps.weights.shape
    gap = max(1, n // 16)
    whole = torch.full((layers * (n + gap), heads * (m + gap)), float("nan"))
    for layer in range(layers):
        for head in range(heads):
            top, left = (layers - 1 - layer) * (n + gap), head * (m + gap)
            whole[top : top + n, left : left + m] = maps.weights[layer, head].sqrt()
    inch = min(0.9, 14 / heads)
    drawn = figure(1.2 + heads * inch, 1.2 + layers * inch)
    axes = drawn.subplots()
    axes.imshow(whole.numpy(), vmin=0, vmax=1, cmap="Blues", interpolation="nearest", aspect="auto")
    axes.set_xticks(
        [head * (m + gap) + m / 2 for head in range(heads)], [str(head) for head in range(heads)], fontsize=8
    )
    names = [f"{i} {'global' if window is None else 'local'}" for i, window in enumerate(stats.windows)]
    axes.set_yticks([(layers - 1 - i) * (n + gap) + n / 2 for i in range(layers)], names, fontsize=8)
    axes.set_xlabel("head", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    axes.set_title(f"Who looks at whom (root of the share). {shown(length, maps)}", fontsize=9, loc="left", wrap=True)
    axes.tick_params(length=0)
    axes.set_facecolor("#e4e6ea")
    save(drawn, path, force=force)


def shown(length: int, maps: Maps) -> str:
    """Which part of a text a picture has."""
    if not maps.extra:
        return f"All {length:,} tokens are shown." if len(maps.at) == length else ""
    rest = "; attention to the tokens between the BOS and these is one column" if maps.extra == 2 else ""
    return f"The last {len(maps.at):,} of {length:,} tokens are shown{rest}."


def _lines(stats: AttentionStats, layer: int) -> list[str]:
    """What is said of each head of a layer."""
    found = []
    for head in range(stats.distance.shape[1]):
        far = stats.far[layer, head]
        parts = [
            f"looks {stats.distance[layer, head]:.1f} tokens back on average",
            f"{stats.bos[layer, head]:.0%} on BOS",
        ]
        if not far.isnan():
            parts.append(f"{far:.0%} more than {stats.beyond} back")
        parts.append(f"largest |score| {stats.largest[layer, head]:.1f} before the cap")
        found.append(", ".join(parts))
    return found
