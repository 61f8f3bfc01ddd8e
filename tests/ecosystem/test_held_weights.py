"""Weights held in a form, with bitsandbytes, PEFT and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma2
from gemma2.fast.held import HeldLinear
from gemma2.parity.tolerances import TOLERANCES
from tests.conftest import ids
from tests.ecosystem.conftest import needs

UP, TOKENS = "model.layers.1.mlp.up_proj", ids(1, 24, vocab=4096)
# What the form is in transformers' BitsAndBytesConfig.
CONFIGS: dict[str, dict[str, Any]] = {
    "bnb-nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "bnb-int8": {"load_in_8bit": True},
}


@torch.no_grad()
@pytest.mark.parametrize("form", CONFIGS)
def test_the_forms_of_bitsandbytes_are_those_of_transformers(form: str, tmp_path: Path) -> None:
    bitsandbytes, transformers = needs("bitsandbytes"), needs("transformers")
    gemma2.convert("pocket", tmp_path / "hf")
    gemma = gemma2.load("pocket", device="cpu", weights=form)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf",
        quantization_config=transformers.BitsAndBytesConfig(**CONFIGS[form]),
        attn_implementation="eager",
        dtype=torch.bfloat16,
        device_map="cpu",
    )
    held, weight = gemma.model.get_submodule(UP), theirs.get_submodule(UP).weight
    assert isinstance(held, HeldLinear)
    if form == "bnb-int8":
        assert torch.equal(held.matrix.get_buffer("codes"), weight.data)
    else:
        made = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(held.weight, made)
    logits, expected = gemma.model(TOKENS), theirs(TOKENS).logits  # its kernel for 4 bits rounds elsewhere
    assert (logits - expected).abs().max() <= TOLERANCES[torch.bfloat16].allowed(float(expected.abs().max()))
    other = gemma2.load("pocket", device="cpu").model(TOKENS)
    assert (gemma.model.to(torch.float32).bfloat16()(TOKENS) - logits).abs().max() == 0  # the scales stay float32
    assert (logits - other).abs().mean() > 2 * (logits - expected).abs().mean() or form == "bnb-int8"


@pytest.mark.parametrize("form", ["int8", "int4", "bnb-nf4"])
def test_lora_is_trained_around_held_weights_and_loaded_there_again(
    form: str, folder: Callable[..., Path], tmp_path: Path
) -> None:
    peft = needs("peft")
    if form.startswith("bnb"):
        needs("bitsandbytes")
    base = folder("base", size="27b", num_hidden_layers=2, hidden_size=320)
    gemma = gemma2.load(base, device="cpu", dtype="float32", weights=form)
    with torch.no_grad():
        before = gemma.model(TOKENS)
    around = peft.get_peft_model(
        gemma2.as_transformers(gemma), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    trained = [parameter for parameter in around.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 7
    optimizer = torch.optim.SGD(trained, lr=0.05)
    losses = []
    for _ in range(4):
        loss = around(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    around.save_pretrained(tmp_path / "adapter")
    again = gemma2.load(base, device="cpu", dtype="float32", weights=form, adapter=tmp_path / "adapter")
    with torch.no_grad():
        logits = again.model(TOKENS)
        torch.testing.assert_close(logits, around(TOKENS).logits, rtol=0, atol=1e-4)
        assert (logits - before).abs().max() > 1e-2


def test_an_adapter_that_changes_a_matrix_is_refused_beside_held_weights(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    peft = needs("peft")
    base = folder("base", size="27b", num_hidden_layers=2)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = gemma2.as_transformers(gemma2.load(base, device="cpu"))
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"changes model\.embed_tokens itself, which cannot be with weights="):
        gemma2.load(base, device="cpu", weights="int8", adapter=tmp_path / "adapter")
