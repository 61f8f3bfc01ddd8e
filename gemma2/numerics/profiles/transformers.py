"""transformers 5.23, eager attention: what `gemma2/model.py` computes itself, so there is nothing to change."""

from __future__ import annotations

from gemma2.numerics.changes import Change

CHANGES: tuple[Change, ...] = ()
