"""Added tokens, which are looked for in a text before the rest of it is cut into pieces.

The rules are those of the library `tokenizers` (src/tokenizer/added_vocabulary.rs). It goes through a text twice: first
for the tokens that are not `normalized`, in the text as it is typed; then for the others, between what was found and
after spaces have become `▁`. Each time it takes the leftmost one, and of those that begin there the longest.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

SPACE = "▁"  # U+2581, how SentencePiece writes a space
# White_Space of Unicode, which Rust's \s is. Python's \s has four control characters more.
BLANK = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | set(map(chr, range(0x2000, 0x200B)))
WORD_CATEGORIES = {"Nd", "Nl", "Pc"}  # beside letters and marks
JOINERS = "\u200c\u200d"
CIRCLED = ((0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189))  # letters by Unicode's lists


@dataclass(frozen=True)
class Symbol:
    """An added token.

    Attributes:
        text: as it is typed.
        id: its own.
        normalized: look for it after spaces have become `▁`.
        lstrip, rstrip: what is found takes the white space before it, or behind it, along.
        single_word: it is not found where a letter, a digit or the like stands directly before or behind it.
        special: it is looked for when control tokens are asked for, and then before SentencePiece sees the text.
    """

    text: str
    id: int
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    special: bool = field(default=False, compare=False)

    @property
    def sought(self) -> str:
        """The spelling that is looked for."""
        return self.text.replace(" ", SPACE) if self.normalized else self.text

    @property
    def bare(self) -> bool:
        """Whether it is found whatever stands around it."""
        return not (self.lstrip or self.rstrip or self.single_word)


class Finder:
    """Finds some symbols in a text, all in one pass: all `normalized`, or none.

    Raises:
        ValueError: too many, or two that are looked for by one spelling.
    """

    def __init__(self, symbols: Iterable[Symbol], normalized: bool) -> None:
        self.normalized = normalized
        self._symbols: dict[str, Symbol] = {}
        for symbol in symbols:
            other = self._symbols.setdefault(symbol.sought, symbol)
            if other is not symbol:
                raise ValueError(f"added tokens {other.text!r:.60} and {symbol.text!r:.60}, which are found alike")
        try:
            self._pattern = _pattern(self._symbols)
        except (RecursionError, OverflowError, re.error):
            raise ValueError("added tokens that are too many or too long to be looked for") from None

    def __bool__(self) -> bool:
        return self._pattern is not None

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Where each symbol begins and ends, and its id."""
        before = 0
        for match in self._pattern.finditer(text) if self._pattern is not None else ():
            symbol, (start, stop) = self._symbols[match.group()], match.span()
            if not symbol.bare:
                inside_a_word = (start > 0 and _of_word(text[start - 1])) or (stop < len(text) and _of_word(text[stop]))
                if symbol.single_word and inside_a_word:
                    continue
                while symbol.lstrip and start > before and text[start - 1] in BLANK:
                    start -= 1
                while symbol.rstrip and stop < len(text) and text[stop] in BLANK:
                    stop += 1
            # White space that one symbol took along may be a symbol itself, which is then found all the same.
            yield start, stop, symbol.id
            before = stop


def _of_word(character: str) -> bool:
    """What Rust's \\w matches, of the characters that Python's version of Unicode has."""
    category = unicodedata.category(character)
    if category[0] in "LM" or category in WORD_CATEGORIES or character in JOINERS:
        return True
    return category == "So" and any(first <= ord(character) <= last for first, last in CIRCLED)


def one_pass_is_enough(symbols: Iterable[Symbol], deepest: int) -> bool:
    """Whether SentencePiece finds all symbols as two passes do. It looks for all of them at once, after spaces are `▁`.

    It does not where a symbol depends on what is around it, has a space in it, may overlap one of another pass or a
    special one, or where more than `deepest` begin at the same place, of which SentencePiece sees only the shortest.
    """
    every = list(symbols)
    if any(not symbol.bare or " " in symbol.text or SPACE in symbol.text for symbol in every):
        return False
    if len({symbol.text for symbol in every}) < len(every):
        return False
    first, special = _tree(s.text for s in every if not s.normalized), _tree(s.text for s in every if s.special)
    if any(_clash(s.text, first) for s in every if s.normalized):
        return False
    if any(_clash(s.text, special) for s in every if not s.special):
        return False
    return _depth(_tree(symbol.text for symbol in every)) <= deepest


def _clash(text: str, tree: Mapping[str, Any]) -> bool:
    """Whether a spelling of the first pass stands in `text`, or begins with its end; of a long text it may."""
    if len(text) > 1000:
        return True
    for start in range(len(text)):
        node = tree
        for character in text[start:]:
            node = node.get(character, {})
            if "" in node:
                return True
            if not node:
                break
        if node:
            return True
    return False


def _depth(tree: Mapping[str, Any]) -> int:
    """How many spellings at most begin with each other."""
    most, open = 0, [(tree, 0)]
    while open:
        node, count = open.pop()
        count += "" in node
        most = max(most, count)
        open += [(below, count) for character, below in node.items() if character]
    return most


def _tree(spellings: Iterable[str]) -> dict[str, Any]:
    """A tree of characters in which "" ends a spelling."""
    tree: dict[str, Any] = {}
    for text in spellings:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    return tree


def _pattern(spellings: Iterable[str]) -> re.Pattern[str] | None:
    """What finds the longest of the spellings at a place; None if there are none."""
    tree = _tree(spellings)
    return re.compile(_alternatives(tree), re.DOTALL) if tree else None


def _alternatives(tree: Mapping[str, Any]) -> str:
    """A regular expression for a tree of spellings, the longest first."""
    branches = []
    for character, below in tree.items():
        if character:
            # A chain without branches is written flat: what nests deeply cannot be compiled.
            text = re.escape(character)
            while len(below) == 1 and "" not in below:
                ((character, below),) = below.items()
                text += re.escape(character)
            branches.append(text + _alternatives(below))
    joined = "|".join(branches)
    return "" if not branches else f"(?:{joined})?" if "" in tree else f"(?:{joined})"
