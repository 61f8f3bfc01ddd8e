"""One HTML page in one file: style, light and dark, tokens that can be read; nothing is fetched."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from gemma2.atomic import check_target, replacing
from gemma2.tokenizer import Tokenizer

# Colours of both themes have the same names, so that every page follows the reader's system.
STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1d1f23; --dim: #5f6570; --line: #d9dbe0; --card: #ffffff;
  --local: #1f77b4; --global: #c2571a; --warm: 196, 77, 28; --cool: 31, 119, 180; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171b; --ink: #e8e9ec; --dim: #9aa1ad; --line: #343942;
  --card: #1d2026; --local: #6db3e8; --global: #f0965c; --warm: 240, 140, 90; --cool: 110, 175, 235; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; } .dim { color: var(--dim); }
code, .token, td.number { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .86em; }
.token { white-space: pre; unicode-bidi: isolate; border-bottom: 1px dotted var(--line); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; } th, td { padding: .22rem .5rem; border: 1px solid var(--line);
  text-align: left; font-weight: normal; vertical-align: top; } th { color: var(--dim); font-size: .86em; }
td.number { text-align: right; } figure { margin: 1rem 0; } figcaption { color: var(--dim); font-size: .9em; }
footer { margin-top: 3rem; color: var(--dim); font-size: .86em; border-top: 1px solid var(--line); padding-top: .7rem; }
"""


def page(title: str, body: str, *, style: str = "", script: str = "", foot: str = "") -> str:
    """A whole page. `body`, `style` and `script` are taken as they are; whoever makes them escapes what is text.

    Args:
        foot: a line of text below: model, dtype, versions, command.
    """
    scripts = f"<script>{script}</script>\n" if script else ""
    below = f"<footer>{html.escape(foot)}</footer>\n" if foot else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n{below}{scripts}</body>\n</html>\n"
    )


def readable(tokenizer: Tokenizer, token: int) -> str:
    """A token as text in which everything can be seen: `·the`, `⏎`; what has no shape is spelled, as `\\u200b`. Ids
    without a piece are shown as such."""
    if token >= len(tokenizer):
        return f"<{token}>"
    text = tokenizer.piece(token).replace("▁", "·").replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_html(text: str) -> str:
    """A readable token as a piece of HTML."""
    return f'<span class="token">{html.escape(text)}</span>'


def rows(head: Sequence[str], lines: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of text cells, which are escaped; the columns in `numbers` are set to the right."""
    kinds = ["number" if i in numbers else "" for i in range(len(head))]
    first = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rest = "\n".join(f"<tr>{''.join(map(_cell, kinds, line))}</tr>" for line in lines)
    return f'<div class="scroll"><table>\n<tr>{first}</tr>\n{rest}\n</table></div>'


def _cell(kind: str, text: str) -> str:
    return f'<td class="{kind}">{html.escape(text)}</td>'


def write(path: Path, text: str, *, force: bool = False) -> None:
    """Write a page whole or not at all. Raises FileExistsError where a file is there, unless `force`; OSError."""
    check_target(path, force=force)
    with replacing(path) as (partial,):
        partial.write_text(text, encoding="utf-8")
