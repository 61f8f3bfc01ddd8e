"""The traces in tests/golden (made by scripts/make_golden.py): no peer needs to be installed.

The window (8) is a fifth of the prompt, both caps saturate, the query scale is not the head width and the width is not
heads times head width. A test switches every feature of Gemma 2 off in turn and demands that the trace no longer fits:
otherwise the trace would prove nothing about it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2 import Gemma2, ops
from gemma2.checkpoints.hf_config import read_config
from gemma2.config import GLOBAL, LOCAL

GOLDEN = Path(__file__).parent / "golden"
# On the machine that made the traces transformers' is met to the bit. Elsewhere the order of float32 sums may differ:
# 5e-5 on logits of up to 30 is 14 ulp of the largest.
TOLERANCE = 5e-5


def golden_model(**changes: object) -> Gemma2:
    config = dataclasses.replace(read_config(GOLDEN / "config.json"), **changes)  # type: ignore[arg-type]
    model = Gemma2(config).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(GOLDEN / "model.safetensors").items()})
    return model


@torch.no_grad()
def run(model: Gemma2) -> dict[str, Tensor]:
    """The sites of the traces."""
    places: dict[str, nn.Module] = {"hook_embed": model.model.embed_tokens, "ln_final": model.model.norm}
    places |= {f"blocks.{i}.hook_resid_post": layer for i, layer in enumerate(model.model.layers)}
    seen: dict[str, Tensor] = {}
    for name, module in places.items():
        module.register_forward_hook(lambda m, inputs, output, name=name: seen.__setitem__(name, output[0]))
    seen["logits"] = model(load_file(GOLDEN / "transformers.safetensors")["ids"][None])[0]
    seen["logits_last"] = seen["logits"][-1]
    return seen


def distance(model: Gemma2, peer: str = "transformers") -> dict[str, float]:
    """Largest absolute difference at each site, relative to a scale of 30 (the cap of the logits)."""
    ours, theirs = run(model), load_file(GOLDEN / f"{peer}.safetensors")
    return {
        site: ((ours[site] - theirs[site]).abs().max() * 30 / theirs[site].abs().max()).item()
        for site in theirs
        if site != "ids"
    }


@pytest.mark.parametrize("peer", ["transformers", "gemma_pytorch"])
def test_every_site_of_the_golden_trace_is_met(peer: str) -> None:
    apart = distance(golden_model(), peer)
    assert {"hook_embed", "blocks.3.hook_resid_post", "ln_final"} < set(apart)
    assert all(value <= TOLERANCE for value in apart.values()), apart


def without_norm(name: str) -> Callable[[Gemma2], None]:
    def change(model: Gemma2) -> None:
        for layer in model.model.layers:
            setattr(layer, name, nn.Identity())

    return change


def without_final_norm(model: Gemma2) -> None:
    model.model.norm = nn.Identity()  # type: ignore[assignment]


def without_score_cap(model: Gemma2) -> None:
    for layer in model.model.layers:
        layer.self_attn.attend.softcap = nn.Identity()


def without_logit_cap(model: Gemma2) -> None:
    model.softcap = nn.Identity()  # type: ignore[assignment]


def without_one_plus(model: Gemma2) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.sub_(1)


def without_embedding_scale(model: Gemma2) -> None:
    model.model.embed_tokens.scale = 1.0


def with_head_width_as_query_scale(model: Gemma2) -> None:
    for layer in model.model.layers:
        layer.self_attn.attend.scale = model.config.head_dim**-0.5


def with_window(window: int | None) -> Callable[[Gemma2], None]:
    def change(model: Gemma2) -> None:
        for layer in model.model.layers[::2]:
            layer.self_attn.attend.window = window

    return change


def with_swapped_layers(model: Gemma2) -> None:
    for layer, window in zip(model.model.layers, [None, 8, None, 8], strict=True):
        layer.self_attn.attend.window = window


def with_swapped_post_norms(model: Gemma2) -> None:
    for layer in model.model.layers:
        a, b = layer.post_attention_layernorm, layer.post_feedforward_layernorm
        layer.post_attention_layernorm, layer.post_feedforward_layernorm = b, a


def with_tiled_instead_of_grouped_heads(model: Gemma2) -> None:
    """Query head i reads key/value head i % g instead of i // group."""
    for layer in model.model.layers:
        attend = layer.self_attn.attend
        original = attend.forward

        def forward(q: Tensor, k: Tensor, v: Tensor, *positions: Tensor, original=original) -> Tensor:
            order = torch.arange(q.shape[2]).view(2, 2).T.flatten()
            z: Tensor = original(q[:, :, order], k, v, *positions)
            return z[:, :, order.argsort()]

        attend.forward = forward


