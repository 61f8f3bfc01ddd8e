"""PEFT: its adapters go around the model's linears by their names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gemma2
from gemma2.research import capture
from tests.conftest import ids
from tests.ecosystem.conftest import needs

peft = needs("peft")

PROMPT = "The cat sat"
TEXT = f"{PROMPT} on the mat and looked at the dog, who had a bone and would not share it with the cat."
SITE = "blocks.2.attn.hook_q"


@pytest.fixture
def gemma(pocket: gemma2.Gemma) -> gemma2.Gemma:
    """A copy of the pocket model, since an adapter goes into it."""
    return gemma2.Gemma(copy.deepcopy(pocket.model), pocket.tokenizer)


def tokens_of(gemma: gemma2.Gemma) -> Tensor:
    return torch.tensor([gemma.tokenizer.encode(TEXT)])


def adapted(gemma: gemma2.Gemma) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(gemma.model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


@torch.enable_grad()
def train(model: Any, tokens: Tensor, steps: int = 10) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_lora_trains_and_nothing_else_does(gemma: gemma2.Gemma) -> None:
    before = {name: parameter.detach().clone() for name, parameter in gemma.model.named_parameters()}
    model = adapted(gemma)
    losses = train(model, tokens_of(gemma))
    assert losses[-1] < losses[0] - 0.1, losses
    after = {name.replace(".base_layer", ""): p for name, p in gemma.model.named_parameters() if "lora" not in name}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    grown = [bool(p.any()) for name, p in gemma.model.named_parameters() if "lora_B" in name]  # from zero
    assert len(grown) == 2 * gemma.config.num_hidden_layers and all(grown)


@torch.no_grad()
def test_generation_and_capture_see_the_adapter_and_switched_off_the_bits_of_before_return(
    gemma: gemma2.Gemma,
) -> None:
    tokens = tokens_of(gemma)
    text, logits = gemma.generate(PROMPT, 12), gemma.model(tokens)
    model = adapted(gemma)
    train(model, tokens)
    with capture(model, [SITE, "blocks.2.ln1"]) as seen:
        changed = gemma.model(tokens)
    assert not torch.equal(changed, logits) and gemma.generate(PROMPT, 12) != text
    q_proj = gemma.model.get_submodule("model.layers.2.self_attn.q_proj")
    assert torch.equal(seen[SITE].flatten(2), q_proj(seen["blocks.2.ln1"]))
    with model.disable_adapter():
        assert torch.equal(gemma.model(tokens), logits) and gemma.generate(PROMPT, 12) == text
    assert torch.equal(gemma.model(tokens), changed)
    assert torch.equal(model.unload()(tokens), logits)


@torch.no_grad()
def test_a_saved_adapter_loads_into_another_copy_of_the_model(
    gemma: gemma2.Gemma, pocket: gemma2.Gemma, tmp_path: Path
) -> None:
    tokens = tokens_of(gemma)
    model = adapted(gemma)
    train(model, tokens, steps=3)
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(pocket.model)
    plain = other(tokens)
    again = peft.PeftModel.from_pretrained(other, str(tmp_path))
    assert torch.equal(again(tokens), model(tokens)) and not torch.equal(plain, model(tokens))


CAUSAL: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False),
    "every linear": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules="all-linear"
    ),
    "with the embedding": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, init_lora_weights=False, modules_to_save=["embed_tokens"]
    ),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings", "ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_an_adapter_for_causal_lm_serves_our_face_and_transformers_model_alike(
    kind: str, face: Any, theirs: Any, tmp_path: Path
) -> None:
    models = []
    inputs = {"input_ids": ids(2, 20, vocab=4096)}
    plain = face(**inputs).logits
    for place, model in (("ours", face), ("theirs", theirs)):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(copy.deepcopy(model), CAUSAL[kind]()).eval()
        adapted.save_pretrained(tmp_path / place)
        models.append(adapted)
    models.append(peft.PeftModel.from_pretrained(face, str(tmp_path / "theirs")))
    models.append(peft.PeftModel.from_pretrained(theirs, str(tmp_path / "ours")))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    first, *others = (model(**inputs).logits for model in models)
    assert not torch.equal(first, plain) and all(torch.equal(other, first) for other in others)
    first, *others = (model.generate(**inputs, max_new_tokens=6) for model in models)
    assert all(torch.equal(other, first) for other in others)


@torch.no_grad()
def test_a_merged_adapter_leaves_the_model_with_transformers_weights(face: Any, theirs: Any) -> None:
    merged = []
    for model in (face, theirs):
        torch.manual_seed(0)
        merged.append(peft.get_peft_model(model, CAUSAL["lora"]()).merge_and_unload())
    tokens = ids(1, 20, vocab=4096)
    assert torch.equal(merged[0](tokens).logits, merged[1](tokens).logits)
    assert torch.equal(face.whole(tokens), merged[1](tokens).logits)
