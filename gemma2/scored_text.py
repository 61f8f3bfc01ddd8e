"""Texts that are scored, as token ids: which begin with the BOS, and of which some are context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma2.tokenizer import Tokenizer, parse_ids

Text = str | Sequence[int]  # text, or token ids that begin with the BOS
Pair = tuple[Text, Text]  # a context, and what continues it


def as_list(texts: Any) -> tuple[list[Any], bool]:
    """Texts as a list, and whether they are one text (or its token ids, or a tuple) and no list of texts.

    Raises:
        ValueError: none, or something that is neither.
    """
    if not isinstance(texts, Sequence):
        raise ValueError(
            f"give a text, a list of token ids, a tuple (context, continuation) or a list, not {type(texts).__name__}"
        )
    alone = isinstance(texts, str | tuple) or (len(texts) > 0 and all(isinstance(one, int) for one in texts))
    if not alone and not texts:
        raise ValueError("there is no text to score: give one, or a list with at least one")
    return ([texts] if alone else list(texts)), alone


def scored_ids(text: Any, tokenizer: Tokenizer, special: bool, name: str) -> tuple[list[int], int, int]:
    """The ids of a text with its BOS, how many of them are not scored, and the bytes of what the others spell.

    Raises:
        ValueError: there is nothing to score, or no BOS.
    """
    if isinstance(text, tuple):
        if len(text) != 2:
            raise ValueError(f"{name} is a tuple of {len(text)}: a tuple is (context, continuation)")
        ids, first = _joined(text[0], text[1], tokenizer, special)
    else:
        ids, first = [*_encoded(text, tokenizer, special)], 1
    parse_ids(ids, tokenizer.rows)
    bos = tokenizer.special["bos"]
    if ids[:1] != [bos]:
        raise ValueError(f"{name} does not begin with the BOS ({bos}): token ids that are scored begin with it")
    if first >= len(ids):
        raise ValueError(f"{name} is empty: there is no token to score")
    spelled = text if isinstance(text, str) and not special else tokenizer.decode(ids[first:])
    return ids, first, len(spelled.encode())


def _joined(context: Text, more: Text, tokenizer: Tokenizer, special: bool) -> tuple[list[int], int]:
    """A context and its continuation as ids, and where the continuation begins.

    Texts are tokenized as one. Spaces at the end of the context belong to the continuation, as they do in the
    vocabulary's pieces, and so does a piece that holds something of both.
    """
    if not isinstance(context, str) or not isinstance(more, str):
        before = _encoded(context, tokenizer, special)
        after = _encoded(more, tokenizer, special, bos=False)
        return [*before, *after], len(before)
    before = tokenizer.encode(context.rstrip(" "), special=special)
    whole = tokenizer.encode(context + more, special=special)
    pairs = enumerate(zip(before, whole, strict=False))
    return whole, next((i for i, (a, b) in pairs if a != b), min(len(before), len(whole)))


def _encoded(text: Any, tokenizer: Tokenizer, special: bool, bos: bool = True) -> Sequence[int]:
    if isinstance(text, str):
        return tokenizer.encode(text, special=special, bos=bos)
    if not isinstance(text, Sequence) or not all(isinstance(one, int) for one in text):
        raise ValueError(f"a text must be text or a list of token ids, not {text!r}")
    return list(text)
