"""Draw the two pictures of docs/architecture.md: python scripts/draw_architecture.py

`block.svg` is the model with one of its blocks and the names of all sites; `masks.svg` shows what `ops.visible` and
`Gemma2Config.window` return, and the ring buffer of a local layer's cache. The same matplotlib writes the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from gemma2 import ops
from gemma2.checkpoints.hf_config import PUBLISHED, published_config
from gemma2.research.sites import TABLE

try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
except ImportError:
    sys.exit("drawing needs matplotlib: pip install matplotlib")

DOCS = Path(__file__).resolve().parent.parent / "docs"
STYLE = {
    "svg.hashsalt": "gemma2",  # without it the ids in the file are random
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with matplotlib, as does DejaVu Sans Mono
    "hatch.linewidth": 0.6,
}
INK, QUIET, LINE, SITE = "#1f2933", "#5f6c7b", "#52606d", "#b3261e"
WEIGHTS, NORM, PLAIN = "#d6e4f5", "#dcefdc", "#ffffff"
LOCAL, GLOBAL, BEYOND, NEVER = "#e08a1e", "#3b6fb6", "#f8e0bd", "#eceff2"
TIMES = "\N{MULTIPLICATION SIGN}"
SITES = {site.name for site in TABLE}
WINDOW = 4  # of the masks drawn; the published models have 4096


class Page:
    """A figure whose coordinates are points from its left edge, and downwards from `top` to `bottom`."""

    def __init__(self, width: float, bottom: float, top: float = 0.0) -> None:
        self.figure = Figure(figsize=(width / 72, (bottom - top) / 72), facecolor="white")
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(bottom, top))
        self.axes.axis("off")
        self.sites: set[str] = set()  # drawn so far
        self.prefix = ""  # of the names of sites

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        self.axes.text(x, y, text, **{"color": INK, "size": 8.5, "va": "center_baseline", "zorder": 5, **style})

    def code(self, x: float, y: float, text: str, **style: Any) -> None:
        self.text(x, y, text, **{"family": "DejaVu Sans Mono", **style})

    def rectangle(self, left: float, top: float, width: float, height: float, **style: Any) -> None:
        self.axes.add_patch(Rectangle((left, top), width, height, **style))

    def rounded(self, left: float, top: float, width: float, height: float, **style: Any) -> None:
        shape = FancyBboxPatch((left, top), width, height, boxstyle="round,pad=0,rounding_size=5", **style)
        self.axes.add_patch(shape)

    def box(self, x: float, y: float, width: float, name: str, detail: str, color: str = PLAIN) -> None:
        """An operation centred at (x, y): the name it has in the code over what it does."""
        self.rounded(x - width / 2, y - 15, width, 30, facecolor=color, edgecolor=LINE, linewidth=0.9, zorder=3)
        self.code(x, y - 6.5, name, ha="center", weight="bold")
        self.text(x, y + 7, detail, ha="center")

    def room(self, left: float, top: float, right: float, bottom: float, name: str, color: str) -> None:
        """A module that holds what is drawn on it."""
        style = {"facecolor": color, "edgecolor": "#b8c2cc", "linewidth": 0.9, "zorder": 1}
        self.rounded(left, top, right - left, bottom - top, **style)
        self.code(right - 8, top + 11, name, ha="right", weight="bold")

    def line(self, *points: tuple[float, float], head: bool = True, size: float = 1.0) -> None:
        """A path through the points, with an arrow head at the end."""
        xs, ys = zip(*points, strict=True)
        self.axes.plot(xs, ys, color=LINE, linewidth=1.1, zorder=2)
        if head:
            style = {"arrowstyle": "-|>,head_width=0.22,head_length=0.4", "mutation_scale": 10 * size}
            style |= {"color": LINE, "shrinkA": 0, "shrinkB": 0}
            self.axes.annotate("", points[-1], points[-2], arrowprops=style, zorder=2)

    def site(self, x: float, y: float, name: str, shape: str) -> None:
        """A place that can be observed and edited: a dot on the line, its name and shape to the right."""
        if self.prefix + name not in SITES:
            return
        self.sites.add(self.prefix + name)
        self.dot(x, y)
        self.code(x + 7, y, f"{name} {shape}", color=SITE)

    def dot(self, x: float, y: float) -> None:
        self.axes.add_patch(Circle((x, y), 3.2, facecolor=SITE, edgecolor="white", linewidth=0.8, zorder=4))

    def added(self, spine: float, y: float, name: str) -> None:
        """The site of what is added to the residual stream, whose name stands above the short line and below it."""
        self.sites.add(self.prefix + name)
        self.dot(spine + 37, y)
        self.code(spine + 14, y - 11, name, color=SITE)
        self.code(spine + 14, y + 11, "[b t d]", color=SITE)

    def norm(self, x: float, y: float, module: str, name: str) -> None:
        """A norm centred at (x, y), and to its right the two sites inside it."""
        self.box(x, y, 240, module, "x / rms(x) · (1 + w), float32 inside", NORM)
        for down, inner, shape in ((-6.5, "hook_inv_scale", "[b t 1]"), (7, "hook_normalized", "[b t d]")):
            self.line((x + 120, y + down), (x + 134, y + down), head=False)
            self.site(x + 134, y + down, f"{name}.{inner}", shape)

    def joint(self, x: float, y: float, sign: str) -> None:
        self.axes.add_patch(Circle((x, y), 8, facecolor=PLAIN, edgecolor=LINE, linewidth=1.1, zorder=3))
        self.text(x, y, sign, ha="center", size=11)

    def write(self, name: str) -> None:
        path = DOCS / name
        self.figure.savefig(path, metadata={"Date": None, "Creator": None})
        print(f"docs/{name}: {path.stat().st_size:,} bytes")


def draw_block() -> Page:
    """The residual stream runs down the left; each half leaves it, is normalised twice and is added back."""
    page = Page(672, 1204, top=-92)
    spine, q, k, v, right = 30.0, 176.0, 348.0, 540.0, 662.0
    middle, wide = (q + k) / 2, k - q + 140  # where the scores run

    page.text(spine - 14, -78, "Gemma 2: the embedding, one of its blocks, the head", size=12, weight="bold")
    page.box(middle, -44, 240, "model.embed_tokens", "a row of the embedding · sqrt(d)", WEIGHTS)
    page.text(middle + 168, -44, "token ids [b t]")
    page.line((middle + 162, -44), (middle + 120, -44))
    page.line((middle - 120, -44), (spine, -44), (spine, -30))
    page.site(spine, -14, "hook_embed", "[b t d]")
    page.rounded(4, 6, 664, 937, facecolor="none", edgecolor="#8796a5", linewidth=0.9, linestyle=(0, (4, 3)))
    page.code(right - 4, 18, "model.layers[i] · sites blocks.{i}. · one of n blocks", ha="right", weight="bold")
    page.rectangle(spine - 1.5, -32, 3, 1003, facecolor=LINE, zorder=2)
    page.prefix = "blocks.{i}."
    page.site(spine, 40, "hook_resid_pre", "[b t d]")

    page.line((spine, 66), (middle - 120, 66))
    page.norm(middle, 66, "input_layernorm", "ln1")
    page.room(90, 92, right, 588, "self_attn · sites blocks.{i}.attn.", "#f6f8fa")
    page.line((q, 117), (v, 117), head=False)
    page.line((middle, 81), (middle, 117), head=False)
    page.site(middle, 104, "ln1", "[b t d]")
    page.prefix = "blocks.{i}.attn."
    for x, letter, heads in ((q, "q", "h"), (k, "k", "g"), (v, "v", "g")):
        page.line((x, 117), (x, 127))
        page.box(x, 142, 140, f"{letter}_proj", f"d → {heads}·c", WEIGHTS)
        page.site(x, 167, f"hook_{letter}", f"[b t {heads} c]")
    for x, letter, heads in ((q, "q", "h"), (k, "k", "g")):
        page.line((x, 157), (x, 178))
        page.box(x, 193, 140, "apply_rotary", "pairs (i, i + c/2)")
        page.site(x, 219, f"hook_rot_{letter}", f"[b t {heads} c]")
    page.line((k, 208), (k, 231))
    page.line((v, 157), (v, 231))
    cached = "local layer: a ring of window slots · global layer: all positions so far"
    page.box((k + v) / 2, 246, v - k + 140, "cache.update", cached)
    page.room(100, 272, right - 10, 532, "attend", "#eaeef2")
    page.line((q, 208), (q, 294))
    page.line((k, 261), (k, 294))
    page.line((v, 261), (v, 505), (middle + 8, 505))
    page.code(k + 7, 283, "[b s g c]", color=QUIET)
    page.code(v + 7, 283, "[b s g c]", color=QUIET)
    page.text(v + 7, 309, "k, v repeated to", color=QUIET)
    page.text(v + 7, 321, "h heads: head i", color=QUIET)
    page.text(v + 7, 333, "reads i // (h/g)", color=QUIET)
    page.box(middle, 309, wide, "q @ kᵀ · query_pre_attn_scalar ** -0.5", "for each of the h heads")
    page.site(middle, 335, "hook_scores_raw", "[b h t s]")
    page.line((middle, 324), (middle, 347))
    page.box(middle, 362, wide, "softcap", "50 · tanh(x / 50)")
    page.line((middle, 377), (middle, 391))
    page.box(middle, 406, wide, "mask by ops.visible", "")
    page.text(middle + 12, 413, "local: 0 ≤ q - k < window", ha="right", color="#a35c00")
    page.text(middle + 34, 413, "global: 0 ≤ q - k", color=GLOBAL)
    if f"{page.prefix}hook_key_positions" in SITES:
        page.line((middle + wide / 2, 406), (middle + wide / 2 + 13, 406), head=False)
        page.site(middle + wide / 2 + 13, 406, "hook_key_positions", "")
        page.code(middle + wide / 2 + 20, 418, "[b s]", color=SITE)
    page.site(middle, 432, "hook_attn_scores", "[b h t s]")
    page.line((middle, 421), (middle, 444))
    page.box(middle, 459, wide, "softmax", "over s, in float32")
    page.site(middle, 484, "hook_pattern", "[b h t s]")
    page.line((middle, 474), (middle, 497), head=False)
    page.joint(middle, 505, TIMES)
    page.text(v - 8, 496, "pattern @ v", ha="right", color=QUIET)
    page.site(middle, 522, "hook_z", "[b t h c]")
    page.line((middle, 513), (middle, 544))
    page.box(middle, 559, 240, "o_proj", "h·c → d", WEIGHTS)
    page.line((middle, 574), (middle, 604))
    page.site(middle, 581, "hook_out", "[b t d]")
    page.prefix = "blocks.{i}."
    page.norm(middle, 619, "post_attention_layernorm", "ln1_post")
    page.line((middle - 120, 619), (spine + 8, 619))
    page.added(spine, 619, "hook_attn_out")
    page.joint(spine, 619, "+")

    page.site(spine, 650, "hook_resid_mid", "[b t d]")
    page.line((spine, 676), (middle - 120, 676))
    page.norm(middle, 676, "pre_feedforward_layernorm", "ln2")
    page.room(90, 702, right, 870, "mlp · sites blocks.{i}.mlp.", "#f6f8fa")
    page.line((middle, 691), (middle, 725), head=False)
    page.site(middle, 713, "ln2", "[b t d]")
    page.prefix = "blocks.{i}.mlp."
    page.line((q, 725), (k, 725), head=False)
    for x, name, site in ((q, "gate_proj", "hook_pre"), (k, "up_proj", "hook_pre_linear")):
        page.line((x, 725), (x, 733))
        page.box(x, 748, 140, name, "d → f", WEIGHTS)
        page.site(x, 773, site, "[b t f]")
    page.line((q, 763), (q, 784))
    page.rounded(q - 62, 784, 124, 20, facecolor=PLAIN, edgecolor=LINE, linewidth=0.9, zorder=3)
    page.text(q, 794, "act_fn: GELU, tanh form", ha="center", size=8)
    page.line((q + 62, 794), (middle - 8, 794))
    page.line((k, 763), (k, 794), (middle + 8, 794))
    page.joint(middle, 794, TIMES)
    page.site(middle, 814, "hook_post", "[b t f]")
    page.line((middle, 802), (middle, 826))
    page.box(middle, 841, 240, "down_proj", "f → d", WEIGHTS)
    page.line((middle, 856), (middle, 886))
    page.site(middle, 863, "hook_out", "[b t d]")
    page.prefix = "blocks.{i}."
    page.norm(middle, 901, "post_feedforward_layernorm", "ln2_post")
    page.line((middle - 120, 901), (spine + 8, 901))
    page.added(spine, 901, "hook_mlp_out")
    page.joint(spine, 901, "+")
    page.site(spine, 929, "hook_resid_post", "[b t d]")

    page.prefix = ""
    page.text(spine + 8, 957, "after the last block", color=QUIET)
    page.line((spine, 971), (spine, 980), (middle - 120, 980))
    page.norm(middle, 980, "model.norm", "ln_final")
    page.line((middle, 995), (middle, 1018))
    page.site(middle, 1006, "ln_final", "[b t d]")
    page.box(middle, 1033, 240, "lm_head", "d → v, the matrix of embed_tokens", WEIGHTS)
    page.line((middle, 1048), (middle, 1071))
    page.site(middle, 1059, "logits_raw", "[b t v]")
    page.box(middle, 1086, 240, "softcap", "30 · tanh(x / 30)")
    page.line((middle, 1101), (middle, 1127))
    page.site(middle, 1112, "logits", "[b t v]")

    for x, color, meaning in ((16, WEIGHTS, "weights"), (86, NORM, "norm"), (146, PLAIN, "no parameters")):
        page.rounded(x, 1154, 14, 10, facecolor=color, edgecolor=LINE, linewidth=0.8)
        page.text(x + 19, 1159, meaning, color=QUIET)
    page.dot(252, 1159)
    page.text(261, 1159, "site: a value that can be read or changed", color=QUIET)
    letters = "b batch · t query positions · s key positions · d model · h query heads · g key/value heads"
    page.text(spine - 14, 1183, f"{letters} · c head width · f feed-forward · v vocabulary", color=QUIET, size=8)
    missing = SITES - page.sites
    if missing:
        sys.exit(f"the picture lacks {', '.join(sorted(missing))}")
    return page


def draw_masks() -> Page:
    """Three masks, cell by cell from `ops.visible`, under them which layers have which, and the ring buffer."""
    page = Page(672, 500)
    page.text(16, 15, "The two masks", size=12, weight="bold")
    about = f"a row is a query, a column a key, numbered by position · the window is {WINDOW} here, 4,096 in the models"
    page.text(656, 15, about, ha="right", color=QUIET)
    plain, padded = torch.arange(10), torch.arange(-2, 8)
    draw_mask(page, 40, f"local layer, window {WINDOW}", f"0 ≤ q - k < {WINDOW}", plain, WINDOW)
    draw_mask(page, 258, "global layer", "0 ≤ q - k", plain, None)
    draw_mask(page, 476, "local layer, row padded on the left", f"k ≥ 0 and 0 ≤ q - k < {WINDOW}", padded, WINDOW)
    x = 40.0
    for color, hatch, meaning, room in (
        (LOCAL, "", "seen (local)", 90),
        (GLOBAL, "", "seen (global)", 94),
        (BEYOND, "", "outside the window", 122),
        (NEVER, "", "later than the query", 126),
        (NEVER, "////", "padding: sees and is seen by nothing", 0),
    ):
        page.rectangle(x, 265, 11, 11, facecolor=color, edgecolor="#aab4be", linewidth=0.6, hatch=hatch)
        page.text(x + 16, 270.5, meaning, color=QUIET)
        x += room
    page.text(40, 302, "Which layer has which: they alternate, layer 0 is local, the last is global", weight="bold")
    for row, name in enumerate(PUBLISHED):
        config, y = published_config(name), 316 + 22 * row
        page.text(40, y + 7, name.removeprefix("gemma-2-").upper(), weight="bold")
        for layer in range(config.num_hidden_layers):
            color = GLOBAL if config.window(layer) is None else LOCAL
            page.rectangle(66 + 11 * layer, y, 10, 14, facecolor=color)
        page.text(72 + 11 * config.num_hidden_layers, y + 7, f"{config.num_hidden_layers} layers", color=QUIET)
    draw_ring(page, 40, 402)
    return page


def draw_ring(page: Page, left: float, top: float) -> None:
    """Which position each slot of a local layer's cache holds, after one token, two, and so on."""
    title = f"A local layer's cache is a ring of window = {WINDOW} slots: position p goes into slot p % {WINDOW}"
    page.text(left, top, title, weight="bold")
    page.text(
        left, top + 13, "numbers in the cells are positions; the newest is dark, and overwrites the oldest", color=QUIET
    )
    cell, gap = 17.0, 8.0
    for step in range(8):
        x, y = left + step * (WINDOW * cell + gap), top + 52
        page.text(x, y - 22, f"after token {step}", size=8)
        for slot in range(WINDOW):
            held = step - (step - slot) % WINDOW
            color = LOCAL if held == step else BEYOND if held >= 0 else NEVER
            page.text(x + (slot + 0.5) * cell, y - 8, f"{slot}", ha="center", size=7, color=QUIET)
            page.rectangle(x + slot * cell, y, cell, cell, facecolor=color, edgecolor="white", linewidth=1)
            page.text(x + (slot + 0.5) * cell, y + cell / 2, f"{held}" if held >= 0 else "", ha="center", size=8)
    page.text(left, top + 83, "small numbers over the cells: the slot · grey: empty", color=QUIET, size=8)


