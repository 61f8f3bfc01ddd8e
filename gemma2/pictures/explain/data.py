"""What the page's script draws, as plain values and packed arrays."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemma2 import ops
from gemma2.config import LOCAL, Gemma2Config
from gemma2.model import RMSNorm
from gemma2.pictures.explain.panels import Panel
from gemma2.pictures.explain.run import BINS, Run, histogram
from gemma2.pictures.page import readable
from gemma2.research import Seen
from gemma2.research.sites import sites
from gemma2.tokenizer import Tokenizer

WIDTH, HEAD_WIDTH = 64, 32  # how many numbers of a vector, and of a head's, are drawn
TOP, LARGEST = 10, 3
PAIRS = (0, 1, 2, 4, 8, 16, 32)  # rotary pairs that are drawn, where the head has them


def packed(x: Tensor) -> str:
    """Float32 numbers in the order of memory, least byte first, in base64: what the page's script reads."""
    return base64.b64encode(x.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes()).decode()


def gathered(tokenizer: Tokenizer, run: Run, panels: Sequence[Panel]) -> dict[str, Any]:
    """What the page's script draws from: plain values, and arrays as `packed` makes them."""
    config = run.model.config
    names, last = sites(config), config.num_hidden_layers - 1
    tokens = [{"text": readable(tokenizer, run.ids[i]), "id": run.ids[i], "position": i} for i in run.drawn]
    values = {panel.name: run.seen[panel.name] for panel in panels if panel.name in names}
    held = {name: _site(value[0], names[name].shape, run) for name, value in values.items()}
    held["stream"] = _site(run.seen[f"blocks.{last}.hook_resid_post"][0], "b t d", run)
    held["rows"] = _site(run.embedded, "b t d", run)
    for panel in panels:
        if panel.draws == "gain":
            held[panel.name] |= _gain(run.model.get_submodule(names[panel.name].module))
        elif panel.draws == "rotation":
            held[panel.name] |= _pairs(run.seen[panel.beside[0]][0], run.seen[panel.name][0])
        elif panel.draws in ("gelu", "spread"):
            held[panel.name] |= _spread(run.seen[panel.name][0])
    return {
        "tokens": tokens,
        "bos": tokenizer.special["bos"],
        "length": len(run.ids),
        "bins": BINS,
        "cap": config.attn_logit_softcapping,
        "final": config.final_logit_softcapping,
        "scale": float(torch.tensor(config.hidden_size**0.5, dtype=run.model.dtype)),
        "group": config.num_attention_heads // config.num_key_value_heads,
        "sites": held,
        "scores": {
            layer: vars(one) | {"seen": one.seen, "window": config.window(layer)} for layer, one in run.scores.items()
        },
        "layers": [_lengths(run.seen, layer, config) for layer in range(last + 1)],
        "next": _next(tokenizer, run),
    }


def _site(value: Tensor, shape: str, run: Run) -> dict[str, Any]:
    """One site's values at the drawn tokens: the first of each vector or head, or all drawn keys of the scores."""
    wide = value.double()
    if shape.endswith("t s"):
        rest = wide.sum(dim=-1) - wide[..., run.drawn].sum(dim=-1)
        return {"heads": len(value), "v": packed(value[..., run.drawn]), "rest": packed(rest)}
    if shape.endswith("c"):
        return {"heads": value.shape[1], "width": min(HEAD_WIDTH, value.shape[2]), "v": packed(value[..., :HEAD_WIDTH])}
    if value.shape[-1] == 1:
        return {"width": 1, "v": packed(value)}
    place = wide.abs().topk(min(LARGEST, value.shape[-1]), dim=-1).indices
    return {
        "width": min(WIDTH, value.shape[-1]),
        "of": value.shape[-1],
        "v": packed(value[..., :WIDTH]),
        "length": packed(wide.norm(dim=-1)),
        "place": place.tolist(),
        "largest": packed(value.gather(-1, place)),
    }


def _gain(norm: torch.nn.Module) -> dict[str, Any]:
    assert isinstance(norm, RMSNorm)
    gain = 1.0 + ops.upcast(norm.weight.detach())
    least, mean, most = float(gain.min()), float(gain.mean()), float(gain.max())
    return {"gain": packed(gain[:WIDTH]), "least": least, "mean": mean, "most": most}


def _pairs(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Some pairs (i, i + c/2) of queries or keys [n heads c], as points [n heads pairs 2] before and after."""
    half = before.shape[-1] // 2
    pairs = [pair for pair in PAIRS if pair < half]
    both = [packed(torch.stack((x[..., pairs], x[..., [pair + half for pair in pairs]]), -1)) for x in (before, after)]
    return {"pairs": pairs, "half": half, "before": both[0], "after": both[1]}


def _spread(value: Tensor) -> dict[str, Any]:
    reach = float(value.abs().max()) or 1.0
    positive = (value > 0).double().mean(dim=-1)
    return {"reach": reach, "hist": histogram(value, -reach, reach), "positive": packed(positive)}


def _lengths(seen: Seen, layer: int, config: Gemma2Config) -> dict[str, Any]:
    """The lengths of a layer's vectors for each drawn token."""
    names = {"attention": "attn_out", "mlp": "mlp_out", "before": "resid_pre", "after": "resid_post"}
    held = {key: packed(seen[f"blocks.{layer}.hook_{name}"][0].double().norm(dim=-1)) for key, name in names.items()}
    return held | {"local": config.layer_types[layer] == LOCAL}


def _next(tokenizer: Tokenizer, run: Run) -> dict[str, Any]:
    """The likeliest next tokens of each drawn token, with and without the final cap."""
    raw, capped = run.seen["logits_raw"][0].double(), run.seen["logits"][0].double()
    chance, bare = capped.softmax(dim=-1), raw.softmax(dim=-1)
    best = capped.topk(min(TOP, capped.shape[-1]), dim=-1).indices
    reach = float(raw.abs().max()) or 1.0
    return {
        "ids": best.tolist(),
        "text": [[readable(tokenizer, one) for one in row] for row in best.tolist()],
        "raw": packed(raw.gather(-1, best)),
        "capped": packed(capped.gather(-1, best)),
        "chance": packed(chance.gather(-1, best)),
        "bare": packed(bare.gather(-1, best)),
        "reach": reach,
        "hist": histogram(raw, -reach, reach),
    }
