"""Compiled layers: what they compute, in one graph, and where they leave the work to the plain code."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config

import gemma2
from gemma2 import Gemma2, HybridCache, left_padded
from gemma2.fast.compiling import can_compile, show_compiling
from gemma2.fast.growing import BLOCK, GrowingCache
from gemma2.fast.layer import CompiledBlock
from gemma2.fast.speed import Caches, caches_of, speed_up
from tests.conftest import ids, tiny

needs_compiler = pytest.mark.skipif(not can_compile(), reason="there is no C++ compiler")


def fed(model: Gemma2, cache: HybridCache | GrowingCache, tokens: Tensor, *, prompt: int) -> Tensor:
    """Logits of a prompt's last token, and of every later token fed alone."""
    logits = [model(tokens[:, :prompt], None, cache, last=1)]
    logits += [model(tokens[:, i : i + 1], None, cache) for i in range(prompt, tokens.shape[1])]
    return torch.cat(logits, dim=1)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@needs_compiler
@torch.no_grad()
def test_one_graph_serves_both_kinds_of_layer_every_length_every_capacity_and_the_rings_wrap() -> None:
    model, tokens = tiny("2b", sliding_window=16, max_position_embeddings=1024), ids(1, 2 * BLOCK + 30)
    truth = copy.deepcopy(model).double()
    speed_up(model, compile=True)
    before = graphs()
    for prompt, capacity in ((2 * BLOCK - 10, 600), (5, 40), (BLOCK - 20, 300)):
        length = min(prompt + 40, capacity)
        expected = truth(tokens[:, :length])[:, prompt - 1 :]
        found = fed(model, GrowingCache(model, 1, capacity), tokens[:, :length], prompt=prompt)
        assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()
    assert graphs() - before == 1

    # Other batches are other graphs; rows of unequal length do not disturb each other.
    rows = [tokens[0, :23].tolist(), tokens[0, 3:10].tolist()]
    padded, positions = left_padded(rows)
    cache = GrowingCache(model, 2, 64)
    model(padded[:, :-1], positions[:, :-1], cache, last=1)
    found = model(padded[:, -1:], positions[:, -1:], cache)
    for row, logits in zip(rows, found, strict=True):
        expected = truth(torch.tensor([row]))[0, -1]
        assert (logits[0] - expected).abs().max() <= 2e-4 * expected.abs().max()

    # A hook, a gradient or another cache: the plain code computes, and the hook fires.
    seen: list[Tensor] = []
    handle = model.model.layers[1].mlp.hook_post.register_forward_hook(lambda *call: seen.append(call[2]))
    hooked = fed(model, GrowingCache(model, 1, 40), tokens[:, :12], prompt=8)
    handle.remove()
    assert len(seen) == 5
    assert (hooked - truth(tokens[:, :12])[:, 7:]).abs().max() <= 2e-4 * hooked.abs().max()
    other = fed(model, HybridCache(model.config, 1, 40), tokens[:, :12], prompt=8)
    assert (other - hooked).abs().max() <= 2e-4 * hooked.abs().max()
    assert graphs() - before == 2


@torch.no_grad()
def test_a_growing_cache_rolls_back_as_if_nothing_had_been_fed_until_a_ring_has_wrapped() -> None:
    model, tokens = tiny("2b", max_position_embeddings=1024), ids(1, 2 * BLOCK)
    cache = GrowingCache(model, 1, 2 * BLOCK)
    model(tokens[:, :60], None, cache)
    cache.rollback(40)
    assert cache.length == 40
    assert cache.layers[0].reach.shape == (BLOCK,)
    again = model(tokens[:, 40:45], None, cache)
    assert (again - model(tokens[:, :45])[:, 40:]).abs().max() <= 2e-4 * again.abs().max()
    model(tokens[:, 45 : BLOCK + 20], None, cache)
    cache.rollback(BLOCK + 5)  # the ring has 256 slots for a window of 16
    with pytest.raises(ValueError, match="cannot roll back to 20: 261 positions have wrapped"):
        cache.rollback(20)
    with pytest.raises(ValueError, match="cannot roll back to 262: the cache holds 261"):
        cache.rollback(262)
    cache.rollback(0)
    assert cache.length == 0


@torch.no_grad()
def test_a_cache_that_an_interrupted_pass_left_half_written_says_so() -> None:
    model, tokens = tiny("2b"), ids(1, 8)
    cache = GrowingCache(model, 1, 20)
    model(tokens, None, cache)
    cache.layers[2].positions[:, 7] = -1
    with pytest.raises(RuntimeError, match=r"half-written .* call reset\(\)"):
        _ = cache.length
    cache.reset()
    assert cache.length == 0


