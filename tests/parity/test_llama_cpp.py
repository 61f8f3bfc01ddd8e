"""llama.cpp's logits for every file it wrote of a small random Gemma 2, where the shared data is present.

They differ from a correct float32 run by what llama.cpp rounds: activations to 8 bits before they meet quantized
weights, to 16 before F16 and BF16, and GELU to a table of 16-bit numbers. `scripts/compare_llama_cpp.py` takes the
distance apart; the limits here are that distance for every file, so that any other difference shows.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import gemma2
from tests.conftest import SHARED

DATA = SHARED / "data" / "parity-model"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the files in shared/data/parity-model are not here")

DISTANCES = {  # largest and root-mean-square difference of the last 48 positions' logits
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
@pytest.mark.parametrize("name", DISTANCES)
def test_the_logits_are_as_far_from_llama_cpp_as_its_rounding_takes_them(name: str) -> None:
    theirs = load_file(DATA / "llama_cpp_logits.safetensors")[name]
    tokens = torch.tensor([json.loads((DATA / "ids.json").read_text())])
    ours = gemma2.load(DATA / f"{name}.gguf", dtype="float32", device="cpu").model(tokens)[0, -len(theirs) :]
    apart = (ours - theirs).double()
    largest, typical = DISTANCES[name]
    assert apart.abs().max() <= 1.001 * largest + 1e-4 and apart.pow(2).mean().sqrt() <= 1.001 * typical + 1e-4
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_every_file_is_among_them() -> None:
    assert {path.stem for path in DATA.glob("*.gguf")} == set(DISTANCES)


def test_the_f32_file_gives_the_tensors_of_the_safetensors() -> None:
    """Norms too, although the file holds 1 + w."""
    ours = dict(gemma2.load(DATA, device="cpu").model.named_parameters())
    for name, parameter in gemma2.load(DATA / "f32.gguf", device="cpu").model.named_parameters():
        gain = name.endswith("norm.weight")
        assert parameter.dtype == torch.float32
        assert torch.equal(1.0 + parameter, 1.0 + ours[name]) if gain else torch.equal(parameter, ours[name]), name
