"""TransformerLens's words for a Gemma 2: code that was written for a `HookedTransformer` runs on `hooked(gemma)`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma2.ops import upcast
from gemma2.research.activation_cache import ActivationCache
from gemma2.research.hooked_hooks import Hooks, NamesFilter, with_gradient
from gemma2.research.hooked_text import HookedText, Input
from gemma2.research.lens_words import GRAD, PosSlice, residual_directions, sliced
from gemma2.research.seen import capture
from gemma2.research.sites import Site, in_table
from gemma2.research.watch import acting


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


class _Reached(Exception):
    """The pass has come to where it should end."""


class Hooked(HookedText):
    """A Gemma 2 with TransformerLens's methods. Made by `hooked`; `HookedText` has those for texts, and `HookedHooks`
    those for hooks."""

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
        self,
        input: Input,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool = True,
        *,
        stop_at_layer: int | None = None,
    ) -> Any:
        """Logits [b t v]; or by `return_type` "loss", the mean cross-entropy of each next token, "both", or None.

        Texts of unequal length are padded on the right, and the loss counts padding as text, as in TransformerLens.

        Args:
            stop_at_layer: compute the layers before this one only, and return the residual stream [b t d], whatever
                `return_type` is. 0 is the embedding alone; negative numbers count from the last layer.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f'return_type is "logits", "loss", "both" or None, not {return_type!r}')
        layers = None if stop_at_layer is None else self._before(stop_at_layer)
        tokens = self._ids(input, prepend_bos)
        with self._standing():
            if layers is not None:
                return self._stream(tokens, layers)
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
        return_type: str | None = "logits",
        *,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        pos_slice: PosSlice = None,
        **options: Any,
    ) -> tuple[Any, ActivationCache]:
        """One pass, and the values at the chosen sites, detached.

        Args:
            names_filter: a name, a glob, a list of them, or a function that is asked about each name; default all.
            device: to keep the values on.
            remove_batch_dim: leave the batch axis out, which must be 1.
            incl_bwd: the gradients of the loss too, whose names end in "_grad"; needs `return_type="loss"`. Gradients
                of the parameters are not computed.
            pos_slice: of the tokens to keep: a number, a list, a slice or its arguments.
            return_type, options: of the call.
        Raises:
            ValueError: names that are no sites, a filter that chooses none, gradients of what is not a loss.
        """
        picked = self._picked(names_filter)
        if incl_bwd and (return_type != "loss" or options.get("loss_per_token") or "stop_at_layer" in options):
            raise ValueError('incl_bwd takes gradients of the mean loss: give return_type="loss", and all layers')
        nodes: dict[str, Tensor] = {}

        def keep(site: Site, value: Tensor) -> Tensor:
            nodes[site.name] = with_gradient(site.name, value)
            return nodes[site.name]

        with self._standing(), capture(self.model, list(picked), device=device) as seen:
            with acting(self.model, picked if incl_bwd else (), keep):
                found = self(input, return_type, **options)
            values = dict(seen)
            if incl_bwd:
                gradients = torch.autograd.grad(found, list(nodes.values()), materialize_grads=True)
                values |= {name + GRAD: one.to(device) for name, one in zip(nodes, gradients, strict=True)}
        values = {name: sliced(one, pos_slice, in_table(name.removesuffix(GRAD)).axis) for name, one in values.items()}
        cache = ActivationCache(values, self.model, self.to_single_token)
        return found, cache.remove_batch_dim() if remove_batch_dim else cache

    def run_with_hooks(
        self,
        input: Input,
        *args: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **options: Any,
    ) -> Any:
        """One pass with hooks, see `hooks`. Gradients reach `bwd_hooks` also when `backward()` is called later."""
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(input, *args, **options)

    def _before(self, layer: int) -> int:
        """How many layers there are before one. Raises ValueError for one that is not there."""
        n = self.model.config.num_hidden_layers
        if type(layer) is not int or not -n <= layer <= n:
            raise ValueError(f"stop_at_layer must be from {-n} to {n}, not {layer!r}")
        return layer % n if layer < 0 else layer

    def _stream(self, tokens: Tensor, layers: int) -> Tensor:
        """The residual stream after so many layers, without computing what follows."""
        found: list[Tensor] = []

        def stop(site: Site, value: Tensor) -> None:
            found.append(value)
            raise _Reached

        site = f"blocks.{layers - 1}.hook_resid_post" if layers else "hook_embed"
        with suppress(_Reached), acting(self.model, site, stop):
            self.model.model(tokens)
        return found[0]


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
