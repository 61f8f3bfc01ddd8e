"""Edits act where and when they are told, with the ready ones held against what they say; and leave nothing behind."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2 import HybridCache
from gemma2.generate import generate_ids
from gemma2.research import add, capture, edit, mean, remove, replace, resample, silence, steer, zero
from gemma2.research.edits import Edit, Hook
from gemma2.research.sites import sites
from tests.conftest import ids, tiny

MODEL = tiny("2b").double()
TOKENS = ids(1, 24)
MID = "blocks.1.hook_resid_mid"
Z = "blocks.1.attn.hook_z"


def seen_with(edits: dict[str, Any], names: str = "*", tokens: Tensor = TOKENS, **options: Any) -> dict[str, Tensor]:
    with torch.no_grad(), edit(MODEL, edits, **options), capture(MODEL, names) as seen:
        MODEL(tokens)
    return dict(seen)


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    with torch.no_grad(), capture(MODEL) as seen:
        MODEL(TOKENS)
    return dict(seen)


@pytest.mark.parametrize("name", sites(MODEL.config))
def test_every_site_takes_an_edit_at_a_position_and_no_other_position_of_it_changes(
    name: str, plain: dict[str, Tensor]
) -> None:
    axis = sites(MODEL.config)[name].axis
    seen = seen_with({name: lambda value, hook: value * 0.5}, name, positions=[7, -1])
    kept = [i for i in range(24) if i not in (7, 23)]
    assert torch.equal(
        seen[name].index_select(axis, torch.tensor(kept)), plain[name].index_select(axis, torch.tensor(kept))
    )
    both = torch.tensor([7, 23])
    assert torch.equal(seen[name].index_select(axis, both), plain[name].index_select(axis, both) * 0.5)
    for module in MODEL.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_edits_of_decoding_are_those_of_one_pass_also_of_keys_in_a_wrapped_ring() -> None:
    """Attention is moved from one key to another at every step: keys must be in the order of positions."""

    def shift(value: Tensor, hook: Hook) -> Tensor:
        return value.roll(1, dims=-1) if value.shape[-1] > 1 else value

    def last(value: Tensor, hook: Hook) -> Tensor:  # of the window's keys, in one pass
        changed = value.clone()
        for i, at in enumerate(hook.positions[0].tolist()):
            seen = slice(max(0, at - 15), at + 1)
            changed[:, :, i, seen] = value[:, :, i, seen].roll(1, dims=-1)
        return changed

    name = "blocks.0.attn.hook_pattern"
    with torch.no_grad():
        with edit(MODEL, {name: last}):
            expected = MODEL(TOKENS)
        cache, found = HybridCache(MODEL.config, 1, 24), []
        with edit(MODEL, {name: shift}):
            for i in range(24):
                found.append(MODEL(TOKENS[:, i : i + 1], cache=cache))
    assert (torch.cat(found, dim=1) - expected).abs().max() <= 1e-9


def test_steps_choose_passes_of_a_generation() -> None:
    told: list[tuple[int, list[int]]] = []

    def tell(value: Tensor, hook: Hook) -> None:
        told.append((hook.step, hook.positions[0].tolist()))

    with edit(MODEL, {"model.layers.2": tell}, steps=[0, 3]):
        list(generate_ids(MODEL, [TOKENS[0].tolist()], 6))
    assert told == [(0, list(range(24))), (3, [26])]
    with edit(MODEL, {"blocks.2.hook_out": tell}, steps=slice(4, None), positions=[2]):
        list(generate_ids(MODEL, [TOKENS[0].tolist()], 6))
    assert [step for step, _ in told[2:]] == [4, 5]


def test_the_ready_edits_do_what_they_say(plain: dict[str, Tensor]) -> None:
    with torch.no_grad(), capture(MODEL, MID) as other:
        MODEL(ids(1, 20, seed=5))
    x, u = plain[MID], torch.linspace(-1, 1, 144, dtype=torch.float64)
    given: dict[str, tuple[Edit, Tensor]] = {
        "zero": (zero(), torch.zeros_like(x)),
        "mean of a run": (mean(other), other[MID].mean(dim=1, keepdim=True).expand_as(x)),
        "mean given": (mean(u), u.expand_as(x)),
        "replace": (replace(other), torch.cat((other[MID], x[:, 20:]), dim=1)),
        "replace by a tensor": (replace(x * 2), x * 2),
        "add": (add(u, 3.0), x + 3 * u),
        "steer": (steer(u, -2.0), x - 2 * u / u.norm()),
        "remove": (remove(u), x - (x @ u / u.norm())[..., None] * (u / u.norm())),
    }
    for name, (change, expected) in given.items():
        assert torch.allclose(seen_with({MID: change}, MID)[MID], expected, rtol=0, atol=1e-12), name
    drawn = seen_with({MID: resample(other, seed=3)}, MID)[MID]
    assert all((row == other[MID][0]).all(dim=1).any() for row in drawn[0])
    assert torch.equal(drawn, seen_with({MID: resample(other, seed=3)}, MID)[MID])
    quiet = seen_with({"blocks.1.attn.hook_z": silence([2, 5])}, "blocks.1.attn.hook_z")["blocks.1.attn.hook_z"]
    assert not quiet[:, :, [2, 5]].any() and torch.equal(
        quiet[:, :, [0, 1, 3, 4]], plain["blocks.1.attn.hook_z"][:, :, [0, 1, 3, 4]]
    )


def test_patching_all_of_a_layer_with_another_run_gives_that_runs_logits(plain: dict[str, Tensor]) -> None:
    clean = ids(1, 24, seed=8)
    with torch.no_grad(), capture(MODEL, "*") as source:
        expected = MODEL(clean)
    for name in ("blocks.0.hook_resid_pre", MID, "ln_final"):
        assert torch.equal(seen_with({name: replace(source)})["logits"], expected)
    one = seen_with({MID: replace(source)}, MID, positions=5)[MID]
    assert torch.equal(one[:, 5], source[MID][:, 5]) and torch.equal(one[:, 6:], plain[MID][:, 6:])


def test_several_edits_act_in_order_and_gradients_flow_through_them() -> None:
    direction = torch.ones(144, dtype=torch.float64, requires_grad=True)
    first, second = {MID: [zero(), add(direction)]}, {MID: lambda value, hook: value * 2}
    with edit(MODEL, first), edit(MODEL, second), capture(MODEL, MID) as seen:
        logits = MODEL(TOKENS)
    assert torch.equal(seen[MID], torch.full_like(seen[MID], 2.0))
    (gradient,) = torch.autograd.grad(logits[0, -1].square().sum(), direction)
    assert gradient.abs().max() > 0


@torch.no_grad()
def test_what_an_edit_must_not_return_is_named_and_nothing_stays_behind(plain: dict[str, Tensor]) -> None:
    wrong: list[tuple[Any, str]] = [
        (lambda value, hook: value[:, :3], r"the edit returned shape \[1, 3, 144\], and \[1, 24, 144\] is needed"),
        (lambda value, hook: value.float(), r"the edit returned dtype torch.float32, and torch.float64 is needed"),
        (lambda value, hook: value.to("meta"), "the edit returned device meta, and cpu is needed"),
        (lambda value, hook: 3, "the edit returned int, not a tensor or None"),
        (silence(9), "no heads"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message), edit(MODEL, {MID: change}):
            MODEL(TOKENS)
    with pytest.raises(ValueError, match="heads 0 to 7, not 9"), edit(MODEL, {"blocks.0.attn.hook_z": silence(9)}):
        MODEL(TOKENS)
    for edits, message in (
        ({}, "there is no edit"),
        ({MID: []}, "an edit is a function"),
        ({"nope": zero()}, "no site"),
    ):
        with pytest.raises(ValueError, match=message), edit(MODEL, edits):
            pass
    assert torch.equal(MODEL(TOKENS), plain["logits"])


@torch.no_grad()
def test_a_packed_and_compiled_model_takes_edits_while_it_generates() -> None:
    """Nothing that is compiled passes a hook by."""
    gemma = gemma2.load("pocket:pocket-q8_0.gguf", device="cpu", weights="packed", fast=True)
    text = "And God said"
    before = gemma.generate(text, 8)
    with edit(gemma, {"blocks.3.hook_mlp_out": zero()}), capture(gemma, "blocks.3.hook_mlp_out") as seen:
        changed = gemma.generate(text, 8)
    assert changed != before and gemma.generate(text, 8) == before
    assert len(seen.passes) == 8 and not any(bool(one.values["blocks.3.hook_mlp_out"].any()) for one in seen.passes)


def test_positions_and_steps_that_no_pass_had_are_told_at_the_end_of_the_block() -> None:
    said = pytest.warns(UserWarning, match="position 50: no pass of this block had it")
    with said, torch.no_grad(), edit(MODEL, {MID: zero()}, positions=[7, 50]):
        MODEL(TOKENS)
    with pytest.warns(UserWarning, match="position -50: no pass"), torch.no_grad(), capture(MODEL, MID, positions=-50):
        MODEL(TOKENS)
    with pytest.warns(UserWarning, match="step 2: no pass"), torch.no_grad(), edit(MODEL, {MID: zero()}, steps=[0, 2]):
        MODEL(TOKENS)
        MODEL(TOKENS)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        with edit(MODEL, {MID: zero()}, positions=[25, -1], steps=slice(0, None)), capture(MODEL, MID, positions=25):
            list(generate_ids(MODEL, TOKENS.tolist(), 4))
        with edit(MODEL, {MID: zero()}, positions=50):  # nothing ran
            pass


def test_an_edit_that_writes_into_the_value_is_refused(plain: dict[str, Tensor]) -> None:
    def write(value: Tensor, hook: Hook) -> Tensor:
        return value.mul_(0)

    def quietly(value: Tensor, hook: Hook) -> None:
        value[:, 0] = 0.0

    for function in (write, quietly):
        refused = pytest.raises(ValueError, match=rf"{MID}: the edit wrote into the value")
        with refused, torch.no_grad(), edit(MODEL, {MID: function}):
            MODEL(TOKENS)
    with torch.no_grad():
        assert torch.equal(MODEL(TOKENS), plain["logits"])


@pytest.mark.parametrize(
    "ready",
    [
        add(torch.ones(10)),
        steer(torch.ones(10), 2.0),
        remove(torch.ones(10)),
        replace(torch.ones(3, 24)),
        mean(torch.ones(10)),
    ],
)
def test_a_ready_edit_with_a_tensor_of_another_shape_names_the_site_and_both_shapes(ready: Edit) -> None:
    refused = pytest.raises(ValueError, match=rf"{MID}: .*does not broadcast to \[1, 24, \d+\] \[b t d\]")
    with refused, torch.no_grad(), edit(MODEL, {MID: ready}):
        MODEL(TOKENS)
