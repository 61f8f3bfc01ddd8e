"""accelerate: layers may wait in memory or on disk; the embedding may not, since the head reads it too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma2
from gemma2.generate import generate_ids
from gemma2.research import capture
from gemma2.research.sites import chosen
from tests.conftest import ids, tiny
from tests.ecosystem.conftest import needs

accelerate = needs("accelerate")

PROMPT = "In the beginning"
CURE = r"embedding's weight is on meta.*offload the layers instead.*cpu_offload\(model\.model\.layers\)"


@pytest.fixture
def gemma(pocket: gemma2.Gemma) -> gemma2.Gemma:
    """A copy of the pocket model, whose weights a test moves away."""
    return gemma2.Gemma(copy.deepcopy(pocket.model), pocket.tokenizer)


def to_memory(module: torch.nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(module)


def to_disk(module: torch.nn.Module, folder: Path) -> None:
    accelerate.disk_offload(module, str(folder))


Offload = Callable[[Any, Path], None]
both = pytest.mark.parametrize("offload", [to_memory, to_disk])


@both
@torch.no_grad()
def test_offloaded_layers_compute_the_same_bits(
    offload: Offload, gemma: gemma2.Gemma, pocket: gemma2.Gemma, tmp_path: Path
) -> None:
    tokens = ids(2, 20, vocab=4096)
    offload(gemma.model.model.layers, tmp_path)
    assert all(parameter.is_meta for parameter in gemma.model.model.layers.parameters())
    assert torch.equal(gemma.model(tokens), pocket.model(tokens))
    assert gemma.generate(PROMPT, 8) == pocket.generate(PROMPT, 8)


@torch.no_grad()
def test_a_model_dispatched_over_memory_and_disk_computes_the_same_bits_at_every_site(tmp_path: Path) -> None:
    model, plain = tiny(), tiny()
    tokens = ids(2, 20)
    whole = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    places = accelerate.infer_auto_device_map(
        model, {"cpu": int(whole * 0.6), "disk": 10**12}, no_split_module_classes=["Block"]
    )
    places = {path: place if ".layers." in path else "cpu" for path, place in places.items()}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    away = [layer.mlp.up_proj.weight.is_meta for layer in model.model.layers]
    assert any(away) and not all(away)
    with capture(plain) as expected:
        plain(tokens)
    with capture(model) as seen:
        model(tokens)
    assert seen.keys() == chosen(model.config).keys()
    assert all(torch.equal(seen[name], value) for name, value in expected.items())


@both
def test_a_model_offloaded_as_a_whole_says_what_to_offload_instead(
    offload: Offload, gemma: gemma2.Gemma, tmp_path: Path
) -> None:
    offload(gemma.model, tmp_path)
    with pytest.raises(RuntimeError, match=CURE):
        gemma.model(ids(1, 20, vocab=4096))
    with pytest.raises(RuntimeError, match=CURE):
        gemma.generate(PROMPT, 8)
    with pytest.raises(RuntimeError, match=CURE):
        gemma.generate(PROMPT, 8, temperature=1.0, seed=3)
    with pytest.raises(RuntimeError, match=CURE):
        generate_ids(gemma.model, [[2, 5, 7]], 8)


def test_an_embedding_alone_on_disk_is_an_error_and_no_garbage(tmp_path: Path) -> None:
    model = tiny()
    places = dict.fromkeys(("model.layers", "model.rotary_emb", "model.norm", "lm_head", "softcap"), "cpu")
    places["model.embed_tokens"] = "disk"
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    with pytest.raises(RuntimeError, match="meta"):
        model(ids(1, 20))
