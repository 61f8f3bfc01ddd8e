"""Looking inside: see, edit and take apart what flows through a model, and twins of its parts that show more."""

from gemma2.research.ablate import ablate
from gemma2.research.edits import add, edit, mean, remove, replace, resample, silence, steer, zero
from gemma2.research.seen import Seen, capture, opened
from gemma2.research.watch import watching

__all__ = [
    "Seen",
    "ablate",
    "add",
    "capture",
    "edit",
    "mean",
    "opened",
    "remove",
    "replace",
    "resample",
    "silence",
    "steer",
    "watching",
    "zero",
]
