"""TransformerLens's words for a Gemma 2: code that was written for a `HookedTransformer` runs on `hooked(gemma)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma2.ops import upcast
from gemma2.research.activation_cache import ActivationCache
from gemma2.research.aliases import canonical
from gemma2.research.edits import Edit, Hook, edit
from gemma2.research.hooked_text import HookedText, Input
from gemma2.research.lens_words import INVERSE, RESULT, SCALE, PosSlice, Z, residual_directions, shown, sliced
from gemma2.research.seen import capture
from gemma2.research.sites import Site, chosen, in_table, sites
from gemma2.research.watch import Passes, acting
from gemma2.twins import hidden_by

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
Function = Callable[[Tensor, "HookPoint"], Tensor | None]
Hooks = Sequence[tuple[str | Callable[[str], bool], Function]]


@dataclass(frozen=True)
class HookPoint:
    """Where a hook function stands, as it is told.

    Attributes:
        name: of the site, as TransformerLens has it.
        step: which pass it is, from 0 since the hooks were set.
        positions: of the value's tokens [b t]; negative for padding.
        ctx: a dict of this site's own, which lasts as long as the hooks.
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


@dataclass(frozen=True)
class HookedConfig:
    """Sizes by TransformerLens's names."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    eps: float
    device: torch.device
    dtype: torch.dtype


class Hooked(HookedText):
    """A Gemma 2 with TransformerLens's methods. Made by `hooked`; `HookedText` has those for texts."""

    @property
    def cfg(self) -> HookedConfig:
        c = self.model.config
        return HookedConfig(
            n_layers=c.num_hidden_layers,
            n_heads=c.num_attention_heads,
            n_key_value_heads=c.num_key_value_heads,
            d_model=c.hidden_size,
            d_head=c.head_dim,
            d_mlp=c.intermediate_size,
            d_vocab=c.vocab_size,
            n_ctx=c.max_position_embeddings,
            eps=c.rms_norm_eps,
            device=self.model.device,
            dtype=self.model.dtype,
        )

    @property
    def W_U(self) -> Tensor:  # noqa: N802  (TransformerLens's name)
        """[d v]: from the stream, divided by its scale, to logits before the cap. It is made at every use."""
        every = torch.arange(self.model.config.vocab_size, device=self.model.device)
        return residual_directions(self.model, every, self.to_single_token).T

    def __call__(
        self, input: Input, return_type: str | None = "logits", loss_per_token: bool = False, prepend_bos: bool = True
    ) -> Any:
        """Logits [b t v]; or by `return_type` "loss", the mean cross-entropy of each next token, "both", or None."""
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f'return_type is "logits", "loss", "both" or None, not {return_type!r}')
        tokens = self._ids(input, prepend_bos)
        logits = self.model(tokens)
        if return_type in ("logits", None):
            return logits if return_type else None
        loss = F.cross_entropy(upcast(logits[:, :-1]).transpose(1, 2), tokens[:, 1:].long(), reduction="none")
        loss = loss if loss_per_token else loss.mean()
        return loss if return_type == "loss" else (logits, loss)

    forward = __call__

    def run_with_cache(
        self,
        input: Input,
        *,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        pos_slice: PosSlice = None,
        **options: Any,
    ) -> tuple[Any, ActivationCache]:
        """One pass, and the values at the chosen sites, detached.

        Args:
            names_filter: a name, a glob, a list of them, or a function that is asked about each name; default all.
            device: to keep the values on.
            remove_batch_dim: leave the batch axis out, which must be 1.
            pos_slice: of the tokens to keep: a number, a list, a slice or its arguments.
            options: of the call, as `return_type`.
        Raises:
            ValueError: names that are no sites, or a filter that chooses none.
        """
        picked = self._picked(names_filter)
        with capture(self.model, list(picked), device=device) as seen:
            found = self(input, **options)
        values = {name: sliced(value, pos_slice, in_table(name).axis) for name, value in seen.items()}
        cache = ActivationCache(values, self.model, self.to_single_token)
        return found, cache.remove_batch_dim() if remove_batch_dim else cache

    @contextmanager
    def hooks(self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = ()) -> Iterator[Hooked]:
        """Call functions at sites in every pass inside the block, also while generating.

        Args:
            fwd_hooks: (name, glob or function of names; function(value, hook) -> what takes its place, or None). The
                value is a copy, so that the function may write into it; what it wrote counts, as in TransformerLens.
            bwd_hooks: the same for gradients, in the backward pass of what was computed inside the block. At a norm's
                scale they are told the gradient of `hook_inv_scale`.
        Raises:
            ValueError: as `gemma2.research.edit`.
        """
        edits: dict[str, list[Edit]] = {}
        for where, function in _pairs(fwd_hooks):
            for site, name in self._picked(where).items():
                edits.setdefault(site, []).append(_edit(function, name))
        back: dict[str, list[tuple[Function, dict[str, Any]]]] = {}
        for where, function in _pairs(bwd_hooks):
            for site in self._picked(where):
                back.setdefault(site, []).append((function, {}))
        with ExitStack() as stack:
            if edits:
                stack.enter_context(edit(self.model, edits))
            if back:
                passes = stack.enter_context(Passes(self.model))
                stack.enter_context(acting(self.model, back, _backward(back, passes)))
            yield self

    def run_with_hooks(self, input: Input, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), **options: Any) -> Any:
        """One pass with hooks, see `hooks`. Gradients reach `bwd_hooks` also when `backward()` is called later."""
        with self.hooks(fwd_hooks, bwd_hooks):
            return self(input, **options)

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


