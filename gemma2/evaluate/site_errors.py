"""How far the activations of two models of one shape are from each other, at every site."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma2.cache import HybridCache
from gemma2.evaluate.states import Cut
from gemma2.model import Gemma2
from gemma2.research.sites import sites
from gemma2.research.watch import watching

PIECE = 32  # tokens whose values at all sites are held at once


@dataclass(frozen=True)
class SiteError:
    """Relative error ||B - A|| / ||A|| of the activations at a site, over all tokens. `layer` is None outside of the
    layers. Scores count where the query sees the key."""

    name: str
    layer: int | None
    error: float

    @property
    def kind(self) -> str:
        """The name without the layer, as `hook_resid_post`."""
        return self.name if self.layer is None else self.name.split(".", 2)[2]


def site_errors(a: Gemma2, b: Gemma2, cut: Cut) -> list[SiteError]:
    """Errors at all sites: both models take a few tokens at a time, in turn."""
    known = sites(a.config)
    sums = {name: torch.zeros(2, dtype=torch.float64, device="cpu") for name in known}
    values = dict[str, Tensor]()

    def see(name: str, value: Tensor) -> None:
        wanted, value = values[name], value.to(a.device)
        if name.endswith(("hook_scores_raw", "hook_attn_scores")):
            scores = values[name.rpartition(".")[0] + ".hook_attn_scores"]
            seen = scores > torch.finfo(scores.dtype).min
            wanted, value = wanted[seen], value[seen]
        wide = wanted.float() if a.device.type == "mps" else wanted.double()
        sums[name] += torch.stack([(value.to(wide.dtype) - wide).square().sum(), wide.square().sum()]).double().cpu()

    turns = ((a, values.__setitem__), (b, see))
    with torch.no_grad():
        for row in cut.rows:
            tokens = cut.tokens([row])
            stores = [HybridCache(model.config, 1, tokens.shape[1]) for model in (a, b)]
            for part in tokens.split(PIECE, dim=1):
                for (model, act), store in zip(turns, stores, strict=True):
                    with watching(model, act):  # one at a time: B may be A
                        model(part.to(model.device), cache=store)
    errors = {name: float((found[0] / found[1].clamp_min(1e-300)).sqrt()) for name, found in sums.items()}
    return [SiteError(name, _layer_of(name), error) for name, error in errors.items()]


def _layer_of(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("blocks.") else None
