"""The page around the drawings: the head, the side's navigation, a section for each panel, the other layers."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from gemma2.config import LOCAL, Gemma2Config
from gemma2.pictures.data import script_json
from gemma2.pictures.explain.panels import AFTER, BEFORE, Panel
from gemma2.pictures.explain.run import Run, Scores
from gemma2.pictures.page import in_html, readable
from gemma2.research.sites import sites
from gemma2.tokenizer import Tokenizer

TITLE = 60  # characters of the text in it
FIRST = 4  # values of a site in the tables of the other layers
HINT = """<p class="keys dim">Choose a token above, or with <kbd>←</kbd> <kbd>→</kbd>: every panel then shows it.
<kbd>j</kbd> and <kbd>k</kbd> go to the next and the previous panel, <kbd>[</kbd> and <kbd>]</kbd> to another head.
Point at a cell to read its value.</p>
<noscript><p>The drawings need JavaScript, which is off here.</p></noscript>"""


def style() -> str:
    return _file("page.css")


def script() -> str:
    code = _file("draw.js") + _file("panels.js")
    return f'"use strict";\n{{\n{code}}}\n'  # in a block of its own: browsers have names such as `top` already


def _file(name: str) -> str:
    return (files("gemma2.pictures.explain") / name).read_text(encoding="utf-8")


def title(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The page's title: the text that was read, cut where it is long."""
    text = " ".join(tokenizer.decode(list(ids)).split())
    if not text:
        return "Gemma 2 reads an empty text"
    return f"Gemma 2 reads “{text[:TITLE] + '…' if len(text) > TITLE else text}”"


def body(run: Run, full: Mapping[int, Sequence[Panel]], data: dict[str, Any], tokenizer: Tokenizer, name: str) -> str:
    """Everything between the page's title and its foot. `full` are the layers to show in full, with their panels."""
    config = run.model.config
    parts, links = list[str](), list[str]()
    for heading, layer, panels in _chapters(config, full):
        key = f"at-{len(links)}"
        kind = "" if layer < 0 else _kind(config, layer)
        links.append(f'<li class="{kind}"><a href="#{key}">{html.escape(heading)}</a><ol>{_listed(panels)}</ol></li>')
        if not panels:
            parts.append(_summary(run, layer, key, tokenizer))
            continue
        words = _fields(config, layer)
        inside = "\n".join(_section(one, config, len(run.ids), words) for one in panels)
        way = _way(panels) if kind else ""
        parts.append(
            f'<section class="chapter {kind}" id="{key}">\n<h2>{html.escape(heading)}</h2>{way}\n{inside}\n</section>'
        )
    return (
        f"{_head(run, list(full), name)}\n"
        '<div class="strip" role="toolbar" aria-label="tokens of the text"></div>\n'
        f'<div class="columns">\n<nav aria-label="panels"><ol>{"".join(links)}</ol></nav>\n'
        f"<main>\n{HINT}\n{chr(10).join(parts)}\n</main>\n</div>\n"
        f'<div class="tip" hidden></div>\n<script type="application/json" id="data">{script_json(data)}</script>'
    )


def _chapters(config: Gemma2Config, full: Mapping[int, Sequence[Panel]]) -> list[tuple[str, int, Sequence[Panel]]]:
    """Headings with their layer (or -1) and panels, in the order of computation; a layer that is only summed up has
    no panels."""
    layers = range(config.num_hidden_layers)
    middle = [(f"Layer {layer}, {_kind(config, layer)}", layer, full.get(layer, ())) for layer in layers]
    return [("The text goes in", -1, BEFORE), *middle, ("The prediction comes out", -1, AFTER)]


def _listed(panels: Sequence[Panel]) -> str:
    """The links to a chapter's panels. Of those with the same beginning, as `Norm after attention: ...`, the later ones
    are indented and say the rest alone."""
    links, before = list[str](), ""
    for panel in panels:
        begin, _, rest = panel.title.partition(": ")
        within = bool(rest) and begin == before
        mark, text = ('class="within" ', rest) if within else ("", panel.title)
        links.append(f'<li><a {mark}href="#{html.escape(panel.name)}">{html.escape(text)}</a></li>')
        before = begin
    return "".join(links)


def _kind(config: Gemma2Config, layer: int) -> str:
    return "local" if config.layer_types[layer] == LOCAL else "global"


def _head(run: Run, full: list[int], name: str) -> str:
    config, t = run.model.config, len(run.ids)
    called = f"the model {html.escape(name)}" if name else "the model"
    drawn = "" if len(run.drawn) == t else _cut(run)
    layers = " and ".join(str(layer) for layer in full)
    return (
        f"<p>This is one pass of {called} over {t:,} token{'s' * (t != 1)}, from the text to the likeliest next "
        f"token, one panel a step. Every number was computed in it. {_count(len(full), layers)}; the others are one "
        f"line each, which opens. The model has {config.num_hidden_layers} layers, a residual stream of "
        f"{config.hidden_size:,} numbers and {config.num_attention_heads} heads.</p>{drawn}"
    )


def _cut(run: Run) -> str:
    left = len(run.ids) - len(run.drawn)
    return (
        f'<p class="cut">The text has {len(run.ids):,} tokens. The first and the last {len(run.drawn) // 2} are drawn; '
        f"the {left:,} between them were computed too and are left out of the drawings. Masks, shares of keys seen and "
        "nearness to the cap are of all tokens. Lengths in the lines of the other layers, and the numbers in their "
        "tables, are of the drawn tokens.</p>"
    )


def _count(number: int, layers: str) -> str:
    return f"Layer{'s' * (number != 1)} {layers} {'is' if number == 1 else 'are'} shown in full"


