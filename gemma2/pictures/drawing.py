"""What the PNG pictures share: a figure without a screen, and text that matplotlib takes as it is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from gemma2.atomic import check_target, replacing

LONGEST = 9  # characters of a token in a picture
DOTS = 110  # per inch


def check_drawing() -> None:
    """Raises ImportError, with the cure, where matplotlib is missing."""
    figure(1, 1)


def figure(width: float, height: float) -> Any:
    """A figure of so many inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        needed = "the picture needs matplotlib: pip install matplotlib (the extra gemma2[plots])"
        raise ImportError(f"{needed}; --no-png, or no --png, leaves the picture out") from None
    return Figure(figsize=(width, height), layout="constrained", dpi=DOTS)


def short(text: str) -> str:
    """A readable token, cut to what a cell can hold."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def save(drawn: Any, path: Path, *, force: bool = False) -> None:
    """Write a PNG, whole or not at all. Raises OSError; FileExistsError unless `force`."""
    check_target(path, force=force)
    with replacing(path) as (partial,), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # scripts that the font lacks are drawn as boxes
        drawn.savefig(partial, format="png")
