"""Logits to ids: against transformers' own processors, and the promises about sorting and seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma2 import sampling as module
from gemma2.checks import SMALLEST
from gemma2.sampling import (
    Sampling,
    draw,
    filter_logits,
    ids_in_order,
    make_generator,
    repetition_penalty,
    sample,
    sort_down,
)

SETTINGS = [
    {},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.7},
    {"top_k": 40, "min_p": 0.2},
    {"top_p": 0.8, "min_p": 0.05},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.01},
]


def some_logits(rows: int = 3, size: int = 5000, seed: int = 0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 4


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What `sample` would draw from, over the whole vocabulary."""
    kept, ids_at = filter_logits(logits / sampling.temperature, sampling)
    return torch.zeros_like(logits).scatter(-1, all_ids(kept, ids_at), kept.softmax(-1))


def all_ids(kept: Tensor, ids_at: Callable[[Tensor], Tensor]) -> Tensor:
    """The ids [b n] of all places."""
    places = torch.arange(kept.shape[-1]).expand(kept.shape)
    if getattr(ids_at, "func", None) is not ids_in_order:
        return ids_at(places)
    return torch.cat([ids_at(one) for one in places.split(1, dim=-1)], dim=-1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers(settings: dict[str, float], temperature: float) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = some_logits()
    theirs = process.TemperatureLogitsWarper(temperature)(None, logits)
    if "top_k" in settings:
        theirs = process.TopKLogitsWarper(int(settings["top_k"]))(None, theirs)
    if "top_p" in settings:
        theirs = process.TopPLogitsWarper(settings["top_p"])(None, theirs)
    if "min_p" in settings:
        theirs = process.MinPLogitsWarper(settings["min_p"])(None, theirs)
    ours = probabilities(logits, Sampling(temperature=temperature, **settings))  # type: ignore[arg-type]
    assert torch.equal(ours > 0, theirs.softmax(-1) > 0)
    assert torch.allclose(ours, theirs.softmax(-1), atol=1e-6)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits, history = some_logits(2, 50), torch.tensor([[1, 2, 3, 1], [4, 4, 5, 6]])
    theirs = process.RepetitionPenaltyLogitsProcessor(1.7)(history, logits.clone())
    assert torch.equal(repetition_penalty(1.7, torch.zeros(2, 1))(history, logits), theirs)
    assert not torch.equal(theirs, logits)


def test_padding_is_no_id_that_a_row_has_had() -> None:
    logits = some_logits(2, 50)
    padded, plain = torch.tensor([[0, 0, 3, 1], [0, 4, 5, 6]]), torch.tensor([[3, 1, 3, 1], [4, 5, 6, 4]])
    found = repetition_penalty(1.7, torch.tensor([[2], [1]]))(padded, logits)
    assert torch.equal(found, repetition_penalty(1.7, torch.zeros(2, 1))(plain, logits))
    assert torch.equal(found[:, 0], logits[:, 0])


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    for mass, kept in ((0.4, 1), (0.6, 2), (0.81, 3), (0.96, 4), (1.0, 4)):
        assert (probabilities(p.log(), Sampling(temperature=1.0, top_p=mass)) > 0).sum() == kept


def test_nothing_is_sorted_unless_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain temperature and min-p sort nothing; top-k and a peaked top-p sort a short slice, as flat a one as that
    cannot hold the mass is not tried, and all of it is sorted by numpy."""
    sorted_: list[int] = []
    original = torch.Tensor.topk

    def topk(self: Tensor, k: int, dim: int = -1) -> tuple[Tensor, Tensor]:
        sorted_.append(k)
        return original(self, k, dim=dim)

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    monkeypatch.setattr(torch, "topk", None)
    monkeypatch.setattr(torch, "sort", None)
    monkeypatch.setattr(torch.Tensor, "sort", None)
    peaked, flat = some_logits(1, 256_000) * 4, torch.zeros(1, 256_000)
    for settings, logits, largest in (
        ({}, peaked, 0),
        ({"min_p": 0.1}, peaked, 0),
        ({"top_k": 40}, peaked, 40),
        ({"top_p": 0.9}, peaked, 256),
        ({"top_p": 0.9}, flat, 0),
        ({"top_p": 0.9}, peaked / 16, 0),
    ):
        sorted_.clear()
        sample(logits, Sampling(temperature=1.0, **settings), torch.Generator().manual_seed(0))
        assert max(sorted_, default=0) <= largest, settings


def by_full_sorts(logits: Tensor, sampling: Sampling, first: int) -> tuple[Tensor, Tensor]:
    """The plain way: `topk` of growing slices, from the first on. What is kept, -inf where excluded, and the ids."""
    total, size, n = logits.logsumexp(dim=-1, keepdim=True), logits.shape[-1], first
    while True:
        kept, ids = logits.topk(min(n, size), dim=-1)
        if n >= size or bool(((kept - total).exp().sum(dim=-1) >= sampling.top_p).all()):
            break
        n *= 8
    probabilities = (kept - total).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = kept.masked_fill(before >= max(sampling.top_p, SMALLEST), -math.inf)
    if sampling.min_p > 0:
        kept = kept.masked_fill(kept < kept.amax(dim=-1, keepdim=True) + math.log(sampling.min_p), -math.inf)
    return kept, ids


def shapes_of_logits(rows: int, size: int) -> dict[str, Tensor]:
    x = some_logits(rows, size) / 4
    banned = x.masked_fill(torch.arange(size) % 3 > 0, -math.inf)
    one_hot = torch.full((rows, size), -math.inf).index_fill(1, torch.tensor([size // 2]), 0.0)
    mixed = torch.cat((x[:1] * 8, x[1:]))  # a peaked row beside flat ones: the slice is the widest row's
    named = {f"normal times {scale:g}": x * scale for scale in (0.01, 1.0, 2.0, 4.0, 16.0)}
    tied = {
        "all equal": torch.zeros(rows, size),
        "three values": (x * 2).round().clamp(-1, 1),
        "few values": x.mul(4).round() / 4,
        "bfloat16": (x * 2).bfloat16().float(),
    }
    return named | tied | {"banned ids": banned, "one id": one_hot, "a peaked row": mixed, "float64": x.double()}


MASSES = [0.0, 1e-9, 0.01, 0.5, 0.95, 0.9999, math.nextafter(1.0, 0.0)]


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("name", shapes_of_logits(1, 1))
def test_top_p_keeps_and_draws_what_full_sorts_would(name: str, mass: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 4 and 32 of 600 logits are sorted by topk, 256 and all of them by numpy. Among equal logits that are
    sorted by numpy the ids may differ: then the logits kept are the same, and the place that is drawn."""
    monkeypatch.setattr(module, "FIRST_SLICE", 4)
    monkeypatch.setattr(module, "LAST_SLICE", 32)
    logits = shapes_of_logits(3, 600)[name]
    logits = logits - logits.amax(dim=-1, keepdim=True)  # as `sample` does
    sampling = Sampling(temperature=1.0, top_p=mass, min_p=0.001)
    kept, ids_at = filter_logits(logits, sampling)
    plain, plain_ids = by_full_sorts(logits, sampling, 4)
    assert torch.equal(kept, plain)
    ids = all_ids(kept, ids_at)
    assert torch.equal(logits.gather(-1, ids).masked_fill(kept == -math.inf, -math.inf), plain)
    assert all(len(set(row.tolist())) == ids.shape[-1] for row in ids)
    untied = logits.dtype == torch.float64 or name.startswith(("normal", "a peaked row"))
    if untied or ids.shape[-1] <= 32:
        assert torch.equal(ids, plain_ids)
    for seed in range(3):
        one, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        drawn = torch.multinomial(plain.softmax(dim=-1), 1, generator=one)
        chosen = sample(logits, sampling, other)[:, None]
        assert torch.equal(logits.gather(-1, chosen), plain.gather(-1, drawn))
        if untied:
            assert torch.equal(chosen, plain_ids.gather(-1, drawn))
        assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("mass", [0.5, 0.95, 0.9999])
def test_a_flat_top_p_over_a_whole_vocabulary_keeps_the_set_of_transformers(mass: float) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = some_logits(1, 256_000) / 4
    kept, _ = filter_logits(logits, Sampling(temperature=1.0, top_p=mass))
    theirs = process.TopPLogitsWarper(mass)(None, logits)
    assert kept.shape[-1] > 16_384
    least = kept[kept > -math.inf].min()
    # They add from the smallest up and in float32, so the last ids may be on the other side.
    assert ((logits >= least) != (theirs > -math.inf)).sum() <= 2


def test_of_equal_logits_the_lower_id_comes_first() -> None:
    logits = torch.cat((torch.tensor([0.0, -0.0, math.inf, -math.inf]).repeat(5), some_logits(1, 80)[0].round()))
    logits = logits.expand(2, -1)
    plain, falling = logits.sort(dim=-1, descending=True, stable=True), sort_down(logits)
    assert torch.equal(falling, plain.values)
    for place in range(100):
        found = ids_in_order(logits, falling, torch.tensor([[place], [99 - place]]))
        assert found.tolist() == [[int(plain.indices[0, place])], [int(plain.indices[1, 99 - place])]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_is_that_of_multinomial_and_uses_up_the_same_numbers(dtype: torch.dtype) -> None:
    probabilities = some_logits(16, 5000).to(dtype).softmax(dim=-1)
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    for _ in range(20):
        drawn = torch.multinomial(probabilities, 1, generator=one)
        assert torch.equal(draw(probabilities, other), drawn)
    assert torch.equal(one.get_state(), other.get_state())


def test_draws_follow_the_distribution() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = sample(p.log().expand(20_000, 4), Sampling(temperature=1.0), torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.bincount(minlength=4) / 20_000, p, atol=0.012)


def test_temperature_near_zero_is_greedy_and_small_ones_do_not_overflow() -> None:
    logits = some_logits()
    for temperature in (0, 1e-40, 1e-7, 1e-5, 1e-3):
        chosen = sample(logits, Sampling(temperature=temperature), torch.Generator().manual_seed(0))
        assert torch.equal(chosen, logits.argmax(-1)), temperature


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    logits = some_logits().bfloat16()
    a = sample(logits, Sampling(temperature=0.7, top_p=0.9), torch.Generator().manual_seed(1))
    b = sample(logits.float(), Sampling(temperature=0.7, top_p=0.9), torch.Generator().manual_seed(1))
    assert torch.equal(a, b)


def test_the_same_seed_gives_the_same_draws_and_a_generator_is_used_as_it_is() -> None:
    device, logits = torch.device("cpu"), some_logits(64)
    one, two, other = (sample(logits, Sampling(temperature=1.0), make_generator(seed, device)) for seed in (5, 5, 6))
    assert torch.equal(one, two) and not torch.equal(one, other)
    own = torch.Generator()
    assert make_generator(own, device) is own
    assert make_generator(None, device).initial_seed() != make_generator(None, device).initial_seed()


@pytest.mark.parametrize("value", [-2, math.inf, math.nan, "1", True, [], torch.ones(1)])
@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"])
def test_values_that_cannot_be_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_none_is_the_default_and_minus_one_is_no_top_k() -> None:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    assert Sampling(**dict.fromkeys(names)) == Sampling() == Sampling(top_k=-1)  # type: ignore[arg-type]
    assert Sampling(top_k=np.int64(-1)) == Sampling()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, torch.tensor, np.array, float])
