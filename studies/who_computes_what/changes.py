"""What other implementations compute instead, injected into our model: each change gives a changed copy that shares
the parameters, and leaves the model alone.

A change is given the chunks in which a run feeds its ids to the other implementation's cache. Our copy takes all ids
in one pass nevertheless: what a cache holds and which of its slots are seen is a sum on the scores, by the positions of
queries and keys and by where chunks begin and end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2 import Gemma2, ops
from gemma2.config import GLOBAL, LOCAL
from gemma2.model import SoftCap, SoftcapAttention, TiedHead
from gemma2.numerics.parts import HeadInParts, ScoresInParts, masked
from gemma2.twins import Make, on, replaced, sharing
from studies.who_computes_what.models import CAPACITY

Chunks = Sequence[int]  # none: one pass without a cache
HIDDEN = float("-inf")
EMPTY = CAPACITY  # slots of a cache that hold zeros, after the keys of a run


class Change(Protocol):
    """Our model with a change injected, as it is for a run that is fed in these chunks."""

    def __call__(self, model: Gemma2, chunks: Chunks = (), /) -> Gemma2: ...


class CappedHiddenHead(HeadInParts):
    def __init__(self, plain: TiedHead) -> None:
        super().__init__(plain)
        self.received = lambda x: ops.softcap(x, 50.0)


class AddingCap(SoftCap):
    """The cap, and then a sum on the capped scores."""

    def __init__(self, plain: SoftCap, addend: Tensor) -> None:
        super().__init__(plain.cap)
        self.addend = addend

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.addend.to(x.dtype)


class CacheAttention(ScoresInParts):
    """Attention over the run's keys and, after them, empty slots.

    Args:
        addend: [t s+EMPTY], HIDDEN where a key is not seen; that alone says what is seen.
    """

    def __init__(self, plain: SoftcapAttention, addend: Tensor) -> None:
        super().__init__(plain)
        self.softcap = AddingCap(plain.softcap, addend)
        self.masked = lambda scores, visible: masked(scores, addend > HIDDEN)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, key_positions: Tensor) -> Tensor:
        k, v = (F.pad(x, (0, 0, 0, 0, 0, EMPTY)) for x in (k, v))
        return super().forward(q, k, v, positions, key_positions)


def without(paths: str) -> Make:
    """The modules whose paths fit this pattern give back what they are given."""
    return lambda path, module: nn.Identity() if fnmatch(path, paths) else None


@dataclass(frozen=True)
class Fed:
    """A run that is fed to a cache, by the positions in it.

    Attributes:
        query: [t 1].
        start, stop: [t 1], of the query's chunk: it ends before `stop`.
        key: [1 s+EMPTY]; the last `EMPTY` are no keys of the run, and have the numbers that follow.
        back: [t s+EMPTY], how far a key lies behind the query.
    """

    query: Tensor
    start: Tensor
    stop: Tensor
    key: Tensor

    @property
    def back(self) -> Tensor:
        return self.query - self.key

    @property
    def slot(self) -> Tensor:
        """[1 s+EMPTY]: 0, 1 ... for what is no key of the run, negative for its keys."""
        return self.key - len(self.query)

    def as_published(self, window: int | None) -> Tensor:
        seen = (self.back >= 0) & (self.slot < 0)
        return seen if window is None else seen & (self.back < window)


# What is added to the capped scores in a layer of that window (None: global): [t s+EMPTY], or bool, for seen or not.
Rule = Callable[[Fed, int | None], Tensor]


def fed(chunks: Chunks) -> Fed:
    lengths = torch.tensor(chunks)
    stops = lengths.cumsum(0)
    t = int(stops[-1])
    start, stop = (x.repeat_interleave(lengths)[:, None] for x in (stops - lengths, stops))
    return Fed(torch.arange(t)[:, None], start, stop, torch.arange(t + EMPTY)[None])


def cached(rule: Rule, model: Gemma2, chunks: Chunks) -> Gemma2:
    """The model whose attention sees what `rule` says where it is fed in chunks."""
    other = changed()(model)
    if not chunks:
        return other
    run = fed(chunks)

    def twin(plain: SoftcapAttention) -> CacheAttention:
        addend = rule(run, plain.window)
        if addend.dtype == torch.bool:
            addend = torch.zeros(addend.shape).masked_fill(~addend, HIDDEN)
        return CacheAttention(plain, addend)

    return replaced(other, on(SoftcapAttention, twin)).model


def with_cache(rule: Rule) -> Change:
    def change(model: Gemma2, chunks: Chunks = ()) -> Gemma2:
        return cached(rule, model, chunks)

    return change


def changed(**numbers: Any) -> Change:
    """The same parameters under a config in which these numbers are others."""

    def change(model: Gemma2, chunks: Chunks = ()) -> Gemma2:
        return sharing(model, replace(model.config, **numbers)).eval()

    return change


def swapped(model: Gemma2, chunks: Chunks = ()) -> Gemma2:
    other = {LOCAL: GLOBAL, GLOBAL: LOCAL}
    return changed(layer_types=tuple(other[kind] for kind in model.config.layer_types))(model, chunks)


def without_score_cap(model: Gemma2, chunks: Chunks = ()) -> Gemma2:
    return replaced(changed()(model, chunks), without("*.attend.softcap")).model


def as_torchtune(model: Gemma2, chunks: Chunks = ()) -> Gemma2:
    other = cached(first_keys, changed(attn_logit_softcapping=30.0)(model, chunks), chunks)
    replaced(other, on(TiedHead, CappedHiddenHead))
    replaced(other, without("softcap"))
    for layer in other.model.layers:  # their weights alone are others, so they need no twins
        before = layer.get_submodule("pre_feedforward_layernorm")
        after = layer.get_submodule("post_feedforward_layernorm")
        before.weight, after.weight = after.weight, before.weight
    return other


def first_keys(run: Fed, window: int | None) -> Tensor:
    """The window counts from a query's row in its chunk: decoding one at a time, every query sees the first keys."""
    seen = run.as_published(None)
    row = run.query - run.start
    return seen if window is None else seen & ((run.key - row).abs() < window)


def own_chunk(run: Fed, window: int | None) -> Tensor:
    """Nothing that was fed before."""
    return run.as_published(window) & (run.key >= run.start)


def early_shift(run: Fed, window: int | None) -> Tensor:
    """Where decoding fills the window, a key is dropped one step early, until all that were there then are gone; an
    empty slot is seen in its place."""
    seen = run.as_published(window)
    if window is None or run.stop[0] >= window:
        return seen
    early = (run.query >= window - 1) & (run.query < 2 * window - 2)
    return torch.where(early, seen & (run.back < window - 1) | (run.slot == 0), seen)


def added_mask(empty: bool) -> Rule:
    """Nothing that the cache holds is hidden: 1 is added for what should be seen, 0 for later keys of the chunk and, if
    `empty`, for the empty slots of global layers."""

    def rule(run: Fed, window: int | None) -> Tensor:
        held = (run.slot < 0) & (run.key < run.stop)
        if window is not None:
            held = held & (run.key >= run.stop - window)
        elif empty:
            held = held | (run.slot >= run.stop)
        return run.as_published(None).float().masked_fill(~held, HIDDEN)

    return rule
