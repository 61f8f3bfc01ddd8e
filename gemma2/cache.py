"""The key/value cache. The caller owns it and passes it in; the model keeps nothing.

A local layer needs only the last `window` positions, so it holds a ring of exactly that many slots; a global layer
holds the whole capacity. Each slot carries the position it belongs to (empty: -1), and `ops.visible` does the rest:
no mask depends on how slots are arranged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2.config import Gemma2Config
from gemma2.errors import ContextOverflow

EMPTY = -1  # the position of a slot that holds nothing; padding has negative positions too
BROKEN = -1  # the length of a layer whose write was interrupted


class LayerCache:
    """Keys and values of one layer: slot = column % slots, where columns count the tokens fed so far."""

    def __init__(self, batch: int, slots: int, config: Gemma2Config, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch, slots, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [b s g c], rotated
        self.values = torch.zeros(shape, dtype=dtype, device=device)  # [b s g c]
        self.positions = torch.full((batch, slots), EMPTY, dtype=torch.int32, device=device)  # [b s]
        self.slots = slots
        self.length = 0  # columns written so far

    def update(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store t new columns; return the keys, values and positions that the t queries attend over."""
        self._refuse_misfit(keys, positions)
        start, t = self.length, positions.shape[1]
        slots = (self.keys, self.values, self.positions)
        new = (keys, values, positions.to(self.positions.dtype))
        # A write may evict slots that a chunk's first queries still see, so a chunk is joined before it is written.
        held = [slot[:, : min(start, self.slots)] for slot in slots]  # until the ring wraps, the rest is empty
        seen = [torch.cat(pair, dim=1) for pair in zip(held, new, strict=True)] if t > 1 else None
        kept = min(t, self.slots)
        where = torch.arange(start + t - kept, start + t, device=keys.device) % self.slots
        self.length = BROKEN
        for slot, fresh in zip(slots, new, strict=True):
            slot.index_copy_(1, where, fresh[:, -kept:].detach())
        self.length = start + t
        # One token evicts only what it does not see, so it reads the slots themselves, without a copy.
        k, v, p = seen or [slot[:, : min(start + t, self.slots)] for slot in slots]
        return k, v, p

    def _refuse_misfit(self, keys: Tensor, positions: Tensor) -> None:
        """Before anything is written: what would fail halfway."""
        if (keys.dtype, keys.device.type) != (self.keys.dtype, self.keys.device.type):
            raise ValueError(
                f"the cache is {self.keys.dtype} on {self.keys.device.type}, the model computes {keys.dtype} on "
                f"{keys.device.type}: make it with the model's dtype and device"
            )
        if positions.shape != keys.shape[:2]:
            raise ValueError(f"positions {list(positions.shape)} are not one for each token {list(keys.shape[:2])}")

    def truncate(self, length: int) -> None:
        self.positions[:, length:] = EMPTY
        self.length = length


class HybridCache:
    """One `LayerCache` a layer: rings of `window` slots for local layers, `capacity` slots for global ones.

    Padding goes on the left: a ring forgets by column, so padding after real tokens would push some of them out. What
    is stored is detached: gradients flow through the tokens of one pass, not into earlier ones.

    Args:
        config: the model's architecture.
        batch: rows.
        capacity: most columns (tokens, padding included) that can be fed.
        dtype, device: the model's.
    """

    def __init__(
        self,
        config: Gemma2Config,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"a cache needs at least one row and one position, not {batch} x {capacity}")
        self.batch, self.capacity, self.window = batch, capacity, config.sliding_window
        windows = [config.window(i) for i in range(config.num_hidden_layers)]
        self.layers = [
            LayerCache(batch, min(window or capacity, capacity), config, dtype, torch.device(device))
            for window in windows
        ]

    @property
    def length(self) -> int:
        """Columns fed so far. Raises RuntimeError when an interrupted pass left the layers out of step; a pass that was
        interrupted after its last layer has fed its columns, and they count here."""
        lengths = {layer.length for layer in self.layers}
        if len(lengths) > 1 or BROKEN in lengths:
            raise RuntimeError("the cache was left half-written by an interrupted forward pass: call reset()")
        return lengths.pop()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values (positions add 4 a slot)."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def next_positions(self, batch: int, t: int) -> Tensor:
        """Positions [b t] of the next t columns, for rows without padding. Raises before anything is computed.

        Raises:
            ContextOverflow: the columns do not fit.
            ValueError: the batch is not the cache's.
        """
        start = self.length
        if batch != self.batch:
            raise ValueError(f"the cache holds {self.batch} rows, the tokens have {batch}")
        if start + t > self.capacity:
            raise ContextOverflow(
                f"cache full: {start} positions held and {t} new exceed its capacity of {self.capacity}"
            )
        return torch.arange(start, start + t, device=self.layers[0].keys.device).expand(batch, t)

    def rollback(self, length: int) -> None:
        """Forget all columns from `length` on, exactly as if they had never been fed.

        Raises:
            ValueError: `length` is negative or beyond what is held, or a ring has wrapped: what it overwrote is gone.
        """
        held = self.length
        if not 0 <= length <= held:
            raise ValueError(f"cannot roll back to {length}: the cache holds {held} positions")
        if length < held and held > min(layer.slots for layer in self.layers):
            raise ValueError(
                f"cannot roll back to {length}: {held} positions have wrapped the local layers' ring of "
                f"{self.window}; reset() and feed the prefix again"
            )
        for layer in self.layers:
            layer.truncate(length)

    def reset(self) -> None:
        """Empty the cache, also after an interrupted pass."""
        for layer in self.layers:
            layer.truncate(0)


class NoCache:
    """What the model uses when the caller passes no cache: the queries attend over this pass's own keys."""

    def __init__(self, config: Gemma2Config, device: torch.device) -> None:
        self.layers = [self] * config.num_hidden_layers
        self.device = device

    def next_positions(self, batch: int, t: int) -> Tensor:
        return torch.arange(t, device=self.device).expand(batch, t)

    def update(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return keys, values, positions
