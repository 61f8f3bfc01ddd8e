"""The twins of norm, rotary embedding and feed-forward layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma2.fast.prefill import FastMLP, FastNorm, FastRotary, short
from gemma2.model import MLP, ApplyRotary, RMSNorm
from gemma2.research import capture
from gemma2.twins import replaced
from tests.conftest import ids, tiny

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}


def parts() -> dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]]:
    """Name -> the plain module, its twin, the shape of what it takes. 40 x 2 rows are several buffers of the MLP."""
    model = tiny("27b")
    norm, mlp = model.model.layers[1].post_attention_layernorm, model.model.layers[1].mlp
    assert isinstance(norm, RMSNorm) and isinstance(mlp, MLP)
    return {
        "norm": (norm, FastNorm(norm), (2, 40, 288)),
        "rotary": (ApplyRotary(), FastRotary(ApplyRotary()), (2, 40, 8, 16)),
        "mlp": (mlp, FastMLP(mlp), (2, 40, 288)),
    }


def given(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    if name != "rotary":
        return [x]
    positions = torch.stack([torch.arange(40), torch.arange(40) + 900])
    return [x, *tiny("27b").model.rotary_emb(positions, dtype)]


@torch.no_grad()
def test_the_twins_give_the_plain_results_within_the_stated_tolerance() -> None:
    for name, (plain, fast, shape) in parts().items():
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
def test_what_is_given_is_not_written_into() -> None:
    for name, (_, fast, shape) in parts().items():
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