def test_numbers_of_numpy_and_pytorch_are_numbers(kind: Callable[[float], Any]) -> None:
    taken = Sampling(temperature=kind(0.5), top_p=kind(0.25), min_p=kind(0.0), repetition_penalty=kind(2.0))
    assert taken == Sampling(temperature=0.5, top_p=0.25, min_p=0.0, repetition_penalty=2.0)
    assert all(type(value) in (float, int) for value in vars(taken).values())
    with pytest.raises(ValueError, match="top_p must be a number in"):
        Sampling(top_p=kind(1.5))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, torch.tensor, np.array, int])
def test_integers_of_numpy_and_pytorch_are_integers(kind: Callable[[int], Any]) -> None:
    assert Sampling(top_k=kind(3)) == Sampling(top_k=3)
    cpu = torch.device("cpu")
    assert make_generator(kind(5), cpu).initial_seed() == make_generator(5, cpu).initial_seed() == 5
    for wrong in (
        np.float64(3.0),
        np.bool_(True),
        torch.tensor(True),
        torch.tensor([3]),
        torch.empty((), device="meta"),
    ):
        with pytest.raises(ValueError, match="top_k must be a non-negative integer"):
            Sampling(top_k=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="seed must be a non-negative integer"):
            make_generator(wrong, cpu)  # type: ignore[arg-type]


def test_a_seed_of_minus_one_is_another_each_time() -> None:
    cpu = torch.device("cpu")
    seeds = {make_generator(seed, cpu).initial_seed() for seed in (-1, -1, np.int64(-1), None)}  # type: ignore[arg-type]
    assert len(seeds) == 4 and not {5, -1, 2**64 - 1} & seeds
