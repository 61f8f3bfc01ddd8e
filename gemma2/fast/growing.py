"""A cache for compiled layers: its tensors stay where they are, and are read only as far as they are filled."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2.cache import EMPTY, Held
from gemma2.config import Gemma2Config
from gemma2.fast.static import StaticCache, StaticLayer
from gemma2.model import Gemma2

BLOCK = 256  # slots by which what is read grows


class GrowingLayer(StaticLayer):
    """A `StaticLayer` of which the first `len(reach)` slots are read; the others hold nothing yet."""

    def __init__(self, batch: int, slots: int, config: Gemma2Config, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(batch, -(-slots // BLOCK) * BLOCK, config, dtype, device)
        for tensor in (self.keys, self.values, self.positions):
            torch._dynamo.mark_dynamic(tensor, 1)
        self.reach = torch.empty(0, device="cpu")

    def held(self) -> Held:
        n = len(self.reach)
        return self.keys[:, :n], self.values[:, :n], self.positions[:, :n]


class GrowingCache(StaticCache):
    """`StaticCache` of which a pass reads as many slots as are filled, in blocks of 256.

    How many these are is the length of a tensor, which compiled code takes as a variable: one graph serves every length
    and every capacity.

    Args:
        slack: positions that `rollback` can take back after a ring has wrapped.
    """

    layer = GrowingLayer
    layers: list[GrowingLayer]  # type: ignore[assignment]

    def __init__(self, model: Gemma2, batch: int, capacity: int, slack: int = 0) -> None:
        super().__init__(model, batch, capacity, slack=slack)
        self.windows = [model.config.window(i) for i in range(model.config.num_hidden_layers)]
        self._read(0)

    @property
    def length(self) -> int:
        """Positions held by the longest row. Raises RuntimeError when an interrupted pass left the layers out of step;
        reading all of them takes a while, so a pass does not ask."""
        highest = {int(layer.positions.amax()) for layer in self.layers}
        if len(highest) > 1:
            raise RuntimeError("the cache was left half-written by an interrupted forward pass: call reset()")
        return max(0, highest.pop() + 1)

    def next_positions(self, tokens: Tensor, given: Tensor | None = None) -> Tensor:
        positions = super().next_positions(tokens, given)
        self._read(int(positions.max()) + 1)
        return positions

    def rollback(self, length: int) -> None:
        """Forget the positions from `length` on, exactly as if they had never been fed. Shorter rows of a batch lose as
        many as the longest one.

        Raises:
            ValueError: `length` is negative or beyond what is held, or a ring has wrapped and overwritten what the next
                token would see.
        """
        held = self.length
        if not 0 <= length <= held:
            raise ValueError(f"cannot roll back to {length}: the cache holds {held} positions")
        ends = (self.last_positions() + 1 - (held - length)).clamp(min=0)[:, None]
        for layer, window in zip(self.layers, self.windows, strict=True):
            first = torch.zeros_like(ends) if window is None else (ends - window + 1).clamp(min=0)
            seen = (layer.positions >= first) & (layer.positions < ends)
            if bool((seen.sum(1, keepdim=True) < ends - first).any()):
                raise ValueError(
                    f"cannot roll back to {length}: {held} positions have wrapped the local layers' rings; reset() and "
                    "feed the prefix again"
                )
        for layer in self.layers:
            layer.positions.masked_fill_(layer.positions >= ends, EMPTY)
        self._read(length)

    def reset(self) -> None:
        super().reset()
        self._read(0)

    def _read(self, length: int) -> None:
        """Let attention read the slots of so many positions."""
        made: dict[int, Tensor] = {}
        for layer in self.layers:
            n = min(layer.slots, -(-max(length, 1) // BLOCK) * BLOCK)
            if len(layer.reach) != n:
                if n not in made:
                    made[n] = torch.empty(n, device="cpu")
                    torch._dynamo.mark_dynamic(made[n], 0)
                layer.reach = made[n]
