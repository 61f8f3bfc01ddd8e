"""The published sizes, and configs that must not pass; tests/hostile has more of those."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma2
from gemma2 import BadModelFile, Gemma2
from gemma2.checkpoints.hf_config import (
    PUBLISHED,
    config_and_notes,
    config_dict,
    configs,
    published_config,
    read_config,
)
from gemma2.config import GLOBAL, LOCAL
from gemma2.inspect import inspect
from tests.conftest import ids, raw_config

COUNTS = {"gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984, "gemma-2-27b": 27_227_128_320}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_exact_by_formula_and_by_module(name: str) -> None:
    config = published_config(name)
    with torch.device("meta"):
        model = Gemma2(config)
    assert config.parameter_count == COUNTS[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensor_names_are_those_of_hugging_face(name: str) -> None:
    config = published_config(name)
    with torch.device("meta"):
        names = set(Gemma2(config).state_dict())
    assert len(names) == 11 * config.num_hidden_layers + 2
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.25.self_attn.q_proj.weight"} <= names
    assert {n.split(".", 3)[-1] for n in names if n.startswith("model.layers.0.")} == {
        *(f"self_attn.{letter}_proj.weight" for letter in "qkvo"),
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        *(f"{n}_layernorm.weight" for n in ("input", "post_attention", "pre_feedforward", "post_feedforward")),
    }


def test_layers_alternate_and_the_first_is_local() -> None:
    config = published_config("gemma-2-27b")
    assert config.layer_types[:3] == (LOCAL, GLOBAL, LOCAL) and config.layer_types[-1] == GLOBAL
    assert [config.window(i) for i in range(2)] == [4096, None]
    assert config.query_pre_attn_scalar == 144 != config.head_dim


def test_a_config_survives_being_written_and_read(tmp_path: Path) -> None:
    config = read_config(raw_config())
    (tmp_path / "config.json").write_text(json.dumps(config_dict(config)), encoding="utf-8")
    assert read_config(tmp_path / "config.json") == config


def test_what_transformers_writes_is_read() -> None:
    transformers = pytest.importorskip("transformers")
    raw = {key: value for key, value in raw_config().items() if key != "model_type"}
    written = transformers.Gemma2Config(**raw).to_dict()
    assert read_config(written) == read_config(raw_config())


PLAIN = {"rope_theta": 10000.0, "rope_type": "default"}
# What programs write beside or instead of the keys of `raw_config`; None leaves a key out.
WRITTEN: dict[str, dict[str, Any]] = {
    "Google, transformers 4.42": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 107],
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "sliding_window_size": 4096,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0",
        "use_cache": True,
    },
    "Unsloth": {
        "_name_or_path": "unsloth/gemma-2-2b",
        "torch_dtype": "float16",
        "unsloth_fixed": True,
        "unsloth_version": "2024.9",
        "transformers_version": "4.44.2",
        "_attn_implementation_autoset": True,
    },
    "axolotl": {"_name_or_path": "google/gemma-2-2b", "use_cache": False, "transformers_version": "4.47.1"},
    "mergekit": {"_name_or_path": "merge", "cache_implementation": "hybrid", "rope_scaling": None},
    "transformers 5": {
        "dtype": "bfloat16",
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_theta": None,
        "rope_parameters": PLAIN,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": None,
        "transformers_version": "5.23.0",
    },
    "an early activation": {"hidden_act": "gelu"},
    "an early activation alone": {"hidden_act": "gelu", "hidden_activation": None},
    "no activation": {"hidden_activation": None},
    "no rotary base": {"rope_theta": None},
    "rotary type alone": {"rope_theta": None, "rope_parameters": {"rope_type": "default"}},
    "rotary type beside the base": {"rope_theta": 500000.0, "rope_parameters": {"rope_type": "default"}},
    "rotary base without type": {"rope_theta": None, "rope_parameters": {"rope_theta": 500000.0}},
    "rotary scaling that is none": {"rope_scaling": {"type": "default"}},
    "empty rotary scaling": {"rope_scaling": {}, "rope_parameters": {}},
    "a whole number for the base": {"rope_theta": 10000},
    "no caps stated": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "no window stated": {"sliding_window": None},
    "no context stated": {"max_position_embeddings": None},
    "no epsilon stated": {"rms_norm_eps": None},
    "no head width": {"head_dim": None},
    "no query scale for heads of 256": {"head_dim": 256, "query_pre_attn_scalar": None},
    "every layer global": {"layer_types": ["full_attention"] * 4},
}


@pytest.mark.parametrize("case", WRITTEN)
def test_a_config_means_the_numbers_that_transformers_takes_from_it(case: str) -> None:
    transformers = pytest.importorskip("transformers")
    changes = WRITTEN[case]
    left_out = {key for key, value in changes.items() if value is None and key in raw_config()}
    raw = {key: value for key, value in {**raw_config(), **changes}.items() if key not in left_out}
    own, notes = config_and_notes(raw, "config.json")
    theirs = transformers.Gemma2Config(**{key: copy.deepcopy(value) for key, value in raw.items()}).to_dict()
    theirs["rope_theta"] = theirs["rope_parameters"]["rope_theta"]
    expected = {key: tuple(v) if isinstance(v := theirs[key], list) else v for key in dataclasses.asdict(own)}
    assert dataclasses.asdict(own) == expected
    assert theirs["hidden_activation"] == "gelu_pytorch_tanh"
    filled = left_out - ({"rope_theta"} if "rope_theta" in (changes.get("rope_parameters") or {}) else set())
    ignored = {"hidden_act"} if changes.get("hidden_act") == "gelu" else set()
    assert len(notes) == len(filled | ignored)
    assert all(any(f"config.json states no {name}: " in note for note in notes) for name in filled), notes
    assert not ignored or "config.json states hidden_act 'gelu', which Gemma 2 ignores" in notes[-1]


@pytest.mark.parametrize("case", ["an early activation", "no activation", "rotary base without type", "no caps stated"])
@torch.no_grad()
def test_a_folder_with_such_a_config_gives_the_logits_of_transformers(case: str, folder: Callable[..., Path]) -> None:
    transformers = pytest.importorskip("transformers")
    place = folder()
    raw = json.loads((place / "config.json").read_text(encoding="utf-8")) | WRITTEN[case]
    raw = {key: value for key, value in raw.items() if value is not None}
    (place / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    external = transformers.Gemma2ForCausalLM.from_pretrained(place, attn_implementation="eager").eval()
    tokens = ids(1, 40)
    assert torch.equal(gemma2.load(place, device="cpu").model(tokens), external(tokens, use_cache=False).logits)


def test_rotary_numbers_for_each_kind_of_layer_are_read_where_they_are_one() -> None:
    """transformers' Gemma2Config takes them, though no release of it writes them for Gemma 2."""
    raw = {**raw_config(), "rope_parameters": {LOCAL: PLAIN, GLOBAL: PLAIN}}
    assert config_and_notes(raw) == (read_config(raw_config()), ())


