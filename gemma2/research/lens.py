"""The logit lens: what the model would say if a value of the residual stream were its last one.

    for name, logits in logit_lens(gemma, tokens, positions=-1):
        print(name, logits.argmax(-1))

A lens here is the model's own final norm, head and cap, so at the last layer it gives the model's own logits, bit for
bit. The cap is part of it: without the cap, probabilities of Gemma 2 are other ones. nostalgebraist 2020, "interpreting
GPT: the logit lens".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma2 import ops
from gemma2.checks import check_count
from gemma2.model import Gemma2
from gemma2.research.fitted import FittedLens
from gemma2.research.seen import Seen, capture
from gemma2.research.sites import chosen, missing
from gemma2.research.watch import model_of
from gemma2.research.where import Where, check_there, check_where, columns

STREAM = "blocks.*.hook_resid_post"
VALUES = 2**26  # logits that a table holds at once


def unembed(model: object, stream: Tensor, at: Tensor | None = None) -> Tensor:
    """Final norm, head and cap of a residual stream [b t d]: logits [b t v], or [b n v] at the columns `at` [b n].

    The modules are the model's own, so twins of them, packed weights and their hooks count. Gradients flow.
    """
    inner = model_of(model)
    return _head(inner, inner.model.norm(stream), at)


def logit_lens(
    model: object,
    source: Tensor | Seen,
    sites: Iterable[str] | str = STREAM,
    *,
    positions: Where = None,
    fitted: FittedLens | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The name of each site and the lens's logits there, [b n v], one site at a time and without gradients.

    At the last layer's `hook_resid_post` the logits are the model's own: equal in every bit to `model(tokens)`, and to
    `model(tokens, last=n)` where the positions are the last n. Other choices of positions may differ by rounding, since
    a product of other rows may be summed in another order. So may fast twins in a pass that wants gradients: compare
    under `torch.no_grad()`.

    Args:
        model: a `Gemma2`, a `Gemma`, or one of them in a wrapper.
        source: token ids [b t], for a pass of their own; or what a `capture` has seen, of a generation too.
        sites: names, globs or aliases of sites with the width of the residual stream, [b t d]. What a layer adds
            (`hook_attn_out`, `hook_mlp_out`) is read alone, as if it were the whole stream. `ln_final` has been
            through the final norm, and gets none here.
        positions: which tokens to look at, as in `capture`; default all. Logits of all take b x t x v numbers.
        fitted: a Jacobian or tuned lens, which carries each value to the last layer first.
    Raises:
        ValueError: a site of another width, a name that is no site, a lens that does not have the site or was fitted on
            another model.
        KeyError: a site that was not captured.
    """
    inner, where = model_of(model), check_where(positions)
    names = sites_of_width(inner, sites)
    if fitted is not None:
        fitted.check_model(names, inner)
    check_there(where, source.positions if isinstance(source, Seen) else source)
    seen = _seen(inner, source, names)
    return _each(inner, seen, names, where, fitted)


@dataclass(frozen=True)
class LensTable:
    """What a lens says at some sites and positions.

    Attributes:
        names: of the sites, in the order of computation.
        positions: of the tokens [b n].
        ids: the k likeliest tokens, [sites b n k].
        probabilities: of these, [sites b n k], in float32 or float64.
        targets: the token that follows in the text, [b n]; -1 where none does.
        target_probabilities: what the lens gives it, [sites b n]; NaN where there is none.
        target_ranks: how many tokens are likelier, [sites b n]; -1 where there is none.
    """

    names: list[str]
    positions: Tensor
    ids: Tensor
    probabilities: Tensor
    targets: Tensor
    target_probabilities: Tensor
    target_ranks: Tensor


