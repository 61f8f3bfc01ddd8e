"""What each place of a run does to a number, by gradients: attribution patching and integrated gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma2.model import Gemma2
from gemma2.research.seen import Seen, capture
from gemma2.research.sites import Site, chosen
from gemma2.research.watch import acting, check_shown, model_of
from gemma2.research.where import Where, check_where, marked

Metric = Callable[[Tensor], Tensor]  # logits [b t v] -> one number
STEPS = 16


def attribution_patching(
    model: Any,
    tokens: Tensor,
    source: Tensor | Mapping[str, Tensor],
    metric: Metric,
    sites: Iterable[str] | str = "blocks.*.hook_resid_pre",
    *,
    positions: Where = None,
) -> dict[str, Tensor]:
    """An estimate, to first order, of how `metric` changes when a site is given the values of another run.

    It is (their value - ours) x the gradient of `metric`, of all sites from one forward and one backward pass.
    Activation patching itself, `edit(model, {site: replace(source)})`, takes a pass a site; where the estimate is large
    or the runs are far apart, check it by that. Source: Nanda 2023, "Attribution patching"; Syed et al. 2023,
    arXiv:2310.10348.

    Args:
        model: a `Gemma2`, a `Gemma`, or one of them in a wrapper.
        tokens: ids of the run that is changed, [b t].
        source: ids [b t] of the other run; or its values by site, as `capture` gives them.
        metric: from logits [b t v] to one number, by operations of PyTorch.
        sites: names, globs or aliases.
        positions: of the tokens that are changed; default all. What stands elsewhere is 0.
    Returns:
        site -> effects, of the shape of the site. The sum over an axis is the estimate for changing all of it.
    Raises:
        ValueError: names that are no sites, runs of unequal shape, or a metric that is not one number or takes no
            gradient.
    """
    inner, picked = _checked(model, tokens, source, sites)
    where = check_where(positions)
    theirs = _values(inner, source, picked)
    values, gradients = _gradients(inner, tokens, metric, picked, {})
    return {
        name: _difference(theirs[name], values[name], site, where) * gradients[name] for name, site in picked.items()
    }


def integrated_gradients(
    model: Any,
    tokens: Tensor,
    source: Tensor | Mapping[str, Tensor],
    metric: Metric,
    sites: Iterable[str] | str = "hook_embed",
    *,
    steps: int = STEPS,
    positions: Where = None,
) -> dict[str, Tensor]:
    """How much each value of a site has to do with the change of `metric` when the site goes over to another run.

    The site moves on a straight line from our value to theirs, and the gradient is averaged on the way: (their value -
    ours) x the mean gradient. The effects sum to the whole change of `metric`, that is, to what
    `edit(model, {site: replace(source)})` does. Source: Sundararajan et al. 2017, arXiv:1703.01365.

    Args:
        steps: points on the line, each a forward and a backward pass for each site. They are those of Gauss and
            Legendre, with which few are enough; take more where the sum is not the change.
        model, tokens, source, metric, sites, positions: as in `attribution_patching`.
    Returns:
        site -> effects, of the shape of the site.
    Raises:
        ValueError: as `attribution_patching`; or no step.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps!r}")
    inner, picked = _checked(model, tokens, source, sites)
    where = check_where(positions)
    theirs, ours = _values(inner, source, picked), _values(inner, tokens, picked)
    points, weights = (x.tolist() for x in np.polynomial.legendre.leggauss(steps))  # on [-1, 1]
    found = {}
    for name, site in picked.items():
        start, difference = ours[name], _difference(theirs[name], ours[name], site, where)
        mean = torch.zeros_like(start)
        for point, weight in zip(points, weights, strict=True):
            on_the_way = start + difference * ((point + 1) / 2)
            _, gradients = _gradients(inner, tokens, metric, {name: site}, {name: on_the_way})
            mean += gradients[name] * (weight / 2)
        found[name] = difference * mean
    return found


def _checked(
    model: Any, tokens: Tensor, source: Tensor | Mapping[str, Tensor], sites: Iterable[str] | str
) -> tuple[Gemma2, dict[str, Site]]:
    inner = model_of(model)
    picked = chosen(inner.config, sites)
    check_shown(inner, picked)
    if isinstance(source, Tensor):
        if source.shape != tokens.shape:
            raise ValueError(f"source is {list(source.shape)} and tokens are {list(tokens.shape)}: they must be alike")
        return inner, picked
    for name in picked:
        if name not in source:
            raise ValueError(f"source has no values of {name}: capture that site too, or give ids")
    return inner, picked


def _values(model: Gemma2, given: Tensor | Mapping[str, Tensor], picked: Mapping[str, Site]) -> Mapping[str, Tensor]:
    if not isinstance(given, Tensor):
        return given
    with torch.no_grad(), capture(model, list(picked)) as seen:
        model(given)
    found: Seen = seen
    return found


def _gradients(
    model: Gemma2, tokens: Tensor, metric: Metric, picked: Mapping[str, Site], placed: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and gradients of the metric at sites, in a pass in which the values of `placed` stand in their places."""
    kept: dict[str, Tensor] = {}

    def act(site: Site, value: Tensor) -> Tensor:
        value = placed.get(site.name, value)
        # Nothing before a value without a gradient is a chosen site: the graph may begin there.
        kept[site.name] = value if value.requires_grad else value.detach().requires_grad_()
        return kept[site.name]

    with torch.inference_mode(False), torch.enable_grad(), acting(model, picked, act):
        number = metric(model(tokens))
        if not isinstance(number, Tensor) or number.numel() != 1:
            said = f"{list(number.shape)}" if isinstance(number, Tensor) else type(number).__name__
            raise ValueError(f"the metric must give one number as a tensor, not {said}")
        if not number.requires_grad:
            raise ValueError("the metric takes no gradient: compute it from the logits with operations of PyTorch")
        gradients = torch.autograd.grad(number.reshape(()), list(kept.values()), materialize_grads=True)
    return {name: value.detach() for name, value in kept.items()}, dict(zip(kept, gradients, strict=True))


def _difference(theirs: Tensor, ours: Tensor, site: Site, where: Where) -> Tensor:
    """From our value to theirs, 0 at tokens that are not meant."""
    if theirs.shape != ours.shape:
        raise ValueError(f"{site.name} is {list(theirs.shape)} in the source and {list(ours.shape)} here")
    difference = theirs.to(ours) - ours
    if where is None:
        return difference
    meant = marked(where, torch.arange(ours.shape[site.axis], device=ours.device)[None])
    shape = [1] * ours.ndim
    shape[site.axis] = meant.shape[1]
    return difference * meant.view(shape)
