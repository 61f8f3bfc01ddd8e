"""A few numbers of a model's weights, by which a lens knows the model that it was fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gemma2.model import Gemma2

MANY = 16  # rows of the embedding, and coordinates of each row and norm
ROUNDED = 2**-7  # relative: two roundings to bfloat16 are within it. No format quantizes norms
TINY = 2**-16  # files of llama.cpp hold 1 + the gain, in float32
APART = 0.5  # relative: 4-bit embeddings are far within it, those of another model are beyond 1


def embedding_rows(model: Gemma2, ids: Tensor) -> Tensor:
    """The embedding's rows of these ids, [... d], in the model's dtype or as exact as they are held."""
    embedding = model.model.embed_tokens
    matrix: Any = getattr(embedding, "matrix", None)  # a twin that holds it in a form of its own makes these rows alone
    rows: Tensor = matrix.at(ids) if hasattr(matrix, "at") else embedding.weight[ids]
    return rows


def marks_of(model: Gemma2) -> dict[str, Tensor]:
    """Some numbers of the embedding and of the norms that layers read through, in float32 on the CPU. But for rounding
    they are the same in every dtype and form of the same weights. Empty where weights are not in memory."""
    inner = model.model
    read = ("input_layernorm", "pre_feedforward_layernorm")  # which no ablation takes away
    norms = [getattr(layer, name) for layer in inner.layers for name in read]
    gains = [norm.weight for norm in (*norms, inner.norm)]
    ids = torch.linspace(0, model.config.vocab_size - 1, MANY, device="cpu").long()
    rows = embedding_rows(model, ids.to(model.device))
    if any(tensor.is_meta for tensor in (rows, *gains)):
        return {}
    found = {"embedding": rows[:, :MANY]}
    found["norms"] = torch.stack([gain[:MANY].detach().float().cpu() for gain in gains])
    return {name: tensor.detach().float().cpu() for name, tensor in found.items()}


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str | None:
    """In words, what shows that two models have other weights; None where nothing does, or where one has no marks."""
    if not ours or not theirs:
        return None
    if any(ours[name].shape != theirs[name].shape for name in ours):
        return "it has another number of layers, or another width"
    if not torch.allclose(ours["norms"], theirs["norms"], rtol=ROUNDED, atol=TINY):
        return f"the gains of its norms differ by up to {float((ours['norms'] - theirs['norms']).abs().max()):.2g}"
    apart = float((ours["embedding"] - theirs["embedding"]).norm() / theirs["embedding"].norm())
    return f"its embedding differs by {apart:.0%}" if apart > APART else None
