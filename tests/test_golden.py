"""The traces in tests/golden (made by scripts/make_golden.py): no peer needs to be installed.

The window (8) is a fifth of the prompt, both caps saturate, the query scale is not the head width and the width is not
heads times head width. A test switches every feature of Gemma 2 off in turn and demands that the trace no longer fits:
otherwise the trace would prove nothing about it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gemma2 import Gemma2
from gemma2.checkpoints.hf_config import read_config
from gemma2.config import GLOBAL, LOCAL
from gemma2.model import ApplyRotary, GELUTanh, SoftcapAttention
from gemma2.numerics.parts import ApplyRotaryInParts, ScoresInParts
from gemma2.twins import on
from tests.parity.injected import (
    Inject,
    at,
    cap_after_mask,
    changed,
    erf_gelu,
    interleaved_rotary,
    layers_swapped,
    no_final_cap,
    no_score_cap,
    post_norms_swapped,
    twins,
    unscaled_embedding,
)

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


# Where a weight, a scale or a window is switched, the module computes as before and needs no twin.


class NoNorm(nn.Identity):
    hides = ("hook_inv_scale", "hook_normalized")


def without_norm(name: str) -> Inject:
    return twins(at(f"model.layers.*.{name}", NoNorm))


without_final_norm = twins(at("model.norm", NoNorm))


def without_one_plus(model: Gemma2) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.sub_(1)


def with_head_width_as_query_scale(model: Gemma2) -> None:
    for layer in model.model.layers:
        layer.self_attn.attend.scale = model.config.head_dim**-0.5


def with_window(window: int | None) -> Inject:
    def change(model: Gemma2) -> None:
        for layer in model.model.layers[::2]:
            layer.self_attn.attend.window = window

    return change


class Tiled(ScoresInParts):
    """Query head i reads key/value head i % g instead of i // group."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, key_positions: Tensor) -> Tensor:
        order = torch.arange(q.shape[2]).view(self.group, -1).T.flatten()
        z = super().forward(q[:, :, order], k, v, positions, key_positions)
        return z[:, :, order.argsort()]


class Ones(nn.Module):
    """A linear layer that gives 1 whatever it reads: the product with it is gone."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.weight = plain.weight

    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(*x.shape[:-1], len(self.weight))


with_tiled_heads = twins(on(SoftcapAttention, Tiled))
without_rotation = twins(on(ApplyRotary, changed(ApplyRotaryInParts, apply_rotary=lambda x, cos, sin: x)))
with_relu = twins(on(GELUTanh, lambda plain: nn.ReLU()))
without_gate = twins(at("*.up_proj", Ones))


SWITCHED: dict[str, Inject] = {
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
    "post-norms swapped": post_norms_swapped,
    "scores not capped": no_score_cap,
    "scores capped after the mask": cap_after_mask,
    "logits not capped": no_final_cap,
    "embedding not scaled": unscaled_embedding,
    "query scale from the head width": with_head_width_as_query_scale,
    "window off": with_window(None),
    "window one wider": with_window(9),
    "window one narrower": with_window(7),
    "local and global layers swapped": layers_swapped,
    "heads tiled instead of grouped": with_tiled_heads,
    "no rotation": without_rotation,
    "rotary pairs interleaved": interleaved_rotary,
    "relu instead of gelu": with_relu,
    "erf gelu": erf_gelu,
    "no gate": without_gate,
}


@pytest.mark.parametrize("name", SWITCHED)
def test_each_feature_switched_off_breaks_the_golden_trace(name: str) -> None:
    model = golden_model()
    SWITCHED[name](model)
    assert distance(model)["logits"] > 20 * TOLERANCE


def test_an_ablation_by_config_is_the_same_as_one_by_module() -> None:
    all_global = run(golden_model(layer_types=(GLOBAL,) * 4))["logits"]
    by_module = golden_model()
    with_window(None)(by_module)
    assert torch.equal(run(by_module)["logits"], all_global)
    assert golden_model().config.layer_types == (LOCAL, GLOBAL, LOCAL, GLOBAL)
