"""Random checkpoints to measure with: the same for the same seed, and loadable in every form."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import random_checkpoint
import torch

import gemma2
from gemma2.checkpoints.hf_config import read_config
from tests.conftest import raw_config


def test_a_random_checkpoint_loads_from_its_folder_and_from_its_gguf_with_the_same_weights(tmp_path: Path) -> None:
    config = read_config(raw_config("2b", vocab_size=9000))  # far more than the pocket model has pieces
    random_checkpoint.make_folder(tmp_path / "random", config, seed=0)
    file = random_checkpoint.make_gguf(tmp_path / "random", "BF16")
    one, other = gemma2.load(tmp_path / "random", device="cpu"), gemma2.load(file, device="cpu")
    assert one.config == other.config == config and one.model.dtype == torch.bfloat16
    weights, same = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    for name, weight in weights.items():
        assert weight.float().std() == pytest.approx(0.02, rel=0.2), name
        assert weight.float().mean().abs() < 0.005, name  # of norms too, whose gain is 1 + w
    assert one.tokenizer.encode("In the beginning") == other.tokenizer.encode("In the beginning")
    assert len(one.tokenizer) == len(other.tokenizer) == 9000


def test_a_seed_gives_the_same_weights_again_and_another_seed_others(tmp_path: Path) -> None:
    config = read_config(raw_config("2b", vocab_size=4200))
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        random_checkpoint.make_folder(tmp_path / name, config, seed)
    one, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again", "other"))
    assert one == again != other
    (tmp_path / "one" / "model.safetensors").write_bytes(b"kept")
    random_checkpoint.make_folder(tmp_path / "one", config, 0)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == b"kept"


def test_sizes_are_those_published_or_the_first_layers_of_the_2b() -> None:
    name, config = random_checkpoint.parse_size("27b")
    assert name == "random-27b-46-layers" and config.query_pre_attn_scalar == 144
    name, config = random_checkpoint.parse_size("layers=6")
    assert name == "random-2b-6-layers" and config.num_hidden_layers == len(config.layer_types) == 6
    for text in ("3b", "layers=0", "layers=27", "layers="):
        with pytest.raises(ArgumentTypeError, match="is not a size: give 2b, 9b, 27b, or"):
            random_checkpoint.parse_size(text)


def test_a_type_without_its_quantizer_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(sys, "argv", ["", "--size", "layers=1", "--folder", str(tmp_path), "--gguf", "bf16,q4_k_m"])
    with pytest.raises(SystemExit, match=r"Q4_K_M is made by llama\.cpp's quantizer: pip install"):
        random_checkpoint.main()
    assert not list(tmp_path.iterdir())
