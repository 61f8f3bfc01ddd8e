"""Looking inside: see, edit and take apart what flows through a model, and twins of its parts that show more."""

from gemma2.research.edits import add, edit, mean, remove, replace, resample, silence, steer, zero
from gemma2.research.gradients import attribution_patching, integrated_gradients
from gemma2.research.hooked import hooked
from gemma2.research.patching import path_patching
from gemma2.research.seen import Seen, capture, opened
from gemma2.research.watch import watching

__all__ = [
    "Seen",
    "add",
    "attribution_patching",
    "capture",
    "edit",
    "hooked",
    "integrated_gradients",
    "mean",
    "opened",
    "path_patching",
    "remove",
    "replace",
    "resample",
    "silence",
    "steer",
    "watching",
    "zero",
]
