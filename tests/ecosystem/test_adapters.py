"""Adapters that PEFT made, for transformers' Gemma 2 and for ours, given to `gemma2.load`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import gemma2
from gemma2.errors import BadModelFile
from gemma2.research import capture
from gemma2.research.sites import chosen
from tests.conftest import ids
from tests.ecosystem.conftest import needs
from tests.test_adapter_tokenizer import CHATML, END, beside

peft = needs("peft")
transformers = needs("transformers")

TOKENS = ids(2, 24, vocab=4096)
Base = Callable[..., Any]


def lora(**options: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj", "v_proj"], **options})


KINDS: dict[str, Callable[[], Any]] = {
    "LoRA": lora,
    "all-linear": lambda: lora(target_modules="all-linear"),
    "a pattern": lambda: lora(target_modules=r".*layers\.[01]\.(self_attn|mlp)\.(q|up)_proj"),
    "DoRA": lambda: lora(use_dora=True, target_modules=["q_proj", "o_proj", "down_proj"]),
    "rsLoRA": lambda: lora(use_rslora=True, lora_alpha=16),
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "ranks": lambda: lora(rank_pattern={"v_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 32}),
    "one layer": lambda: lora(layers_to_transform=[1]),
    "IA3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "norms": lambda: lora(modules_to_save=["input_layernorm", "norm"]),
    "embedding": lambda: lora(modules_to_save=["embed_tokens"]),
    "embedding, tied": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "embedding and head": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "head": lambda: lora(modules_to_save=["lm_head"]),
    "tokens": lambda: lora(trainable_token_indices=[5, 106, 107]),
    "LoRA of the embedding": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "LoRA of the embedding, tied": lambda: lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "LoRA of the head": lambda: lora(target_modules=["q_proj", "lm_head"]),
}
APART = {"embedding", "embedding and head", "head", *(kind for kind in KINDS if kind.startswith("LoRA of"))}


@pytest.fixture
def base(folder: Callable[..., Path]) -> Path:
    return folder("base", size="2b", num_hidden_layers=2)


def theirs(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.Gemma2ForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")


@torch.no_grad()
def made(model: Any, config: Any, place: Path, **options: Any) -> Path:
    """An adapter with values of its own, saved by PEFT."""
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    model.save_pretrained(place, **options)
    return place


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    found = model(tokens)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_made_for_transformers_gives_the_bits_of_transformers_with_peft(
    base: Path, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    place = made(theirs(base, dtype), KINDS[kind](), tmp_path / "adapter")
    wanted = logits(peft.PeftModel.from_pretrained(theirs(base, dtype), place).eval())
    plain = gemma2.load(base, dtype=dtype, device="cpu")
    gemma = gemma2.load(base, dtype=dtype, device="cpu", adapter=place)
    assert torch.equal(logits(gemma.model), wanted) and not torch.equal(wanted, logits(plain.model))
    assert isinstance(gemma.model, gemma2.Gemma2) and not gemma.model.training
    assert all(parameter.requires_grad for parameter in gemma.model.parameters())
    assert len(gemma.notes) == len(plain.notes) + 1 and f"{place} is in the model" in gemma.notes[-1]


@pytest.mark.filterwarnings("ignore")
def test_on_a_wider_model_the_layout_of_a_tied_head_counts_and_is_that_of_peft(tmp_path: Path) -> None:
    base = gemma2.convert(None, tmp_path / "pocket", type="f32").path
    place = made(theirs(base), KINDS["LoRA of the embedding, tied"](), tmp_path / "adapter")
    wanted = peft.PeftModel.from_pretrained(theirs(base), place).eval()
    found = gemma2.load(base, device="cpu", adapter=place).model
    for length in (1, 2, 3, 5, 8, 13, 24):  # in some the layout makes no difference
        assert torch.equal(logits(found, TOKENS[:1, :length]), logits(wanted, TOKENS[:1, :length]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_gives_a_model_that_can_be_written_or_is_refused_by_name(
    base: Path, tmp_path: Path, kind: str
) -> None:
    place = made(theirs(base), KINDS[kind](), tmp_path / "adapter")
    if kind in APART:
        with pytest.raises(BadModelFile, match="trains the head apart from the embedding"):
            gemma2.load(base, adapter=place, merge_adapter=True)
        return
    around = gemma2.load(base, adapter=place, dtype="float32")
    merged = gemma2.load(base, adapter=place, dtype="float32", merge_adapter=True)
    assert {type(module) for module in merged.model.modules()} == {
        type(module) for module in gemma2.load(base).model.modules()
    }
    wanted = logits(around.model)
    assert (logits(merged.model) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    gemma2.convert(merged, tmp_path / "written.gguf", type="f32")
    gemma2.convert(base, tmp_path / "folder", adapter=place)
    for written in (tmp_path / "written.gguf", tmp_path / "folder"):
        assert torch.equal(logits(gemma2.load(written).model), logits(merged.model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved", [None, ["embed_tokens"]])
def test_an_adapter_made_for_our_model_gives_the_bits_it_had(base: Path, tmp_path: Path, saved: list[str]) -> None:
    ours = gemma2.load(base, dtype="float32").model
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=saved)
    place = made(ours, config, tmp_path / "adapter")
    gemma = gemma2.load(base, dtype="float32", adapter=place)
    assert torch.equal(logits(gemma.model), logits(ours)), "the head follows the trained embedding"
    merged = gemma2.load(base, dtype="float32", adapter=place, merge_adapter=True)
    assert (logits(merged.model) - logits(ours)).abs().max() < 1e-3


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["LoRA", "norms", "embedding", "tokens", "LoRA of the embedding", "head"])
def test_generation_capture_and_hooks_work_with_an_adapter_in(base: Path, tmp_path: Path, kind: str) -> None:
    gemma = gemma2.load(base, dtype="float32", adapter=made(theirs(base), KINDS[kind](), tmp_path / "adapter"))
    wanted = logits(gemma.model)
    with capture(gemma.model) as seen:
        assert torch.equal(gemma.model(TOKENS), wanted)
    assert torch.equal(seen["logits"], wanted) and len(seen) == len(chosen(gemma.config, "*"))
    cache = gemma2.HybridCache(gemma.config, 2, 32)
    stepwise = [gemma.model(TOKENS[:, :20], cache=cache), gemma.model(TOKENS[:, 20:], cache=cache)]
    assert (torch.cat(stepwise, 1) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    text = gemma.generate("The cat", 6)
    hook = gemma.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, i, o: o * 0)
    assert not torch.equal(logits(gemma.model), wanted)
    hook.remove()
    assert gemma.generate("The cat", 6) == text


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_float64_is_applied_in_float64(base: Path, tmp_path: Path) -> None:
    place = made(theirs(base, torch.float64), lora(), tmp_path / "adapter")
    assert {tensor.dtype for tensor in load_file(place / "adapter_model.safetensors").values()} == {torch.float64}
    double = gemma2.load(base, dtype="float64", device="cpu", adapter=place).model
    stored = load_file(place / "adapter_model.safetensors")
    matrix = "model.layers.0.self_attn.q_proj.lora_A"
    assert torch.equal(double.get_parameter(f"{matrix}.default.weight"), stored[f"base_model.model.{matrix}.weight"])
    wanted = logits(peft.PeftModel.from_pretrained(theirs(base, torch.float64), place).eval())
    assert (logits(double) - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # its norms are float32
    single = logits(gemma2.load(base, dtype="float32", device="cpu", adapter=place).model)
    assert (single - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_tokenizer_beside_an_adapter_is_used_and_written_unless_another_is_given(
    base: Path, tmp_path: Path
) -> None:
    place = beside(tmp_path / "adapter", 8, END, CHATML)
    made(theirs(base), lora(), place)
    gemma = gemma2.load(base, adapter=place, device="cpu")
    assert gemma.chat_template == CHATML and 9 in gemma.stop_ids
    assert gemma.tokenizer.encode(END, bos=False, special=True) == [9]
    gemma2.convert(base, tmp_path / "merged", adapter=place)
    merged = gemma2.load(tmp_path / "merged", device="cpu")
    assert (merged.stop_ids, merged.chat_template) == (gemma.stop_ids, CHATML)
    plain = gemma2.load(base, adapter=place, device="cpu", tokenizer=base)
    assert plain.chat_template is None and 9 not in plain.stop_ids


def test_a_pickled_adapter_is_read_as_its_tensors(base: Path, tmp_path: Path) -> None:
    place = made(theirs(base), lora(), tmp_path / "adapter")
    wanted = logits(gemma2.load(base, dtype="float32", adapter=place).model)
    torch.save(load_file(place / "adapter_model.safetensors"), place / "adapter_model.bin")
    (place / "adapter_model.safetensors").unlink()
    assert torch.equal(logits(gemma2.load(base, dtype="float32", adapter=place).model), wanted)


def test_a_resized_embedding_kept_beside_the_adapter_is_taken_too(base: Path, tmp_path: Path) -> None:
    model = theirs(base)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] += 1
    place = made(model, lora(), tmp_path / "adapter", save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(place / "adapter_model.safetensors")
    wanted = logits(peft.PeftModel.from_pretrained(theirs(base), place).eval())
    assert torch.equal(logits(gemma2.load(base, dtype="float32", adapter=place).model), wanted)


RESIZED = ("LoRA", "embedding", "embedding, tied", "embedding and head", "tokens", "LoRA of the embedding")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", RESIZED)
def test_an_adapter_of_a_resized_base_names_the_cure_and_with_it_has_the_bits_of_peft(
    kind: str, base: Path, tmp_path: Path
) -> None:
    model = theirs(base)
    model.resize_token_embeddings(4100)
    config = KINDS[kind]()
    place = made(model, config, tmp_path / "adapter")
    with pytest.raises(
        BadModelFile, match=r"its embedding has 4,100 rows, and the model's 4,096: .*embeddings\(4100\)"
    ):
        gemma2.load(base, adapter=place)
    resized = theirs(base)
    resized.resize_token_embeddings(4100)
    resized.save_pretrained(tmp_path / "resized")
    (tmp_path / "resized" / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    wanted = logits(peft.PeftModel.from_pretrained(theirs(tmp_path / "resized"), place).eval())
    assert torch.equal(logits(gemma2.load(tmp_path / "resized", device="cpu", adapter=place).model), wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "ADALORA", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_other_kinds_that_peft_makes_are_refused_by_name(base: Path, tmp_path: Path, kind: str) -> None:
    prompts = {"num_virtual_tokens": 4}
    others = {"target_modules": ["q_proj"]} | ({"total_step": 10} if kind == "ADALORA" else {})
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](
        task_type="CAUSAL_LM", **(prompts if kind.endswith("TUNING") else others)
    )
    place = made(theirs(base), config, tmp_path / "adapter")
    with pytest.raises(BadModelFile, match=f"adapter_config.json: peft_type is {kind}"):
        gemma2.load(base, adapter=place)


def test_a_key_that_is_not_known_is_refused_only_where_it_switches_something_on(base: Path, tmp_path: Path) -> None:
    place = made(theirs(base), lora(), tmp_path / "adapter")
    wanted = logits(gemma2.load(base, dtype="float32", adapter=place).model)
    stated = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
    (place / "adapter_config.json").write_text(
        json.dumps(stated | {"use_more": False, "more_config": {}, "more": 16}), encoding="utf-8"
    )
    assert torch.equal(logits(gemma2.load(base, dtype="float32", adapter=place).model), wanted)
    (place / "adapter_config.json").write_text(json.dumps(stated | {"use_more": True}), encoding="utf-8")
    with pytest.raises(BadModelFile, match="'use_more' is set, and what it does is not known here"):
        gemma2.load(base, adapter=place)
