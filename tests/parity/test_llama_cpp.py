"""llama.cpp's recorded logits for every file of a small random Gemma 2, against ours without any profile.

They differ from a correct float32 run by what llama.cpp rounds: activations to 8 bits before they meet quantized
weights, to 16 before F16 and BF16, and GELU to a table of 16-bit numbers. `scripts/compare_llama_cpp.py` takes the
distance apart; the limits here are that distance for every file, so that any other difference shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import parity_model
import pytest
import torch
from safetensors.torch import load_file

import gemma2
from tests.conftest import SHARED
from tests.parity.recordings import FILES, MADE, PARITY, WRITTEN, file, prompt

DATA = SHARED / "data" / "parity-model"
# Largest and root-mean-square difference of the last positions' logits.
DISTANCES = {
    "f32": (0.0015, 0.0004),
    "f16": (0.0091, 0.0023),
    "bf16": (0.0825, 0.0183),
    "q8_0": (0.2282, 0.0591),
    "q4_k_m": (0.7790, 0.1112),
    "q2_k": (0.2960, 0.0746),
    "mixed": (0.3394, 0.0797),
}
FOUR_LAYERS = {
    "f32": (0.0157, 0.0020),
    "f16": (0.0639, 0.0062),
    "bf16": (0.7321, 0.0605),
    "q8_0": (1.4292, 0.1757),
    "q6_k": (1.6914, 0.2581),
    "q5_k_m": (1.7747, 0.2458),
    "q5_k_s": (1.6665, 0.2497),
    "q5_1": (1.4176, 0.2043),
    "q5_0": (1.3490, 0.1959),
    "q4_k_m": (1.7911, 0.2449),
    "q4_k_s": (2.1855, 0.2450),
    "q4_1": (1.4158, 0.2013),
    "q4_0": (1.3473, 0.1878),
    "iq4_nl": (1.6394, 0.2039),
    "iq4_xs": (1.8598, 0.2714),
    "q3_k_l": (2.2188, 0.2458),
    "q3_k_m": (1.4636, 0.2320),
    "q3_k_s": (1.9216, 0.2483),
    "iq3_m": (4.9903, 0.3555),
    "iq3_s": (1.4882, 0.2680),
    "q2_k": (2.4520, 0.2725),
    "tq2_0": (2.3321, 0.3110),
    "tq1_0": (2.3321, 0.3110),
}


@torch.no_grad()
def check(path: Path, tokens: torch.Tensor, theirs: torch.Tensor, limits: tuple[float, float]) -> None:
    ours = gemma2.load(path, dtype="float32", device="cpu").model(tokens)[0, -len(theirs) :]
    apart = (ours - theirs).double()
    largest, typical = limits
    assert apart.abs().max() <= 1.001 * largest + 1e-4 and apart.pow(2).mean().sqrt() <= 1.001 * typical + 1e-4
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("name", DISTANCES)
def test_the_logits_are_as_far_from_llama_cpp_as_its_rounding_takes_them(name: str) -> None:
    check(file(name), prompt(), load_file(PARITY / "llama_cpp_logits.safetensors")[name], DISTANCES[name])


@pytest.mark.long
@pytest.mark.needs("shared", "data/parity-model")
@pytest.mark.parametrize("name", FOUR_LAYERS)
def test_the_logits_of_a_deeper_model_are_as_far_from_llama_cpp_as_its_rounding_takes_them(name: str) -> None:
    tokens = torch.tensor([json.loads((DATA / "ids.json").read_text(encoding="utf-8"))])
    check(DATA / f"{name}.gguf", tokens, load_file(DATA / "llama_cpp_logits.safetensors")[name], FOUR_LAYERS[name])


def test_every_recorded_file_is_among_them_and_all_are_at_most_4_mb() -> None:
    assert set(DISTANCES) == set(FILES) == load_file(PARITY / "llama_cpp_logits.safetensors").keys()
    assert {path.stem for path in PARITY.glob("*.gguf")} == set(WRITTEN)
    assert sum(path.stat().st_size for path in PARITY.iterdir()) <= 4_000_000


@pytest.mark.parametrize("name", MADE)
def test_a_float_file_gives_the_weights_of_the_seed(name: str) -> None:
    """Norms too, although the file holds 1 + w; they are float32 in every file."""
    seeded, dtype = parity_model.weights(), {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name]
    for weight, parameter in gemma2.load(file(name), dtype="float32", device="cpu").model.named_parameters():
        if weight.endswith("norm.weight"):
            assert torch.equal(1.0 + parameter, 1.0 + seeded[weight]), weight
        else:
            assert torch.equal(parameter, seeded[weight].to(dtype).float()), weight
