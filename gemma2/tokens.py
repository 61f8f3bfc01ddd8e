"""Token ids as tensors [b t]: what a model refuses, and rows of unequal length as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def left_padded(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows of token ids as one batch: tokens [b t] and positions [b t], negative where there is padding (id 0).

    Give both to the model: without the positions it would take the padding for text.

    Raises:
        ValueError: no row, or only empty ones.
    """
    width = max(map(len, rows), default=0)
    if width == 0:
        raise ValueError("a batch needs at least one row with one token id")
    tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    pads = torch.tensor([[width - len(row)] for row in rows], device=device)
    return tokens, torch.arange(width, device=device) - pads


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Refuse what is not a matrix of token ids: an embedding would take some of it and answer nonsense.

    Values are not checked where they cannot be read, see `first_true`.

    Raises:
        ValueError: no tensor, a wrong rank or dtype, an empty matrix, or an id outside [0, vocab_size), the first one
            named.
    """
    if not isinstance(tokens, Tensor):
        raise ValueError(
            f"tokens must be a tensor [batch, length], not {type(tokens).__name__}; "
            "gemma2.left_padded(rows) makes one, with its positions, from lists of ids"
        )
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token ids must be int64 or int32, not {tokens.dtype}")
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"token ids must be a non-empty matrix [batch, length], not of shape {list(tokens.shape)}")
    wrong = first_true((tokens < 0) | (tokens >= vocab_size))
    if wrong is not None:
        row, column = wrong
        raise ValueError(
            f"token id {int(tokens[row, column])} at [{row}, {column}] is outside the vocabulary [0, {vocab_size})"
        )


def check_positions(positions: Tensor, tokens: Tensor, before: Tensor, column: int) -> None:
    """Refuse positions [b t] that a cache cannot take: in each row padding (negative) comes first, then positions rise
    by one. Otherwise a ring would forget keys that are still in the window.

    Args:
        before: [b 1], each row's position in the column before; negative where there is none.
        column: of the first of these tokens.
    """
    if positions.shape != tokens.shape:
        raise ValueError(f"positions {list(positions.shape)} are not one for each token {list(tokens.shape)}")
    before = torch.cat((before.to(positions), positions[:, :-1]), dim=1)
    wrong = first_true((before >= 0) & (positions != before + 1))
    if wrong is not None:
        row, t = wrong
        raise ValueError(
            f"positions: row {row} goes from {int(before[row, t])} to {int(positions[row, t])} at column {column + t}; "
            "with a cache, padding (negative) goes on the left and positions rise by one"
        )


def check_fit(stored: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Refuse keys, values and positions that a cache cannot store beside those it has, before anything is written."""
    for name, old, x in zip(("keys", "values"), stored, new, strict=False):
        same = old.dtype == x.dtype and old.device == x.device
        if not same or len(old) != len(x) or old.shape[2:] != x.shape[2:]:
            held, computed = (f"{y.dtype} on {y.device}, {[len(y), *y.shape[2:]]} [b g c]" for y in (old, x))
            raise ValueError(f"the cache holds {name} of {held}, this pass computes {computed}: reset() it first")
    if new[2].shape != new[0].shape[:2]:
        raise ValueError(f"positions {list(new[2].shape)} are not one for each token {list(new[0].shape[:2])}")


def check_last(last: int | None, tokens: Tensor) -> None:
    """Raises ValueError unless `last` is None or one of the numbers from 1 to the length of `tokens`."""
    if last is None or not isinstance(tokens, Tensor):  # the embedding refuses what is no tensor
        return
    if isinstance(last, bool) or not isinstance(last, int | torch.SymInt) or not 1 <= last <= tokens.shape[-1]:
        raise ValueError(f"last must be from 1 to {tokens.shape[-1]}, the length of the tokens, not {last!r}")


def first_true(wrong: Tensor) -> list[int] | None:
    """The index at which `wrong` first holds, or None.

    None also where values cannot be read: while a graph is compiled, exported or captured, under `torch.vmap`, and for
    meta and fake tensors. A check that needs values is left out there.
    """
    if torch.compiler.is_compiling() or (wrong.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    try:
        found = bool(wrong.any())
    except RuntimeError:  # what vmap, meta and fake tensors answer
        return None
    return list(map(int, wrong.nonzero()[0].tolist())) if found else None
