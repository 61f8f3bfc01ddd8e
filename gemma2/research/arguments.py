"""What transformers' face refuses of its arguments, before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What generate() hands on and forward has no use for: the place in the cache, which the cache says already, and the
# tokenizers that stop strings and assisted decoding need outside.
SAID = ("cache_position", "tokenizer", "assistant_tokenizer")


def check_options(options: dict[str, Any]) -> None:
    """Raises ValueError for an argument that would be ignored."""
    for name, value in options.items():
        if value is not None and name not in SAID:
            raise ValueError(f"forward has no argument {name!r} here: leave it out")


def check_mask(mask: Tensor | None, batch: int, start: int | Tensor, t: int) -> None:
    """Raises ValueError unless the mask is [b s] with a value for each column so far, these tokens' included."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        found = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be [batch, columns], 1 for text and 0 for padding, not {found}")
    if isinstance(start, int) and tuple(mask.shape) != (batch, start + t):
        raise ValueError(
            f"attention_mask is {list(mask.shape)}, and {[batch, start + t]} is needed: {start} columns in the cache "
            f"and {t} new ones"
        )


def whole_rows(positions: Tensor, batch: int, t: int) -> Tensor:
    """position_ids as [b t]. Raises ValueError where they are not one for each token."""
    if positions.ndim != 2 or positions.shape[1] != t or positions.shape[0] not in (1, batch):
        raise ValueError(f"position_ids are {list(positions.shape)}, not one for each token {[batch, t]}")
    return positions.expand(batch, t)


def check_unpacked(positions: Tensor) -> None:
    """Raises ValueError for several texts in a row, which transformers would keep apart by their positions alone."""
    if torch.compiler.is_compiling():
        return
    breaks = (positions[:, 1:] != positions[:, :-1] + 1).nonzero()
    if len(breaks):
        row, column = breaks[0].tolist()
        raise ValueError(
            f"position_ids do not rise by one at row {row}, column {column + 1}: several texts packed into one row are "
            "not supported; give each its own row"
        )
