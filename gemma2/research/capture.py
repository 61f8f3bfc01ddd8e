"""Seeing what flows through a model: hooks on named sites, set for the length of a `with` block."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gemma2.model import Gemma2
from gemma2.research.sites import Site, chosen
from gemma2.twins import hidden_by


@contextmanager
def watching(model: Any, see: Callable[[str, Tensor], None], sites: Iterable[str] | str = "*") -> Iterator[None]:
    """Call `see(name, value)` for every chosen site of every pass inside the block, in the order of computation.

    The value is the model's own tensor, part of the graph: copy or detach what is kept. Scores and patterns [b h t s]
    have their keys in the order of positions, empty slots and padding first. Where a cache holds the keys in another
    order, the value is a sorted copy, through which gradients flow. A compiled model runs eagerly inside the block,
    since compiled code passes hooks by.

    Args:
        model: a `Gemma2`, a `Gemma`, or one of them in a wrapper such as `torch.compile`'s.
    Raises:
        ValueError: a pattern that names no site, or a site that a twin hides.
    """
    inner = model_of(model)
    picked = chosen(inner.config, sites)
    check_shown(inner, picked)
    order: dict[str, Tensor | None] = {}  # path of an attention -> how its keys must be sorted, None if they are
    by_module: dict[str, list[Site]] = {}
    for site in picked.values():
        by_module.setdefault(site.module, []).append(site)
    with ExitStack() as hooks:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes a second
            hooks.enter_context(torch.compiler.set_stance("force_eager"))
        for path, names in by_module.items():
            attend = path.rpartition(".")[0] if any("s" in site.shape.split() for site in names) else ""
            if attend and attend not in order:
                order[attend] = None
                tap = inner.get_submodule(f"{attend}.hook_key_positions")
                hooks.callback(tap.register_forward_hook(_sorter(order, attend)).remove)
            hooks.callback(inner.get_submodule(path).register_forward_hook(_teller(see, names, order, attend)).remove)
        yield


@contextmanager
def capture(model: Any, sites: Iterable[str] | str = "*") -> Iterator[dict[str, Tensor]]:
    """A dict that fills with the detached values of the last pass inside the block: site -> tensor.

    with capture(model, "blocks.*.hook_resid_post") as seen:
        model(tokens)
    """
    seen: dict[str, Tensor] = {}
    with watching(model, lambda name, value: seen.__setitem__(name, value.detach()), sites):
        yield seen


def model_of(model: Any) -> Gemma2:
    """The `Gemma2` itself, of a `Gemma`, of a face or out of a wrapper. Raises ValueError where there is none."""
    found = model
    while not isinstance(found, Gemma2):
        inner = next((name for name in ("_orig_mod", "module", "whole", "model") if hasattr(found, name)), None)
        if inner is None:
            raise ValueError(f"expected a Gemma2 or a Gemma, not {type(model).__name__}")
        found = getattr(found, inner)
    return found


def check_shown(model: Gemma2, sites: Iterable[str]) -> None:
    """Raises ValueError for a site whose place is inside a twin that does not show it."""
    known = chosen(model.config)
    for name in sites:
        found = hidden_by(model, known[name].module)
        if found is not None:
            path, twin = found
            raise ValueError(
                f"{name} is hidden by the twin {type(twin).__name__} at {path}: restore it to see this site"
            )


def _sorter(order: dict[str, Tensor | None], attend: str) -> Callable[[nn.Module, object, Tensor], None]:
    def hook(module: nn.Module, inputs: object, positions: Tensor) -> None:
        sorted_ = positions.shape[1] < 2 or bool((positions[:, 1:] >= positions[:, :-1]).all())
        order[attend] = None if sorted_ else positions.argsort(dim=1, stable=True)

    return hook


def _teller(
    see: Callable[[str, Tensor], None], sites: list[Site], order: dict[str, Tensor | None], attend: str
) -> Callable[[nn.Module, object, Tensor], None]:
    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        index = order.get(attend)
        if index is not None:
            output = output.gather(-1, index[:, None, None].expand_as(output))
        for site in sites:
            see(site.name, output)

    return hook
