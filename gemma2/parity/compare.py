"""Site by site, how far another system is from the truth, and whether rounding can take it there.

The truth is this model in float64. The yardstick is the same model in the other system's dtype: whoever computes
Gemma 2 in that dtype, in whatever order, is about as far from the truth. A system that is farther by more than FACTOR
computes something else, and the first such site in the order of computation is where.

Two distances are judged, since a mistake can hide in either: the size of the error, and the part of it that is the same
for every token (a gain per channel), which rounding has not: over t tokens its average shrinks by sqrt(t).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

FACTOR = 4.0  # times the yardstick's error; see docs/parity.md for what it lets through and what it finds
MASKED = -1e4  # a score below it is one that the softmax never sees; the caps keep real ones within +-50
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
SCORES = "hook_attn_scores"


@dataclass(frozen=True)
class Row:
    """One site. Errors are against the truth; `own` ones are the yardstick's.

    Attributes:
        largest: of |other - truth|.
        relative: rms of other - truth, by the rms of the truth.
        cosine: between other and truth.
        gain: rms over channels of the relative error that is common to all tokens.
        ratio: how many times the yardstick's error it is, by size or by gain, whichever is more.
        finite: whether every value of the other system is.
    """

    site: str
    largest: float
    relative: float
    own_relative: float
    cosine: float
    gain: float
    own_gain: float
    ratio: float
    finite: bool = True

    @property
    def parts(self) -> bool:
        """Whether this is no rounding."""
        return not self.finite or not self.ratio <= FACTOR


@dataclass(frozen=True)
class LogitsRow:
    """What the difference means for predictions, averaged over positions.

    Attributes:
        kl: mean and largest Kullback-Leibler divergence from the truth's distribution, in nats.
        flips: positions whose most likely token is another.
        margin: largest gap, over those flips, between the truth's two most likely logits; None without flips.
    """

    kl_mean: float
    kl_largest: float
    flips: int
    positions: int
    margin: float | None


def compare(
    truth: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    dtype: torch.dtype,
    names: Iterable[str],
) -> list[Row]:
    """A row for each of `names`, in that order.

    Args:
        truth, own, other: site -> value without the batch axis. Where `other` has fewer positions than the truth, they
            are its last.
        dtype: in which `own` was computed.
    """
    return [row(name, truth[name], own[name], other[name], dtype) for name in names]


def row(name: str, truth: Tensor, own: Tensor, other: Tensor, dtype: torch.dtype) -> Row:
    """The distances of one site."""
    count = other.shape[-2]
    truth, own, other = truth[..., -count:, :].double(), own[..., -count:, :].double(), other.double()
    finite = bool(other.isfinite().all())
    if name.endswith(SCORES):
        # Whatever stands in a masked place, it is masked in both or the two see different keys.
        hidden = truth < MASKED
        finite = not bool(other.isnan().any())
        if not torch.equal(hidden, other < MASKED):
            return Row(name, math.inf, math.inf, 0.0, 0.0, math.inf, 0.0, math.inf, finite)
        truth, own, other = (x.masked_fill(hidden, 0.0) for x in (truth, own, other))
    scale = truth.square().mean().sqrt().item() or 1.0
    error, own_error = other - truth, own - truth
    relative, own_relative = (e.square().mean().sqrt().item() / scale for e in (error, own_error))
    gain, own_gain = _gain(error, truth), _gain(own_error, truth)
    unit = ROUNDING[dtype]
    positions = max(1, truth.numel() // truth.shape[-1])
    # A yardstick that happens to be exact is taken as half a unit in the last place.
    ratio = max(relative / max(own_relative, unit / 2), gain / max(own_gain, unit / math.sqrt(positions)))
    cosine = F.cosine_similarity(other.flatten(), truth.flatten(), dim=0).item()
    return Row(name, error.abs().max().item(), relative, own_relative, cosine, gain, own_gain, ratio, finite)


def _gain(error: Tensor, truth: Tensor) -> float:
    """Least-squares gain of the error on the truth in each channel (last axis): rms, channels weighted by power."""
    error, truth = error.reshape(-1, error.shape[-1]), truth.reshape(-1, truth.shape[-1])
    power = truth.square().sum(0)
    gains = (error * truth).sum(0) / power.clamp_min(power.max() * 1e-12 + 1e-300)
    return math.sqrt(((gains.square() * power).sum() / power.sum().clamp_min(1e-300)).item())


def compare_logits(truth: Tensor, other: Tensor) -> LogitsRow:
    """What the distance of logits [t v] does to predictions; the last positions where `other` has fewer."""
    truth, other = truth[-len(other) :].double(), other.double()
    expected, found = truth.log_softmax(-1), other.log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).clamp_min(0)
    best = truth.topk(2, dim=-1)
    flipped = best.indices[:, 0] != other.argmax(-1)
    gaps = (best.values[:, 0] - best.values[:, 1])[flipped]
    margin = gaps.max().item() if flipped.any() else None
    return LogitsRow(kl.mean().item(), kl.max().item(), int(flipped.sum()), len(truth), margin)
