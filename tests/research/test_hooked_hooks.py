"""TransformerLens's hooks: what they are told, in which order they act, how long they stay."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2.research import hooked
from gemma2.research.hooked_hooks import HookPoint
from tests.conftest import ids, tiny

MODEL = tiny("27b").double()
TOKENS = ids(2, 24)
POST, NEXT = "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"  # the same tensor


def close(a: Tensor, b: Tensor, bound: float = 1e-12) -> None:
    assert a.shape == b.shape and float((a - b).abs().max()) <= bound * float(b.abs().max())


def hooks_on(model: gemma2.Gemma2) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
def test_hooks_change_what_they_return_or_write_and_see_what_stands_before() -> None:
    model, plain, told = hooked(MODEL), MODEL(TOKENS), list[tuple[str, int, int]]()

    def returns(value: Tensor, hook: HookPoint) -> Tensor:
        told.append((hook.name, hook.layer(), hook.step))
        return torch.zeros_like(value)

    def writes(value: Tensor, hook: Any) -> None:
        value[:] = 0

    def writes_and_returns(value: Tensor, hook: Any) -> Tensor:
        value[:] = 0
        return value

    def looks(value: Tensor, hook: Any) -> None:
        hook.ctx["norm"] = float(value.norm())

    name = "blocks.2.hook_mlp_out"
    found = [model.run_with_hooks(TOKENS, fwd_hooks=[(name, f)]) for f in (returns, writes, writes_and_returns)]
    assert told == [(name, 2, 0)]
    assert not torch.equal(found[0], plain) and all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: True, looks)]), plain)
    with model.hooks(fwd_hooks=[(lambda name: name == "blocks.2.hook_mlp_out", returns)]) as same:
        logits, cache = same.run_with_cache(TOKENS, names_filter=name)
        assert torch.equal(logits, found[0]) and not cache[name].any()
    with torch.inference_mode():
        assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=[(name, writes)]), found[0])
    twice = model.run_with_hooks(TOKENS, fwd_hooks=[(name, returns), (name, lambda value, hook: value + 1)])
    assert torch.equal(
        twice, model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda value, hook: torch.ones_like(value))])
    )
    assert torch.equal(MODEL(TOKENS), plain)


@torch.no_grad()
def test_an_edit_of_the_scale_is_one_of_its_reciprocal() -> None:
    model = hooked(MODEL)
    scale = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.ln2.hook_scale", lambda value, hook: value * 4)])
    inverse = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.ln2.hook_inv_scale", lambda value, hook: value / 4)])
    close(scale, inverse)
    assert not torch.allclose(scale, MODEL(TOKENS))


def test_backward_hooks_are_told_the_gradient_of_a_site() -> None:
    model, found = hooked(MODEL), dict[str, Tensor]()

    def keep(gradient: Tensor, hook: HookPoint) -> None:
        found[hook.name] = gradient

    name = "blocks.1.hook_resid_mid"
    model.run_with_hooks(TOKENS, bwd_hooks=[(name, keep)], return_type="loss").backward()
    shift = torch.zeros(2, 24, 288, dtype=torch.float64, requires_grad=True)
    with model.hooks(fwd_hooks=[(name, lambda value, hook: value + shift)]):
        (expected,) = torch.autograd.grad(model(TOKENS, return_type="loss"), shift)
    close(found[name], expected)
    MODEL.zero_grad(set_to_none=True)
    with torch.no_grad(), pytest.raises(ValueError, match="takes no gradient"):
        model.run_with_hooks(TOKENS, bwd_hooks=[(name, keep)])


def test_no_hook_stays_when_a_function_fails() -> None:
    def fails(value: Tensor, hook: Any) -> None:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        hooked(MODEL).run_with_hooks(
            TOKENS, fwd_hooks=[("blocks.0.hook_resid_post", fails)], bwd_hooks=[("*_mid", fails)]
        )
    for module in MODEL.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@torch.no_grad()
def test_a_function_is_given_its_hook_by_name_so_that_partials_work() -> None:
    def scaled(value: Tensor, factor: float, hook: HookPoint) -> Tensor:
        return value * factor

    model = hooked(MODEL)
    found = model.run_with_hooks(TOKENS, fwd_hooks=[(POST, partial(scaled, factor=2.0))])
    assert torch.equal(found, model.run_with_hooks(TOKENS, fwd_hooks=[(POST, lambda value, hook: value * 2)]))
    with pytest.raises(TypeError, match="hook"):
        model.run_with_hooks(TOKENS, fwd_hooks=[(POST, lambda value, where: None)])


def test_all_functions_of_a_site_share_its_ctx_until_it_is_cleared() -> None:
    model, found = hooked(MODEL), list[Any]()

    def puts(value: Tensor, hook: HookPoint) -> None:
        hook.ctx["norm"] = float(value.detach().norm())

    def takes(value: Tensor, hook: HookPoint) -> None:
        found.append(hook.ctx.get("norm"))

    model.run_with_hooks(TOKENS, "loss", fwd_hooks=[(POST, puts)], bwd_hooks=[(POST, takes), (NEXT, takes)]).backward()
    model.run_with_hooks(TOKENS, fwd_hooks=[(POST, takes)], clear_contexts=True)
    model.run_with_hooks(TOKENS, fwd_hooks=[(POST, takes)])
    assert found[0] is None and found[1] == found[2] is not None and found[3] is None
    MODEL.zero_grad(set_to_none=True)


def test_gradients_pass_the_later_site_first_and_what_it_returns_goes_on() -> None:
    """Also where both have the same tensor."""
    model, told = hooked(MODEL), dict[str, Tensor]()
    _, plain = model.run_with_cache(TOKENS, "loss", names_filter=[POST], incl_bwd=True)

    def doubles(gradient: Tensor, hook: HookPoint) -> Any:
        told[hook.name] = gradient
        return (gradient * 2,) if hook.name == NEXT else gradient * 2  # in a tuple too, as PyTorch has it

    def looks(gradient: Tensor, hook: HookPoint) -> None:
        told[f"{hook.name} again"] = gradient

    back: Any = [(POST, doubles), (NEXT, doubles), (NEXT, looks), ("hook_embed", looks)]
    model.run_with_hooks(TOKENS, return_type="loss", bwd_hooks=back).backward()
    assert [name for name in told if "embed" not in name] == [NEXT, f"{NEXT} again", POST]
    close(told[NEXT], plain[f"{POST}_grad"])
    close(told[f"{NEXT} again"], told[NEXT])
    close(told[POST], 2 * told[NEXT])
    _, before = model.run_with_cache(TOKENS, "loss", names_filter=["hook_embed"], incl_bwd=True)
    close(told["hook_embed again"], 4 * before["hook_embed_grad"])
    MODEL.zero_grad(set_to_none=True)


def test_the_gradient_of_a_scale_is_that_of_the_scale() -> None:
    model, name = hooked(MODEL), "blocks.1.ln1.hook_scale"
    found = list[Tensor]()
    model.run_with_hooks(TOKENS, "loss", bwd_hooks=[(name, lambda g, hook: found.append(g))]).backward()
    shift = torch.zeros(2, 24, 1, dtype=torch.float64, requires_grad=True)
    with model.hooks([(name, lambda value, hook: value + shift)]):
        (expected,) = torch.autograd.grad(model(TOKENS, return_type="loss"), shift)
    close(found[0], expected, 1e-10)
    embedding = list[Tensor]()
    last: Any = ("hook_embed", lambda g, hook: embedding.append(g))
    for factor in (1.0, 3.0):
        halves: Any = [(name, lambda g, hook, factor=factor: g * factor), last]
        model.run_with_hooks(TOKENS, "loss", bwd_hooks=halves).backward()
    with model.hooks([(name, lambda value, hook: 3 * value - 2 * value.detach())]):  # three times the gradient
        model.run_with_hooks(TOKENS, "loss", bwd_hooks=[last]).backward()
    close(embedding[1], embedding[2], 1e-10)
    assert not torch.allclose(embedding[0], embedding[1])
    MODEL.zero_grad(set_to_none=True)


def test_a_packed_model_tells_gradients_where_its_weights_take_none() -> None:
    gemma = gemma2.load("pocket:pocket-q8_0.gguf", device="cpu", weights="packed", fast=True)
    model, told = hooked(gemma), list[Tensor]()
    keep: Any = lambda gradient, hook: told.append(gradient)  # noqa: E731
    model.run_with_hooks("And God said", "loss", bwd_hooks=[("hook_embed", keep)]).backward()
    _, cache = model.run_with_cache("And God said", "loss", names_filter="hook_embed", incl_bwd=True)
    assert torch.equal(told[0], cache["hook_embed_grad"]) and told[0].abs().max() > 0


@torch.no_grad()
def test_added_hooks_act_in_every_call_until_they_are_reset_and_leave_the_model_alone(pocket: gemma2.Gemma) -> None:
    model, text, name = hooked(pocket), "And God said", "blocks.2.hook_mlp_out"
    plain, written = model(text), model.generate(text, 4, do_sample=False)
    expected = model.run_with_hooks(text, fwd_hooks=[(name, lambda value, hook: value * -3 + 1)])
    model.add_hook(name, lambda value, hook: value * -3)
    assert hooks_on(pocket.model) == 0 and torch.equal(hooked(pocket)(text), plain)
    with model.hooks([(name, lambda value, hook: value + 1)]):  # after what was added before
        assert torch.equal(model(text), expected)
        logits, cache = model.run_with_cache(text, names_filter=name)
        assert torch.equal(logits, expected) and hooks_on(pocket.model) > 0
    model.add_hook(lambda site: site == name, lambda value, hook: value + 1)
    assert torch.equal(model(text), expected)
    logits, again = model.run_with_cache(text, names_filter=name)
    assert torch.equal(logits, expected) and torch.equal(again[name], cache[name])
    assert model.generate(text, 4, do_sample=False) != written
    with model.hooks():
        assert hooks_on(pocket.model) > 0
        model.reset_hooks()
        assert torch.equal(model(text), plain)
    assert torch.equal(model(text), plain) and hooks_on(pocket.model) == 0


def test_reset_hooks_chooses_by_direction_and_leaves_what_is_permanent() -> None:
    model, told = hooked(MODEL), list[str]()

    def tells(what: str) -> Any:
        return lambda value, hook: told.append(what)

    def once() -> list[str]:
        told.clear()
        model(TOKENS, return_type="loss").backward()
        return list(told)

    model.add_hook(POST, tells("forward"))
    model.add_hook(POST, tells("backward"), "bwd")
    model.add_perma_hook(POST, tells("permanent"))
    assert once() == ["forward", "permanent", "backward"]
    model.reset_hooks(direction="fwd")
    assert once() == ["permanent", "backward"]
    model.reset_hooks()
    assert once() == ["permanent"]
    model.reset_hooks(including_permanent=True)
    assert once() == []
    loss = model.run_with_hooks(TOKENS, "loss", bwd_hooks=[(POST, tells("stays"))], reset_hooks_end=False)
    loss.backward()
    assert told == ["stays"] and once() == ["stays"]
    loss = model(TOKENS, return_type="loss")
    model.reset_hooks()
    loss.backward()
    assert told == ["stays"]
    MODEL.zero_grad(set_to_none=True)
    for call in (lambda: model.add_hook(POST, print, "back"), lambda: model.reset_hooks(direction="back")):
        with pytest.raises(ValueError, match="not 'back'"):
            call()
    with pytest.raises(ValueError, match="no site is called 'nope'"):
        model.add_hook("nope", print)


def test_an_added_hook_that_fails_leaves_nothing_on_the_model() -> None:
    model = hooked(MODEL)
    model.add_hook(POST, lambda value, hook: value[:, :1])
    for _ in range(2):
        with pytest.raises(ValueError, match="returned shape"):
            model(TOKENS)
        assert hooks_on(MODEL) == 0
    model.reset_hooks()
    assert torch.equal(model(TOKENS), MODEL(TOKENS))


def test_caching_hooks_keep_what_a_run_with_a_cache_keeps() -> None:
    model, names = hooked(MODEL), [POST, "blocks.1.ln1.hook_scale", "blocks.2.attn.hook_q"]
    _, expected = model.run_with_cache(TOKENS, "loss", names_filter=names, incl_bwd=True, pos_slice=3)
    kept, forward, back = model.get_caching_hooks(names, incl_bwd=True, pos_slice=3)
    model.run_with_hooks(TOKENS, "loss", fwd_hooks=forward, bwd_hooks=back).backward()
    assert kept.keys() == set(expected)
    for name, value in kept.items():
        close(value, expected[name])
    given = dict[str, Tensor]()
    kept, forward, back = model.get_caching_hooks(lambda name: name == POST, remove_batch_dim=True, cache=given)
    model.run_with_hooks(TOKENS[:1], fwd_hooks=forward)
    assert given is kept and not back and kept[POST].shape == (24, 288)
    with pytest.raises(ValueError, match="it has 2 rows"):
        model.run_with_hooks(TOKENS, fwd_hooks=forward)
    MODEL.zero_grad(set_to_none=True)
