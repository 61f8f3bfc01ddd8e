"""The profile of llama.cpp: its arithmetic, piece by piece, against slow oracles; then its traces and logits."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gemma2.numerics import PROFILES, with_numerics
from gemma2.numerics.changes import Stored
from gemma2.numerics.profiles import ggml_math
from gemma2.numerics.profiles.ggml_products import rounded, summed
from gemma2.research import capture
from tests.conftest import SHARED, ids, tiny
from tests.parity.recordings import FILES, PARITY, file, opened, prompt
from tests.parity.test_llama_cpp import FOUR_LAYERS

DATA = SHARED / "data" / "parity-model"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(value: Fraction) -> float:
    """The float32 nearest to a rational: the better of the neighbours of a first guess, the even one of two equals."""
    guess = np.float32(float(value))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return float(min(near, key=lambda x: (abs(Fraction(float(x)) - value), int(x.view(np.uint32)) & 1)))


def fused(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    return np.float32(nearest(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))))


def test_fma_rounds_once() -> None:
    a, b = randn(2000), randn(2000, seed=1)
    c = -(a * b) * (1 + 1e-6 * randn(2000, seed=2))  # nearly cancels, so a rounded product would show
    for x, y, z, got in zip(*(t.tolist() for t in (a, b, c, ggml_math.fma(a, b, c))), strict=True):
        assert got == nearest(Fraction(x) * Fraction(y) + Fraction(z))


@pytest.mark.parametrize("lanes, group", [(16, 1), (64, 1), (8, 4)])
def test_a_product_in_lanes_is_a_loop_over_fused_multiply_adds(lanes: int, group: int) -> None:
    x, w = randn(3, 150), randn(2, 150, seed=1)
    got = ggml_math.lane_product(x, w, lanes, group)
    for i in range(3):
        for j in range(2):
            sums = np.zeros(lanes, np.float32)
            for k in range(0, 150, group):
                exact = sum(
                    Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x[i, k : k + group], w[j, k:], strict=False)
                )
                lane = k // group % lanes
                sums[lane] = nearest(Fraction(float(sums[lane])) + exact)
            while len(sums) > 1:
                sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
            assert got[i, j] == float(sums[0])


def test_rows_split_for_the_cache_do_not_change_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = randn(2, 37, 64), randn(2, 20, 64, seed=1)
    whole = ggml_math.lane_product(x, w, 16)
    monkeypatch.setattr(ggml_math, "CACHED", 1)
    assert torch.equal(ggml_math.lane_product(x, w, 16), whole)


def ulps(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).abs() / torch.exp2(exact.abs().log2().floor() - 23)).max().item()


def test_exp_and_tanh_are_as_good_as_their_libraries_say_and_no_better() -> None:
    x = torch.cat((randn(20000) * 5, randn(20000), torch.linspace(-30, 30, 5000)))
    x = x[x != 0]
    assert 0.5 < ulps(ggml_math.exp(-x.abs()), (-x.abs()).double().exp()) < 2.3
    assert 0.6 < ulps(ggml_math.tanh(x), x.double().tanh()) < 2.2
    assert torch.equal(ggml_math.tanh(-x), -ggml_math.tanh(x))
    assert ggml_math.exp(torch.tensor([0.0, -1e4])).tolist() == [1.0, 0.0]
    assert ggml_math.tanh(torch.tensor([0.0, 1e-30, 30.0])).tolist() == [0.0, float(np.float32(1e-30)), 1.0]


def test_activations_become_what_ggml_makes_of_them() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, -63.5, -127.0] + [0.0] * 27)  # a scale of 1; ties go to the even number
    assert rounded(x, "Q8_0")[:5].tolist() == [127.0, 0.0, 2.0, -64.0, -127.0]
    blocks = randn(4, 512) * 10
    back = rounded(blocks, "Q8_0").unflatten(-1, (-1, 32))
    scale = (blocks.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127).half().float()
    assert torch.equal(back / scale, (back / scale).round())
    assert (back - blocks.unflatten(-1, (-1, 32))).abs().max() < 0.52 * scale.max()
    wide = rounded(blocks, "Q8_K")
    assert wide.dtype == torch.float64 and (wide - blocks).abs().max() < 0.51 * blocks.abs().max() / 127
    assert torch.equal(rounded(torch.zeros(1, 256), "Q8_K"), torch.zeros(1, 256, dtype=torch.float64))
    assert torch.equal(rounded(torch.zeros(1, 256), "Q8_0"), torch.zeros(1, 256))
    assert torch.equal(rounded(blocks, "F16"), blocks.half().float())
    assert rounded(blocks, "F32") is blocks


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q6_K"])
@pytest.mark.parametrize("rows", [1, 5])
def test_products_are_those_of_float64_up_to_rounding(kind: str, rows: int) -> None:
    x, w = randn(1, rows, 512), randn(7, 512, seed=1).half().float()
    x = rounded(x, {"Q6_K": "Q8_K"}.get(kind, kind))
    exact = x.double() @ w.double().T
    assert 0 < (summed(x, w, kind) - exact).abs().max() < 1e-4


@pytest.mark.long
def test_types_are_taken_from_the_dtype_unless_they_are_given() -> None:
    model = tiny()
    names = [name for name, _ in model.named_parameters()]
    for dtype, kind, other in ((torch.float32, "F32", "BF16"), (torch.bfloat16, "BF16", "F32")):
        model.to(dtype)
        taken, stated, wrong = (
            with_numerics(model, "llama.cpp", storage=kinds)
            for kinds in (None, dict.fromkeys(names, Stored(kind)), dict.fromkeys(names, Stored(other)))
        )
        with torch.no_grad():
            assert torch.equal(taken(ids(1, 20)), stated(ids(1, 20)))
            assert not torch.equal(taken(ids(1, 20)), wrong(ids(1, 20)))


def test_rows_of_padding_stay_finite() -> None:
    positions = torch.arange(20)[None] - 4
    with torch.no_grad():
        assert with_numerics(tiny(), "llama.cpp")(ids(1, 20), positions).isfinite().all()


@torch.no_grad()
def apart(name: str, changes: list[str] | None = None) -> Tensor:
    theirs = load_file(PARITY / "llama_cpp_logits.safetensors")[name]
    model, kinds = opened(file(name))
    return (with_numerics(model, "llama.cpp", changes, kinds)(prompt())[0, -len(theirs) :] - theirs).double()


@pytest.mark.parametrize("name", FILES)
def test_llama_cpps_logits_are_met_to_the_bit_for_every_type(name: str) -> None:
    assert apart(name).abs().max() == 0


@pytest.mark.needs("shared", "data/parity-model")
@pytest.mark.parametrize("name", FOUR_LAYERS)
@torch.no_grad()
@pytest.mark.long
def test_llama_cpps_logits_of_a_deeper_model_are_met_to_the_bit_for_every_type(name: str) -> None:
    theirs = load_file(DATA / "llama_cpp_logits.safetensors")[name]
    model, kinds = opened(DATA / f"{name}.gguf")
    tokens = torch.tensor([json.loads((DATA / "ids.json").read_text(encoding="utf-8"))])
    assert torch.equal(with_numerics(model, "llama.cpp", storage=kinds)(tokens)[0, -len(theirs) :], theirs)


@pytest.mark.long
@pytest.mark.parametrize("bit", [bit.name for bit in PROFILES["llama.cpp"]])
def test_no_bit_can_be_left_out_but_those_that_float32_weights_make_void(bit: str) -> None:
    """float32 has nothing to widen, the query scale is a power of two here, and what is hidden weighs nothing."""
    void = {"stream=float32", "embed_scale=float32", "q_scale=before", "mask=-inf"}
    name = "q8_0" if bit == "activations=partner" else "f32"
    left = apart(name, [other.name for other in PROFILES["llama.cpp"] if other.name != bit])
    assert (left.abs().max() == 0) == (bit in void)


@pytest.mark.parametrize("name", ["f32", "q4_k_m"])
@torch.no_grad()
def test_every_recorded_site_of_llama_cpp_is_met_to_the_bit(name: str) -> None:
    theirs = load_file(PARITY / f"llama_cpp_sites_{name}.safetensors")
    assert len(theirs) == 2 * 21 + 5
    model, kinds = opened(file(name))
    twin = with_numerics(model, "llama.cpp", storage=kinds)
    with capture(twin, theirs.keys()) as seen:
        twin(prompt())
    for site, recorded in theirs.items():
        by_head = site.endswith(("scores_raw", "pattern"))  # [h t s], and all others [t ...]
        found = seen[site][0][:, -recorded.shape[1] :] if by_head else seen[site][0][-len(recorded) :]
        assert torch.equal(found, recorded), site
