"""Small models in which every feature of Gemma 2 changes the logits, shared by all tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gemma2
from gemma2.checkpoints.hf_config import read_config
from gemma2.load import POCKET

# Two test processes share two cores: more threads than cores wait for each other longer than they compute.
os.environ["OMP_NUM_THREADS"] = "1"  # for children
torch.set_num_threads(1)

pytest_plugins = ("tests.hub_server",)  # its fixtures
# Data that the repository does not hold, in a folder beside it: a test that needs some is marked
# `@pytest.mark.needs("shared", PATH)`. It skips where they are not, or fails if GEMMA2_EXPECT_DATA names "shared".
SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN = Path(__file__).parent / "golden"
PLACES = {"shared": SHARED, "golden": GOLDEN}
EXPECTED = set(filter(None, os.environ.get("GEMMA2_EXPECT_DATA", "").split(",")))

# GEMMA2_LONG=1 pytest (make test-long) tries as many files and texts as the authors do before a release, and runs the
# tests that are marked `long`.
LONG = "GEMMA2_LONG" in os.environ


def some_of(count: int) -> int:
    """How many of so many random cases a run tries: all in a long one, a quarter in another."""
    return count if LONG else count // 4


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: runs with GEMMA2_LONG=1 only")
    config.addinivalue_line("markers", "needs(place, path): data outside the code, in a folder of PLACES")
    config.addinivalue_line("markers", "posix: signals, forks, pipes with names, symbolic links, terminals, locks")
    if EXPECTED - PLACES.keys():
        raise pytest.UsageError(f"GEMMA2_EXPECT_DATA is {sorted(EXPECTED)}; it can name {', '.join(PLACES)}")


@pytest.hookimpl(tryfirst=True)  # before fixtures open the data
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("long") and not LONG:
        pytest.skip("long: make test-long runs it")
    if os.name != "posix" and item.get_closest_marker("posix"):
        pytest.skip("needs what POSIX systems have")
    for mark in item.iter_markers("needs"):
        place, path = mark.args
        if (PLACES[place] / path).exists():
            continue
        if place in EXPECTED | {"golden"}:  # what the repository holds is never missing for a reason
            pytest.fail(f"{place}/{path} is not here, and must be", pytrace=False)
        pytest.skip(f"{place}/{path} is not here")


# Like the three sizes scaled down: q width below (2B), above (9B) and below (27B) the model width, window 16, and for
# 27B a query scale that is not the head width.
SHAPES: dict[str, dict[str, int]] = {
    "2b": {"hidden_size": 144, "intermediate_size": 576, "num_attention_heads": 8, "num_key_value_heads": 4},
    "9b": {"hidden_size": 112, "intermediate_size": 448, "num_attention_heads": 8, "num_key_value_heads": 4},
    "27b": {"hidden_size": 288, "intermediate_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4},
}
COMMON: dict[str, Any] = {
    "model_type": "gemma2",
    "vocab_size": 512,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "max_position_embeddings": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def raw_config(size: str = "27b", **changes: Any) -> dict[str, Any]:
    """A config.json's content for a tiny model shaped like `size`."""
    scale = {"query_pre_attn_scalar": 36} if size == "27b" else {}
    return {**COMMON, **SHAPES[size], **scale, **changes}


def tiny(size: str = "27b", seed: int = 0, **changes: Any) -> gemma2.Gemma2:
    """A tiny model with weights large enough that both caps saturate and norms matter."""
    model = gemma2.Gemma2(read_config(raw_config(size, **changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        gain = 4 if name.endswith(("q_proj.weight", "k_proj.weight")) else 3
        std = 0.3 if "norm" in name else 1.0 if "embed" in name else gain * parameter.shape[-1] ** -0.5
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model


def ids(batch: int, length: int, seed: int = 0, vocab: int = 512) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def tensors_of(model: gemma2.Gemma2) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="session")
def pocket() -> gemma2.Gemma:
    """The model that ships with the package, in float32 so that tolerances are those of float32."""
    return gemma2.load(dtype="float32", device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a Hugging Face folder of a tiny model with the pocket tokenizer; keyword arguments change its config."""

    def write(name: str = "model", tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
        raw = raw_config(vocab_size=4096, **changes)
        place = tmp_path / name
        place.mkdir()
        (place / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        (place / "tokenizer.model").write_bytes((POCKET / "tokenizer.model").read_bytes())
        save_file(tensors or tensors_of(tiny(vocab_size=4096, **changes)), place / "model.safetensors")
        return place

    return write
