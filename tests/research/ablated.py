"""A model, and what each switch of an ablation should make of it, built in another way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gemma2 import Gemma2, ops
from gemma2.cache import NoCache
from gemma2.config import GLOBAL, LOCAL
from gemma2.research import ablate
from gemma2.twins import sharing
from tests.conftest import ids, tiny

MODEL = tiny("2b").double()
CONFIG = MODEL.config
TOKENS = ids(2, 40)
SWAPPED = tuple(GLOBAL if kind == LOCAL else LOCAL for kind in CONFIG.layer_types)


STEPS = [(0, 9), (9, 30), *((i, i + 1) for i in range(30, 40))]  # a prompt in two chunks, which wraps the rings


def under(switches: dict[str, Any], model: Gemma2 = MODEL, tokens: Tensor = TOKENS, **options: Any) -> Tensor:
    with torch.no_grad(), ablate(model, **switches):
        return model(tokens, **options)


def state(model: Gemma2) -> list[Any]:
    """Everything that an ablation could leave behind: modules, their attributes, hooks, buffers, parameters."""
    found: list[Any] = []
    for path, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        hooks = [len(value) for name, value in vars(module).items() if "hooks" in name]
        tensors = [(name, id(x)) for store in (module._parameters, module._buffers) for name, x in store.items()]
        found.append((path, id(module), own, hooks, tensors))
    return found


def with_config(**changes: Any) -> Callable[[], Tensor]:
    return lambda: sharing(MODEL, replace(CONFIG, **changes))(TOKENS)


def uncapped(cap: float) -> Callable[[], Tensor]:
    def compute() -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            own = ops.softcap
            patch.setattr(ops, "softcap", lambda x, by: x if by == cap else own(x, by))
            return MODEL(TOKENS)

    return compute


def by_hand(layers: Any = None, scale: float | None = None, post: bool = True) -> Callable[[], Tensor]:
    """A pass written out once more, from the model's parts."""

    def compute() -> Tensor:
        inner: Any = MODEL.model
        positions = torch.arange(TOKENS.shape[1]).expand(TOKENS.shape)
        rows = F.embedding(TOKENS, inner.embed_tokens.weight)
        x = rows * (CONFIG.hidden_size**0.5 if scale is None else scale)
        rotary = inner.rotary_emb(positions, x.dtype)
        for block in inner.layers if layers is None else [inner.layers[i] for i in layers]:
            attention = block.self_attn(block.input_layernorm(x), positions, rotary, NoCache(CONFIG))
            x = x + (block.post_attention_layernorm(attention) if post else attention)
            mlp = block.mlp(block.pre_feedforward_layernorm(x))
            x = x + (block.post_feedforward_layernorm(mlp) if post else mlp)
        return MODEL.softcap(MODEL.lm_head(inner.norm(x), inner.embed_tokens))

    return compute


def without_columns() -> Tensor:
    """Heads 2 and 5 of layer 1: the columns of `o_proj` that read them are zero."""
    other: Any = copy.deepcopy(MODEL)
    weight = other.model.layers[1].self_attn.o_proj.weight
    for head in (2, 5):
        weight[:, head * 16 : (head + 1) * 16] = 0
    return other(TOKENS)


BUILT: dict[str, tuple[dict[str, Any], Callable[[], Tensor]]] = {
    "a score cap": ({"attn_softcap": 5.0}, with_config(attn_logit_softcapping=5.0)),
    "no score cap": ({"attn_softcap": None}, uncapped(50.0)),
    "a final cap": ({"final_softcap": 3}, with_config(final_logit_softcapping=3.0)),
    "no final cap": ({"final_softcap": None}, uncapped(30.0)),
    "a shorter window": ({"window": 7}, with_config(sliding_window=7)),
    "a longer window": ({"window": 25}, with_config(sliding_window=25)),
    "no window": ({"window": None}, with_config(layer_types=(GLOBAL,) * 4)),
    "swapped layers": ({"layer_types": list(SWAPPED)}, with_config(layer_types=SWAPPED)),
    "both": ({"layer_types": SWAPPED, "window": 9}, with_config(layer_types=SWAPPED, sliding_window=9)),
    "no post-norms": ({"post_norms": False}, by_hand(post=False)),
    "no scale": ({"embed_scale": False}, by_hand(scale=1.0)),
    "layers": ({"layers": [0, 2]}, by_hand(layers=[1, 3])),
    "heads": ({"heads": [(1, 2), (1, 5)]}, without_columns),
    "several": ({"layers": [3], "embed_scale": False, "post_norms": False}, by_hand([0, 1, 2], 1.0, False)),
}


EVERYTHING: dict[str, Any] = {"attn_softcap": None, "final_softcap": 4, "window": 3, "layer_types": SWAPPED}
EVERYTHING |= {"post_norms": False, "embed_scale": False, "heads": [(0, 1)]}
