"""Switches change fast, packed and compiled models as they change the plain one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2 import HybridCache
from gemma2.config import GLOBAL
from gemma2.fast.speed import speed_up
from gemma2.research import ablate
from gemma2.research.ablation import standard
from gemma2.twins import sharing
from tests.research.ablated import BUILT, CONFIG, EVERYTHING, MODEL, STEPS, TOKENS, state, under


@pytest.fixture(scope="module")
def plain() -> Tensor:
    with torch.no_grad():
        return MODEL(TOKENS)


@pytest.mark.parametrize("name", BUILT)
def test_fast_twins_are_changed_as_the_plain_parts_are(name: str) -> None:
    switches, _ = BUILT[name]
    fast = sharing(MODEL)
    speed_up(fast)
    before = state(fast)
    found, plain = under(switches, fast), under(switches)
    assert state(fast) == before
    assert (found - plain).abs().max() <= 1e-9
    cache = HybridCache(replace(CONFIG, sliding_window=40, layer_types=(GLOBAL,) * 4), 2, 40)  # keeps all
    with torch.no_grad(), ablate(fast, **switches):
        steps = [fast(TOKENS[:, start:end], cache=cache) for start, end in STEPS]
    assert (torch.cat(steps, dim=1) - plain).abs().max() <= 1e-9


def check_packed(switches: dict[str, dict[str, Any]]) -> None:
    gemma = gemma2.load("pocket:pocket-q8_0.gguf", weights="packed", fast=True, device="cpu", dtype="float32")
    exact = gemma2.load("pocket:pocket-q8_0.gguf", device="cpu", dtype="float32").model
    text = torch.tensor([gemma.tokenizer.encode("And God said, Let there be light: and there was light. " * 3)])
    before = state(gemma.model)
    with torch.no_grad():
        plain = gemma.model(text)
    for name, options in switches.items():
        found, expected = under(options, gemma.model, text), under(options, exact, text)
        assert (found - expected).abs().max() <= 1e-3 * expected.abs().max(), name
        steps = under(options, gemma.model, text, cache=HybridCache(gemma.config, 1, 64))
        assert (steps - expected).abs().max() <= 1e-3 * expected.abs().max(), name
    assert state(gemma.model) == before
    with torch.no_grad():
        assert torch.equal(gemma.model(text), plain)


def test_a_packed_fast_model_is_changed_and_is_afterwards_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("compiling", "packed"):
        monkeypatch.setattr(f"gemma2.fast.{place}.can_compile", lambda: False)
    check_packed({"several": {"window": 9, "attn_softcap": 3.0, "heads": [(0, 1)]}, "caps": {"final_softcap": None}})


@pytest.mark.long
def test_a_packed_fast_model_with_compiled_kernels_is_changed_by_each_switch() -> None:
    check_packed(standard(gemma2.load().config, layers=True))
    gemma = gemma2.load("pocket:pocket-q8_0.gguf", weights="packed", fast=True, device="cpu")
    plain = gemma.generate("And God said,", max_new_tokens=8)
    with ablate(gemma, layers=[0], window=None):
        assert gemma.generate("And God said,", max_new_tokens=8) != plain
    assert gemma.generate("And God said,", max_new_tokens=8) == plain


def check_compiled(several: list[dict[str, Any]], plain: Tensor) -> None:
    torch._dynamo.reset()
    whole = torch.compile(MODEL, backend="eager")
    with torch.no_grad():
        assert torch.equal(whole(TOKENS), plain)
        for switches in several:
            with ablate(MODEL, **switches):
                changed = whole(TOKENS)
            with ablate(whole, **switches):
                again = whole(TOKENS)
            assert torch.equal(whole(TOKENS), plain)
            assert torch.equal(changed, again) and torch.equal(changed, under(switches))


def test_a_model_that_someone_compiled_is_changed_too(plain: Tensor) -> None:
    """Compiled code looks whether its modules are still those it was compiled for; hooks it would pass by."""
    check_compiled([{"layers": [0, 2]}, EVERYTHING], plain)


def test_the_window_of_the_fast_twin_changes_for_compiled_single_tokens_too() -> None:
    torch._dynamo.reset()
    fast = sharing(MODEL)
    speed_up(fast)
    places = [model.get_submodule("model.layers.0.self_attn.attend") for model in (MODEL, fast)]
    compiled = torch.compile(places[1], backend="eager")
    q, k, v = (torch.randn(1, n, heads, 16, dtype=torch.float64) for n, heads in ((1, 8), (30, 4), (30, 4)))
    given = (q, k, v, torch.tensor([[29]]), torch.arange(30)[None])
    found = []
    with torch.no_grad():
        for window in (5, None, 20):
            with ablate(MODEL, window=window), ablate(fast, window=window):
                found.append(compiled(*given))
                assert (found[-1] - places[0](*given)).abs().max() <= 1e-12
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


@pytest.mark.long
@pytest.mark.parametrize("name", BUILT)
def test_a_model_that_someone_compiled_is_changed_by_each_switch(name: str, plain: Tensor) -> None:
    check_compiled([BUILT[name][0]], plain)
