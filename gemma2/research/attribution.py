"""Direct logit attribution: how much of a logit each layer and each head writes.

    found = attribute(gemma, tokens, targets=[id], heads=True)
    found.parts     # [parts b n k]: the embedding, then each layer's attention and MLP

The residual stream is a sum of what the embedding and the layers add. So before the cap a logit is a sum over them,
with the final norm's scale held at its value in this pass. After the cap it is no sum: `slope` says by how much a small
change before the cap comes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma2.checks import check_count
from gemma2.model import Gemma2, RMSNorm
from gemma2.research.marks import embedding_rows
from gemma2.research.seen import Seen, capture
from gemma2.research.sites import chosen
from gemma2.research.watch import model_of
from gemma2.research.where import Where, check_there, check_where

ADDED = ("hook_embed", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out")


@dataclass(frozen=True)
class Attribution:
    """Raw logits taken apart, in float64. b rows, n positions, k targets, h heads.

    Attributes:
        names: of the parts, as sites: "hook_embed", "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out", ...
        parts: [parts b n k]. They sum to `raw - rest`.
        heads: [layers b n k h], which sum to the layer's attention but for rounding; h is 0 if they were not asked for.
        raw: the raw logits, before the cap [b n k].
        rest: what the model's rounding adds: zero in float64, but for its last digits [b n k].
        logits: after the cap [b n k].
        slope: of the cap at the raw logit, 1 - tanh(raw / cap)^2 [b n k]: 1 far below the cap, 0 at it.
        targets: the ids [b n k].
        positions: of the tokens [b n].
    """

    names: list[str]
    parts: Tensor
    heads: Tensor
    raw: Tensor
    rest: Tensor
    logits: Tensor
    slope: Tensor
    targets: Tensor
    positions: Tensor


@torch.no_grad()
def attribute(
    model: object,
    tokens: Tensor,
    targets: Sequence[int] | Tensor | None = None,
    *,
    positions: Where = -1,
    heads: bool = False,
) -> Attribution:
    """Take the raw logits of some tokens apart, at some positions.

    A logit difference is a difference along the last axis: `parts[..., 0] - parts[..., 1]`.

    Args:
        model: a `Gemma2`, a `Gemma`, or one of them in a wrapper.
        tokens: ids [b t].
        targets: whose logits: k ids, the same everywhere, or ids [b n k]; default the likeliest token at each position.
        positions: where the prediction is made, as in `capture`; default the last.
        heads: each head's part too. It goes through its rows of `o_proj` and the norm after attention, whose scale is
            held as well. Rows of `o_proj` are read by calling it with one head at a time, so that twins of it count.
    Raises:
        ValueError: an id outside the vocabulary, targets of another shape, positions that are none.
    """
    inner, where = model_of(model), check_where(positions)
    config, final = inner.config, inner.model.norm
    sites = [*ADDED, "ln_final.hook_inv_scale", "ln_final"]
    if heads:
        sites += ["blocks.*.attn.hook_z", "blocks.*.ln1_post.hook_inv_scale"]
    if targets is not None:
        check_targets(targets, config.vocab_size)
    check_there(where, tokens)
    with capture(inner, sites, positions=where) as seen:
        inner.model(tokens)
    raw = inner.lm_head(seen["ln_final"], inner.model.embed_tokens)  # [b n v]
    ids = _ids(targets, raw)
    logits = inner.softcap(raw).gather(-1, ids).double()
    raw = raw.gather(-1, ids).double()
    # [b n k d]: what a unit of the stream at this coordinate adds to the raw logit.
    unit = embedding_rows(inner, ids).double() * _gain(final) * seen["ln_final.hook_inv_scale"].double()[:, :, None]
    names = list(chosen(config, ADDED))
    parts = torch.stack([_dot(seen[name].double(), unit) for name in names])
    by_head = _heads(inner, seen, unit) if heads else raw.new_empty(config.num_hidden_layers, *raw.shape, 0)
    slope = 1 - torch.tanh(raw / config.final_logit_softcapping).square()
    return Attribution(names, parts, by_head, raw, raw - parts.sum(0), logits, slope, ids, seen.positions)


def check_targets(targets: Sequence[int] | Tensor, vocab_size: int) -> None:
    """Raises ValueError for what is no list of ids of the vocabulary."""
    flat = targets.flatten().tolist() if isinstance(targets, Tensor) else list(targets)
    if not flat:
        raise ValueError("targets are empty: give at least one token id")
    for token in flat:
        if check_count("a target", token) >= vocab_size:
            raise ValueError(f"target {token} is outside the vocabulary [0, {vocab_size})")


def _ids(targets: Sequence[int] | Tensor | None, raw: Tensor) -> Tensor:
    """The targets as ids [b n k]."""
    b, n, _ = raw.shape
    if targets is None:
        return raw.argmax(dim=-1, keepdim=True)
    given = torch.as_tensor(targets, dtype=torch.int64).to(raw.device)
    if given.ndim == 1:
        return given.expand(b, n, -1)
    if given.ndim != 3 or given.shape[:2] != (b, n):
        raise ValueError(f"targets are {list(given.shape)}: give k ids, or ids [b n k], here [{b}, {n}, k]")
    return given


def _gain(norm: RMSNorm) -> Tensor:
    return 1.0 + norm.weight.double()


def _dot(value: Tensor, unit: Tensor) -> Tensor:
    """value [b n d] with unit [b n k d]: [b n k]."""
    return torch.einsum("bnd,bnkd->bnk", value, unit.to(value.device))


def _heads(model: Gemma2, seen: Seen, unit: Tensor) -> Tensor:
    """[layers b n k h]"""
    found = []
    for i, layer in enumerate(model.model.layers):
        post: Any = layer.post_attention_layernorm
        o_proj: Any = model.get_submodule(f"model.layers.{i}.self_attn.o_proj")
        z = seen[f"blocks.{i}.attn.hook_z"]  # [b n h c]
        scale = seen[f"blocks.{i}.ln1_post.hook_inv_scale"].double()  # [b n 1]
        into = unit.to(z.device) * _gain(post) * scale[:, :, None]
        of_layer = []
        for head in range(z.shape[2]):
            alone = torch.zeros_like(z)
            alone[:, :, head] = z[:, :, head]
            of_layer.append(_dot(o_proj(alone.flatten(2)).double(), into))
        found.append(torch.stack(of_layer, dim=-1).to(unit.device))
    return torch.stack(found)
