"""The twins of norm, rotary embedding and feed-forward layer, in steps and compiled; prompts in pieces."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn

from gemma2 import HybridCache, left_padded
from gemma2.fast.kernels import STEPS, Kernels, compiled
from gemma2.fast.prefill import FastMLP, FastNorm, FastRotary, fed_in_pieces, short
from gemma2.feed import model_feed
from gemma2.generate import generate_ids
from gemma2.model import MLP, ApplyRotary, RMSNorm
from gemma2.research.capture import capture
from gemma2.twins import replaced
from tests.conftest import ids, tiny

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}


def parts(kernels: Kernels) -> dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]]:
    """Name -> the plain module, its twin, the shape of what it takes. 40 x 2 rows are several buffers of the MLP."""
    model = tiny("27b")
    norm, mlp = model.model.layers[1].post_attention_layernorm, model.model.layers[1].mlp
    assert isinstance(norm, RMSNorm) and isinstance(mlp, MLP)
    return {
        "norm": (norm, FastNorm(norm, kernels), (2, 40, 288)),
        "rotary": (ApplyRotary(), FastRotary(ApplyRotary(), kernels), (2, 40, 8, 16)),
        "mlp": (mlp, FastMLP(mlp, kernels), (2, 40, 288)),
    }


def given(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    if name != "rotary":
        return [x]
    positions = torch.stack([torch.arange(40), torch.arange(40) + 900])
    return [x, *tiny("27b").model.rotary_emb(positions, dtype)]


def check(kernels: Kernels) -> None:
    for name, (plain, fast, shape) in parts(kernels).items():
        for dtype, bound in BOUNDS.items():
            x = given(name, shape, dtype)
            expected = plain.to(dtype)(*x)
            z = fast.to(dtype)(*x)
            assert z.shape == expected.shape and z.dtype == dtype
            assert (z - expected).abs().max() <= bound * expected.abs().max(), (name, dtype)
        truth = [y.bfloat16() for y in given(name, shape, torch.float64)]
        exact = plain.bfloat16().double()(*(y.double() for y in truth))
        errors = [(m.bfloat16()(*truth).double() - exact).pow(2).mean().sqrt() for m in (fast, plain)]
        assert errors[0] <= 1.2 * errors[1], (name, errors)


@torch.no_grad()
def test_the_twins_in_steps_give_the_plain_results_within_the_stated_tolerance() -> None:
    check(STEPS)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C++ compiler on CPU")
@torch.no_grad()
def test_the_compiled_twins_give_the_plain_results_and_serve_every_length_with_one_compilation() -> None:
    torch._dynamo.reset()
    kernels = compiled()
    check(kernels)
    model = tiny("27b")
    expected = [model(ids(1, n)) for n in (300, 40, 77)]
    with replaced(model, short(kernels)):
        found = [model(ids(1, 300))]
        with torch._dynamo.config.patch(error_on_recompile=True):
            found += [model(ids(1, n)) for n in (40, 77)]
    assert all((a - b).abs().max() <= 1e-3 for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_what_is_given_is_not_written_into() -> None:
    for name, (_, fast, shape) in parts(STEPS).items():
        for dtype in (torch.float32, torch.bfloat16):
            x = given(name, shape, dtype)
            before = [y.clone() for y in x]
            fast.to(dtype)(*x)
            assert all(map(torch.equal, x, before)), name


def test_gradients_are_those_of_the_plain_model_also_of_weights_alone() -> None:
    model, tokens = tiny("9b").double(), ids(1, 30)
    names = [name for name, _ in model.named_parameters()]

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(tokens).square().mean(), list(model.parameters())))

    expected = gradients()
    with replaced(model, short()):
        assert [name for name, _ in model.named_parameters()] == names
        assert all(map(torch.equal, gradients(), expected))


@torch.no_grad()
def test_a_captured_model_is_computed_as_the_plain_one() -> None:
    model, tokens = tiny("9b"), ids(2, 40)
    with capture(model) as plain:
        model(tokens)
    with replaced(model, short()), capture(model) as fast:
        model(tokens)
    assert plain.keys() == fast.keys()
    assert all((plain[name] - fast[name]).abs().max() <= 1e-4 * plain[name].abs().max() for name in plain)


@torch.no_grad()
def test_a_prompt_in_pieces_gives_the_logits_of_one_pass_and_the_same_cache() -> None:
    model = tiny("27b").double()
    rows = [ids(1, n, seed=n)[0].tolist() for n in (90, 61)]
    tokens, positions = left_padded(rows)
    expected = model(tokens, positions)[:, -1]
    with replaced(model, short()):
        for columns in (7, 32, 90, 1000):
            cache = HybridCache(model.config, 2, 100)
            assert (fed_in_pieces(model, cache, columns)(tokens, positions) - expected).abs().max() <= 1e-10
            assert cache.length == 90


@torch.no_grad()
def test_generating_with_a_prompt_in_pieces_gives_the_same_text_and_hooks_see_the_whole_prompt() -> None:
    model, prompt, widths = tiny().double(), [ids(1, 50)[0].tolist()], list[int]()
    cache = HybridCache(model.config, 1, 80)
    expected = list(generate_ids(model, prompt, 10, cache=cache, feed=model_feed(model, cache)))
    cache.reset()
    assert list(generate_ids(model, prompt, 10, cache=cache, feed=fed_in_pieces(model, cache, 16))) == expected
    cache.reset()
    handle = model.model.layers[0].register_forward_hook(lambda m, i, x: widths.append(x.shape[1]))
    list(generate_ids(model, prompt, 3, cache=cache, feed=fed_in_pieces(model, cache, 16)))
    handle.remove()
    assert widths == [50, 1, 1]
