"""A cache for compiled layers: of fixed place, and read only as far as it is filled."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2.cache import Held
from gemma2.config import Gemma2Config
from gemma2.fast.static import StaticCache, StaticLayer
from gemma2.model import Gemma2

BLOCK = 256  # slots by which what is read grows


class GrowingLayer(StaticLayer):
    """A `StaticLayer` of which only the first `len(reach)` slots are read: the others hold nothing yet."""

    def __init__(self, batch: int, slots: int, config: Gemma2Config, dtype: torch.dtype, device: torch.device) -> None:
        # At least two blocks, since a compiler takes sizes of one block for a fixed number.
        super().__init__(batch, -(-slots // BLOCK) * BLOCK, config, dtype, device)
        for tensor in (self.keys, self.values, self.positions):
            torch._dynamo.mark_dynamic(tensor, 1)
        self.reach = torch.empty(0)

    def held(self) -> Held:
        n = len(self.reach)
        return self.keys[:, :n], self.values[:, :n], self.positions[:, :n]


class GrowingCache(StaticCache):
    """`StaticCache` of which a step reads as many slots as are filled, in blocks of 256.

    How many are read is the length of a tensor, which compiled code takes as a variable: one graph serves all lengths
    and all capacities.
    """

    layer = GrowingLayer

    def __init__(self, model: Gemma2, batch: int, capacity: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(model, batch, capacity, dtype)
        self._reach(0)

    def next_positions(self, tokens: Tensor, given: Tensor | None = None) -> Tensor:
        positions = super().next_positions(tokens, given)
        self._reach(int(positions.max()) + 1)
        return positions

    def reset(self) -> None:
        super().reset()
        self._reach(0)

    def _reach(self, length: int) -> None:
        """Let attention read the slots of so many positions."""
        made: dict[int, Tensor] = {}
        for layer in self.layers:
            n = min(layer.slots, -(-max(length, 1) // BLOCK) * BLOCK)
            if len(layer.reach) != n:
                if n not in made:
                    made[n] = torch.empty(n)
                    torch._dynamo.mark_dynamic(made[n], 0)
                layer.reach = made[n]
