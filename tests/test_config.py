"""The published sizes, and configs that must not pass; tests/hostile has more of those."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gemma2
from gemma2 import BadModelFile, Gemma2
from gemma2.checkpoints.hf_config import PUBLISHED, config_dict, configs, published_config, read_config
from gemma2.config import GLOBAL, LOCAL
from tests.conftest import raw_config

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
    (tmp_path / "config.json").write_text(json.dumps(config_dict(config)))
    assert read_config(tmp_path / "config.json") == config


def test_what_transformers_writes_is_read() -> None:
    transformers = pytest.importorskip("transformers")
    raw = {key: value for key, value in raw_config().items() if key != "model_type"}
    written = transformers.Gemma2Config(**raw).to_dict()
    assert read_config(written) == read_config(raw_config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', this program runs 'gemma2'"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping must be a positive"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping is null, which means no cap on logits"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"hidden_activation": "gelu"}, "activation must be gelu_pytorch_tanh, found gelu"),
        ({"query_pre_attn_scalar": None, "head_dim": None}, "missing head_dim, query_pre_attn_scalar"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
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
