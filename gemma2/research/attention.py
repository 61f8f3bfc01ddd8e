"""Where attention looks: maps of chosen heads, how far back they look, and how near scores come to their cap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gemma2 import ops
from gemma2.checks import check_count
from gemma2.model import Gemma2
from gemma2.research.seen import capture
from gemma2.research.watch import model_of, watching
from gemma2.research.where import Where, check_there, check_where

NEAR = 0.5  # of the cap: beyond it the cap's slope is below 0.79


def attention_maps(
    model: object,
    tokens: Tensor,
    layers: Iterable[int] | int | None = None,
    heads: Iterable[int] | int | None = None,
    *,
    queries: Where = None,
) -> dict[int, Tensor]:
    """The attention weights of chosen heads: layer -> [b heads n t], with heads in the order that was given.

    Args:
        model: a `Gemma2`, a `Gemma`, or one of them in a wrapper.
        tokens: ids [b t].
        layers, heads: numbers; default all.
        queries: positions that look, as in `capture`; default all.
    Raises:
        ValueError: a layer, head or position that is not there.
    """
    inner = model_of(model)
    wanted = _numbers("layers", layers, inner.config.num_hidden_layers)
    chosen_heads = _numbers("heads", heads, inner.config.num_attention_heads)
    where, kept = check_where(queries), dict[int, Tensor]()
    check_there(where, tokens)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in wanted]
    with torch.no_grad(), capture(inner, names, positions=where) as seen:
        inner.model(tokens)
    for layer, name in zip(wanted, names, strict=True):
        kept[layer] = seen[name][:, chosen_heads]
    return kept


@dataclass(frozen=True)
class AttentionStats:
    """How each head attends to a text, as means over its queries. Every tensor is [layers heads], in float32 or wider.

    The first position is left out as a query, because it sees nothing but itself.

    Attributes:
        windows: of each layer, in tokens; None for a global one.
        beyond: what `far` counts from.
        distance: tokens back, on average.
        far: the share of attention on keys more than `beyond` tokens back, over the queries that have such keys. NaN
            where none has.
        bos: the share on position 0, the BOS. A local layer loses sight of it.
        largest: |score| before the cap, at most.
        near: the share of scores whose |score| before the cap is above half of the cap.
        slope: of the cap, averaged over scores: 1 where the cap changes nothing.
    """

    windows: tuple[int | None, ...]
    beyond: int
    distance: Tensor
    far: Tensor
    bos: Tensor
    largest: Tensor
    near: Tensor
    slope: Tensor

    def rows(self) -> list[tuple[str, ...]]:
        """A table for people: each layer's mean over heads, and the largest score. The first row names the columns."""
        head = (
            "layer",
            "kind",
            "tokens back",
            f"> {self.beyond} back",
            "on BOS",
            "largest |score|",
            "> cap/2",
            "slope of cap",
        )
        found: list[tuple[str, ...]] = [head]
        for layer, window in enumerate(self.windows):
            kind = "global" if window is None else f"local {window}"
            far = self.far[layer].nanmean()
            found.append(
                (
                    str(layer),
                    kind,
                    f"{self.distance[layer].mean():.1f}",
                    "-" if far.isnan() else f"{far:.1%}",
                    f"{self.bos[layer].mean():.1%}",
                    f"{self.largest[layer].max():.1f}",
                    f"{self.near[layer].mean():.1%}",
                    f"{self.slope[layer].mean():.3f}",
                )
            )
        return found


def attention_stats(
    model: object, tokens: Tensor, *, positions: Tensor | None = None, beyond: int | None = None
) -> AttentionStats:
    """Count, layer by layer in one pass, how a text is attended to. Patterns are dropped as soon as they are counted.

    Args:
        model: a `Gemma2`, a `Gemma`, or one of them in a wrapper.
        tokens: ids [b t], at least two.
        positions: [b t], negative for padding, as the model takes them.
        beyond: tokens back from which on attention counts as far; default half of the window.
    Raises:
        ValueError: fewer than two tokens.
    """
    inner = model_of(model)
    config = inner.config
    beyond = config.sliding_window // 2 if beyond is None else check_count("beyond", beyond)
    if tokens.shape[-1] < 2:
        raise ValueError("attention is counted over a text of at least two tokens: the first sees nothing but itself")
    at = torch.arange(tokens.shape[1], device=inner.device).expand(tokens.shape) if positions is None else positions
    counts = _Counts(inner, at.to(inner.device), beyond)
    with torch.no_grad(), watching(inner, counts.see, ["blocks.*.attn.hook_scores_raw", "blocks.*.attn.hook_pattern"]):
        inner.model(tokens, at)
    windows = tuple(config.window(layer) for layer in range(config.num_hidden_layers))
    return AttentionStats(windows, beyond, **counts.stacked())


class _Counts:
    """What is counted of each layer, as its scores and pattern come by."""

    def __init__(self, model: Gemma2, positions: Tensor, beyond: int) -> None:
        self.config, self.positions, self.beyond = model.config, positions, beyond
        names = [field.name for field in fields(AttentionStats)][2:]
        self.found: dict[str, list[Tensor]] = {name: [] for name in names}

    def see(self, name: str, value: Tensor) -> None:
        """Count a value [b h t s], one head at a time: what is between needs memory for one."""
        at = self.positions.to(value.device)
        asks = (at >= 1)[:, :, None]  # [b t 1]
        back = at[:, :, None] - at[:, None, :]  # [b t s]
        if name.endswith("hook_pattern"):
            far = (at > self.beyond)[:, :, None] & (back > self.beyond)
            count, far_count = asks.sum(), (at > self.beyond).sum()
            for head in value.unbind(dim=1):
                weights = ops.upcast(head) * asks
                self._add("distance", (weights * back).sum() / count)
                self._add("bos", (weights * (at == 0)[:, None]).sum() / count)
                self._add("far", (weights * far).sum() / far_count)
        else:
            cap = self.config.attn_logit_softcapping
            window = self.config.window(int(name.split(".")[1]))
            seen = ops.visible(at, at, window)[:, 0] & asks
            for head in value.unbind(dim=1):
                scores = ops.upcast(head)[seen]
                self._add("largest", scores.abs().max())
                self._add("near", (scores.abs() > NEAR * cap).sum() / scores.numel())
                self._add("slope", (1 - torch.tanh(scores / cap).square()).mean())

    def _add(self, name: str, value: Tensor) -> None:
        self.found[name].append(value)

    def stacked(self) -> dict[str, Tensor]:
        """What was counted, each [layers h], on the CPU."""
        heads = self.config.num_attention_heads
        return {name: torch.stack([one.cpu() for one in found]).view(-1, heads) for name, found in self.found.items()}


def _numbers(what: str, given: Iterable[int] | int | None, count: int) -> list[int]:
    """Chosen layers or heads. Raises ValueError for one that is not there."""
    wanted = list(range(count)) if given is None else [given] if isinstance(given, int) else list(given)
    for number in wanted:
        if type(number) is not int or not 0 <= number < count:
            raise ValueError(f"{what} must be some of 0 to {count - 1}, not {number!r}")
    if not wanted:
        raise ValueError(f"{what} must be some of 0 to {count - 1}, not none")
    return wanted