def _section(panel: Panel, config: Gemma2Config, t: int, words: dict[str, str]) -> str:
    """One panel; the script fills what is of class `draw`."""
    site = sites(config).get(panel.name)
    name = html.escape(panel.name)
    shape = f" [{' '.join(str(size) for size in site.sizes(config, t))}]" if site else ""
    letters = f' <span class="dim">({site.shape})</span>' if site else ""
    module = site.module if site else panel.module
    file = "tokenizer.py" if panel.owner == "Tokenizer" else "model.py"
    named = [f"site <code>{name}</code>{shape}{letters}"] if site else []
    named += [f"module <code>{html.escape(module)}</code>"] if module else []
    code = f"{file}, class <code>{panel.owner}</code>: <code>{html.escape(panel.line)}</code>"
    beside = html.escape(json.dumps(panel.beside))
    return (
        f'<section class="panel" id="{name}" data-draws="{panel.draws}" data-beside="{beside}" tabindex="-1">\n'
        f"<h3>{html.escape(panel.title)}</h3>\n<p>{html.escape(panel.says.format(**words))}</p>\n"
        f'<div class="draw"></div>\n<p class="where">{" · ".join(named)}{"<br>" if named else ""}{code}</p>\n</section>'
    )


def _way(panels: Sequence[Panel]) -> str:
    """The layer as a row of steps that lead to their panels: three of a norm are one."""
    steps = [panel for panel in panels if not panel.name.endswith((".hook_inv_scale", ".hook_normalized"))]
    short = [panel.title.split(":")[0] if panel.draws == "gain" else panel.title for panel in steps]
    marks = ["post" if "ln1_post" in str(one.beside) or "ln2_post" in str(one.beside) else one.draws for one in steps]
    cells = "".join(
        f'<li class="{mark}"><a href="#{html.escape(step.name)}">{html.escape(text)}</a></li>'
        for mark, step, text in zip(marks, steps, short, strict=True)
    )
    note = "In colour: what most models do without. With a strong border: the residual stream is changed."
    return f'<ol class="way">{cells}</ol><p class="keyed">{note}</p>'


def _summary(run: Run, layer: int, key: str, tokenizer: Tokenizer) -> str:
    """A layer in one line, which opens to a table of its sites."""
    config, scores, seen = run.model.config, run.scores[layer], run.seen
    kind = _kind(config, layer)
    lengths = [
        _length(seen[f"blocks.{layer}.hook_{name}"]) for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    ]
    line = (
        f"stream {lengths[0]:.4g} → {lengths[3]:.4g}, attention adds {lengths[1]:.4g}, the MLP {lengths[2]:.4g}; "
        f"{scores.seen:.0%} of keys seen; largest score {scores.most:.3g}, {_near(scores, config)} of the cap"
    ).replace(" -", " \N{MINUS SIGN}")
    last = in_html(readable(tokenizer, run.ids[run.drawn[-1]]))
    cells = []
    for name, site in sites(config).items():
        if name.startswith(f"blocks.{layer}."):
            value = seen[name][0].double()
            real = value[value > torch.finfo(seen[name].dtype).min]
            first = ", ".join(f"{one:.4g}" for one in value.select(site.axis - 1, -1).flatten()[:FIRST].tolist())
            if site.shape.endswith("s"):
                first = ""
            shape = " ".join(str(size) for size in site.sizes(config, len(run.ids)))
            norm = f"{_length(seen[name]):.4g}" if site.shape.endswith(("d", "f")) else ""
            numbers = (norm, f"{float(real.abs().max()):.4g}", first)
            texts = "".join(f'<td class="number">{number}</td>' for number in numbers)
            cells.append(f"<tr><td><code>{name}</code></td><td>[{shape}]</td>{texts}</tr>")
    return (
        f'<details class="chapter {kind}" id="{key}"><summary><b>Layer {layer}, {kind}</b> '
        f'<span class="dim">{line}</span></summary>\n<div class="scroll"><table><tr><th>site</th><th>shape</th>'
        f"<th>mean length</th><th>largest value</th><th>first values of {last}</th></tr>{''.join(cells)}"
        "</table></div></details>"
    )


def _length(value: Tensor) -> float:
    """The mean length of the vectors."""
    return float(value.double().norm(dim=-1).mean())


def _near(scores: Scores, config: Gemma2Config) -> str:
    return f"{abs(scores.most) / config.attn_logit_softcapping:.0%}"


def _fields(config: Gemma2Config, layer: int) -> dict[str, str]:
    """The numbers that the sentences name."""
    d, h, c = config.hidden_size, config.num_attention_heads, config.head_dim
    window = config.window(layer) if layer >= 0 else None
    sees = f"itself and the {window - 1:,} tokens before it" if window else "itself and every token before it"
    hides = "A global layer sees further back." if window else "No window limits it, unlike in a local layer."
    local = config.layer_types.count(LOCAL)
    return {
        "i": str(layer),
        "n": str(config.num_hidden_layers),
        "locals": str(local),
        "globals": str(config.num_hidden_layers - local),
        "d": f"{d:,}",
        "h": str(h),
        "g": str(config.num_key_value_heads),
        "c": str(c),
        "half": str(c // 2),
        "hc": f"{h * c:,}",
        "f": f"{config.intermediate_size:,}",
        "v": f"{config.vocab_size:,}",
        "group": str(h // config.num_key_value_heads),
        "scalar": f"{config.query_pre_attn_scalar:g}",
        "qscale": f"{config.query_pre_attn_scalar**-0.5:.4g}",
        "cap": f"{config.attn_logit_softcapping:g}",
        "final": f"{config.final_logit_softcapping:g}",
        "mask": f"This layer is {'local' if window else 'global'}: a token sees {sees}, and none after it. {hides}",
    }
