"""The merges of a tokenizer.json: a list of pairs of pieces, of which the first in the list merge first.

SentencePiece has a score for each piece instead, and merges whatever two pieces are a piece together. `merge_ranks`
finds the scores, or says why there are none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from operator import add as joined
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2.checkpoints.sentencepiece_proto import BYTE, NORMAL, USER_DEFINED
from gemma2.errors import BadModelFile
from gemma2.symbols import SPACE

# Gemma 2's own pieces and merges in the orders in which programs write them, and whether long runs of spaces come
# first. To look at 580,000 merges takes more than half of the time that a file takes to read.
KNOWN = {
    "70b3dfeec77b6a8ecab69cebe5e24b75b67ac5ab309021af4dbdd9762bf439c7": True,  # transformers 4
    "fda29dde02e12e3f467854801c017613bd68cb009a8c4577d2aebd7dc61ba736": True,  # the same, without those of tabs
    "4b5530bae453fa1d221cfd60cb1989f2bb89cacdec31dc8d829cfcd5fffd00cd": False,  # transformers 5
    "739d10f5b694070ef3902d5ea422e451e567a2ab40c9745f520a452d1457d046": True,  # this project
    "d29fb28e90cf7a7d7274fce544f781c531138f6f2c1e60606c0c5364a4a2a683": False,  # this project, from transformers 5
}


def merge_ranks(
    stated: Any, vocabulary: Mapping[str, int], names: Sequence[str], kinds: Sequence[int], where: str
) -> tuple[NDArray[np.float32], bool]:
    """A score for every piece, the better the earlier its merges stand; and whether runs of spaces are symbols.

    Gemma's pieces stand in the order of their merges, so the score is minus the id, counted from behind the bytes. Runs
    of spaces come in two orders. In Google's files, which transformers 4 made, the longest parts merge first, so that a
    run is cut as a symbol is: the longest piece first. In those of transformers 5 the shortest pieces are made first.

    Args:
        stated: the merges as the file has them.
        vocabulary: piece -> id.
        names: the pieces in the order of their ids.
        kinds: theirs, and those of pieces that were added behind them.
    Raises:
        BadModelFile: wrong types, or merges that scores of pieces cannot state.
    """
    kind = np.array(kinds[: len(names)], np.int32)
    runs = [i for i, name in enumerate(names) if name.startswith(SPACE) and not name.strip(SPACE)]
    run = np.zeros(len(names), bool)
    run[runs] = True
    alive = (kind == NORMAL) | (run & (kind == USER_DEFINED))
    base = int(np.flatnonzero(kind == BYTE)[-1]) + 1
    ranks = base - np.arange(len(kinds), dtype=np.float32)
    longest_first = KNOWN.get(merges_digest(stated, names, alive))
    if longest_first is not None:
        made = np.array(sorted((i for i in runs if len(names[i]) > 1), key=lambda i: len(names[i])))
    else:
        lefts, rights, merged = _merges(stated, vocabulary, where)
        if (kind[merged] == BYTE).any():
            i = int(np.flatnonzero(kind[merged] == BYTE)[0])
            raise BadModelFile(f"{where}: merge {i} makes a byte piece ({names[merged[i]]!r}) of ordinary text")
        kept = np.flatnonzero(alive[lefts] & alive[rights] & alive[merged])
        lefts, rights, merged = lefts[kept], rights[kept], merged[kept]
        _check_complete(names, alive, lefts, rights, where)
        of_runs, others = np.flatnonzero(run[merged]), np.flatnonzero(~run[merged])
        if of_runs.size and (run[lefts[others]] & (others < of_runs[-1])).any():
            raise BadModelFile(f"{where}: the merges of runs of spaces do not stand before those of a space and a word")
        group = _groups(merged[others], where)
        if (np.diff(group) <= 0).any():
            ranks[:] = -float(len(kinds))
            ranks[group] = -np.arange(group.size)
        parts = [(len(names[a]), len(names[b])) for a, b in zip(lefts[of_runs], rights[of_runs], strict=True)]
        longest_first = len(parts) > 1 and parts == sorted(parts, reverse=True)
        made = merged[:0] if longest_first else _groups(merged[of_runs], where)
    if not longest_first:
        ranks[made] = len(kinds) - np.arange(made.size)
    return ranks, longest_first


def merges_digest(stated: Any, names: Sequence[str], alive: NDArray[np.bool_]) -> str:
    """What identifies all pieces that can be merged, and all merges in their order; "" for merges of wrong types.

    No piece of Gemma's has a space or a NUL in it, so no other merges have the same text as its own.
    """
    try:
        pairs = stated if stated and isinstance(stated[0], str) else [left + " " + right for left, right in stated]
        text = "\0".join([*pairs, *(names[i] for i in np.flatnonzero(alive).tolist())])
        return hashlib.sha256(f"{len(pairs)}\0{text}".encode()).hexdigest()
    except (TypeError, ValueError, KeyError):  # ValueError: no pair, or a lone surrogate
        return ""


def _groups(merged: NDArray[np.int64], where: str) -> NDArray[np.int64]:
    """The pieces in the order in which they are made."""
    group = merged[np.flatnonzero(np.diff(merged, prepend=-1))]
    if np.unique(group).size != group.size:
        raise BadModelFile(f"{where}: the merges of one piece do not stand together, so their order cannot be kept")
    return group


def _merges(
    stated: Any, vocabulary: Mapping[str, int], where: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The ids of the two parts of every merge, and of what they make. Files have "a b" or, newer ones, ["a", "b"]."""
    if not isinstance(stated, list):
        raise BadModelFile(f"{where}: model.merges must be a list, found {stated!r:.60}")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in stated]
    lefts, rights = list[str](), list[str]()
    if set(map(type, pairs)) <= {list} and set(map(len, pairs)) <= {2}:
        lefts, rights = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if len(lefts) != len(pairs) or not set(map(type, lefts)) | set(map(type, rights)) <= {str}:
        i = next(i for i, pair in enumerate(pairs) if type(pair) is not list or list(map(type, pair)) != [str, str])
        raise BadModelFile(f"{where}: merge {i} is {stated[i]!r:.80}, and must have two pieces")
    found = []
    for parts in (lefts, rights, list(map(joined, lefts, rights))):
        try:
            found.append(np.fromiter(map(vocabulary.__getitem__, parts), np.int64, len(parts)))
        except KeyError:
            i = next(i for i, part in enumerate(parts) if part not in vocabulary)
            raise BadModelFile(f"{where}: merge {i} is {stated[i]!r:.80}, and {parts[i]!r:.60} is no piece") from None
    return found[0], found[1], found[2]


def _check_complete(
    pieces: Sequence[str], alive: NDArray[np.bool_], lefts: NDArray[np.int64], rights: NDArray[np.int64], where: str
) -> None:
    """Every two pieces that together are a piece must be a merge, for SentencePiece always merges them."""
    if np.unique(lefts << 32 | rights).size < lefts.size:
        raise BadModelFile(f"{where}: there are merges that appear twice")
    names = [pieces[i] for i in np.flatnonzero(alive).tolist()]
    known = set(names)
    pairs = sum(1 for p in names for i in range(1, len(p)) if p[i:] in known and p[:i] in known)
    if pairs != lefts.size:
        raise BadModelFile(
            f"{where}: {lefts.size:,} merges, but {pairs:,} pairs of pieces make a piece; Gemma's files list all"
        )
