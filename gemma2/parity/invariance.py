"""What `verify` demands of `numerics="batch-invariant"`: equal bits, and a control that must differ without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gemma2.cache import HybridCache
from gemma2.model import Gemma2
from gemma2.numerics import with_numerics
from gemma2.tokens import left_padded

PROFILE = "batch-invariant"
ROWS, SLOT = 32, 7  # rows of the batch, and the one that is also computed alone
LAYERS = 2  # a local and a global one
Pair = tuple[Tensor, Tensor]


class NothingSeen(Exception):
    """The control did not differ, so that equal bits under the profile say nothing."""


def slot_and_alone(model: Gemma2, ids: Tensor) -> Pair:
    """Row 7 of 32, rows of unequal length padded on the left, and the same row alone. Raises NothingSeen."""
    longest = min(len(ids), 12)
    lengths = [1 + (5 * row) % longest for row in range(ROWS)]
    rows = [ids[row % 4 : row % 4 + length].tolist() for row, length in enumerate(lengths)]
    tokens, positions = left_padded(rows, ids.device)
    row = torch.tensor([rows[SLOT]], device=ids.device)

    def pair(subject: Gemma2) -> Pair:
        return _computed(subject, tokens, positions)[SLOT, -lengths[SLOT] :], _computed(subject, row, None)[0]

    return _held(model, pair)


def fed_and_whole(model: Gemma2, ids: Tensor, sizes: list[int]) -> Pair:
    """Ids fed to a cache in parts of so many, and in one pass without one. Raises NothingSeen."""

    def pair(subject: Gemma2) -> Pair:
        cache = HybridCache(subject.config, 1, len(ids))
        parts = [_computed(subject, part, None, cache) for part in ids[None].split(sizes, dim=1)]
        return torch.cat(parts, dim=1)[0], _computed(subject, ids[None], None)[0]

    return _held(model, pair)


def _held(model: Gemma2, pair: Callable[[Gemma2], Pair]) -> Pair:
    few = _first_layers(model, LAYERS)
    found = pair(with_numerics(few, PROFILE))
    if torch.equal(*found) and torch.equal(*pair(few)):
        raise NothingSeen(f"every bit is equal without numerics={PROFILE!r} too, so the check would show nothing here")
    return found


def _first_layers(model: Gemma2, count: int) -> Gemma2:
    """A new model of the first layers alone, with the parameters of `model` itself."""
    types = model.config.layer_types[:count]
    config = replace(model.config, num_hidden_layers=len(types), layer_types=types)
    with torch.device("meta"):
        new = Gemma2(config)
    mine = dict(model.named_parameters())
    new.load_state_dict({name: mine[name].detach() for name in dict(new.named_parameters())}, assign=True)
    new.model.rotary_emb.to(model.device)
    return new.eval()


@torch.no_grad()
def _computed(model: Gemma2, tokens: Tensor, positions: Tensor | None, cache: HybridCache | None = None) -> Tensor:
    """The final residual stream and the last logits beside it, [b t n]: all that a row computes."""
    hidden = model.model(tokens, positions, cache)
    return torch.cat((hidden, model.softcap(model.lm_head(hidden, model.model.embed_tokens))), dim=-1).cpu()
