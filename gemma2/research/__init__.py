"""Looking inside: see, edit and take apart what flows through a model, and twins of its parts that show more."""

from gemma2.research.ablate import ablate
from gemma2.research.attention import attention_maps, attention_stats
from gemma2.research.attribution import attribute
from gemma2.research.edits import add, edit, mean, remove, replace, resample, silence, steer, zero
from gemma2.research.fitted import FittedLens, open_lens
from gemma2.research.gradients import attribution_patching, integrated_gradients
from gemma2.research.hooked import hooked
from gemma2.research.jacobian import fit_jacobian
from gemma2.research.lens import lens_table, logit_lens, unembed
from gemma2.research.patching import path_patching
from gemma2.research.seen import Seen, capture, opened
from gemma2.research.tuned import fit_tuned
from gemma2.research.watch import watching

__all__ = [
    "FittedLens",
    "Seen",
    "ablate",
    "add",
    "attention_maps",
    "attention_stats",
    "attribute",
    "attribution_patching",
    "capture",
    "edit",
    "fit_jacobian",
    "fit_tuned",
    "hooked",
    "integrated_gradients",
    "lens_table",
    "logit_lens",
    "mean",
    "open_lens",
    "opened",
    "path_patching",
    "remove",
    "replace",
    "resample",
    "silence",
    "steer",
    "unembed",
    "watching",
    "zero",
]