def with_another_function(
    name: str, replacement: Callable[..., object]
) -> Callable[[Gemma2, pytest.MonkeyPatch], None]:
    return lambda model, patch: patch.setattr(ops, name, replacement)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary pairs (2i, 2i+1) instead of (i, i + c/2)."""
    c = x.shape[-1] // 2
    cos, sin = cos[:, :, None, :c], sin[:, :, None, :c]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def capped_after_the_mask(model: Gemma2) -> None:
    for layer in model.model.layers:
        cap = layer.self_attn.attend.softcap.cap
        layer.self_attn.attend.softcap = nn.Identity()
        layer.self_attn.attend.hook_attn_scores.register_forward_hook(lambda m, i, o, cap=cap: ops.softcap(o, cap))


def with_relu(model: Gemma2) -> None:
    """GeGLU becomes ReGLU: relu(x) = gelu(100 x) / 100, very nearly."""
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda m, i, o: o * 100)
        layer.mlp.hook_post.register_forward_hook(lambda m, i, o: o / 100)


def without_gate(model: Gemma2) -> None:
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda m, i, o: torch.ones_like(o))


def with_erf_gelu(model: Gemma2, patch: pytest.MonkeyPatch) -> None:
    exact = F.gelu
    patch.setattr(F, "gelu", lambda x, approximate: exact(x))


SWITCHED: dict[str, Callable[..., None]] = {
    **{
        f"{name} left out": without_norm(name)
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
    },
    "final norm left out": without_final_norm,
    "gain w instead of 1 + w": without_one_plus,
    "post-norms swapped": with_swapped_post_norms,
    "scores not capped": without_score_cap,
    "scores capped after the mask": capped_after_the_mask,
    "logits not capped": without_logit_cap,
    "embedding not scaled": without_embedding_scale,
    "query scale from the head width": with_head_width_as_query_scale,
    "window off": with_window(None),
    "window one wider": with_window(9),
    "window one narrower": with_window(7),
    "local and global layers swapped": with_swapped_layers,
    "heads tiled instead of grouped": with_tiled_instead_of_grouped_heads,
    "no rotation": with_another_function("apply_rotary", lambda x, cos, sin: x),
    "rotary pairs interleaved": with_another_function("apply_rotary", interleaved),
    "relu instead of gelu": with_relu,
    "erf gelu": with_erf_gelu,
    "no gate": without_gate,
}


@pytest.mark.parametrize("name", SWITCHED)
def test_each_feature_switched_off_breaks_the_golden_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, change = golden_model(), SWITCHED[name]
    change(model, monkeypatch) if change.__code__.co_argcount == 2 else change(model)
    assert distance(model)["logits"] > 20 * TOLERANCE


def test_an_ablation_by_config_is_the_same_as_one_by_module() -> None:
    all_global = run(golden_model(layer_types=(GLOBAL,) * 4))["logits"]
    by_module = golden_model()
    with_window(None)(by_module)
    assert torch.equal(run(by_module)["logits"], all_global)
    assert golden_model().config.layer_types == (LOCAL, GLOBAL, LOCAL, GLOBAL)
