"""How near scores and logits come to their caps, before the caps: cap * tanh(x / cap) bends what is large.

The cap's slope at x is 1 - tanh(x / cap)^2: 1 where the cap does nothing, 0 where it hides every difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemma2 import ops
from gemma2.model import Gemma2
from gemma2.research.ablation import batches, parts
from gemma2.research.sites import Site
from gemma2.research.watch import acting, model_of
from gemma2.scoring import hidden

BINS, END = 40, 2.0  # of the histogram of |x| / cap; what is beyond its end counts in the last bin


@dataclass(frozen=True)
class Near:
    """How near the values of one kind come to their cap.

    Attributes:
        name: "scores, layer 3", "logits", ...
        count: values.
        largest: the largest |x|.
        half, most: shares of |x| above 0.5 and 0.9 of the cap.
        slope: the mean slope of the cap there.
        shares: of the values in each bin of |x| / cap, from 0 to `END`.
    """

    name: str
    cap: float
    count: int
    largest: float
    half: float
    most: float
    slope: float
    shares: tuple[float, ...]


class Tally:
    """Counts values as they come."""

    def __init__(self, cap: float) -> None:
        self.cap, self.count, self.largest = cap, 0, 0.0
        self.sums = torch.zeros(3 + BINS, dtype=torch.float64, device="cpu")

    def add(self, x: Tensor) -> None:
        """Any number of values of any shape, before the cap."""
        ratio = ops.upcast(x.flatten()).div(self.cap).abs()
        if not len(ratio):
            return
        slope = (1 - ratio.tanh().square()).sum()
        bins = torch.histc(ratio.clamp(max=END * (1 - 1e-6)), bins=BINS, min=0, max=END)
        above = torch.stack([(ratio > 0.5).sum(), (ratio > 0.9).sum()])
        self.count += len(ratio)
        self.largest = max(self.largest, float(ratio.max()) * self.cap)
        self.sums += torch.cat([x.cpu().double() for x in (above, slope[None], bins)])  # Apple's GPUs have no float64

    def near(self, name: str) -> Near:
        half, most, slope, *shares = (self.sums / max(1, self.count)).tolist()
        return Near(name, self.cap, self.count, self.largest, half, most, slope, tuple(shares))


@torch.no_grad()
def saturation(
    model: Any, ids: Sequence[int], context: int, bos: int, *, tick: Callable[[int], object] = lambda tokens: None
) -> list[Near]:
    """How near a text brings a model to its caps: the scores of each layer, of all, the largest score of each query and
    head, all logits, and the top logit of each token. Scores are those of keys that the query sees.

    Args:
        ids, context, bos: as in `gemma2.research.ablation.measure`.
        tick: called with a number of tokens whenever so many were computed.
    Raises:
        ValueError: a twin hides the scores.
    """
    inner = model_of(model)
    config = inner.config
    layers = [Tally(config.attn_logit_softcapping) for _ in range(config.num_hidden_layers)]
    tops, total = Tally(config.attn_logit_softcapping), Tally(config.attn_logit_softcapping)
    logits, top = Tally(config.final_logit_softcapping), Tally(config.final_logit_softcapping)

    def score(layer: int, scores: Tensor, visible: Tensor) -> None:
        layers[layer].add(scores.masked_select(visible))
        seen = visible.any(dim=-1).expand(scores.shape[:3])
        tops.add(scores.masked_fill(~visible, -torch.inf).amax(dim=-1)[seen])

    for batch in batches(ids, context, bos):
        inputs = batch[:, :-1].to(inner.device)
        with _scores(inner, score):
            states = hidden(inner, inputs)
        for part in parts(inner, states.shape):
            raw = inner.lm_head(states[:, part], inner.model.embed_tokens)
            logits.add(raw)
            top.add(raw.amax(dim=-1))
        tick(inputs.numel())
    for tally in layers:
        total.count, total.largest = total.count + tally.count, max(total.largest, tally.largest)
        total.sums += tally.sums
    found = [tally.near(f"scores, layer {i}") for i, tally in enumerate(layers)]
    found += [total.near("scores, all layers"), tops.near("largest score of each query and head")]
    return [*found, logits.near("logits"), top.near("top logit of each token")]


@contextmanager
def _scores(model: Gemma2, told: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call told(layer, scores [b h t s] before the cap, which are visible [b 1 t s]) in every pass inside the block."""
    visible: dict[str, Tensor] = {}  # by site

    def enter(site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            positions, keys = inputs[3:5]  # scores come with their keys in the order of positions
            visible[site] = ops.visible(positions, keys.sort(dim=1).values, module.window)  # type: ignore[arg-type]

        return hook

    def see(site: Site, scores: Tensor) -> None:
        told(int(site.name.split(".")[1]), scores, visible.pop(site.name))

    names = [f"blocks.{i}.attn.hook_scores_raw" for i in range(model.config.num_hidden_layers)]
    with acting(model, names, see), ExitStack() as hooks:
        for i, name in enumerate(names):
            attend = model.get_submodule(f"model.layers.{i}.self_attn.attend")
            hooks.callback(attend.register_forward_pre_hook(enter(name)).remove)
        yield
