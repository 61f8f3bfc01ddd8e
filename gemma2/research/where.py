"""Which tokens of a pass are meant: by their positions in the text, or counted from the end of the pass."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Positions in the text from 0 (the BOS), or negative ones, which count from the end of each pass; None is all.
Where = int | slice | Sequence[int] | None


def check_where(where: Any) -> Where:
    """Raises ValueError for what says no positions, or none that can be."""
    if where is None or (isinstance(where, int) and not isinstance(where, bool)):
        return where
    if isinstance(where, slice):
        if any(part is not None and (not isinstance(part, int) or part < 0) for part in (where.start, where.stop)):
            raise ValueError(f"a slice of positions goes from one position to another, not {where}")
        return where
    several = isinstance(where, Sequence | range) and not isinstance(where, str) and len(where) > 0
    if several and all(isinstance(one, int) and not isinstance(one, bool) for one in where):
        found: Where = where
        return found
    raise ValueError(f"positions are a number, a list of numbers or a slice, not {where!r}")


def marked(where: Where, positions: Tensor) -> Tensor:
    """Which tokens are meant: bool [b t], of the tokens at `positions` [b t]. Padding never is."""
    real = positions >= 0
    if where is None:
        return real
    if isinstance(where, slice):
        start, stop, step = where.start or 0, where.stop, where.step or 1
        inside = (positions >= start) & ((positions - start) % step == 0)
        return real & inside if stop is None else real & inside & (positions < stop)
    found = torch.zeros_like(real)
    for one in (where,) if isinstance(where, int) else where:
        if one >= 0:
            found |= positions == one
        elif -one <= positions.shape[1]:
            found[:, one] = True
    return found & real


def columns(where: Where, positions: Tensor) -> Tensor:
    """The columns [b n] of the tokens that are meant. Raises ValueError where rows do not have equally many."""
    meant = marked(where, positions)
    counts = meant.sum(dim=1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"positions {where!r} are {counts} tokens in the rows of the batch: they must be equally many")
    return meant.nonzero()[:, 1].view(len(positions), counts[0])


def check_there(where: Where, tokens: Tensor) -> None:
    """Raises ValueError for positions that a text does not have. `tokens` are its ids [b t], or positions."""
    t = tokens.shape[-1]
    at = torch.arange(t, device="cpu")[None]
    several = () if where is None or isinstance(where, slice) else (where,) if isinstance(where, int) else where
    for one in several or (where,):
        if not bool(marked(one, at).any()):
            raise ValueError(f"position {one} is not in the text, which has {t} tokens")


class Met:
    """Which of the positions that are meant came by, so that those that never did can be told.

    A block cannot refuse a position beyond its first pass: a generation may reach it.

    Args:
        where: the positions, or the steps.
        name: what they are, for the warning.
    """

    def __init__(self, where: Where, name: str) -> None:
        self.name, self.any = name, False
        self.left: list[int | slice] = [where] if isinstance(where, int | slice) else [*(where or ())]

    def meet(self, positions: Tensor) -> None:
        """Some tokens come by, at positions [b t]."""
        self.any = True
        if self.left:
            self.left = [one for one in self.left if not bool(marked(one, positions).any())]

    def warn(self) -> None:
        """Warn of those that did not come, where others could have."""
        if self.any and self.left:
            said = ", ".join(map(str, self.left))
            warnings.warn(f"{self.name} {said}: no pass of this block had it, so nothing was done there", stacklevel=4)
