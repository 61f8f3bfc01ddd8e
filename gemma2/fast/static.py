"""A cache whose tensors never change shape or place: one compiled or captured graph serves every decode step."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2.cache import EMPTY, Held
from gemma2.config import Gemma2Config
from gemma2.errors import ContextOverflow
from gemma2.model import Gemma2
from gemma2.tokens import check_fit, check_positions, first_true


class StaticLayer:
    """All slots, always. A token's slot is its position modulo the ring; one more slot takes what is padding."""

    def __init__(self, batch: int, slots: int, config: Gemma2Config, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch, slots + 1, config.num_key_value_heads, config.head_dim)
        self.rows = torch.arange(batch, device=device)[:, None]
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [b s g c], rotated
        self.values = torch.zeros_like(self.keys)
        self.positions = torch.full(shape[:2], EMPTY, device=device)  # [b s]

    @property
    def slots(self) -> int:
        """Slots for tokens; the last one of the tensors is for padding."""
        return self.keys.shape[1] - 1

    def update(self, keys: Tensor, values: Tensor, positions: Tensor) -> Held:
        stored, new = (self.keys, self.values, self.positions), (keys, values, positions)
        check_fit(stored, new)
        t, slots = positions.shape[1], self.slots
        # One token overwrites only what it does not see. More would hide keys from each other, so those are joined.
        joined = [torch.cat(pair, dim=1) for pair in zip(self.held(), new, strict=True)] if t > 1 else None
        slot = torch.where(positions >= 0, positions % slots, slots)[:, -slots:]
        for old, x in zip(stored, new, strict=True):
            old[self.rows, slot] = x[:, -slots:].detach()
        k, v, p = joined or self.held()
        return k, v, p

    def held(self) -> Held:
        """What attention reads."""
        return self.keys, self.values, self.positions


class StaticCache:
    """Like `HybridCache`, of fixed shape: a graph compiled over it is compiled once, whatever has been fed.

    Attention then reads every slot at every step, so an eager model is faster with `HybridCache`. No gradient flows
    through what is stored, and nothing can be rolled back.

    Args:
        model: gives the architecture, the device and, of its keys, the dtype.
        batch: rows.
        capacity: most columns (tokens, padding included) that can be fed.
        dtype: of keys and values, where it is not that of the embedding.
        slack: slots of a ring beyond its window.
    """

    layer: type[StaticLayer] = StaticLayer

    def __init__(
        self, model: Gemma2, batch: int, capacity: int, dtype: torch.dtype | None = None, slack: int = 0
    ) -> None:
        config = model.config
        if batch < 1 or capacity < 1:
            raise ValueError(f"a cache needs at least one row and one column, not {batch} and {capacity}")
        self.batch, self.capacity = batch, capacity
        windows = [(config.window(i) or capacity) + slack for i in range(config.num_hidden_layers)]
        self.layers = [
            self.layer(batch, min(window, capacity), config, dtype or model.dtype, model.device) for window in windows
        ]

    @property
    def length(self) -> int:
        """Positions held by the longest row. Reads the device, so the model itself never asks."""
        return max(0, int(self.last_positions().max()) + 1)

    def last_positions(self) -> Tensor:
        """The highest position [b] of each row, -1 in an empty one."""
        return self.layers[0].positions.amax(dim=1)

    def next_positions(self, tokens: Tensor, given: Tensor | None = None) -> Tensor:
        """The positions [b t] of tokens [b t]: those given, or each row's next ones.

        Raises:
            ContextOverflow: a position does not fit. A compiled or captured graph does not check this; `generate_ids`
                checks it before it starts.
            ValueError: as `HybridCache.next_positions`.
        """
        if len(tokens) != self.batch:
            raise ValueError(f"the cache holds {self.batch} rows, the tokens have {len(tokens)}")
        last = self.last_positions()[:, None]
        positions = last + 1 + torch.arange(tokens.shape[1], device=tokens.device) if given is None else given
        if given is not None:
            check_positions(given, tokens, last, 0)
        if first_true(positions >= self.capacity) is not None:
            raise ContextOverflow(f"cache full: a position is beyond its capacity of {self.capacity}")
        return positions

    def reset(self) -> None:
        """Empty the cache; its tensors stay where they are."""
        for layer in self.layers:
            layer.positions.fill_(EMPTY)
