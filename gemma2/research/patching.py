"""Path patching: what one place of a run does to others along chosen paths alone.

Activation patching, `edit(model, {site: replace(source)})`, shows what a site does by every path that leads on from it.
Path patching keeps the paths from a sender to some receivers through the residual stream, and freezes all others.
Sources: Wang et al. 2022, "Interpretability in the Wild", arXiv:2211.00593, section 3.1 and appendix B; Goldowsky-Dill
et al. 2023, "Localizing Model Behavior with Path Patching", arXiv:2304.05969.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma2.model import Gemma2
from gemma2.research.edits import Edit, Hook, edit, replace
from gemma2.research.seen import Seen, capture
from gemma2.research.sites import chosen, sites
from gemma2.research.watch import check_shown, model_of
from gemma2.research.where import Where

Place = str | tuple[str, int | Sequence[int]]  # a site, or a site that has heads and which of them
Places = dict[str, list[int] | None]  # site -> heads, None for all of it
ATTENTION, MLP = "blocks.*.attn.hook_z", "blocks.*.hook_mlp_out"


def path_patching(
    model: Any,
    tokens: Tensor,
    source: Tensor | Seen,
    sender: Place | list[Place],
    receivers: Place | list[Place],
    *,
    positions: Where = None,
    through_mlps: bool = False,
    clean: Seen | None = None,
) -> Tensor:
    """The logits of `tokens` when the receivers see what the sender computes for `source`, and nothing else does.

        path_patching(gemma, tokens, other, ("blocks.2.attn.hook_z", 5), ("blocks.4.attn.hook_q", [0, 1]))

    One pass computes `tokens` with the sender's value from `source`, while every head and MLP keeps the value of the
    clean run; norms are computed anew. What the receivers are given there replaces their values in a second pass, in
    which all else is free. The paths from the sender to a receiver are those through the residual stream.

    Args:
        model: a `Gemma2`, a `Gemma`, or one of them in a wrapper.
        tokens: ids of the run that is patched, [b t].
        source: ids [b t] of the run that the sender's value comes from; or what `capture` has seen of it.
        sender: a site, or (a site with heads, head or heads); several in a list.
        receivers: the same. "logits" is the direct effect on the output.
        positions: of the sender that are patched; default all.
        through_mlps: let MLPs compute anew, so that paths may lead through them, as Wang et al. do.
        clean: what `capture` has seen of `tokens` at "blocks.*.attn.hook_z" and "blocks.*.hook_mlp_out", which saves a
            pass where there are many senders.
    Returns:
        Logits [b t v].
    Raises:
        ValueError: names that are no sites, heads that are none, a receiver that is computed before the senders, or
            runs of unequal shape.
    """
    inner = model_of(model)
    sending, receiving = (_places(inner, given) for given in (sender, receivers))
    _check_order(inner, sending, receiving)
    if isinstance(source, Tensor) and source.shape != tokens.shape:
        raise ValueError(f"source is {list(source.shape)} and tokens are {list(tokens.shape)}: they must be alike")
    frozen = chosen(inner.config, [ATTENTION] if through_mlps else [ATTENTION, MLP])
    check_shown(inner, [*frozen, *sending, *receiving])
    with torch.no_grad():
        clean = clean or _seen(inner, tokens, frozen)
        other = _seen(inner, source, sending) if isinstance(source, Tensor) else source
        # What is entered first is called first: the receivers are seen before they are frozen themselves.
        with (
            capture(inner, receiving) as given,
            edit(inner, {site: replace(clean) for site in frozen}),
            edit(inner, _replacing(sending, other), positions=positions),
        ):
            inner(tokens)
    with edit(inner, _replacing(receiving, given)):
        logits: Tensor = inner(tokens)
    return logits


def _places(model: Gemma2, given: Place | list[Place]) -> Places:
    places: Places = {}
    for place in given if isinstance(given, list) else [given]:
        name, heads = place if isinstance(place, tuple) else (place, None)
        for site in chosen(model.config, name):
            places[site] = None if heads is None else _heads(model, site, heads)
    if not places:
        raise ValueError("there is no place: give a site, or (a site, a head)")
    return places


def _heads(model: Gemma2, site: str, heads: int | Sequence[int]) -> list[int]:
    letters = set(sites(model.config)[site].shape.split()) & {"h", "g"}
    if not letters:
        raise ValueError(f"{site} has no heads: take blocks.{{i}}.attn.hook_z, hook_q, hook_k or hook_v")
    query = "h" in letters
    count = model.config.num_attention_heads if query else model.config.num_key_value_heads
    found = [heads] if isinstance(heads, int) else list(heads)
    outside = [head for head in found if not 0 <= head < count]
    if outside or not found:
        raise ValueError(f"{site} has heads 0 to {count - 1}, not {outside[0] if outside else 'none'}")
    return found


def _check_order(model: Gemma2, sending: Iterable[str], receiving: Iterable[str]) -> None:
    order = {name: number for number, name in enumerate(sites(model.config))}
    first = min(sending, key=order.__getitem__)
    for name in receiving:
        if order[name] <= order[first]:
            raise ValueError(f"{name} is computed before {first}, or is the same: nothing reaches it from there")


def _seen(model: Gemma2, tokens: Tensor, names: Iterable[str]) -> Seen:
    with capture(model, list(names)) as seen:
        model(tokens)
    return seen


def _replacing(places: Places, source: Seen) -> dict[str, Edit]:
    return {site: _of_heads(replace(source), heads) for site, heads in places.items()}


def _of_heads(change: Edit, heads: list[int] | None) -> Edit:
    """An edit of some heads alone."""
    if heads is None:
        return change

    def some(value: Tensor, hook: Hook) -> Tensor | None:
        found = change(value, hook)
        if found is None:
            return None
        axis = next(i for i, letter in enumerate(hook.site.shape.split()) if letter in "hg")
        index = torch.tensor(heads, device=value.device)
        return value.index_copy(axis, index, found.index_select(axis, index))

    return some