def test_what_was_filled_in_is_a_note_of_the_loaded_model(folder: Callable[..., Path]) -> None:
    place = folder()
    raw = json.loads((place / "config.json").read_text(encoding="utf-8"))
    del raw["hidden_activation"]
    (place / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    said = (f"{place / 'config.json'} states no hidden_activation: gelu_pytorch_tanh, as every published Gemma 2 has",)
    assert gemma2.load(place, device="cpu").notes == said
    assert inspect(place).filled == list(said)


def test_what_transformers_writes_today_is_read_without_a_note(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    raw = {key: value for key, value in raw_config().items() if key != "model_type"}
    transformers.Gemma2Config(**raw).save_pretrained(tmp_path)
    assert config_and_notes(tmp_path / "config.json") == (read_config(raw_config()), ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', this program runs 'gemma2'"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping must be a positive"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping is null, which means no cap on logits"),
        ({"attn_logit_softcapping": None}, "null, which means no cap on attention scores: every Gemma 2 has 50 there"),
        ({"sliding_window": None}, "sliding_window is null, which means no sliding window: every Gemma 2 has 4096"),
        ({"per_layer_config": {"0": {"sliding_window": 8}}}, "all layers of Gemma 2 have the same shape"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"hidden_activation": "gelu"}, "activation must be gelu_pytorch_tanh, found gelu"),
        ({"query_pre_attn_scalar": None, "head_dim": None}, "missing head_dim, query_pre_attn_scalar"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0, Gemma 2 has True"),
    ],
)
def test_configs_of_another_model_are_refused_with_the_reason(change: dict[str, object], message: str) -> None:
    with pytest.raises(BadModelFile, match=message):
        read_config({**raw_config(), **change})


def test_the_configs_are_found_in_a_checkout_and_in_an_installed_package(tmp_path: Path) -> None:
    """There is one copy, at the top level; a wheel has it inside the package."""
    root = Path(gemma2.__file__).parents[1]
    if (root / "configs").is_dir():
        assert configs() == root / "configs" and not (root / "gemma2" / "configs").exists()
    shutil.copytree(root / "gemma2", tmp_path / "gemma2", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copytree(configs(), tmp_path / "gemma2" / "configs")
    code = (
        "from gemma2.checkpoints import hf_config; print(hf_config.configs(), hf_config.published_config('gemma-2-9b'))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert done.stdout.decode().startswith(str(tmp_path / "gemma2" / "configs")), done.stderr
    assert "hidden_size=3584" in done.stdout.decode()
