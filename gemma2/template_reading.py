"""What a chat template writes for a conversation, worked out for templates that do what Gemma's do.

Of Jinja this knows what Gemma's templates need: text, `if`, `for`, `set`, plus signs, `trim`, and questions about roles
and places. Whatever else a conversation reaches is unknown, and so is what depends on the text that somebody says: of
that nothing is known but its place. No function is called by its name, and nothing can take long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gemma2.template_tags import DEEPEST, Node, Token, Unknown

STEPS = 20_000  # tags and values that are looked at; Gemma's templates need a few hundred
LONGEST = 10_000  # characters of a value
# [0], [-1], [1:] and [2:]: the number, whether it is counted from the end, whether all that follow are meant.
COUNTED = ((0, False, False), (1, True, False), (1, False, True), (2, False, True))
# Names that have a value which is not known here.
GIVEN = {
    *(f"{name}_token" for name in ("eos", "pad", "unk", "sep", "cls", "mask")),
    *("additional_special_tokens", "extra_special_tokens", "raise_exception", "strftime_now", "self", "caller"),
    *("range", "dict", "lipsum", "cycler", "joiner", "namespace"),
}


class _Undefined:
    """What a template asks for and is not there."""


@dataclass(frozen=True)
class Said:
    """A text that holds what somebody says."""

    text: str


@dataclass(frozen=True)
class _Place:
    """A message's number, counted from `first`. A template may ask whether it is the first one, and whether it is even:
    so a few lengths stand for all."""

    number: int
    first: int


class Reading:
    """What the tags of a template write for one conversation."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.messages, self.asked, self.steps = messages, False, STEPS
        self.names: dict[str, Any] = {"messages": messages, "bos_token": "<bos>", "add_generation_prompt": True}
        self.names |= {"tools": None, "documents": None, "true": True, "false": False, "none": None}
        self.names |= {"True": True, "False": False, "None": None}

    def write(self, nodes: list[Node]) -> str:
        written = ""
        for node in nodes:
            self.step()
            if node.kind == "text":
                written += node.text
            elif node.kind == "write":
                value = self.value(node.tokens)
                written += value.text if isinstance(value, Said) else _text(value)
            elif node.kind == "set":
                (kind, name), *rest = node.tokens or [("", "")]
                if kind != "name" or rest[:1] != [("sign", "=")] or name == "loop":
                    raise Unknown
                self.names[name] = self.value(rest[1:])
            elif node.kind == "if":
                chosen = next((body for test, body in node.branches if test is None or _truth(self.value(test))), [])
                written += self.write(chosen)
            elif node.kind == "for":
                written += self.repeated(node)
            else:
                written += self.inside(node.branches[0][1], {})
        return written

    def repeated(self, node: Node) -> str:
        (kind, name), *rest = node.tokens or [("", "")]
        values = self.value(rest[1:]) if kind == "name" and rest[:1] == [("name", "in")] else None
        if not isinstance(values, list):
            raise Unknown
        written = ""
        for i, value in enumerate(values):
            loop = {"first": i == 0, "last": i == len(values) - 1, "index0": _Place(i, 0), "index": _Place(i + 1, 1)}
            written += self.inside(node.branches[0][1], {name: value, "loop": loop})
        return written

    def inside(self, body: list[Node], names: dict[str, Any]) -> str:
        """What is set inside is forgotten behind it."""
        before = self.names
        self.names = before | names
        written = self.write(body)
        self.names = before
        return written

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Unknown

    def value(self, tokens: list[Token]) -> Any:
        expression = _Expression(tokens, self)
        value = expression.chosen(True)
        if expression.place < len(tokens):
            raise Unknown
        return value


