"""The tags of a Jinja template and the tokens in them. A template is read here, and never run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

DEEPEST = 30  # tags or brackets in each other
TAG = re.compile(r"\{([{%#])([-+]?)")
ENDS = {"{": re.compile(r"(-?)\}\}"), "%": re.compile(r"([-+]?)%\}"), "#": re.compile(r"([-+]?)#\}")}
SPACE = re.compile(r"\s*")
TOKEN = re.compile(
    r"""('(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+")|([A-Za-z_]\w*)|(\d{1,9})(?![\w.])|([=!]=|[-+~%|.,:()\[\]=])""",
    re.DOTALL,
)
ESCAPE = re.compile(r"\\(.)", re.DOTALL)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
OPENS = {"if": "endif", "for": "endfor", "generation": "endgeneration"}

Token = tuple[str, str]  # its kind, "string", "name", "number" or "sign", and its text


class Unknown(Exception):
    """Something that Gemma's templates do not have."""


@dataclass
class Node:
    """A text, or a tag: "write" for `{{ }}`, "set", "if", "for", "generation".

    Attributes:
        tokens: what stands in the tag, without its name.
        branches: of an `if`, each test (None for `else`) with what follows it; of the others that enclose something,
            one without a test.
    """

    kind: str
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    branches: list[tuple[list[Token] | None, list[Node]]] = field(default_factory=list)


def parse(template: str) -> list[Node]:
    """The tags of a template in each other.

    White space around them goes as transformers sets Jinja: the newline behind a tag and the spaces before one that
    begins a line are left out, but not those around `{{ }}`.

    Raises:
        Unknown: a tag that Gemma's templates do not have, or one that does not end.
    """
    root: list[Node] = []
    open_tags: list[tuple[str, Node | None, list[Node]]] = [("", None, root)]  # its end, itself, where its content goes
    for kind, tokens, text in _pieces(template.replace("\r\n", "\n").removesuffix("\n")):
        end, node, body = open_tags[-1]
        name = tokens[0][1] if kind == "%" and tokens and tokens[0][0] == "name" else ""
        if kind == "text":
            body.append(Node("text", text=text))
        elif kind == "{":
            body.append(Node("write", tokens))
        elif name == "set":
            body.append(Node("set", tokens[1:]))
        elif name in OPENS:
            inner: list[Node] = []
            body.append(Node(name, tokens[1:], branches=[(tokens[1:] if name == "if" else None, inner)]))
            open_tags.append((OPENS[name], body[-1], inner))
            if len(open_tags) > DEEPEST:
                raise Unknown
        elif name in ("elif", "else") and node is not None and node.branches[-1][0] is not None:
            inner = []
            node.branches.append((tokens[1:] if name == "elif" else None, inner))
            open_tags[-1] = (end, node, inner)
        elif name and len(tokens) == 1 and name == end:
            open_tags.pop()
        else:
            raise Unknown
    if len(open_tags) > 1:
        raise Unknown
    return root


def _pieces(template: str) -> Iterator[tuple[str, list[Token], str]]:
    """Texts, `("text", [], text)`, and tags, `("{" or "%", tokens, "")`. Comments are left out."""
    place, trims, starts = 0, "", True  # starts: whether a line begins at `place`
    while True:
        found = TAG.search(template, place)
        text = template[place : found.start() if found else len(template)]
        if trims == "-":
            text = text.lstrip()
        elif trims == "\n":
            starts |= text.startswith("\n")
            text = text.removeprefix("\n")
        if found and found[2] == "-":
            text = text.rstrip()
        elif found and found[1] != "{" and found[2] != "+":
            line = text.rfind("\n") + 1
            text = text[:line] if (line or starts) and not text[line:].strip() else text
        if text:
            yield "text", [], text
        if not found:
            return
        tokens: list[Token] = []
        if found[1] == "#":
            end = ENDS["#"].search(template, found.end())
            place = found.end()
        else:
            end, place = _tokens(template, found.end(), found[1], tokens)
        if end is None:
            raise Unknown
        trims = "-" if end[1] == "-" else "\n" if found[1] != "{" and end[1] != "+" else ""
        place, starts = end.end(), False
        if found[1] != "#":
            yield found[1], tokens, ""


def _tokens(template: str, place: int, kind: str, tokens: list[Token]) -> tuple[re.Match[str] | None, int]:
    """Add the tokens of a tag whose content begins at `place`; return its end."""
    while True:
        place = SPACE.match(template, place).end()  # type: ignore[union-attr]  # it matches nothing too
        if end := ENDS[kind].match(template, place):
            return end, place
        found = TOKEN.match(template, place)
        if found is None:
            return None, place
        string, name, number, sign = found.groups()
        if string:
            tokens.append(("string", ESCAPE.sub(_escaped, string[1:-1])))
        else:
            tokens.append(("name", name) if name else ("number", number) if number else ("sign", sign))
        place = found.end()


def _escaped(found: re.Match[str]) -> str:
    if found[1] not in ESCAPES:
        raise Unknown
    return ESCAPES[found[1]]