def lens_table(
    model: object,
    tokens: Tensor,
    sites: Iterable[str] | str = STREAM,
    *,
    positions: Where = None,
    top: int = 5,
    fitted: FittedLens | None = None,
    progress: Callable[[str], object] = lambda name: None,
) -> LensTable:
    """The likeliest tokens at each site and position. It holds the logits of some positions of one site at a time, so
    that a large vocabulary does not fill the memory.

    Args:
        tokens: ids [b t].
        top: how many tokens.
        progress: called with the name of each site that is done.
        sites, positions, fitted: as in `logit_lens`.
    Raises:
        ValueError: as `logit_lens`; `top` beyond the vocabulary.
    """
    inner, where = model_of(model), check_where(positions)
    if check_count("top", top, 1) > inner.config.vocab_size:
        raise ValueError(f"top must be at most the vocabulary's {inner.config.vocab_size}, not {top}")
    names = sites_of_width(inner, sites)
    if fitted is not None:
        fitted.check_model(names, inner)
    check_there(where, tokens)
    seen = _seen(inner, tokens, names)
    at = columns(where, seen.positions)
    following = torch.cat((tokens[:, 1:], tokens.new_full((len(tokens), 1), -1)), dim=1).long()
    targets = following.gather(1, at.to(tokens.device))
    step = max(1, VALUES // (inner.config.vocab_size * len(tokens)))
    found = []
    for name in names:
        parts = []
        for some, wanted in zip(at.split(step, dim=1), targets.split(step, dim=1), strict=True):
            with torch.no_grad():
                logits = _lens(inner, name, seen.stacked(name), some, fitted)
                parts.append([part.cpu() for part in _likeliest(logits, wanted.to(logits.device), top)])
        found.append([torch.cat(kind, dim=1) for kind in zip(*parts, strict=True)])
        progress(name)
    ids, probabilities, own, ranks = (torch.stack(kind) for kind in zip(*found, strict=True))
    return LensTable(names, seen.positions.gather(1, at), ids, probabilities, targets.cpu(), own, ranks)


def sites_of_width(model: Gemma2, sites: Iterable[str] | str) -> list[str]:
    """The chosen sites, all of the residual stream's width. Raises ValueError for one of another width."""
    picked = chosen(model.config, sites)
    for name, site in picked.items():
        if site.shape != "b t d":
            raise ValueError(
                f"{name} is [{site.shape}]: a lens reads values of the residual stream's width, [b t d], such as "
                "blocks.*.hook_resid_post, blocks.*.hook_attn_out or hook_embed"
            )
    return list(picked)


def _seen(model: Gemma2, source: Tensor | Seen, names: list[str]) -> Seen:
    if isinstance(source, Seen):
        absent = [name for name in names if name not in source.names]
        if absent:
            raise KeyError(missing(absent[0], source.names))
        return source
    with torch.no_grad(), capture(model, names) as seen:
        model.model(source)  # without the head
    return seen


def _each(
    model: Gemma2, seen: Seen, names: list[str], where: Where, fitted: FittedLens | None
) -> Iterator[tuple[str, Tensor]]:
    at = None if where is None else columns(where, seen.positions)
    for name in names:
        with torch.no_grad():
            logits = _lens(model, name, seen.stacked(name), at, fitted)
        yield name, logits


def _lens(model: Gemma2, name: str, value: Tensor, at: Tensor | None, fitted: FittedLens | None) -> Tensor:
    value = value.to(model.device)
    if fitted is not None:
        value = fitted.carry(name, value)
    if name == "ln_final":
        return _head(model, value, at)
    if name.endswith("hook_normalized"):  # float32 in every model
        value = value.to(model.dtype)
    # The norm reads all columns, as in the model: so what is chosen has the model's bits.
    return _head(model, model.model.norm(value), at)


def _head(model: Gemma2, hidden: Tensor, at: Tensor | None) -> Tensor:
    if at is not None:
        hidden = hidden.gather(1, at.to(hidden.device)[:, :, None].expand(-1, -1, hidden.shape[-1]))
    return model.softcap(model.lm_head(hidden, model.model.embed_tokens))


def _likeliest(logits: Tensor, targets: Tensor, top: int) -> tuple[Tensor, ...]:
    """Of logits [b n v] and targets [b n]: ids and probabilities [b n k], the targets' probabilities and ranks."""
    logits = ops.upcast(logits)
    best, ids = logits.topk(top, dim=-1)
    total = logits.logsumexp(dim=-1, keepdim=True)
    there = targets >= 0
    own = logits.gather(-1, targets.clamp(min=0)[:, :, None])
    ranks = (logits > own).sum(dim=-1).masked_fill(~there, -1)
    shares = (own - total).exp()[:, :, 0].masked_fill(~there, float("nan"))
    return ids, (best - total).exp(), shares, ranks
