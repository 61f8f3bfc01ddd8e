"""The model that ships with the package: what it is, how large, and that it has learnt to write."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import gemma2
from gemma2.load import POCKET
from tests.conftest import SHARED

GGUF = "pocket-q8_0.gguf"
# From chapters that were never trained on: every 20th of the Bible, from the first on, is held out.
HELD_OUT = "And God saw the light, that it was good: and God divided the light from the darkness."


def test_the_package_grows_by_at_most_12_megabytes_and_6_and_a_half_for_the_gguf() -> None:
    sizes = {path.suffix == ".gguf": 0 for path in POCKET.iterdir()}
    for path in POCKET.iterdir():
        sizes[path.suffix == ".gguf"] += path.stat().st_size
    assert sizes[False] <= 12e6 and sizes[True] <= 6.5e6


def test_the_gguf_beside_it_is_what_convert_makes_of_it(tmp_path: Path) -> None:
    again = gemma2.convert("pocket", tmp_path / GGUF, type="q8_0", progress=False).path
    assert (POCKET / GGUF).read_bytes() == again.read_bytes()


@torch.no_grad()
def test_the_gguf_beside_it_runs_and_predicts_as_well(pocket: gemma2.Gemma) -> None:
    quantized = gemma2.load(f"pocket:{GGUF}", device="cpu", dtype="float32")
    assert quantized.config == pocket.config
    ids = quantized.tokenizer.encode(HELD_OUT)
    assert ids == pocket.tokenizer.encode(HELD_OUT)
    tokens = torch.tensor([ids])
    loss, plain = (F.cross_entropy(m(tokens)[0, :-1], tokens[0, 1:]).item() for m in (quantized.model, pocket.model))
    assert loss == pytest.approx(plain, abs=0.02)


def test_it_is_a_complete_gemma_2_in_which_every_feature_bites() -> None:
    gemma = gemma2.load()
    config = gemma.config
    assert gemma.model.model.norm.weight.dtype == torch.bfloat16
    assert config.sliding_window * 8 == config.max_position_embeddings
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    assert config.num_attention_heads * config.head_dim != config.hidden_size
    assert config.query_pre_attn_scalar == config.head_dim
    assert len(set(config.layer_types)) == 2 and config.layer_types[-1] == gemma2.config.GLOBAL
    for name, parameter in gemma.model.named_parameters():
        assert parameter.ndim == 1 or parameter.shape[-1] % 256 == 0, f"{name}: rows that GGUF cannot block"
    assert set(gemma.tokenizer.special) == {"pad", "eos", "bos", "unk", "start_of_turn", "end_of_turn"}


@torch.no_grad()
def test_it_predicts_text_it_never_saw_far_better_than_chance(pocket: gemma2.Gemma) -> None:
    tokens = torch.tensor([pocket.tokenizer.encode(HELD_OUT)])
    logits = pocket.model(tokens)[0, :-1]
    loss = F.cross_entropy(logits, tokens[0, 1:]).item()
    assert loss < 4.0 < math.log(pocket.config.vocab_size) - 4


@torch.no_grad()
def test_without_a_bos_it_predicts_worse(pocket: gemma2.Gemma) -> None:
    tokens = torch.tensor([pocket.tokenizer.encode(HELD_OUT)])
    with_bos = F.cross_entropy(pocket.model(tokens)[0, 1:-1], tokens[0, 2:])
    without = F.cross_entropy(pocket.model(tokens[:, 1:])[0, :-1], tokens[0, 2:])
    assert without > with_bos


@pytest.mark.long
def test_it_writes_words_of_the_language_it_was_trained_on(pocket: gemma2.Gemma) -> None:
    text = "".join(
        pocket.generate("And the king said unto", max_new_tokens=120, temperature=0.7, top_p=0.9, seed=seed)
        for seed in range(4)
    )
    words = re.findall(r"[a-z]+", text.lower())
    common = {
        "the",
        "and",
        "of",
        "unto",
        "lord",
        "shall",
        "that",
        "he",
        "thou",
        "thy",
        "thee",
        "him",
        "his",
        "in",
        "to",
    }
    assert len(words) > 250
    assert sum(word in common for word in words) / len(words) > 0.2


@pytest.mark.long
@pytest.mark.needs("shared", "data/early-modern-english")
def test_the_reported_held_out_loss_is_that_of_the_shipped_weights(pocket: gemma2.Gemma) -> None:
    card = (POCKET / "README.md").read_text(encoding="utf-8")
    reported = re.search(r"\*\*([\d.]+) nats per token\*\*", card)
    script = load_script("train_pocket")
    _, held = script.documents(SHARED / "data" / "early-modern-english")
    random.Random(0).shuffle(held)
    ids = [[*pocket.tokenizer.encode(text, bos=False), 1] for text in held[script.SELECTION :]]
    total, count = script.held_out_loss(pocket.model, ids, 2, pocket.config.max_position_embeddings)
    pocket.model.eval()
    assert reported and float(reported[1]) == pytest.approx(total / count, abs=0.005)


def load_script(name: str) -> Any:
    place = Path(__file__).resolve().parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_its_training_is_recorded_beside_it() -> None:
    log = json.loads((POCKET / "training.json").read_text(encoding="utf-8"))
    result, losses = log["result"], [loss for _, loss in log["held_out"]]
    assert len(losses) > 5 and losses[0] > min(losses)
    assert result["held_out_bits_per_byte"] < 2 and result["held_out_tokens"] > 10_000
