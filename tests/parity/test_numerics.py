"""Numerics profiles: every change shows, the model they start from is left alone, and the other systems are met."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gemma2
from gemma2 import ops
from gemma2.model import RotaryEmbedding, Tap
from gemma2.numerics import PROFILES, with_numerics
from gemma2.numerics.changes import Stored
from gemma2.numerics.parts import in_parts
from gemma2.numerics.profiles import jax, litgpt
from gemma2.twins import replaced
from tests.conftest import SHAPES, ids, tiny

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@torch.no_grad()
def seen(model: gemma2.Gemma2, tokens: Tensor) -> dict[str, Tensor]:
    """What every module of a model puts out, by name, and the logits under ""; cosines and sines left out, which are a
    pair, and in parts are rounded where they are used."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, i, output, name=name: found.__setitem__(name, output))
        for name, module in model.named_modules()
        if not isinstance(module, RotaryEmbedding)
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return found


def taps(model: gemma2.Gemma2) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Tap)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SHAPES)
def test_the_model_in_parts_is_the_model_at_every_place(size: str, dtype: torch.dtype) -> None:
    model = tiny(size).to(dtype)
    plain = seen(model, ids(2, 40))
    parts = seen(with_numerics(model, "gemma_pytorch", changes=[]), ids(2, 40))
    assert plain.keys() <= parts.keys()
    assert all(torch.equal(parts[name], output) for name, output in plain.items())


@torch.no_grad()
def test_the_model_in_parts_decodes_with_a_cache_and_padding_as_the_model_does() -> None:
    model, tokens, positions = tiny(), ids(2, 30), torch.arange(30).expand(2, 30) - torch.tensor([[4], [0]])
    results = []
    for each in (model, with_numerics(model, "gemma_pytorch", changes=[])):
        cache = gemma2.HybridCache(model.config, 2, 30)
        spans = [slice(0, 20), slice(20, 21), slice(21, 30)]
        results.append(torch.cat([each(tokens[:, s], positions[:, s], cache) for s in spans], dim=1))
    assert torch.equal(*results)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_leaves_the_model_alone_and_shares_its_parameters(profile: str) -> None:
    model = tiny()
    before, named = seen(model, ids(1, 40)), dict(model.named_modules())
    twin = with_numerics(model, profile)
    with torch.no_grad():
        twin(ids(1, 40))
    assert dict(model.named_modules()) == named
    after = seen(model, ids(1, 40))
    assert all(torch.equal(after[name], output) for name, output in before.items())
    mine, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert mine.keys() == theirs.keys() and all(mine[name] is theirs[name] for name in mine)


@pytest.mark.long
@pytest.mark.parametrize("profile", PROFILES)
def test_every_tap_exists_and_is_passed_under_every_profile(profile: str) -> None:
    model = tiny()
    twin = with_numerics(model, profile)
    assert taps(twin) == taps(model)
    plain, theirs = seen(model, ids(1, 40)), seen(twin, ids(1, 40))
    assert plain.keys() <= theirs.keys()
    assert all(theirs[name].shape == output.shape for name, output in plain.items())


@pytest.mark.long
@pytest.mark.parametrize("profile, name", [(name, each.name) for name, changes in PROFILES.items() for each in changes])
def test_each_change_alone_changes_something(profile: str, name: str) -> None:
    """In float32 or bfloat16, at some place: some round only what bfloat16 can lose, or only hidden scores."""
    for dtype in DTYPES.values():
        model = tiny("27b").to(dtype)
        kinds = {parameter: Stored("F16") for parameter, _ in model.named_parameters()}
        twin = with_numerics(model, profile, changes=[name], storage=kinds)
        plain, theirs = seen(model, ids(1, 60)), seen(twin, ids(1, 60))
        if any(theirs[at].dtype != dtype or not torch.equal(theirs[at], output) for at, output in plain.items()):
            return
    raise AssertionError(f"{profile}: {name} changes nothing")


@pytest.mark.parametrize("profile", PROFILES)
def test_bits_are_described_and_named_once(profile: str) -> None:
    changes = PROFILES[profile]
    assert len({change.name for change in changes}) == len(changes)
    assert all(change.about and change.source and "=" in change.name for change in changes)


def test_unknown_profiles_and_bits_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'mlx' is not one of transformers, gemma_pytorch, llama\.cpp"):
        with_numerics(tiny(), "mlx")
    with pytest.raises(ValueError, match="gemma_pytorch has no change 'gelu=fp16'; it has rope_mul=float32"):
        with_numerics(tiny(), "gemma_pytorch", changes=["gelu=fp16"])


def test_gradients_reach_the_shared_parameters() -> None:
    model = tiny()
    with_numerics(model, "gemma_pytorch")(ids(1, 20)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_twin_is_put_in_place_of_every_module_that_computes() -> None:
    kinds = {type(module) for module in replaced(tiny(), in_parts).model.modules()}
    assert nn.Linear not in kinds and gemma2.model.RMSNorm not in kinds


@torch.no_grad()
def test_litgpt_in_float32_is_transformers_but_for_hidden_scores() -> None:
    model, tokens = tiny(), ids(2, 60)
    assert torch.equal(with_numerics(model, "litgpt")(tokens), model(tokens))
    wide = model.bfloat16()
    assert not torch.equal(with_numerics(wide, "litgpt")(tokens), wide(tokens))


@pytest.mark.parametrize("operation", ["norm", "softmax", "gelu", "cap", "query scale"])
def test_jaxs_operations_one_by_one_are_met_to_the_bit_in_bfloat16(operation: str) -> None:
    external = pytest.importorskip("jax", reason="the live comparison needs jax")
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 288, generator=generator) * 4).bfloat16()
    w = (torch.randn(288, generator=generator) * 0.3).bfloat16()
    a, s = (external.numpy.asarray(t.float().numpy()).astype("bfloat16") for t in (x, w))
    if operation == "norm":
        theirs = (
            a
            * external.lax.rsqrt(external.numpy.mean(external.numpy.square(a), axis=-1, keepdims=True) + 1e-06)
            * (1 + s)
        )
        ours = jax.normalized(x, jax.inverse_scale(x, 1e-6)) * litgpt.gain(w)
    elif operation == "softmax":
        theirs, ours = external.nn.softmax(a, axis=-1), jax.softmaxed(x, x.dtype)
    elif operation == "gelu":
        theirs, ours = external.nn.gelu(a) * a, jax.gelu(x) * x
    elif operation == "cap":
        theirs, ours = external.numpy.tanh(a / 5.0) * 5.0, ops.softcap(x, 5.0)
    else:
        theirs, ours = a * (1 / 12), jax.scaled_queries(x, 1 / 12)
    assert ours.dtype == torch.bfloat16
    assert ours.float().tolist() == theirs.astype("float32").tolist()


@pytest.mark.parametrize("profile", [name for name, changes in PROFILES.items() if changes])
def test_float64_is_refused_by_every_profile_that_rounds(profile: str) -> None:
    with pytest.raises(ValueError, match="no float64 is computed there; use float32 or bfloat16"):
        with_numerics(tiny().double(), profile)
