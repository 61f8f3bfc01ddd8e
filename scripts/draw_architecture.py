"""Draw the two pictures of docs/architecture.md: python scripts/draw_architecture.py

`block.svg` is one block with the names of its sites, `masks.svg` what `ops.visible` and `Gemma2Config.window` answer.
The same matplotlib writes the same bytes again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from gemma2 import ops
from gemma2.checkpoints.hf_config import PUBLISHED, published_config

try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
except ImportError:
    sys.exit("drawing needs matplotlib: pip install 'gemma2[plots]'")

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
WINDOW = 4  # of the masks drawn; the published models have 4096


class Page:
    """A figure whose coordinates are points from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")

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
        self.code(right - 8, top + 11, name, ha="right", color=QUIET)

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
        self.axes.add_patch(Circle((x, y), 3.2, facecolor=SITE, edgecolor="white", linewidth=0.8, zorder=4))
        self.code(x + 7, y, f"{name} {shape}", color=SITE)

    def joint(self, x: float, y: float, sign: str) -> None:
        self.axes.add_patch(Circle((x, y), 8, facecolor=PLAIN, edgecolor=LINE, linewidth=1.1, zorder=3))
        self.text(x, y, sign, ha="center", size=11)

    def write(self, name: str) -> None:
        path = DOCS / name
        self.figure.savefig(path, metadata={"Date": None, "Creator": None})
        print(f"docs/{name}: {path.stat().st_size:,} bytes")


