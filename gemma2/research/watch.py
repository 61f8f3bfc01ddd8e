"""Hooks on named sites, set for the length of a `with` block: what capturing and editing are made of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from gemma2.cache import NoCache
from gemma2.model import Gemma2
from gemma2.research.sites import Site, chosen
from gemma2.twins import hidden_by

Act = Callable[[Site, Tensor], Tensor | None]  # a site and its value -> what takes the value's place, or None


@contextmanager
def watching(model: Any, see: Callable[[str, Tensor], None], sites: Iterable[str] | str = "*") -> Iterator[None]:
    """Call `see(name, value)` for every chosen site of every pass inside the block, in the order of computation.

    The value is the model's own tensor, part of the graph: copy or detach what is kept. Scores and patterns [b h t s]
    have their keys in the order of positions, empty slots and padding first. Where a cache holds the keys in another
    order, the value is a sorted copy, through which gradients flow. A compiled model runs eagerly inside the block,
    since compiled code passes hooks by.

    Args:
        model: a `Gemma2`, a `Gemma`, or one of them in a wrapper such as `torch.compile`'s.
        sites: names or globs, see `gemma2.research.sites.chosen`.
    Raises:
        ValueError: a pattern that names no site, or a site that a twin hides.
    """

    def act(site: Site, value: Tensor) -> None:
        see(site.name, value)

    with acting(model, sites, act):
        yield


@contextmanager
def acting(model: Any, sites: Iterable[str] | str, act: Act) -> Iterator[None]:
    """Call `act(site, value)` at every chosen site of every pass inside the block; a tensor that it returns takes the
    value's place. Keys are in the order of positions, in what it is given and in what it returns.

    Raises:
        ValueError: as `watching`.
    """
    inner = model_of(model)
    picked = chosen(inner.config, sites)
    check_shown(inner, picked)
    order: dict[str, Tensor | None] = {}  # path of an attention -> how its keys must be sorted, None if they are
    with ExitStack() as hooks:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes a second
            hooks.enter_context(torch.compiler.set_stance("force_eager"))
        for site in picked.values():
            attend = site.module.rpartition(".")[0] if "s" in site.shape.split() else ""
            if attend and attend not in order:
                order[attend] = None
                tap = inner.get_submodule(f"{attend}.hook_key_positions")
                hooks.callback(tap.register_forward_hook(_sorter(order, attend)).remove)
            module = reduce(getattr, site.module.split("."), inner)  # a quarter of get_submodule's time
            hooks.callback(module.register_forward_hook(_hook(act, site, order, attend)).remove)
        yield


class Passes:
    """The passes of a model inside a `with` block: which one runs, and where its tokens stand.

    Attributes:
        number: of the running pass, from 0; -1 before the first.
        positions: of its tokens [b t]; negative for padding. None until they are known.
        begun: called when a pass begins, with its token ids [b t]; by then `number` is that of the pass.
    """

    def __init__(self, model: Gemma2) -> None:
        self.model, self.number = model, -1
        self.positions: Tensor | None = None
        self.begun: Callable[[Tensor], object] = lambda tokens: None
        self._announced = False

    def __enter__(self) -> Passes:
        inner = self.model.model
        self._hooks = ExitStack()
        self._hooks.callback(inner.register_forward_pre_hook(self._announce, with_kwargs=True).remove)
        self._hooks.callback(inner.embed_tokens.register_forward_pre_hook(self._begin).remove)
        self._hooks.callback(inner.rotary_emb.register_forward_pre_hook(self._locate).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def located(self, t: int | None = None) -> Tensor:
        """The positions of the pass's last `t` tokens: the head may compute fewer than the layers.

        Raises:
            ValueError: they are not known yet, as at the embedding of a model whose parts are called by themselves.
        """
        if self.positions is None:
            raise ValueError("the positions of these tokens are not known yet: take blocks.0.hook_resid_pre instead")
        length = self.positions.shape[1]
        return self.positions if t is None or t == length else self.positions[:, length - t :]

    def _announce(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = dict(zip(("tokens", "positions", "cache"), args, strict=False)) | options
        store = NoCache(self.model.config) if given.get("cache") is None else given["cache"]
        self.positions = store.next_positions(given["tokens"], given.get("positions"))
        self._announced = True

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._announced:  # whoever calls the model's parts by themselves, as transformers' face does
            self.positions = None
        self._announced = False
        self.number += 1
        self.begun(args[0])

    def _locate(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.positions is None:
            self.positions = args[0]


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


def _hook(
    act: Act, site: Site, order: dict[str, Tensor | None], attend: str
) -> Callable[[nn.Module, object, Tensor], Tensor | None]:
    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor | None:
        index = order.get(attend)
        if index is None:
            return act(site, output)
        index = index[:, None, None].expand_as(output)
        found = act(site, output.gather(-1, index))
        return None if found is None else found.gather(-1, index.argsort(dim=-1))

    return hook
