"""TransformerLens's words for places, slices and directions, as `research.hooked` and its cache take them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from gemma2 import ops
from gemma2.model import Gemma2
from gemma2.research.aliases import canonical
from gemma2.research.marks import embedding_rows

SCALE, INVERSE = "hook_scale", "hook_inv_scale"  # TransformerLens's, and its reciprocal, which this model has
GRAD = "_grad"  # at the end of a gradient's name in a cache
RESULT, Z = "attn.hook_result", "attn.hook_z"  # a head's result is made from z
SHORTER = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_post": "post",
}
SHORT = re.compile(r"([a-z_]+?)(\d+)(ln[12](?:_post)?)?[am]?")  # as in cache["k6"] and cache["scale4ln1"]
PosSlice = int | tuple[int | None, ...] | slice | Sequence[int] | Tensor | None


def shown(site: str) -> str:
    """A site's name as TransformerLens has it."""
    return site.replace(INVERSE, SCALE)


def named(key: Any, layers: int) -> str:
    """The name that a cache's key stands for: a name or an alias; "k6"; or ("resid_post", 5), where -1 is the last
    layer. A `hook_scale` stays one, and a gradient's ending stays."""
    if isinstance(key, str) and key.endswith(GRAD):
        return named(key.removesuffix(GRAD), layers) + GRAD
    short = None if isinstance(key, tuple) else SHORT.fullmatch(str(key))
    if short:
        key = (short[1], int(short[2]), short[3])
    elif key in ("embed", "scale", "inv_scale", "normalized"):
        key = (key,)
    if isinstance(key, tuple):
        name, layer, *rest = (*key, None)[: max(len(key), 2)]
        if isinstance(layer, int) and layer < 0:
            layer += layers
        key = (SHORTER.get(name, name), layer, *rest)
    return canonical(key)


def residual_directions(model: Gemma2, tokens: str | int | Tensor, to_single_token: Callable[[str], int]) -> Tensor:
    """The direction of each token's logit in the normalised stream, with the final norm's gain in it: [... d].

    This is a column of TransformerLens's `W_U`, with `fold_ln=True`.
    """
    if isinstance(tokens, str):
        tokens = to_single_token(tokens)
    ids = torch.as_tensor(tokens, device=model.device)
    ids = ids.reshape(()) if ids.numel() == 1 else ids
    rows = embedding_rows(model, ids)
    return (ops.upcast(rows) * (1.0 + ops.upcast(model.model.norm.weight))).to(model.dtype)


def of_scale(gradient: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of a scale from that of its reciprocal, and the other way with the scale for the reciprocal."""
    return -gradient * inverse.square()


def sliced(value: Tensor, which: PosSlice, dim: int) -> Tensor:
    """Cut an axis as TransformerLens's `Slice` does: a number takes the axis away, everything else keeps it."""
    if which is None:
        return value
    if isinstance(which, int):
        return value.select(dim, which)
    if isinstance(which, tuple):
        which = slice(*which)
    index = torch.arange(value.shape[dim], device=value.device)[which] if isinstance(which, slice) else which
    return value.index_select(dim, torch.as_tensor(index, device=value.device))


def check_one_row(rows: Set[int]) -> None:
    """Raises ValueError for values with other counts of rows than one, whose batch axis is to be left out."""
    if rows - {1}:
        raise ValueError(f"the batch axis cannot be removed: it has {max(rows)} rows")