def draw_mask(page: Page, left: float, title: str, rule: str, positions: torch.Tensor, window: int | None) -> None:
    top, cell = 72.0, 17.0
    row = positions[None]
    seen, without_window = ops.visible(row, row, window)[0, 0], ops.visible(row, row, None)[0, 0]
    page.text(left, 38, title, weight="bold")
    page.text(left, 51, rule, color=QUIET)
    page.text(left - 5, top - 7, "q↓ k→", ha="right", color=QUIET, size=8)
    for i, query in enumerate(positions.tolist()):
        page.text(left - 5, top + (i + 0.5) * cell, f"{query}", ha="right", size=8)
        page.text(left + (i + 0.5) * cell, top - 7, f"{query}", ha="center", size=8)
        for j, key in enumerate(positions.tolist()):
            color = (GLOBAL if window is None else LOCAL) if seen[i, j] else BEYOND if without_window[i, j] else NEVER
            style = {"facecolor": color, "edgecolor": "white", "linewidth": 1}
            if query < 0 or key < 0:
                style |= {"hatch": "////", "edgecolor": "#aab4be", "linewidth": 0.3}
            page.rectangle(left + j * cell, top + i * cell, cell, cell, **style)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    DOCS.mkdir(exist_ok=True)
    with rc_context(STYLE):
        draw_block().write("block.svg")
        draw_masks().write("masks.svg")


if __name__ == "__main__":
    main()
