"""google-deepmind/gemma, Google's own JAX module: golden traces of its compiled run, met with no jax installed.

They are made by `scripts/make_golden.py --deepmind`, with XLA's products left to Eigen, which sums each in the order of
k from float32 zero. torch sums in an order of its own, so here the profile's products are summed in Eigen's, and all
that is left to differ is what the profile claims: every rounding between two products. In bfloat16 that is met to the
bit, on a prompt of five windows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import gemma2
from gemma2.model import Attention
from gemma2.numerics import PROFILES, with_numerics
from gemma2.numerics.parts import HeadInParts, LinearInParts, ScoresInParts
from gemma2.numerics.profiles import jax
from gemma2.parity.trace import Trace
from gemma2.research import capture

GOLDEN = Path(__file__).parents[1] / "golden"
CHANGES = [change.name for change in PROFILES["jax"]]
# What bfloat16 hides: these numbers are others in float32 only, or never seen.
SILENT = {"mask=-2.38e38", "rope_turn=divided", "cap=reciprocal", "tanh=xla"}
LEFT_OUT: list[tuple[str, ...]] = [(change,) for change in CHANGES if change not in SILENT | {"softmax=act_dtype"}]
LEFT_OUT.append(("softmax=act_dtype", "softmax_sum=compiled"))  # the second takes the place of the first


def in_order(x: Tensor, y: Tensor) -> Tensor:
    """x [... t k] by y [... k n] in float32, one k after the other, rounded to x's dtype at the end. The product of two
    bfloat16 numbers is exact in float32; one of float32 numbers is fused with its sum, as float64 all but is."""
    total = torch.zeros(1)
    for k in range(x.shape[-1]):
        term = x[..., k : k + 1].double() * y[..., k : k + 1, :].double()
        total = (total.double() + term).float()
    return total.to(x.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return in_order(x, weight.T)


def put_in_order(model: gemma2.Gemma2) -> None:
    for module in model.modules():
        if isinstance(module, LinearInParts | HeadInParts):
            module.product = linear
        if isinstance(module, ScoresInParts):
            module.product = lambda q, k: in_order(q, k.transpose(2, 3))
            module.mixed = lambda pattern, v: in_order(pattern, v)
    for module in model.modules():
        if isinstance(module, Attention):
            c = module.head_dim

            def across_heads(x: Tensor, weight: Tensor, c: int = c) -> Tensor:
                """The last product of attention is over two axes, and the heads' is the inner one there."""
                x, weight = (t.unflatten(-1, (-1, c)).transpose(-1, -2).flatten(-2) for t in (x, weight))
                return linear(x, weight)

            assert isinstance(module.o_proj, LinearInParts)
            module.o_proj.product = across_heads


def computed(trace: Trace, changes: list[str] | None, ordered: bool = True) -> dict[str, Tensor]:
    model = gemma2.Gemma2(trace.about.config)
    model.load_state_dict(load_file(GOLDEN / "model.safetensors"))
    model.to(getattr(torch, trace.about.dtype)).eval()
    twin = with_numerics(model, "jax", changes)
    if ordered:
        put_in_order(twin)
    with torch.no_grad(), capture(twin, trace.names) as seen:
        twin(torch.tensor([trace.ids]))
    return {name: seen[name][0] for name in trace.names}


def unequal(trace: Trace, found: dict[str, Tensor]) -> list[str]:
    return [name for name in trace.names if not torch.equal(found[name], trace[name])]


def rms(trace: Trace, found: dict[str, Tensor]) -> float:
    return (found["logits"].double() - trace["logits"].double()).square().mean().sqrt().item()


@pytest.fixture(params=["bfloat16", "float32"])
def trace(request: pytest.FixtureRequest) -> Trace:
    return Trace(GOLDEN / f"deepmind_{request.param}.safetensors")


@pytest.fixture
def narrow() -> Trace:
    return Trace(GOLDEN / "deepmind_bfloat16.safetensors")


def test_the_traces_are_googles_compiled_run_over_five_windows(trace: Trace) -> None:
    assert trace.about.system.startswith("gemma 3.3.0, jax 0.10.2, compiled")
    assert len(trace.ids) == 5 * trace.about.config.sliding_window
    assert sum(path.stat().st_size for path in GOLDEN.glob("deepmind_*")) < 200_000


def test_in_bfloat16_every_site_has_googles_bits(narrow: Trace) -> None:
    assert len(narrow.names) == 11 and "logits" in narrow.names
    assert unequal(narrow, computed(narrow, None)) == []


@pytest.mark.parametrize("missing", LEFT_OUT, ids=" and ".join)
def test_in_bfloat16_no_bit_can_be_left_out(narrow: Trace, missing: tuple[str, ...]) -> None:
    assert unequal(narrow, computed(narrow, [change for change in CHANGES if change not in missing]))


def test_in_bfloat16_torchs_own_products_leave_half_of_the_distance_at_most(narrow: Trace) -> None:
    """Of 0.093 rms, of logits within 30: 0.0054 with the products of AVX-512, 0.030 with those of AMX."""
    assert rms(narrow, computed(narrow, None, ordered=False)) < 0.5 * rms(narrow, computed(narrow, [], ordered=False))


def test_in_float32_the_logits_are_met_within_rounding() -> None:
    """Reciprocal roots, powers and angles are XLA's own there: 3.9e-6 rms remain, as many as without the profile."""
    assert rms(wide(), computed(wide(), None)) < 1e-5


def test_in_float32_the_caps_have_googles_bits() -> None:
    raw, capped = wide()["logits_raw"], wide()["logits"]
    cap = wide().about.config.final_logit_softcapping
    assert torch.equal(jax.tanh(jax.divided(raw, cap)) * cap, capped)
    assert not torch.equal(jax.tanh(raw / cap) * cap, capped)
    assert not torch.equal(jax.divided(raw, cap).tanh() * cap, capped)


def wide() -> Trace:
    return Trace(GOLDEN / "deepmind_float32.safetensors")