class _Expression:
    """The value of an expression, read from left to right; with `live` False it is read over, for its end."""

    def __init__(self, tokens: list[Token], reading: Reading) -> None:
        self.tokens, self.reading, self.place, self.depth = tokens, reading, 0, 0

    def take(self, *texts: str) -> str | None:
        """The next token, where it is one of these signs or names."""
        kind, text = self.tokens[self.place] if self.place < len(self.tokens) else ("", "")
        if kind not in ("sign", "name") or text not in texts:
            return None
        self.place += 1
        return text

    def must(self, *texts: str) -> str:
        found = self.take(*texts)
        if found is None:
            raise Unknown
        return found

    def chosen(self, live: bool) -> Any:
        """`a if b else c`."""
        self.deeper(1)
        start = self.place
        self.either(False)
        if not self.take("if"):
            self.place = start
            value = self.either(live)
            self.deeper(-1)
            return value
        test = self.either(live)
        self.must("else")
        end = self.place
        if live and _truth(test):
            self.chosen(False)
            end, self.place = self.place, start
            value = self.either(True)
            self.place = end
        else:
            value = self.chosen(live)
        self.deeper(-1)
        return value

    def deeper(self, by: int) -> None:
        self.depth += by
        if self.depth > DEEPEST:
            raise Unknown

    def either(self, live: bool) -> Any:
        value = self.both(live)
        while self.take("or"):
            live = live and not _truth(value)
            other = self.both(live)
            value = other if live else value
        return value

    def both(self, live: bool) -> Any:
        value = self.negated(live)
        while self.take("and"):
            live = live and _truth(value)
            other = self.negated(live)
            value = other if live else value
        return value

    def negated(self, live: bool) -> Any:
        turns = 0
        while self.take("not"):
            turns += 1
        value = self.compared(live)
        return value if not turns or not live else _truth(value) != bool(turns % 2)

    def compared(self, live: bool) -> Any:
        value = self.joined(live)
        sign = self.take("==", "!=", "in", "not")
        if sign == "not":
            self.must("in")
        if sign is None:
            return value
        other = self.joined(live)
        if not live:
            return None
        if sign in ("==", "!="):
            return _equal(value, other) == (sign == "==")
        if isinstance(other, dict) and isinstance(value, str):
            return (value in other) == (sign == "in")
        if not isinstance(other, list) or not all(isinstance(one, str) for one in [value, *other]):
            raise Unknown
        return (value in other) == (sign == "in")

    def joined(self, live: bool) -> Any:
        value = self.rest(live)
        while self.take("+", "~"):
            other = self.rest(live)
            if live:
                value = _joined(value, other)
        return value

    def rest(self, live: bool) -> Any:
        value = self.asked(live)
        while self.take("%"):
            other = self.asked(live)
            if live and not (isinstance(value, _Place) and other == 2 and type(other) is int):
                raise Unknown
            value = value.number % 2 if live else None
        return value

    def asked(self, live: bool) -> Any:
        """A value with its filters, and `is`."""
        value = self.part(live)
        while self.take("|"):
            self.must("trim")
            value = _trimmed(value) if live else None
        while self.take("is"):
            negated = bool(self.take("not"))
            test = self.must("string", "iterable", "sequence", "mapping", "defined", "undefined", "none")
            value = self.tested(value, test) != negated if live else None
        return value

    def tested(self, value: Any, test: str) -> bool:
        if test in ("defined", "undefined"):
            return isinstance(value, _Undefined) == (test == "undefined")
        if isinstance(value, Said | list) and test != "none":
            self.reading.asked = True
        if isinstance(value, _Undefined | _Place):
            raise Unknown
        kinds = {"string": str | Said, "iterable": str | Said | list | dict, "mapping": dict, "none": type(None)}
        return isinstance(value, kinds.get(test, str | Said | list | dict))

    def part(self, live: bool) -> Any:
        """A value, and what stands behind it: `.name`, `['name']`, `[0]`, `[1:]`, `.strip()`."""
        value = self.single(live)
        while sign := self.take(".", "["):
            if sign == ".":
                kind, name = self.tokens[self.place] if self.place < len(self.tokens) else ("", "")
                self.place += 1
                if kind != "name":
                    raise Unknown
                if name == "strip" and self.take("("):
                    self.must(")")
                    value = _trimmed(value) if live else None
                elif live:
                    value = _found(value, name)
                continue
            back = bool(self.take("-"))
            key = self.single(live)
            sliced = bool(self.take(":"))
            self.must("]")
            if live and isinstance(key, str) and not back and not sliced:
                value = _found(value, key)
            elif live:
                value = _counted(value, key, back, sliced)
        return value

    def single(self, live: bool) -> Any:
        self.reading.step()
        kind, text = self.tokens[self.place] if self.place < len(self.tokens) else ("", "")
        self.place += 1
        if kind == "string":
            return text
        if kind == "number":
            return int(text)
        if kind == "name" and text not in GIVEN:
            return self.reading.names.get(text, _Undefined())
        if text not in ("(", "["):
            raise Unknown
        values: list[Any] = []
        while not values or self.take(","):
            values.append(self.chosen(live))
        self.must(")" if text == "(" else "]")
        return values[0] if text == "(" and len(values) == 1 else values


def _truth(value: Any) -> bool:
    if isinstance(value, _Undefined) or value is None:
        return False
    if not isinstance(value, bool | str | list | dict):
        raise Unknown
    return bool(value)


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, _Place) and type(other) is int and other == value.first:
        return value.number == other
    if isinstance(value, _Undefined) or isinstance(other, _Undefined):
        return isinstance(value, _Undefined) and isinstance(other, _Undefined)
    if not all(one is None or isinstance(one, bool | int | str) for one in (value, other)):
        raise Unknown
    return bool(value == other)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unknown
    return value


def _joined(value: Any, other: Any) -> Any:
    texts = [one.text if isinstance(one, Said) else _text(one) for one in (value, other)]
    if sum(map(len, texts)) > LONGEST:
        raise Unknown
    return Said("".join(texts)) if isinstance(value, Said) or isinstance(other, Said) else "".join(texts)


def _trimmed(value: Any) -> Any:
    return Said(value.text.strip()) if isinstance(value, Said) else _text(value).strip()


def _found(value: Any, name: str) -> Any:
    if not isinstance(value, dict) or hasattr(dict, name) or ("index0" in value and name not in value):
        raise Unknown
    return value.get(name, _Undefined())


def _counted(value: Any, key: Any, back: bool, sliced: bool) -> Any:
    """A first or last message, or all messages but the first or the first two."""
    asked = (key, back, sliced)
    if not isinstance(value, list) or not isinstance(key, int) or asked not in COUNTED:
        raise Unknown
    return value[key:] if sliced else value[-key]
