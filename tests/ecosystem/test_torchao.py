"""torchao: the linears' weights become quantized tensors, the model stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gemma2
from gemma2.research import capture
from gemma2.research.sites import chosen
from tests.ecosystem.conftest import needs

quantization = needs("torchao.quantization")

TEXT = "And it came to pass in those days, that the king sent unto him, and said, Behold, I am here before thee."


@pytest.fixture
def quantized(pocket: gemma2.Gemma) -> gemma2.Gemma:
    """The pocket model with int8 weights in all linears; the embedding, which is also the head, stays float32."""
    model = copy.deepcopy(pocket.model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return gemma2.Gemma(model, pocket.tokenizer)


def tokens_of(gemma: gemma2.Gemma) -> Tensor:
    return torch.tensor([gemma.tokenizer.encode(TEXT)])


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def test_int8_weights_compute_what_the_same_weights_do_in_float32(
    quantized: gemma2.Gemma, pocket: gemma2.Gemma
) -> None:
    dequantized = copy.deepcopy(pocket.model)
    for name, linear in linears(dequantized).items():
        rounded = linears(quantized.model)[name].weight.dequantize()
        assert not torch.equal(rounded, linear.weight)
        linear.weight.copy_(rounded)
    tokens = tokens_of(pocket)
    found, expected, plain = (model(tokens) for model in (quantized.model, dequantized, pocket.model))
    assert (found - expected).abs().max() < 1e-3 < (found - plain).abs().max()
    losses = [F.cross_entropy(logits[0, :-1], tokens[0, 1:]).item() for logits in (found, plain)]
    assert abs(losses[0] - losses[1]) < 0.02, losses


@torch.no_grad()
def test_generation_is_the_argmax_of_the_quantized_model(quantized: gemma2.Gemma) -> None:
    prompt = quantized.tokenizer.encode("And the king said")
    text = quantized.generate([prompt], 12)[0]
    written = list(prompt)
    for _ in range(12):
        written.append(int(quantized.model(torch.tensor([written]))[0, -1].argmax()))
    assert text == quantized.tokenizer.decode(written[len(prompt) :])


@torch.no_grad()
def test_capture_sees_every_site_of_a_quantized_model(quantized: gemma2.Gemma) -> None:
    tokens = tokens_of(quantized)
    with capture(quantized) as seen:
        logits = quantized.model(tokens)
    assert seen.keys() == chosen(quantized.config).keys() and torch.equal(seen["logits"], logits)
    gate_proj = quantized.model.get_submodule("model.layers.3.mlp.gate_proj")
    assert torch.equal(seen["blocks.3.mlp.hook_pre"], gate_proj(seen["blocks.3.ln2"]))
