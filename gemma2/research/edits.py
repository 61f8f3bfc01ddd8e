"""Changing what flows through a model: `edit`, and ready edits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma2.research.seen import Seen
from gemma2.research.sites import Site, chosen
from gemma2.research.watch import Passes, acting, check_shown, model_of
from gemma2.research.where import Met, Where, check_where, marked


@dataclass(frozen=True)
class Hook:
    """Where an edit stands, as it is told.

    Attributes:
        site: the place, with its name, its shape in letters and its axis of tokens.
        step: which pass it is, counted from 0 since the block began: in a generation, 0 is the prompt.
        positions: of the value's tokens [b t]; negative for padding.
    """

    site: Site
    step: int
    positions: Tensor

    @property
    def name(self) -> str:
        return self.site.name

    def layer(self) -> int:
        """The number of the layer. Raises ValueError for a site that is in none."""
        parts = self.name.split(".")
        if parts[0] != "blocks":
            raise ValueError(f"{self.name} is in no layer")
        return int(parts[1])


Edit = Callable[[Tensor, Hook], Tensor | None]


@contextmanager
def edit(
    model: Any,
    edits: Mapping[str, Edit | Sequence[Edit]],
    *,
    positions: Where = None,
    steps: Where = None,
) -> Iterator[None]:
    """Change the values at named sites, in every pass inside the block.

        with edit(model, {"blocks.3.hook_attn_out": zero()}):
            model(tokens)

    Edits act in the order in which they are given, and blocks in the order in which they were entered; a `capture`
    that is entered later sees what they made. Gradients flow through them.

    Args:
        model: a `Gemma2`, a `Gemma`, or one of them in a wrapper.
        edits: site (a name, a glob or an alias) -> function(value, hook), or several. It returns what takes the value's
            place, of the same shape, dtype and device; or None, and the value stays. It must not write into the value.
            Scores and patterns have their keys in the order of positions.
        positions: change these tokens only: positions in the text (0 is the BOS), a slice of them, or negative numbers,
            which count from the end of each pass. A position, or a step, that no pass had is told in a warning at the
            end of the block.
        steps: change these passes only, counted from 0 since the block began: in a generation, 0 is the prompt, and
            every token after it is one. A number, a list or a slice.
    Raises:
        ValueError: a name that is no site, a site that a twin hides; inside the block, an edit that returns something
            of another shape, dtype or device, or that wrote into the value, which other sites may share.
    """
    inner = model_of(model)
    where, when = check_where(positions), check_where(steps)
    by_site: dict[str, list[Edit]] = {}
    for pattern, given in edits.items():
        functions = [given] if callable(given) else list(given)
        if not functions or not all(map(callable, functions)):
            raise ValueError(f"{pattern}: an edit is a function (value, hook) -> value or None, not {given!r}")
        for name in chosen(inner.config, pattern):
            by_site.setdefault(name, []).extend(functions)
    if not by_site:
        raise ValueError("there is no edit: give {site: function}")
    check_shown(inner, by_site)
    with ExitStack() as stack:
        passes = stack.enter_context(Passes(inner))
        met, steps_met = Met(where, "position"), Met(when, "step")

        def act(site: Site, value: Tensor) -> Tensor | None:
            if when is not None:
                step = torch.tensor([[passes.number]], device="cpu")
                steps_met.meet(step)
                if not bool(marked(when, step).any()):
                    return None
            hook = Hook(site, passes.number, passes.located(value.shape[site.axis]))
            met.meet(hook.positions)
            changed = value
            for function in by_site[site.name]:
                version = None if changed.is_inference() else changed._version
                found = function(changed, hook)
                if version is not None and changed._version != version:
                    raise ValueError(
                        f"{site.name}: the edit wrote into the value, which other sites may share: return a changed "
                        "value instead, as value * 0.5 or value.clone()"
                    )
                if found is not None:
                    _check_like(found, changed, site)
                    changed = found
            if changed is value or where is None:
                return None if changed is value else changed
            meant = marked(where, hook.positions).to(value.device)
            shape = [1] * value.ndim
            shape[0], shape[site.axis] = meant.shape
            return torch.where(meant.view(shape), changed, value)

        stack.enter_context(acting(inner, by_site, act))
        yield
    met.warn()
    steps_met.warn()


def zero() -> Edit:
    """Zeros in the value's place."""
    return lambda value, hook: torch.zeros_like(value)


def mean(source: Seen | Tensor) -> Edit:
    """The mean over all tokens of another run, or a given value that is broadcast: "mean ablation"."""

    def change(value: Tensor, hook: Hook) -> Tensor:
        if isinstance(source, Tensor):
            return _broadcast(source, value, hook)
        other = source.stacked(hook.name)
        return other.mean(dim=(0, hook.site.axis), keepdim=True).to(value).expand_as(value)

    return change


