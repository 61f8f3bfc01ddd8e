"""Whether systems compute the same before they are timed: logits after a prompt and after each of some ids."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# How far logits may be apart: the root mean square of their difference, divided by the spread (the standard deviation
# over the vocabulary). On random weights in 12 layers bfloat16's rounding gives 0.015, the 8-bit activations of
# llama.cpp 0.037, and Q4_K_M weights beside bfloat16 ones 0.29.
ALLOWED = {torch.float32: 0.01, torch.float64: 0.01}
OTHERWISE = 0.1


class Disagreement(RuntimeError):
    """Two systems do not compute the same, so their times say nothing of each other."""


@dataclass(frozen=True)
class Agreement:
    """How far a system's logits are from ours.

    Attributes:
        distance: root mean square of the difference by the spread of our logits, the largest of all steps.
        top: steps at which both have the same likeliest id.
        largest: the largest difference of one logit.
    """

    system: str
    distance: float
    allowed: float
    largest: float
    top: int
    steps: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def allowed_for(dtype: torch.dtype) -> float:
    """The distance that is allowed where `dtype` is the narrowest in which either computes."""
    return ALLOWED.get(dtype, OTHERWISE)


def compare(system: str, ours: Tensor, theirs: Tensor, allowed: float, name: str = "gemma2") -> Agreement:
    """Compare logits [n v] of n steps.

    Args:
        allowed: the largest distance; see `allowed_for`.
        name: what messages call the system that `ours` are from.
    Raises:
        Disagreement: another vocabulary, values that are not finite, a distance beyond what is allowed, or another
            likeliest id where rounding does not explain it.
    """
    if ours.shape != theirs.shape:
        raise Disagreement(
            f"{system} and {name} do not run the same model: logits over {theirs.shape[-1]} and {ours.shape[-1]} ids"
        )
    if not theirs.isfinite().all() or not ours.isfinite().all():
        raise Disagreement(f"{system if ours.isfinite().all() else name} computes logits that are not finite")
    a, b = ours.double(), theirs.double()
    spread = a.std(dim=-1)
    distances = (a - b).square().mean(dim=-1).sqrt() / spread
    # A likeliest id is another one by rounding only if ours gives both nearly the same logit.
    lead = a.amax(dim=-1) - a.gather(-1, b.argmax(dim=-1, keepdim=True))[:, 0]
    found = Agreement(
        system,
        distance=float(distances.max()),
        allowed=allowed,
        largest=float((a - b).abs().max()),
        top=int((lead == 0).sum()),
        steps=len(a),
    )
    worst = int(distances.argmax())
    if found.distance > allowed:
        raise Disagreement(
            f"{system} does not compute what {name} does, so it is not timed: at step {worst} of {len(a)} the logits "
            f"differ by {found.distance:.3g} of their spread, and {allowed:g} is allowed (largest difference of one "
            f"logit {found.largest:.3g}); do both run the same weights? gemma2 parity says where they part"
        )
    odd = (lead > 5 * allowed * spread).nonzero()
    if len(odd):
        step = int(odd[0])
        raise Disagreement(
            f"{system} does not choose as {name} does, so it is not timed: at step {step} its likeliest id is "
            f"{int(b[step].argmax())}, and {name} has {int(a[step].argmax())}, which leads by {float(lead[step]):.3g}"
        )
    return found
