"""Path patching holds to its definition: what is frozen stays, and what flows is computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2.research import capture, edit, path_patching, replace
from tests.conftest import ids, tiny

MODEL = tiny("2b").double()
LAYERS: list[Any] = list(MODEL.model.layers)
TOKENS, OTHER = ids(1, 24), ids(1, 24, seed=5)


@pytest.fixture(scope="module")
def runs() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found = []
    for tokens in (TOKENS, OTHER):
        with torch.no_grad(), capture(MODEL) as seen:
            MODEL(tokens)
        found.append(dict(seen))
    return found[0], found[1]


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and float((a - b).abs().max()) <= 1e-11 * float(b.abs().max())


def head_of(stream: Tensor) -> Tensor:
    return MODEL.softcap(MODEL.lm_head(MODEL.model.norm(stream), MODEL.model.embed_tokens))


@pytest.mark.parametrize(
    "sender", ["hook_embed", "blocks.1.hook_attn_out", "blocks.2.hook_mlp_out", "blocks.3.hook_mlp_out"]
)
@torch.no_grad()
def test_the_direct_effect_is_the_difference_in_the_last_stream(sender: str, runs: Any) -> None:
    ours, theirs = runs
    stream = ours["blocks.3.hook_resid_post"] + theirs[sender] - ours[sender]
    close(path_patching(MODEL, TOKENS, OTHER, sender, "logits"), head_of(stream))
    assert not torch.allclose(head_of(stream), ours["logits"])


@torch.no_grad()
def test_a_head_reaches_another_layers_queries_through_the_stream_alone(runs: Any) -> None:
    ours, theirs = runs
    z = ours["blocks.1.attn.hook_z"].clone()
    z[:, :, 3] = theirs["blocks.1.attn.hook_z"][:, :, 3]
    first, third = LAYERS[1], LAYERS[3]
    added = first.post_attention_layernorm(first.self_attn.o_proj(z.flatten(2))) - ours["blocks.1.hook_attn_out"]
    read = third.input_layernorm(ours["blocks.3.hook_resid_pre"] + added)
    q = ours["blocks.3.attn.hook_q"].clone()
    q[:, :, [0, 6]] = third.self_attn.q_proj(read).view(q.shape)[:, :, [0, 6]]
    with edit(MODEL, {"blocks.3.attn.hook_q": replace(q)}):
        expected = MODEL(TOKENS)
    sender, receivers = ("blocks.1.attn.hook_z", 3), ("blocks.3.attn.hook_q", [0, 6])
    found = path_patching(MODEL, TOKENS, OTHER, sender, receivers)
    close(found, expected)
    assert not torch.allclose(found, ours["logits"])
    with capture(MODEL) as source, capture(MODEL, "blocks.1.attn.hook_z") as one:
        MODEL(OTHER)
    with capture(MODEL) as clean:
        MODEL(TOKENS)
    for given in (source, one):
        assert torch.equal(found, path_patching(MODEL, TOKENS, given, sender, receivers, clean=clean))


@torch.no_grad()
def test_a_receiver_that_is_itself_frozen_is_seen_before_and_only_its_own_change_goes_on(runs: Any) -> None:
    ours, theirs = runs
    added = theirs["blocks.0.hook_mlp_out"] - ours["blocks.0.hook_mlp_out"]
    values = {}
    for layer in (1, 2):
        block = LAYERS[layer]
        read = block.pre_feedforward_layernorm(ours[f"blocks.{layer}.hook_resid_mid"] + added)
        values[f"blocks.{layer}.hook_mlp_out"] = block.post_feedforward_layernorm(block.mlp(read))
    with edit(MODEL, {name: replace(value) for name, value in values.items()}):
        expected = MODEL(TOKENS)
    close(path_patching(MODEL, TOKENS, OTHER, "blocks.0.hook_mlp_out", list(values)), expected)


@torch.no_grad()
def test_paths_may_lead_through_mlps(runs: Any) -> None:
    ours, theirs = runs
    x = ours["hook_embed"].clone()
    x[:, 7] = theirs["hook_embed"][:, 7]
    for layer, block in enumerate(LAYERS):
        x = x + ours[f"blocks.{layer}.hook_attn_out"]
        x = x + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x)))
    found = path_patching(MODEL, TOKENS, OTHER, "hook_embed", "logits", positions=7, through_mlps=True)
    close(found, head_of(x))
    others = [i for i in range(24) if i != 7]
    close(found[:, others], ours["logits"][:, others])  # nothing moves between tokens while attention is frozen


@torch.no_grad()
def test_the_same_run_changes_nothing_and_gradients_flow_in_the_last_pass(runs: Any) -> None:
    ours, _ = runs
    found = path_patching(MODEL, TOKENS, TOKENS, "blocks.0.hook_mlp_out", "logits")
    assert torch.equal(found, ours["logits"])
    with torch.enable_grad():
        logits = path_patching(MODEL, TOKENS, OTHER, "hook_embed", "blocks.2.attn.hook_v")
        (gradient,) = torch.autograd.grad(logits.sum(), LAYERS[3].mlp.up_proj.weight)
    assert gradient.abs().max() > 0


@torch.no_grad()
def test_what_cannot_be_is_named_and_nothing_stays_behind(runs: Any) -> None:
    wrong: list[tuple[Any, Any, Any, str]] = [
        ("blocks.2.hook_mlp_out", "blocks.2.attn.hook_q", OTHER, "computed before blocks.2.hook_mlp_out"),
        ("blocks.2.hook_mlp_out", "blocks.2.hook_mlp_out", OTHER, "or is the same"),
        (("blocks.0.hook_mlp_out", 1), "logits", OTHER, "has no heads"),
        (("blocks.0.attn.hook_z", 8), "logits", OTHER, "heads 0 to 7, not 8"),
        (("blocks.0.attn.hook_z", 1), ("blocks.1.attn.hook_k", [4]), OTHER, "heads 0 to 3, not 4"),
        ([], "logits", OTHER, "there is no place"),
        ("blocks.0.hook_mlp_ou", "logits", OTHER, "no site is called"),
        ("blocks.0.hook_mlp_out", "logits", OTHER[:, :5], "they must be alike"),
    ]
    for sender, receivers, source, message in wrong:
        with pytest.raises(ValueError, match=message):
            path_patching(MODEL, TOKENS, source, sender, receivers)
    for module in MODEL.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert torch.equal(MODEL(TOKENS), runs[0]["logits"])


@torch.no_grad()
def test_a_packed_model_from_a_gguf_is_patched_too() -> None:
    gemma = gemma2.load("pocket:pocket-q8_0.gguf", device="cpu", weights="packed", fast=True)
    texts = ("And God said, Let there be light", "And the king of Israel said unto him")
    tokens, other = (torch.tensor([gemma.tokenizer.encode(text)[:7]]) for text in texts)
    plain = gemma.model(tokens)
    found = path_patching(gemma, tokens, other, ("blocks.1.attn.hook_z", [0, 1]), "blocks.3.attn.hook_v")
    assert not torch.equal(found, plain) and torch.equal(gemma.model(tokens), plain)
