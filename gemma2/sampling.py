"""Logits to ids: pure functions and one record of checked settings. Names and order are those of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gemma2.checks import SMALLEST, check_count, check_number, plain_number
from gemma2.errors import NonFiniteError
from gemma2.ops import upcast
from gemma2.tied import check_here

Places = Callable[[Tensor], Tensor]  # places [b 1] in what was kept -> ids [b 1]
GREEDY_BELOW = 1e-6  # a temperature this small is the greedy limit, not a division
FIRST_SLICE, LAST_SLICE = 256, 16_384  # how many top logits a top-p search sorts at first, and before all
TINY = 2.0**-64  # below any uniform number but 0


@dataclass(frozen=True)
class Sampling:
    """How a next id is chosen. The defaults are greedy decoding.

    Attributes:
        temperature: logits are divided by it; below 1e-6, so also 0, is greedy; at most 1e30.
        top_k: keep the k most likely ids; 0 and -1 keep all.
        top_p: keep the most likely ids until their probability reaches this, in [0, 1]; 0 keeps the likeliest alone.
        min_p: keep ids at least this fraction as likely as the likeliest, in [0, 1].
        repetition_penalty: positive logits of ids already seen are divided by it, negative ones multiplied;
            in [1e-30, 1e30]. Keskar et al. 2019, arXiv:1909.05858.
    Each may be None, which is its default. Numbers of numpy and PyTorch are taken too.

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
        self._check("temperature", "in [0, 1e30]", lambda x: 0 <= x <= 1e30)
        self._check("top_p", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check("min_p", "in [0, 1]", lambda x: 0 <= x <= 1)
        # A logit of 30 times or over it, and then over the least temperature, stays finite in float32.
        self._check("repetition_penalty", "in [1e-30, 1e30]", lambda x: 1e-30 <= x <= 1e30)
        off = self.top_k is None or (type(top_k := plain_number(self.top_k)) is int and top_k == -1)
        object.__setattr__(self, "top_k", 0 if off else check_count("top_k", self.top_k))

    def _check(self, name: str, range_: str, holds: Callable[[float], bool]) -> None:
        given = getattr(self, name)
        number = getattr(Sampling, name) if given is None else check_number(name, given, range_, holds)
        object.__setattr__(self, name, number)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


def make_generator(seed: int | torch.Generator | None, device: torch.device) -> torch.Generator:
    """The one source of randomness: seeded, given, or freshly seeded when `seed` is None or -1, as in llama.cpp.

    Raises:
        RuntimeError: the model's embedding was offloaded, so it is on the meta device.
        ValueError: a seed that is no integer, or a generator for another device.
    """
    check_here(device)
    if isinstance(seed, torch.Generator):
        if seed.device.type != device.type:
            raise ValueError(f"the generator is for {seed.device.type}, the model is on {device.type}")
        return seed
    generator = torch.Generator(device)
    number = plain_number(seed)
    if seed is None or (type(number) is int and number == -1):
        generator.seed()
        return generator
    return generator.manual_seed(check_count("seed", seed))


def repetition_penalty(penalty: float, pads: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A processor that makes ids less likely that a row already has: positive logits are divided by the penalty,
    negative ones multiplied. Keskar et al. 2019, arXiv:1909.05858.

    Args:
        pads: [b 1], how many ids of each row are padding on its left, which do not count.
    """

    def process(ids: Tensor, logits: Tensor) -> Tensor:
        real = torch.arange(ids.shape[1], device=ids.device) >= pads
        ids = torch.where(real, ids, ids[:, -1:])  # the last id is no padding
        score = logits.gather(1, ids)
        return logits.scatter(1, ids, torch.where(score < 0, score * penalty, score / penalty))

    return process


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One id a row: logits [b v] -> [b]."""
    logits = upcast(logits)
    if sampling.greedy:
        return logits.argmax(dim=-1)
    top = logits.amax(dim=-1, keepdim=True)
    kept, ids_at = filter_logits((logits - top) / sampling.temperature, sampling)
    return ids_at(draw(kept.softmax(dim=-1), generator)).squeeze(-1)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One place a row, [b n] -> [b 1], each as often as its probability says: what `torch.multinomial` draws.

    That divides each by an exponential number, -log(1 - u) of a uniform u, and takes the largest quotient. On a CPU it
    makes these numbers one by one. Here the same u are drawn, and logarithms are taken of those that can win alone.
    """
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, 1, generator=generator)
    uniform, drawn = torch.empty(probabilities.shape[-1], dtype=torch.float64, device="cpu"), []
    for p in probabilities.detach().numpy():
        u = uniform.uniform_(generator=generator).numpy()
        likeliest, luckiest = p.argmax(), u.argmin()
        best = max(p[i] / -np.log1p(-max(u[i], TINY)) for i in (likeliest, luckiest))
        places = np.flatnonzero(u <= 1.001 * p[likeliest] / best)  # -log(1 - u) is at least u
        exponential = -torch.log1p(-uniform[places])
        drawn.append(places[(p[places] / exponential.to(probabilities.dtype).numpy()).argmax()])
    return torch.tensor(drawn, device="cpu")[:, None]


def refuse_non_finite(logits: Tensor, step: int) -> None:
    """Raises NonFiniteError where a row of logits [b v] has no finite maximum; -inf bans an id and is no fault."""
    top = logits.amax(dim=-1)  # NaN where any is NaN
    if not bool(top.isfinite().all()):
        row = int(top.isfinite().logical_not().nonzero()[0])
        why = "every id is banned" if top[row] == -math.inf else "the logits are not finite"
        raise NonFiniteError(f"step {step}: {why} in row {row}; generation stops here")


def filter_logits(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Places]:
    """What top-k, then top-p, then min-p leave: logits [b n], -inf where excluded, and the ids that stand there.

    Without top-k and top-p nothing is sorted: the whole vocabulary stands in its own order.
    """
    kept, total = logits, None
    ids_at: Places = _themselves
    if sampling.top_k:
        kept, ids = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1)
        ids_at = partial(ids.gather, -1)
    elif sampling.top_p < 1:
        total = logits.logsumexp(dim=-1, keepdim=True)
        kept, ids_at = _top_slice(logits, total, sampling.top_p)
    if sampling.top_p < 1:
        total = kept.logsumexp(dim=-1, keepdim=True) if total is None else total
        probabilities = (kept - total).exp_()
        before = probabilities.cumsum(dim=-1).sub_(probabilities)  # the likeliest id has none before it, so it stays
        kept = kept.masked_fill(before >= max(sampling.top_p, SMALLEST), -math.inf)
    if sampling.min_p > 0:
        least = kept.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
        kept = kept.masked_fill(kept < least, -math.inf)
    return kept, ids_at


def _themselves(places: Tensor) -> Tensor:
    return places


def _top_slice(logits: Tensor, total: Tensor, mass: float) -> tuple[Tensor, Places]:
    """The largest logits, sorted, as many as surely hold `mass`: a short slice nearly always, all of them at worst."""
    size, n = logits.shape[-1], FIRST_SLICE
    while n < size and n <= LAST_SLICE:
        if _may_hold(logits, total, n, mass):
            kept, ids = logits.topk(n, dim=-1)
            if _holds(kept, total, mass):
                return kept, partial(ids.gather, -1)
        n *= 8
    if size <= LAST_SLICE:
        kept, ids = logits.topk(size, dim=-1)
        return kept, partial(ids.gather, -1)
    falling = sort_down(logits)
    while n < size and not _holds(falling[:, :n], total, mass):
        n *= 8
    return falling[:, :n], partial(ids_in_order, logits, falling)


def _holds(kept: Tensor, total: Tensor, mass: float) -> bool:
    return bool(((kept - total).exp_().sum(dim=-1) >= mass).all())


def _may_hold(logits: Tensor, total: Tensor, n: int, mass: float) -> bool:
    """Whether the n largest logits may hold `mass`, found in less time than `topk` sorts them."""
    nearly, likeliest = 0.999 * mass, (logits.amax(dim=-1, keepdim=True) - total).exp()
    if bool((n * likeliest < nearly).any()):
        return False
    if n == FIRST_SLICE or logits.device.type != "cpu":
        return True
    return _holds(torch.from_numpy(np.partition(logits.detach().numpy(), -n, axis=-1)[:, -n:]), total, nearly)


def sort_down(logits: Tensor) -> Tensor:
    """Logits [b v] from the largest to the smallest. On a CPU numpy sorts them, with vector instructions: under 1 ms
    for 256,000, where PyTorch takes 20 to 40 because it carries their places along."""
    if logits.device.type != "cpu":
        return logits.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(-logits.detach().numpy(), axis=-1)).neg_()


def ids_in_order(logits: Tensor, falling: Tensor, places: Tensor) -> Tensor:
    """The ids [b 1] of the logits at `places` [b 1] of their falling order; of equal ones the lower id comes first."""
    ids = []
    for row, sorted_, place in zip(*(x.detach().cpu().numpy() for x in (logits, falling, places[:, 0])), strict=True):
        rank = place - np.count_nonzero(sorted_ > sorted_[place])  # among equal ones
        ids.append(np.flatnonzero(row == sorted_[place])[rank])
    return torch.tensor(ids, device=logits.device)[:, None]
