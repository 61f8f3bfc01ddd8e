"""How far two ways of computing the same may differ, by dtype, and why: the one table.

A tolerance is for the same mathematics with sums in another order: a cache, a chunk, a batch, a compiler, a device.
Where not even the order differs (saving and loading), nothing is tolerated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """At most `bound`, times the largest logit unless it is `absolute`."""

    bound: float
    why: str
    absolute: bool = False

    def allowed(self, largest: float) -> float:
        """For logits of which the largest is so large."""
        return self.bound if self.absolute else self.bound * largest

    def __str__(self) -> str:
        return f"{self.bound:g} {'absolute' if self.absolute else 'of the largest logit'}"


TOLERANCES = {
    torch.float64: Tolerance(1e-10, "sums in another order", absolute=True),
    torch.float32: Tolerance(1e-5, "sums in another order; a d x d product alone differs by 8e-7 between batch sizes"),
    torch.bfloat16: Tolerance(
        2**-4,
        "32 roundings of 2^-9: one rounding that falls the other way spreads through all later layers. This finds "
        "large errors only, and not a window that is one too narrow: use float32 to find mistakes",
    ),
    torch.float16: Tolerance(2**-7, "32 roundings of 2^-12; as bfloat16, and it may overflow"),
}
