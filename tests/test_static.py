"""A cache of fixed shape: exact in every order of feeding, and one graph for every decode step."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from gemma2 import ContextOverflow, Gemma, left_padded
from gemma2.fast.static import StaticCache
from gemma2.fast.step import compiled_step
from gemma2.generate import generate_ids
from tests.conftest import ids, tiny


class Counting:
    """A backend of torch.compile that counts the graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        self.graphs += 1
        return graph.forward


@torch.no_grad()
def test_one_full_graph_serves_120_steps_and_7_wraps() -> None:
    model, tokens, backend = tiny("2b").double(), ids(1, 120), Counting()
    cache = StaticCache(model, 1, 128)
    step = compiled_step(model, cache, backend=backend)
    steps = [step(tokens[:, i : i + 1], torch.tensor([[i]])) for i in range(120)]
    assert backend.graphs == 1
    assert (torch.stack(steps, 1) - model(tokens)).abs().max() <= 1e-10


@torch.no_grad()
@pytest.mark.long
def test_three_prompts_of_three_lengths_and_300_tokens_are_computed_by_one_graph() -> None:
    model, backend = tiny("27b").double(), Counting()
    cache = StaticCache(model, 1, 256)
    step = compiled_step(model, cache, backend=backend)
    for length in (5, 40, 90):
        cache.reset()
        prompt = [ids(1, length)[0].tolist()]
        compiled = list(generate_ids(model, prompt, 100, cache=cache, feed=step))
        assert compiled == list(generate_ids(model, prompt, 100))
    assert backend.graphs == 1


@pytest.mark.long
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_the_pocket_models_greedy_text_is_the_same_compiled_and_eager(pocket: Gemma) -> None:
    """Past the window of 128, with the compiler that people use."""
    cache = StaticCache(pocket.model, 1, 200)
    feed = compiled_step(pocket.model, cache)
    text = "In the beginning"
    assert pocket.generate(text, 150, cache=cache, feed=feed) == pocket.generate(text, 150)


@pytest.mark.parametrize("sizes", [[7, 16, 1, 40, 1, 1, 30, 24], [120], [1] * 120, [17, 17, 17, 69]], ids=str)
@torch.no_grad()
def test_chunks_of_any_size_give_the_uncached_logits(sizes: list[int]) -> None:
    model, tokens = tiny("9b").double(), ids(2, 120)
    cache = StaticCache(model, 2, 120)
    parts = [model(part, cache=cache) for part in tokens.split(sizes, dim=1)]
    assert (torch.cat(parts, 1) - model(tokens)).abs().max() <= 1e-10
    assert cache.length == 120


@torch.no_grad()
def test_ragged_rows_go_on_from_their_own_positions() -> None:
    model = tiny().double()
    rows, more = [ids(1, n, seed=n)[0].tolist() for n in (30, 11)], ids(2, 30, seed=5)
    cache = StaticCache(model, 2, 60)
    model(*left_padded(rows), cache)
    last = [model(more[:, i : i + 1], cache=cache) for i in range(30)][-1]
    for row, prompt in enumerate(rows):
        solo = model(torch.tensor([prompt + more[row].tolist()]))[0, -1]
        assert (last[row, 0] - solo).abs().max() <= 1e-10


@torch.no_grad()
@pytest.mark.long
def test_hooks_are_seen_while_a_compiled_step_decodes() -> None:
    model, fired = tiny(), list[int]()
    cache = StaticCache(model, 1, 64)
    step = compiled_step(model, cache, backend=Counting())
    prompt = [ids(1, 9)[0].tolist()]
    list(generate_ids(model, prompt, 4, cache=cache, feed=step))
    hook = model.model.layers[2].register_forward_hook(lambda m, i, o: fired.append(1))
    cache.reset()
    list(generate_ids(model, prompt, 4, cache=cache, feed=step))
    hook.remove()
    assert len(fired) == 4  # the prompt, and three tokens; the fourth is not fed


@torch.no_grad()
def test_what_does_not_fit_is_refused() -> None:
    model = tiny()
    cache = StaticCache(model, 1, 16)
    with pytest.raises(ValueError, match="the cache has room for 16 more columns; the prompt has 9, and 9 new tokens"):
        generate_ids(model, [ids(1, 9)[0].tolist()], 9, cache=cache)
    with pytest.raises(ValueError, match="positions: row 0 goes from 2 to -1"):
        model(ids(1, 4), torch.tensor([[0, 1, 2, -1]]), cache)
    with pytest.raises(ValueError, match="the cache holds 1 rows, the tokens have 2"):
        model(ids(2, 4), cache=cache)
    model(ids(1, 16), cache=cache)
    with pytest.raises(ContextOverflow, match="a position is beyond its capacity of 16"):
        model(ids(1, 1), cache=cache)
    cache.reset()
    with pytest.raises(ValueError, match=r"keys of torch\.float32"):
        model.double()(ids(1, 4), cache=cache)
    with pytest.raises(ValueError, match="at least one row"):
        StaticCache(model, 0, 16)
