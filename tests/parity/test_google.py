"""The traces of google/gemma_pytorch and llama.cpp on a small random Gemma 2, where the shared data is present."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import gemma2
from tests.conftest import SHARED

DATA = SHARED / "data" / "parity-model"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the traces in shared/data/parity-model are not here")


@pytest.fixture(scope="module")
def traced() -> dict[str, torch.Tensor]:
    """Our float32 run under the names of Google's trace."""
    gemma = gemma2.load(DATA)
    model = gemma.model
    seen: dict[str, torch.Tensor] = {}
    places = {"hook_embed": model.model.embed_tokens, "ln_final": model.model.norm}
    places |= {f"blocks.{i}.hook_resid_post": layer for i, layer in enumerate(model.model.layers)}
    for name, module in places.items():
        module.register_forward_hook(lambda m, inputs, output, name=name: seen.__setitem__(name, output[0]))
    with torch.no_grad():
        seen["logits"] = model(torch.tensor([json.loads((DATA / "ids.json").read_text())]))[0]
    return seen


def test_the_residual_stream_and_final_norm_of_gemma_pytorch_in_float32(traced: dict[str, torch.Tensor]) -> None:
    google = load_file(DATA / "gemma_pytorch_float32.safetensors")
    for name in [name for name in google if name != "logits_last"]:
        scale = google[name].abs().max()
        assert (traced[name] - google[name]).abs().max() <= 2e-5 * scale, name


def test_the_last_logits_of_gemma_pytorch_in_float32(traced: dict[str, torch.Tensor]) -> None:
    google = load_file(DATA / "gemma_pytorch_float32.safetensors")["logits_last"]
    assert (traced["logits"][-1] - google).abs().max() <= 5e-5


def test_the_logits_of_llama_cpp_up_to_its_16_bit_gelu_table(traced: dict[str, torch.Tensor]) -> None:
    other = load_file(DATA / "llama_cpp_logits.safetensors")["f32"]
    apart = traced["logits"][-48:] - other
    assert apart.abs().max() <= 0.016 and apart.pow(2).mean().sqrt() <= 0.0021
    assert torch.equal(traced["logits"][-48:].argmax(-1), other.argmax(-1))


def test_googles_ckpt_gives_the_tensors_of_the_safetensors() -> None:
    ckpt, folder = gemma2.load(DATA / "model.ckpt"), gemma2.load(DATA)
    ours = dict(folder.model.named_parameters())
    for name, parameter in ckpt.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, ours[name].bfloat16()), name
