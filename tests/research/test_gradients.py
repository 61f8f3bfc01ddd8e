"""Effects by gradients are held against the edits that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2.research import attribution_patching, capture, edit, integrated_gradients, replace
from gemma2.research.sites import sites
from tests.conftest import ids, tiny

MODEL = tiny("2b").double()
TOKENS, OTHER = ids(1, 20), ids(1, 20, seed=5)
STEPS = 8


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 7].sum() - logits[:, -1, 9].sum()


@pytest.fixture(scope="module")
def ours() -> dict[str, Tensor]:
    with torch.no_grad(), capture(MODEL) as seen:
        MODEL(TOKENS)
    return dict(seen)


def patched(model: Any, site: str, value: Any, number: Any, tokens: Tensor, **options: Any) -> float:
    """The number when a site has another value."""
    with torch.no_grad(), edit(model, {site: replace(value)}, **options):
        return float(number(model(tokens)))


def test_attribution_patching_is_activation_patching_for_a_small_difference_at_every_site(
    ours: dict[str, Tensor],
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Relative to each value: what the mask has filled stays as it is.
    near = {
        name: torch.where(
            value < -1e300, value, value + 1e-7 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        )
        for name, value in ours.items()
    }
    estimates = attribution_patching(MODEL, TOKENS, near, metric, "*")
    assert list(estimates) == list(sites(MODEL.config))
    effects, plain = 0, float(metric(ours["logits"]))
    for name, estimate in estimates.items():
        assert estimate.shape == ours[name].shape
        if name.startswith(("blocks.0", "blocks.2")):  # a local layer and a global one are enough here
            continue
        change = patched(MODEL, name, near[name], metric, TOKENS) - plain
        assert abs(float(estimate.sum()) - change) <= 1e-3 * abs(change) + 1e-11, name
        effects += abs(change) > 1e-9
    assert effects > 40  # of 60: most changes can be told from rounding


def test_effects_are_chosen_by_position_and_taken_from_a_run(ours: dict[str, Tensor]) -> None:
    name = "blocks.2.hook_resid_pre"
    with torch.no_grad(), capture(MODEL, name) as theirs:
        MODEL(OTHER)
    all_of_it = attribution_patching(MODEL, TOKENS, OTHER, metric, name)[name]
    assert torch.equal(all_of_it, attribution_patching(MODEL, TOKENS, theirs, metric, name)[name])
    some = attribution_patching(MODEL, TOKENS, OTHER, metric, [name], positions=[3, -1])[name]
    assert torch.equal(some[:, [3, 19]], all_of_it[:, [3, 19]]) and not some[:, :3].any() and not some[:, 4:19].any()
    shift = torch.zeros_like(ours[name], requires_grad=True)
    with edit(MODEL, {name: lambda value, hook: value + shift}):
        (gradient,) = torch.autograd.grad(metric(MODEL(TOKENS)), shift)
    expected = (theirs[name] - ours[name]) * gradient
    assert (all_of_it - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_integrated_gradients_sum_to_the_whole_change(pocket: gemma2.Gemma) -> None:
    model = gemma2.load(dtype="float64", device="cpu").model
    texts = ("And God said unto Moses, Go", "And David said unto Saul, Go")
    tokens, other = (torch.tensor([pocket.tokenizer.encode(text)]) for text in texts)
    assert tokens.shape == other.shape

    def logit(logits: Tensor) -> Tensor:
        return logits[0, -1, 300]

    with torch.no_grad():
        plain = float(logit(model(tokens)))
        with capture(model) as theirs:
            model(other)
    names = ["hook_embed", "blocks.2.hook_resid_mid", "blocks.3.attn.hook_pattern", "blocks.4.ln2.hook_inv_scale"]
    found = integrated_gradients(model, tokens, other, logit, names, steps=STEPS)
    one = attribution_patching(model, tokens, other, logit, names)
    for name in names:
        change = patched(model, name, theirs[name], logit, tokens) - plain
        print(name, float(found[name].sum()) - change, change)
        assert abs(float(found[name].sum()) - change) <= 1e-3 * abs(change), name
        assert abs(change) > 1e-3
    assert abs(float((one["hook_embed"] - found["hook_embed"]).sum())) > 1e-2  # a single gradient does not
    part = integrated_gradients(model, tokens, other, logit, "blocks.1.hook_resid_pre", steps=STEPS, positions=5)
    change = patched(model, "blocks.1.hook_resid_pre", theirs, logit, tokens, positions=5) - plain
    print(float(part["blocks.1.hook_resid_pre"].sum()) - change, change)
    assert abs(float(part["blocks.1.hook_resid_pre"].sum()) - change) <= 1e-3 * abs(change)
    assert abs(change) > 1e-3


def test_gradients_are_taken_without_a_gradient_of_weights_and_under_no_grad_and_in_a_packed_model() -> None:
    frozen = tiny("2b").double().requires_grad_(False)
    names = ["hook_embed", "blocks.1.attn.hook_k", "ln_final"]
    with torch.no_grad():
        found = attribution_patching(frozen, TOKENS, OTHER, metric, names)
    expected = attribution_patching(MODEL, TOKENS, OTHER, metric, names)
    for name in names:
        assert torch.equal(found[name], expected[name]) and found[name].any()
    gemma = gemma2.load("pocket:pocket-q8_0.gguf", device="cpu", weights="packed", fast=True)
    effects = attribution_patching(gemma, TOKENS, OTHER, metric, "*")
    assert all(value.isfinite().all() for value in effects.values()) and effects["hook_embed"].any()


def test_what_cannot_be_is_named_and_nothing_stays_behind(ours: dict[str, Tensor]) -> None:
    wrong: list[tuple[Any, Any, Any, str]] = [
        (OTHER[:, :4], metric, "hook_embed", "they must be alike"),
        ({}, metric, "hook_embed", "source has no values of hook_embed"),
        ({"hook_embed": ours["hook_embed"][:, :4]}, metric, "hook_embed", r"is \[1, 4, 144\] in the source"),
        (OTHER, lambda logits: logits[0, -1], "hook_embed", r"one number as a tensor, not \[512\]"),
        (OTHER, lambda logits: 3.0, "hook_embed", "not float"),
        (OTHER, lambda logits: logits.detach().sum(), "hook_embed", "takes no gradient"),
        (OTHER, metric, "nope", "no site is called"),
    ]
    for source, number, names, message in wrong:
        for function in (attribution_patching, integrated_gradients):
            with pytest.raises(ValueError, match=message):
                function(MODEL, TOKENS, source, number, names)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        integrated_gradients(MODEL, TOKENS, OTHER, metric, steps=0)
    for module in MODEL.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert torch.equal(MODEL(TOKENS), ours["logits"])