def hooked(model: Any) -> Hooked:
    """A Gemma 2 with TransformerLens's methods, so that code written for it runs unchanged.

        model = hooked(gemma)
        logits, cache = model.run_with_cache("And God said")
        cache["resid_post", 5]    # [b t d]

    Values are those of its `HookedTransformer` with `fold_ln=True`, see `gemma2.research.activation_cache`. Logits are
    after the cap, as there. It changes nothing in the model.

    Args:
        model: a `Gemma`; or a `Gemma2`, which takes ids alone.
    Raises:
        ValueError: neither.
    """
    return Hooked(model)


def _pairs(hooks: Any) -> Hooks:
    """Raises ValueError for what is not a list of (name or filter, function)."""
    if not isinstance(hooks, list | tuple):
        raise ValueError(f"hooks are a list of (name, function), not {hooks!r}")
    for pair in hooks:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not callable(pair[1]):
            raise ValueError(f"a hook is (name, function(value, hook)), not {pair!r}")
    return hooks


def _edit(function: Function, name: str) -> Edit:
    """A TransformerLens hook function as an edit."""
    ctx: dict[str, Any] = {}

    def change(value: Tensor, hook: Hook) -> Tensor | None:
        inverse = name.endswith(SCALE)
        given = 1 / value if inverse else value.clone()
        before = None if given.is_inference() else given._version
        found = function(given, HookPoint(name, hook.step, hook.positions, ctx))
        if found is None:
            if before is not None and given._version == before:
                return None
            found = given
        return 1 / found if inverse and isinstance(found, Tensor) else found

    return change


def _backward(
    functions: dict[str, list[tuple[Function, dict[str, Any]]]], passes: Passes
) -> Callable[[Site, Tensor], Tensor]:
    def act(site: Site, value: Tensor) -> Tensor:
        if not value.requires_grad:
            raise ValueError(f"{site.name} takes no gradient: call with gradients enabled")
        for function, ctx in functions[site.name]:
            hook = HookPoint(site.name, passes.number, passes.located(value.shape[site.axis]), ctx)
            value.register_hook(lambda gradient, function=function, hook=hook: function(gradient, hook))
        return value

    return act
