"""Logits to ids: pure functions and one record of checked settings. Names and order are those of transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GREEDY_BELOW = 1e-6  # a temperature this small is the greedy limit, not a division
FIRST_SLICE = 256  # how many top logits a top-p search sorts before it looks further


@dataclass(frozen=True)
class Sampling:
    """How a next id is chosen. The defaults are greedy decoding.

    Attributes:
        temperature: logits are divided by it; below 1e-6, so also 0, is greedy; at most 1e30.
        top_k: keep the k most likely ids; 0 keeps all.
        top_p: keep the most likely ids until their probability reaches this, in (0, 1].
        min_p: keep ids at least this fraction as likely as the likeliest, in [0, 1].
        repetition_penalty: positive logits of ids already seen are divided by it, negative ones multiplied;
            in [1e-30, 1e30]. Keskar et al. 2019, arXiv:1909.05858.
    Raises:
        ValueError: a value out of its range, NaN, or of another type.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        # Written so that NaN fails: every comparison with it is false.
        checked_number("temperature", self.temperature, "in [0, 1e30]", lambda x: 0 <= x <= 1e30)
        checked_number("top_p", self.top_p, "in (0, 1]", lambda x: 0 < x <= 1)
        checked_number("min_p", self.min_p, "in [0, 1]", lambda x: 0 <= x <= 1)
        # A logit of 30 times or over it, and then over the least temperature, stays finite in float32.
        checked_number("repetition_penalty", self.repetition_penalty, "in [1e-30, 1e30]", lambda x: 1e-30 <= x <= 1e30)
        checked_count("top_k", self.top_k)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


def checked_number(name: str, value: object, range_: str, holds) -> None:  # type: ignore[no-untyped-def]
    """Raises ValueError unless `value` is a real number (no bool) for which `holds` is true."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
        raise ValueError(f"{name} must be a number {range_}, not {value!r}")


def checked_count(name: str, value: object, below: int = 2**63) -> None:
    """Raises ValueError unless `value` is an integer (no bool) in [0, below)."""
    if type(value) is not int or not 0 <= value < below:
        raise ValueError(f"{name} must be a non-negative integer, not {value!r}")


def make_generator(seed: int | torch.Generator | None, device: torch.device) -> torch.Generator:
    """The one source of randomness: seeded, given, or freshly seeded when `seed` is None."""
    if isinstance(seed, torch.Generator):
        if seed.device.type != device.type:
            raise ValueError(f"the generator is for {seed.device.type}, the model is on {device.type}")
        return seed
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
        return generator
    checked_count("seed", seed)
    return generator.manual_seed(seed)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator, seen: Tensor | None = None) -> Tensor:
    """One id a row: logits [b v] -> [b].

    Args:
        seen: [b v] bool, the ids that repetition_penalty applies to; needed only when it is not 1.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if sampling.repetition_penalty != 1.0 and seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.greedy:
        return logits.argmax(dim=-1)
    top = logits.amax(dim=-1, keepdim=True)
    kept, ids = candidates((logits - top) / sampling.temperature, sampling)
    drawn = torch.multinomial(kept.softmax(dim=-1), 1, generator=generator)
    return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1)


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """What top-k, then top-p, then min-p leave: logits [b n], -inf where excluded, and their ids [b n].

    The ids are None when the whole vocabulary stands in its own order: without top-k and top-p nothing is sorted.
    """
    kept, ids, total = logits, None, None
    if sampling.top_k:
        kept, ids = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1)
    elif sampling.top_p < 1:
        total = logits.logsumexp(dim=-1, keepdim=True)
        kept, ids = _top_slice(logits, total, sampling.top_p)
    if sampling.top_p < 1:
        total = kept.logsumexp(dim=-1, keepdim=True) if total is None else total
        probabilities = (kept - total).exp()
        before = probabilities.cumsum(dim=-1) - probabilities  # the likeliest id has none before it, so it stays
        kept = kept.masked_fill(before >= sampling.top_p, -math.inf)
    if sampling.min_p > 0:
        least = kept.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
        kept = kept.masked_fill(kept < least, -math.inf)
    return kept, ids


def _top_slice(logits: Tensor, total: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """The largest logits, sorted, as many as surely hold `mass`: a short slice nearly always, all of them at worst."""
    size, n = logits.shape[-1], FIRST_SLICE
    while True:
        kept, ids = logits.topk(min(n, size), dim=-1)
        if n >= size or bool(((kept - total).exp().sum(dim=-1) >= mass).all()):
            return kept, ids
        n *= 8