def resample(source: Seen, seed: int = 0) -> Edit:
    """At each token, the value at a token of another run, drawn at random: "resample ablation"."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def change(value: Tensor, hook: Hook) -> Tensor:
        other, axis = source.stacked(hook.name).to(value), hook.site.axis
        if "s" in hook.site.shape.split():
            raise ValueError(f"{hook.name} has keys, which are not those of other tokens: resample another site")
        tokens = other.movedim(axis, 1).flatten(0, 1)
        shape = (value.shape[0], value.shape[axis])
        drawn = torch.randint(len(tokens), shape, generator=generator, device="cpu").to(value.device)
        return tokens[drawn].movedim(1, axis)

    return change


def replace(source: Seen | Tensor) -> Edit:
    """The value of another run at the same positions: "activation patching". Tokens at positions that it does not have
    stay as they are. A tensor must have the value's shape, or one that is broadcast to it."""

    def change(value: Tensor, hook: Hook) -> Tensor:
        if isinstance(source, Tensor):
            return _broadcast(source, value, hook)
        other, axis = source.stacked(hook.name).to(value), hook.site.axis
        if "s" in hook.site.shape.split() and other.shape[-1] != value.shape[-1]:
            raise ValueError(f"{hook.name} has {value.shape[-1]} keys here and {other.shape[-1]} in the other run")
        theirs = source.positions[:, source.positions.shape[1] - other.shape[axis] :].to(value.device)
        same = (hook.positions[:, :, None].to(value.device) == theirs[:, None]) & (hook.positions >= 0)[:, :, None]
        if len(same) != len(value):
            raise ValueError(f"{hook.name}: the other run has {len(theirs)} rows, this one {len(value)}")
        taken = hook.site.take(other.expand(len(value), *other.shape[1:]), same.int().argmax(dim=2))
        shape = [1] * value.ndim
        shape[0], shape[axis] = same.shape[:2]
        return torch.where(same.any(dim=2).view(shape), taken, value)

    return change


def add(direction: Tensor, coefficient: float = 1.0) -> Edit:
    """value + coefficient * direction; the direction [d] is used as it is, not normalised."""
    return lambda value, hook: value + coefficient * _broadcast(direction, value, hook)


def steer(direction: Tensor, coefficient: float) -> Edit:
    """value + coefficient * the direction's unit vector."""
    return add(direction / direction.norm(), coefficient)


def remove(direction: Tensor) -> Edit:
    """The value without its part along a direction [d]: x - (x . u) u, with the unit vector u."""

    def change(value: Tensor, hook: Hook) -> Tensor:
        unit = _broadcast(direction.to(value) / direction.to(value).norm(), value, hook)
        return value - (value * unit).sum(dim=-1, keepdim=True) * unit

    return change


def silence(heads: int | Iterable[int]) -> Edit:
    """Zeros for some heads, at a site that has heads: queries, keys, values, scores, patterns or outputs."""
    indices = [heads] if isinstance(heads, int) else list(heads)

    def change(value: Tensor, hook: Hook) -> Tensor:
        letters = hook.site.shape.split()
        axis = next((i for i, letter in enumerate(letters) if letter in "hg"), None)
        if axis is None:
            raise ValueError(f"{hook.name} has no heads: silence them at blocks.{{i}}.attn.hook_z")
        outside = [head for head in indices if not 0 <= head < value.shape[axis]]
        if outside:
            raise ValueError(f"{hook.name} has heads 0 to {value.shape[axis] - 1}, not {outside[0]}")
        return value.index_fill(axis, torch.tensor(indices, device=value.device), 0.0)

    return change


def _broadcast(given: Tensor, value: Tensor, hook: Hook) -> Tensor:
    """A given tensor in the value's shape, dtype and device. Raises ValueError where it has no such shape."""
    try:
        return given.to(value).expand_as(value)
    except RuntimeError:
        shapes = f"{list(given.shape)} does not broadcast to {list(value.shape)} [{hook.site.shape}]"
        raise ValueError(f"{hook.name}: the tensor given has another shape than the value: {shapes}") from None


def _check_like(found: Any, value: Tensor, site: Site) -> None:
    if not isinstance(found, Tensor):
        raise ValueError(f"{site.name}: the edit returned {type(found).__name__}, not a tensor or None")
    for what in ("shape", "dtype", "device"):
        theirs, ours = getattr(found, what), getattr(value, what)
        if theirs != ours:
            said = (list(theirs), list(ours)) if what == "shape" else (theirs, ours)
            raise ValueError(f"{site.name}: the edit returned {what} {said[0]}, and {said[1]} is needed")