@needs_compiler
@torch.no_grad()
def test_the_step_is_compiled_and_said_to_be_when_a_cache_is_made_and_not_in_the_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokens = tiny("9b", num_hidden_layers=2), ids(1, 20)
    speed_up(model, compile=True)
    make = caches_of(model)
    assert make is not None
    show_compiling(True)
    try:
        cache = make(model, 1, 40)
    finally:
        show_compiling(False)
    assert "compiling" in capsys.readouterr().err and cache.length == 0
    before = graphs()
    fed(model, cache, tokens, prompt=5)
    assert graphs() == before and make.compiled == {1}
    told: list[Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda *call: told.append(call[2]))
    make(model, 2, 40)  # another number of rows, while somebody looks
    handle.remove()
    assert not told and make.compiled == {1}


def test_a_model_keeps_its_parameters_and_can_be_copied_and_pickled() -> None:
    gemma = gemma2.load(device="cpu", compile=True)
    plain = gemma2.load(device="cpu")
    assert isinstance(caches_of(gemma.model), Caches)
    assert caches_of(plain.model) is None
    assert isinstance(plain.new_cache(1, 20), HybridCache)
    assert isinstance(gemma.new_cache(1, 20, slack=4), GrowingCache)
    mine, theirs = gemma.model.state_dict(), plain.model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    for other in (copy.deepcopy(gemma), pickle.loads(pickle.dumps(gemma))):
        assert all(type(layer) is CompiledBlock for layer in other.model.model.layers)


@pytest.mark.long
@needs_compiler
def test_the_pocket_models_greedy_text_is_the_references_compiled_and_fast() -> None:
    text, options = "In the beginning God created the heaven", dict[str, Any](device="cpu", dtype="float32")
    expected = gemma2.load(**options).generate(text, 150)
    assert gemma2.load(**options, fast=True).generate(text, 150) == expected
    assert gemma2.load(**options, compile=True).generate(text, 150) == expected


@pytest.mark.long
@needs_compiler
def test_in_bfloat16_greedy_text_leaves_the_references_at_a_tie_alone() -> None:
    """Logits between 8 and 16 are 1/16 apart there, and a compiled layer rounds less often than the reference."""
    plain = gemma2.load(device="cpu", dtype="bfloat16")
    start = plain.tokenizer.encode("In the beginning God created the heaven")
    expected = plain.tokenizer.encode(plain.generate([start], 150)[0], bos=False)
    compiled = gemma2.load(device="cpu", dtype="bfloat16", compile=True)
    found = plain.tokenizer.encode(compiled.generate([start], 150)[0], bos=False)
    same = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    if same is not None:
        with torch.no_grad():
            logits = plain.model(torch.tensor([start + expected[:same]]))[0, -1]
        assert same > 5 and float(logits.max() - logits[found[same]]) <= 1 / 16


def test_what_fast_cannot_be_combined_with_is_refused_before_a_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="numerics computes as another implementation does, and fast does not"):
        gemma2.load(device="cpu", fast=True, numerics="llama.cpp")
    with pytest.raises(ValueError, match="device_map and fast cannot be combined"):
        gemma2.load(compile=True, device_map="auto")


@torch.no_grad()
def test_single_tokens_are_rounded_nowhere_but_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled code's expressions, run as they are: bfloat16 weights, and logits as exact as float32's."""
    monkeypatch.setattr("gemma2.fast.compiling.can_compile", lambda: False)
    model, tokens = tiny("2b").bfloat16(), ids(1, 1)
    truth = copy.deepcopy(model).double()
    truth.model.embed_tokens.scale = float(torch.tensor(model.model.embed_tokens.scale).bfloat16())
    speed_up(model, compile=True)
    x = model.model.embed_tokens(tokens)
    assert torch.equal(x, truth.model.embed_tokens(tokens).float())
    logits = model.lm_head(x, model.model.embed_tokens)
    expected = truth.lm_head(x.double(), truth.model.embed_tokens)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_without_a_compiler_a_note_says_so_and_the_twins_stay_eager() -> None:
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        gemma = gemma2.load(device="cpu", compile=True)
    assert "nothing is compiled: there is no C++ compiler here" in gemma.notes[-1]
    assert caches_of(gemma.model) is None
    assert gemma.generate("In the beginning", 4)
