"""A tokenizer of pieces, merges and added tokens, some of which SentencePiece cannot find as `tokenizers` does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from gemma2.checkpoints.sentencepiece_proto import (
    NORMAL,
    SPECIAL,
    SYMBOL,
    USER_DEFINED,
    Vocabulary,
    with_pieces,
    write_proto,
)
from gemma2.symbols import SPACE, Symbol, one_pass_is_enough
from gemma2.tokenizer import CONTROL as STEERING
from gemma2.tokenizer import Tokenizer, hidden

DEEPEST = 64  # symbols that begin at one place, of which SentencePiece sees no more (PrefixMatcher in normalizer.cc)

LONGEST_RUN = 31  # spaces, of which Gemma has a piece


def tokenizer_with(
    vocabulary: Vocabulary,
    trained: Sequence[str],
    symbols: Sequence[Symbol],
    where: str,
    notes: Sequence[str],
    merged: Mapping[int, float] | None = None,
) -> Tokenizer:
    """The tokenizer of a vocabulary with added tokens.

    Args:
        vocabulary: with the pieces of the added tokens.
        trained: the pieces before any was added.
        symbols: all that are looked for, Gemma's own among them.
        merged: symbols among the trained pieces that are also made of their parts, and their scores for it.
    Raises:
        BadModelFile: as `Tokenizer`.
    """
    # SentencePiece itself finds runs of spaces that are normalized.
    if not merged and _one_pass([s for s in symbols if not (s.normalized and _is_run(s))]):
        return Tokenizer(write_proto(vocabulary), where, notes=notes)
    pieces, taken, kinds = list(vocabulary.pieces), set(vocabulary.pieces), vocabulary.kinds
    for i in np.flatnonzero(kinds == USER_DEFINED).tolist():
        # Both may be there: a token in which a space is typed, and the piece that merges make with a space there.
        spelling = pieces[i].replace(" ", SPACE)
        if spelling not in taken:
            pieces[i] = spelling
            taken.add(spelling)
    changes = {i: (pieces[i], pieces[i], score, NORMAL) for i, score in (merged or {}).items()}
    for symbol in symbols:
        i = symbol.id
        if kinds[i] == USER_DEFINED and (i >= len(trained) or trained[i] != symbol.text):
            changes[i] = (pieces[i], hidden(i), 0.0, USER_DEFINED)
    proto = write_proto(Vocabulary(pieces, vocabulary.scores, kinds, vocabulary.space_prefix))
    engine = with_pieces(proto, [changes[i] for i in sorted(changes)])
    return Tokenizer(proto, where, added=symbols, engine=engine, notes=notes)


def beyond_sentencepiece(symbols: Iterable[Symbol] | None) -> set[Symbol]:
    """The symbols that say how they are found, if SentencePiece would find any of them otherwise; else none.

    Gemma's runs of spaces are left aside: SentencePiece has them as symbols too.
    """
    looked_for = [s for s in symbols or () if not _is_run(s)]
    if _one_pass(looked_for):
        return set()
    return {s for s in looked_for if s.normalized or not s.bare or not is_gemmas(s.text)}


def is_gemmas(text: str) -> bool:
    """Whether a spelling is one of Gemma's own symbols."""
    if not text.strip(f" {SPACE}"):
        return len(text) <= LONGEST_RUN and " " not in text
    return text in SPECIAL or SYMBOL.fullmatch(text) is not None


def _one_pass(symbols: Sequence[Symbol]) -> bool:
    """Whether SentencePiece finds the symbols by itself, also where control tokens are spelled out."""
    spelled_out = (s.text for s in symbols if not s.special and STEERING.search(s.text) and not is_gemmas(s.text))
    return not any(spelled_out) and one_pass_is_enough(symbols, DEEPEST)


def _is_run(symbol: Symbol) -> bool:
    """Whether a symbol is a run of spaces, as Gemma has them."""
    return symbol.bare and len(symbol.text) <= LONGEST_RUN and not symbol.text.strip(SPACE)


def in_effect(own: Iterable[Symbol], added: Mapping[str, Symbol]) -> list[Symbol]:
    """Gemma's own symbols and the added tokens, whose flags hold where one is both."""
    texts = {symbol.text: symbol for symbol in own if symbol.id not in {s.id for s in added.values()}}
    return list((texts | dict(added)).values())