def draw_block() -> Page:
    """The residual stream runs down the left; each half leaves it, is normalised twice and is added back."""
    page = Page(672, 986)
    spine, q, k, v, right = 30.0, 176.0, 348.0, 540.0, 662.0
    middle, wide = (q + k) / 2, k - q + 140  # where the scores run
    gain = "x / rms(x) · (1 + w), float32 inside"

    page.text(spine - 14, 15, "One Gemma 2 block", size=12, weight="bold")
    page.code(right, 15, "model.layers[i] · sites blocks.{i}.", ha="right", color=QUIET)
    page.rectangle(spine - 1.5, 30, 3, 905, facecolor=LINE, zorder=2)
    page.line((spine, 935), (spine, 947), size=1.8)
    page.site(spine, 40, "hook_resid_pre", "[b t d]")

    page.line((spine, 66), (middle - 120, 66))
    page.box(middle, 66, 240, "input_layernorm", gain, NORM)
    page.room(90, 90, right, 588, "self_attn · sites blocks.{i}.attn.", "#f6f8fa")
    page.line((q, 113), (v, 113), head=False)
    page.line((middle, 81), (middle, 113), head=False)
    for x, letter, heads in ((q, "q", "h"), (k, "k", "g"), (v, "v", "g")):
        page.line((x, 113), (x, 125))
        page.box(x, 140, 140, f"{letter}_proj", f"d → {heads}·c", WEIGHTS)
        page.site(x, 166, f"hook_{letter}", f"[b t {heads} c]")
    for x, letter, heads in ((q, "q", "h"), (k, "k", "g")):
        page.line((x, 155), (x, 178))
        page.box(x, 193, 140, "ops.rotate", "pairs (i, i + c/2)")
        page.site(x, 219, f"hook_rot_{letter}", f"[b t {heads} c]")
    page.line((k, 208), (k, 231))
    page.line((v, 155), (v, 231))
    page.box((k + v) / 2, 246, v - k + 140, "cache.update", "local layer: ring of window slots · global: every slot")
    page.room(100, 272, right - 10, 532, "attend", "#eaeef2")
    page.line((q, 208), (q, 294))
    page.line((k, 261), (k, 294))
    page.line((v, 261), (v, 505), (middle + 8, 505))
    page.code(k + 7, 283, "[b s g c]", color=QUIET)
    page.code(v + 7, 283, "[b s g c]", color=QUIET)
    page.box(middle, 309, wide, "q @ kᵀ · query_pre_attn_scalar ** -0.5", "head i reads key/value head i // (h/g)")
    page.site(middle, 335, "hook_scores_raw", "[b h t s]")
    page.line((middle, 324), (middle, 347))
    page.box(middle, 362, wide, "softcap", "50 · tanh(x / 50)")
    page.line((middle, 377), (middle, 391))
    page.box(middle, 406, wide, "mask by ops.visible", "")
    page.text(middle + 12, 413, "local: 0 ≤ q - k < window", ha="right", color="#a35c00")
    page.text(middle + 34, 413, "global: 0 ≤ q - k", color=GLOBAL)
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
    page.line((middle, 574), (middle, 599))
    page.box(middle, 614, 240, "post_attention_layernorm", gain, NORM)
    page.line((middle - 120, 614), (spine + 8, 614))
    page.site(spine + 37, 614, "", "")
    page.code(spine + 14, 603, "hook_attn_out", color=SITE)
    page.code(spine + 14, 625, "[b t d]", color=SITE)
    page.joint(spine, 614, "+")

    page.site(spine, 650, "hook_resid_mid", "[b t d]")
    page.line((spine, 676), (middle - 120, 676))
    page.box(middle, 676, 240, "pre_feedforward_layernorm", gain, NORM)
    page.room(90, 700, right, 870, "mlp · sites blocks.{i}.mlp.", "#f6f8fa")
    page.line((middle, 691), (middle, 719), head=False)
    page.line((q, 719), (k, 719), head=False)
    for x, name, site in ((q, "gate_proj", "hook_pre"), (k, "up_proj", "hook_pre_linear")):
        page.line((x, 719), (x, 731))
        page.box(x, 746, 140, name, "d → f", WEIGHTS)
        page.site(x, 772, site, "[b t f]")
    page.line((q, 761), (q, 784))
    page.rounded(q - 50, 784, 100, 20, facecolor=PLAIN, edgecolor=LINE, linewidth=0.9, zorder=3)
    page.text(q, 794, "GELU, tanh form", ha="center")
    page.line((q + 50, 794), (middle - 8, 794))
    page.line((k, 761), (k, 794), (middle + 8, 794))
    page.joint(middle, 794, TIMES)
    page.site(middle, 814, "hook_post", "[b t f]")
    page.line((middle, 802), (middle, 826))
    page.box(middle, 841, 240, "down_proj", "f → d", WEIGHTS)
    page.line((middle, 856), (middle, 881))
    page.box(middle, 896, 240, "post_feedforward_layernorm", gain, NORM)
    page.line((middle - 120, 896), (spine + 8, 896))
    page.site(spine + 37, 896, "", "")
    page.code(spine + 14, 885, "hook_mlp_out", color=SITE)
    page.code(spine + 14, 907, "[b t d]", color=SITE)
    page.joint(spine, 896, "+")
    page.site(spine, 925, "hook_resid_post", "[b t d]")

    letters = "b batch · t query positions · s key positions · d model · h query heads · g key/value heads"
    page.text(spine - 14, 961, f"{letters} · c head width · f feed-forward", color=QUIET, size=8)
    for x, color, meaning in ((240, WEIGHTS, "weights"), (310, NORM, "norm"), (370, PLAIN, "no parameters")):
        page.rounded(x, 932, 14, 10, facecolor=color, edgecolor=LINE, linewidth=0.8)
        page.text(x + 19, 937, meaning, color=QUIET)
    page.site(470, 937, "", "")
    page.text(479, 937, "site: can be observed and edited", color=QUIET)
    return page


def draw_masks() -> Page:
    """Three masks, cell by cell from `ops.visible`, and under them which layers have which."""
    page = Page(672, 386)
    page.text(16, 15, "The two masks", size=12, weight="bold")
    page.text(656, 15, "one row a query, one column a key, numbered by position", ha="right", color=QUIET)
    plain, padded = torch.arange(10), torch.arange(-2, 8)
    draw_mask(page, 40, f"local layer, window {WINDOW}", f"0 ≤ q - k < {WINDOW}", plain, WINDOW)
    draw_mask(page, 258, "global layer", "0 ≤ q - k", plain, None)
    draw_mask(page, 476, "local layer, row padded on the left", f"k ≥ 0 and 0 ≤ q - k < {WINDOW}", padded, WINDOW)
    x = 40.0
    for color, hatch, meaning, room in (
        (LOCAL, "", "seen (local)", 90),
        (GLOBAL, "", "seen (global)", 94),
        (BEYOND, "", "window or more back", 128),
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
    return page


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
