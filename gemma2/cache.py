"""The key/value cache. The caller owns it and passes it in; the model keeps nothing.

A column is one step of the batch: the tokens of all rows that stand in the same place, padding included. A position
counts a row's own tokens, so in a row without padding the two are equal. A local layer needs only the last `window`
columns, so it holds a ring of that many slots (and `slack` more); a global layer holds the whole capacity. Each slot
carries the position of what it holds (empty: -1), and `ops.visible` does the rest: no mask depends on the order of
slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gemma2.config import Gemma2Config
from gemma2.errors import ContextOverflow
from gemma2.tokens import check_fit, check_positions

EMPTY = -1  # the position of a slot that holds nothing; padding has negative positions too
Held = tuple[Tensor, Tensor, Tensor]  # keys [b s g c], values [b s g c], positions [b s]


class LayerStore(Protocol):
    """What attention asks of the cache of one layer."""

    def update(self, keys: Tensor, values: Tensor, positions: Tensor) -> Held:
        """Store t new columns; return the keys, values and positions that the t queries attend over."""


class Cache(Protocol):
    """What the model and the generation loop ask of a cache. `HybridCache` is one; anything that has these serves."""

    capacity: int  # columns that fit

    @property
    def length(self) -> int: ...  # columns held

    @property
    def layers(self) -> Sequence[LayerStore]: ...

    def next_positions(self, tokens: Tensor, given: Tensor | None = None) -> Tensor:
        """The positions [b t] of tokens [b t]: those given, or the ones that follow. Refuses what would not fit."""


class LayerCache:
    """Keys and values of one layer: slot = column % slots. Their dtype, device and heads are those of the first keys
    and values it is given."""

    def __init__(self, slots: int, window: int | None) -> None:
        self.slots, self.window = slots, window or slots
        self.reset()

    def reset(self) -> None:
        self.length = self.most = 0  # columns written so far, and the most there were before a rollback
        self.broken = False  # while a write is under way, and after one that was interrupted
        self.keys, self.values, self.positions = torch.empty(3, 0)  # until the first pass: [b s g c] twice, [b s]

    def update(self, keys: Tensor, values: Tensor, positions: Tensor) -> Held:
        new = (keys, values, positions.to(torch.int32))
        if not len(self.keys):
            shape = (len(keys), self.slots)
            with torch.inference_mode(False):  # else nothing could be written into them outside of it
                self.keys, self.values = (x.new_zeros(*shape, *x.shape[2:]) for x in (keys, values))
                self.positions = new[2].new_full(shape, EMPTY)
        stored = (self.keys, self.values, self.positions)
        check_fit(stored, new)
        start, t = self.length, positions.shape[1]
        # Two things are lost by a write: old keys that this pass's first queries still see, and gradients, which slots
        # do not carry. Then the queries get what is held and what is new, joined, and not the slots.
        lossless = start + t <= self.slots or t <= self.slots - self.window + 1
        joined = None
        if keys.requires_grad or values.requires_grad or not lossless:
            joined = [torch.cat((old[:, :start], x), dim=1) for old, x in zip(stored, new, strict=True)]
        kept = min(t, self.slots)
        where = torch.arange(start + t - kept, start + t, device=keys.device) % self.slots
        self.broken = True
        for old, x in zip(stored, new, strict=True):
            old.index_copy_(1, where, x[:, -kept:].detach())
        self.length, self.broken = start + t, False
        self.most = max(self.most, self.length)
        k, v, p = joined or [old[:, : self.length] for old in stored]  # beyond the slots a slice ends with them
        return k, v, p

    def last_positions(self) -> Tensor | None:
        """The positions [b 1] in the last column, or None in an empty cache."""
        column = torch.arange(self.length - 1, self.length, device=self.positions.device)
        return self.positions.index_select(1, column % self.slots) if self.length else None

    def can_forget(self, length: int) -> bool:
        """Whether all that a query in column `length` sees is still held."""
        return max(0, length - self.window + 1) >= self.most - self.slots

    def forget(self, length: int) -> None:
        """Empty the slots of all columns from `length` on."""
        for column in range(max(length, self.length - self.slots), self.length):
            self.positions[:, column % self.slots], self.values[:, column % self.slots] = EMPTY, 0.0
        self.length = length


class HybridCache:
    """One `LayerCache` a layer: rings of `window + slack` slots for local layers, `capacity` slots for global ones.

    Padding goes on the left: a ring forgets by column, so padding after real tokens would push some of them out. What
    is stored is detached: gradients flow through the tokens of one pass, not into earlier ones.

    Args:
        config: the model's architecture.
        batch: rows.
        capacity: most columns (tokens, padding included) that can be fed.
        slack: columns that `rollback` can take back after a ring has wrapped.
    """

    def __init__(self, config: Gemma2Config, batch: int, capacity: int, slack: int = 0) -> None:
        if batch < 1 or capacity < 1 or slack < 0:
            raise ValueError(
                f"a cache needs at least one row, one column and no negative slack, not {batch}, {capacity}, {slack}"
            )
        self.batch, self.capacity, self.slack = batch, capacity, slack
        windows = [config.window(i) for i in range(config.num_hidden_layers)]
        self.layers = [
            LayerCache(min(capacity, window + slack if window else capacity), window and min(window, capacity))
            for window in windows
        ]

    @property
    def length(self) -> int:
        """Columns fed so far. Raises RuntimeError when an interrupted pass left the layers out of step; a pass that was
        interrupted after its last layer has fed its columns, and they count here."""
        length = self.layers[0].length
        for layer in self.layers:  # compared, not hashed: torch.compile would pin the number
            if layer.broken or layer.length != length:
                raise RuntimeError("the cache was left half-written by an interrupted forward pass: call reset()")
        return length

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values (positions add 4 a slot); 0 before the first pass."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def next_positions(self, tokens: Tensor, given: Tensor | None = None) -> Tensor:
        """The positions [b t] of tokens [b t]: those given, or each row's next ones. Nothing is computed before this.

        Raises:
            ContextOverflow: the columns do not fit.
            ValueError: the batch is not the cache's; or positions that do not rise by one in a row, as with padding
                after its tokens: a ring would forget the wrong keys.
        """
        (batch, t), start = tokens.shape, self.length
        if batch != self.batch:
            raise ValueError(f"the cache holds {self.batch} rows, the tokens have {batch}")
        if start + t > self.capacity:
            raise ContextOverflow(f"cache full: {start} columns held and {t} new exceed {self.capacity}, its capacity")
        last = self.layers[0].last_positions()
        before = torch.full((batch, 1), EMPTY, device=tokens.device) if last is None else last.long()
        if given is None:
            return before.clamp(min=EMPTY).to(tokens.device) + 1 + torch.arange(t, device=tokens.device)
        check_positions(given, tokens, before, start)
        return given

    def rollback(self, length: int) -> None:
        """Forget all columns from `length` on, exactly as if they had never been fed.

        Raises:
            ValueError: `length` is negative or beyond what is held, or a ring has wrapped and overwritten what the next
                token would see; `slack` columns can be taken back then.
        """
        held = self.length
        if not 0 <= length <= held:
            raise ValueError(f"cannot roll back to {length}: the cache holds {held} columns")
        if length == 0:
            return self.reset()
        if length < held and not all(layer.can_forget(length) for layer in self.layers):
            raise ValueError(
                f"cannot roll back to {length}: {held} columns have wrapped the local layers' rings, which can take "
                f"back {self.slack} (slack); reset() and feed the prefix again"
            )
        for layer in self.layers:
            layer.forget(length)

    def reset(self) -> None:
        """Empty the cache, also after an interrupted pass; it then takes keys of any dtype again."""
        for layer in self.layers:
            layer.reset()


class NoCache:
    """What the model uses when the caller passes no cache: the queries attend over this pass's own keys."""

    def __init__(self, config: Gemma2Config) -> None:
        self.layers: Sequence[LayerStore] = [self] * config.num_hidden_layers  # none holds anything, so one serves all

    def next_positions(self, tokens: Tensor, given: Tensor | None = None) -> Tensor:
        if given is not None:
            return given
        return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)

    def update(self, keys: Tensor, values: Tensor, positions: Tensor) -> Held:
        return keys, values, positions
