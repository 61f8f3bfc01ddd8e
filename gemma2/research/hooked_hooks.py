"""The part of `research.hooked` that has to do with hooks: in a `with` block, or until they are reset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from gemma2.research.aliases import canonical
from gemma2.research.edits import Edit, Hook, edit
from gemma2.research.lens_words import GRAD, INVERSE, RESULT, SCALE, PosSlice, Z, check_one_row, of_scale, shown, sliced
from gemma2.research.sites import Site, chosen, in_table, sites
from gemma2.research.watch import Passes, acting, model_of
from gemma2.twins import hidden_by

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
Function = Callable[..., Any]  # (value, hook) -> what takes the value's place, or None
Hooks = Sequence[tuple[NamesFilter, Function]]
Self = TypeVar("Self", bound="HookedHooks")
DIRECTIONS = ("fwd", "bwd")


@dataclass(frozen=True)
class HookPoint:
    """Where a hook function stands, as it is told.

    Attributes:
        name: of the site, as TransformerLens has it.
        step: which pass it is, from 0 since the hooks were set.
        positions: of the value's tokens [b t]; negative for padding.
        ctx: a dict of this site's own, the same for all functions. It lasts until `reset_hooks`.
    """

    name: str
    step: int
    positions: Tensor
    ctx: dict[str, Any]

    def layer(self) -> int:
        """The number of the layer. Raises ValueError for a site that is in none."""
        parts = self.name.split(".")
        if parts[0] != "blocks":
            raise ValueError(f"{self.name} is in no layer")
        return int(parts[1])


@dataclass(eq=False)
class _Held:
    """A function at some sites.

    Attributes:
        places: site -> the name that the function is told.
        standing: whether it is on the model now.
        dropped: whether it was reset since.
    """

    direction: str
    places: dict[str, str]
    function: Function
    permanent: bool = False
    standing: bool = False
    dropped: bool = False


class HookedHooks:
    """TransformerLens's methods for hooks.

    Attributes:
        model: the `Gemma2` itself; nothing in it is changed.
    """

    def __init__(self, model: Any) -> None:
        self.model = model_of(model)
        self._held: list[_Held] = []
        self._contexts: dict[str, dict[str, Any]] = {}  # of each site

    @contextmanager
    def hooks(
        self: Self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Self]:
        """Call functions at sites in every pass inside the block, also while generating.

        Args:
            fwd_hooks: (name, glob or function of names; function(value, hook) -> what takes its place, or None). The
                value is a copy, so that the function may write into it; what it wrote counts, as in TransformerLens.
            bwd_hooks: the same for gradients, in the backward pass of what was computed inside the block. A gradient
                must not be written into. Several functions at one site are all told the same gradient, and what the
                last one returns counts, as in TransformerLens.
            reset_hooks_end: False keeps them after the block, as `add_hook` does.
            clear_contexts: empty every `hook.ctx` at the end.
        Raises:
            ValueError: as `gemma2.research.edit`.
        """
        given = [
            _Held(direction, self._picked(where), function)
            for direction, several in zip(DIRECTIONS, (fwd_hooks, bwd_hooks), strict=True)
            for where, function in _pairs(several)
        ]
        if not reset_hooks_end:
            self._held += given
            given = []
        try:
            with self._standing(), self._set(given):
                yield self
        finally:
            if clear_contexts:
                self._contexts.clear()

    def add_hook(self, name: NamesFilter, hook: Function, dir: str = "fwd", is_permanent: bool = False) -> None:
        """Call a function at sites, in every call of this object from now on, until `reset_hooks`.

        The model itself keeps no hook: they are set when a method here computes, and taken off at its end. So the
        `Gemma` and other `hooked` objects do not feel them.

        Args:
            name, hook: as in `hooks`.
            dir: "fwd", or "bwd" for gradients.
            is_permanent: `reset_hooks` leaves it, unless it is told otherwise.
        """
        if dir not in DIRECTIONS:
            raise ValueError(f'dir is "fwd" or "bwd", not {dir!r}')
        ((where, function),) = _pairs([(name, hook)])
        self._held.append(_Held(dir, self._picked(where), function, is_permanent))

    def add_perma_hook(self, name: NamesFilter, hook: Function, dir: str = "fwd") -> None:
        """`add_hook` with `is_permanent`."""
        self.add_hook(name, hook, dir, is_permanent=True)

    def reset_hooks(
        self, clear_contexts: bool = True, direction: str = "both", including_permanent: bool = False
    ) -> None:
        """Forget what `add_hook` was given, and empty every `hook.ctx`. Hooks of a `with` block last until its end.

        Args:
            direction: "fwd", "bwd" or "both".
            including_permanent: those that were added as permanent too.
        """
        if direction not in (*DIRECTIONS, "both"):
            raise ValueError(f'direction is "fwd", "bwd" or "both", not {direction!r}')
        for one in self._held:
            one.dropped = direction in (one.direction, "both") and (including_permanent or not one.permanent)
        self._held = [one for one in self._held if not one.dropped]
        if clear_contexts:
            self._contexts.clear()

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: PosSlice = None,
    ) -> tuple[dict[str, Tensor], list[tuple[str, Function]], list[tuple[str, Function]]]:
        """A dict, and hooks for `hooks` that put values into it: (cache, fwd_hooks, bwd_hooks).

        Args:
            incl_bwd: hooks for gradients too, whose names end in "_grad"; else there are none.
            cache: the dict to use; default a new one.
            names_filter, device, remove_batch_dim, pos_slice: as in `run_with_cache`.
        """
        kept: dict[str, Tensor] = {} if cache is None else cache

        def save(value: Tensor, hook: HookPoint, ending: str = "") -> None:
            axis = in_table(hook.name.replace(SCALE, INVERSE)).axis
            value = sliced(value.detach().to(device), pos_slice, axis)
            if remove_batch_dim:
                check_one_row({len(value)})
            kept[hook.name + ending] = value[0] if remove_batch_dim else value

        names = list(self._picked(names_filter).values())
        back: list[tuple[str, Function]] = [(name, partial(save, ending=GRAD)) for name in names] if incl_bwd else []
        return kept, [(name, save) for name in names], back

    @contextmanager
    def _standing(self) -> Iterator[None]:
        """Set the added hooks that are not on the model yet. A block inside a block finds them set."""
        waiting = [one for one in self._held if not one.standing]
        with ExitStack() as stack:
            for one in waiting:
                one.standing = True
                stack.callback(setattr, one, "standing", False)
            stack.enter_context(self._set(waiting))
            yield

    @contextmanager
    def _set(self, several: Sequence[_Held]) -> Iterator[None]:
        edits: dict[str, list[Edit]] = {}
        back: dict[str, list[tuple[_Held, str]]] = {}
        for one in several:
            for site, name in one.places.items():
                if one.direction == "fwd":
                    edits.setdefault(site, []).append(self._edit(one, site, name))
                else:
                    back.setdefault(site, []).append((one, name))
        with ExitStack() as stack:
            if edits:
                stack.enter_context(edit(self.model, edits))
            if back:
                passes = stack.enter_context(Passes(self.model))
                stack.enter_context(acting(self.model, back, partial(self._back, back, passes)))
            yield

    def _edit(self, held: _Held, site: str, name: str) -> Edit:
        """A TransformerLens hook function as an edit."""

        def change(value: Tensor, hook: Hook) -> Tensor | None:
            if held.dropped:
                return None
            inverse = name.endswith(SCALE)
            given = 1 / value if inverse else value.clone()
            before = None if given.is_inference() else given._version
            found = held.function(given, hook=HookPoint(name, hook.step, hook.positions, self._context(site)))
            if found is None:
                if before is not None and given._version == before:
                    return None
                found = given
            changed: Tensor | None = 1 / found if inverse and isinstance(found, Tensor) else found
            return changed

        return change

    def _back(self, functions: dict[str, list[tuple[_Held, str]]], passes: Passes, site: Site, value: Tensor) -> Tensor:
        """Let the functions of a site see its gradient."""
        value = with_gradient(site.name, value)
        step, at = passes.number, passes.located(value.shape[site.axis])
        inverse = value.detach()

        def told(gradient: Tensor) -> Tensor | None:
            changed = None
            for held, name in functions[site.name]:
                if held.dropped:
                    continue
                scale = name.endswith(SCALE)
                given = of_scale(gradient, inverse) if scale else gradient
                found = held.function(given, hook=HookPoint(name, step, at, self._context(site.name)))
                if isinstance(found, tuple) and len(found) == 1:  # which TransformerLens takes too
                    (found,) = found
                if found is not None:
                    changed = of_scale(found, 1 / inverse) if scale else found
            return changed

        value.register_hook(told)
        return value

    def _context(self, site: str) -> dict[str, Any]:
        return self._contexts.setdefault(site, {})

    def _picked(self, names: NamesFilter) -> dict[str, str]:
        """The sites that a filter chooses, in the order of computation -> the names that they are told by."""
        config = self.model.config
        if names is None or callable(names):
            found = {
                name: shown(name)
                for name, site in sites(config).items()
                if hidden_by(self.model, site.module) is None and (names is None or names(shown(name)))
            }
            if not found:
                raise ValueError("the filter chose no site: it is asked about names as blocks.0.hook_resid_post")
            return found
        listed = [names] if isinstance(names, str) else names
        if not isinstance(listed, list | tuple):
            raise ValueError(f"names are text, a list of it or a function of a name, not {names!r}")
        wanted = [canonical(name) for name in listed]
        # TransformerLens's scale is kept as its reciprocal, and a head's result is made from z.
        by_ours = {name.replace(SCALE, INVERSE).replace(RESULT, Z): name for name in wanted}
        picked = {}
        for ours, name in by_ours.items():
            for site in chosen(config, ours):
                picked[site] = shown(site) if SCALE in name else site
        return {site: picked[site] for site in sites(config) if site in picked}


def with_gradient(site: str, value: Tensor) -> Tensor:
    """The value as a node of its own in the graph, so that the gradient that it is told is that of this site, also
    where the next site has the same tensor. Before a value that needs no gradient, as in a packed model, the graph
    begins here. Raises ValueError where gradients are turned off."""
    if not torch.is_grad_enabled():
        raise ValueError(f"{site} takes no gradient: call with gradients enabled")
    return value.view_as(value) if value.requires_grad else value.detach().requires_grad_()


def _pairs(hooks: Any) -> Hooks:
    """Raises ValueError for what is not a list of (name or filter, function)."""
    if not isinstance(hooks, list | tuple):
        raise ValueError(f"hooks are a list of (name, function), not {hooks!r}")
    for pair in hooks:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not callable(pair[1]):
            raise ValueError(f"a hook is (name, function(value, hook)), not {pair!r}")
    return hooks
