"""Two models on one text: how far the predictions of B are from those of A, token by token.

Of neither model the logits of more than a few tokens are held. With `Recorded`, A and B are never in memory together.
The definitions of the figures are those of llama.cpp's `llama-perplexity --kl-divergence`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma2.checkpoints.vocabulary import same_tokenizer
from gemma2.checks import check_count
from gemma2.errors import NonFiniteError
from gemma2.evaluate.states import Recorded, Tick, cut_text, states_of
from gemma2.gemma import Gemma
from gemma2.model import Gemma2
from gemma2.research.ablation import SAMPLES, Estimate, bootstrap
from gemma2.scoring import WIDE, logits_in_parts, perplexity_of
from gemma2.tokenizer import Tokenizer

PASSAGE = 24  # tokens of a passage that is shown


@dataclass(frozen=True)
class Summary:
    """A comparison in a few numbers. Intervals are those of a bootstrap that draws whole windows.

    Attributes:
        tokens, windows: of the text.
        kl: the mean of KL(A || B), in nats.
        median, high, most: of the KL: the middle, the 99th percentile, the largest.
        same: share of the tokens at which both have the same likeliest token.
        before, after: perplexities of A and of B.
        ratio: the natural logarithm of after / before.
        change: root mean square of the change of the probabilities of the text's tokens.
    """

    tokens: int
    windows: int
    kl: Estimate
    median: float
    high: float
    most: float
    same: Estimate
    before: float
    after: float
    ratio: Estimate
    change: float


@dataclass(frozen=True)
class Passage:
    """Some tokens in a row.

    Attributes:
        start: which token of the text is the first.
        ids, kl: of each token its id, and KL(A || B) in nats where it is predicted.
        mean: of the KL.
        worst: which of the tokens has the largest KL.
        top: the likeliest token there under A and under B, each with its probability.
    """

    start: int
    ids: list[int]
    kl: list[float]
    mean: float
    worst: int
    top: tuple[tuple[int, float], tuple[int, float]]


@dataclass(frozen=True)
class Comparison:
    """What two models say at every token of a text. Tensors are on the CPU; those of floats are float32, or float64
    where one of the models is.

    Attributes:
        ids: of the n tokens that were predicted: the whole text.
        scored: how many of them each window predicted.
        kl: KL(A || B) in nats [n].
        before, after: log-probabilities of the text's tokens under A and under B [n].
        top: ids of the likeliest token under A and under B [n 2].
        sure: log-probabilities of those [n 2].
    """

    ids: list[int]
    scored: list[int]
    kl: Tensor
    before: Tensor
    after: Tensor
    top: Tensor
    sure: Tensor

    @property
    def same(self) -> Tensor:
        """Whether both models have the same likeliest token [n]."""
        return self.top[:, 0] == self.top[:, 1]

    def summary(self, samples: int = SAMPLES, seed: int = 0) -> Summary:
        """The figures that are shown. `samples` and `seed` are those of the bootstrap."""
        kl, before, after = self.kl.double(), self.before.double(), self.after.double()
        columns = torch.stack([kl, self.same.double(), before - after], dim=1)
        sums = torch.stack([part.sum(dim=0) for part in columns.split(self.scored)])
        counts = torch.tensor(self.scored, dtype=torch.float64, device="cpu")
        means = bootstrap(sums, counts, check_count("samples", samples, least=1), check_count("seed", seed))
        return Summary(
            tokens=len(self.ids),
            windows=len(self.scored),
            kl=means[0],
            median=percentile(kl, 0.5),
            high=percentile(kl, 0.99),
            most=float(kl.max()),
            same=means[1],
            before=perplexity_of(-float(before.mean())),
            after=perplexity_of(-float(after.mean())),
            ratio=means[2],
            change=float((after.exp() - before.exp()).square().mean().sqrt()),
        )

    def worst(self, count: int = 5, tokens: int = PASSAGE) -> list[Passage]:
        """The passages of so many tokens with the largest mean KL, the worst first; no two overlap."""
        tokens = min(check_count("tokens", tokens, least=1), len(self.ids))
        sums = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), self.kl.double().cumsum(0)])
        means = (sums[tokens:] - sums[:-tokens]) / tokens
        found: list[Passage] = []
        while len(found) < check_count("count", count) and bool((means > 0).any()):
            start = int(means.argmax())
            found.append(self._passage(start, tokens, float(means[start])))
            means[max(0, start - tokens + 1) : start + tokens] = -math.inf
        return found

    def _passage(self, start: int, tokens: int, mean: float) -> Passage:
        part = slice(start, start + tokens)
        worst = int(self.kl[part].argmax())
        tops = zip(self.top[start + worst].tolist(), self.sure[start + worst].exp().tolist(), strict=True)
        a, b = ((int(id), float(p)) for id, p in tops)
        return Passage(start, self.ids[part], self.kl[part].tolist(), mean, worst, (a, b))


@torch.no_grad()
def compare(
    a: Gemma | Recorded,
    b: Gemma,
    text: str | Sequence[int] | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    tick: Tick = lambda tokens: None,
) -> Comparison:
    """Compare the predictions of two models of one vocabulary at every token of a text.

    Args:
        a: a model, or what was recorded of it; then the text and its windows are those of the recording.
        text, window, stride, limit: as in `gemma2.evaluate.states.cut_text`.
        tick: called with a number of tokens whenever one of the models has computed so many.
    Raises:
        ValueError: see `cut_text` and `check_comparable`.
        NonFiniteError: the predictions of a model hold NaN; says at which token.
    """
    head = a.head if isinstance(a, Recorded) else a.model
    check_comparable(a.tokenizer, b.tokenizer, (head.config.vocab_size, b.config.vocab_size))
    if isinstance(a, Recorded):
        if text is not None or (window, stride, limit) != (None, None, None):
            raise ValueError("the text and its windows are those of the recording: leave text, window and stride out")
        cut, states = a.cut, a.states()
        if cut.longest > b.config.max_position_embeddings:
            raise ValueError(f"the recording has windows of {cut.longest:,} tokens, which are beyond B's context")
    else:
        if text is None:
            raise ValueError("there is no text to compare the models on")
        cut = cut_text(text, a.tokenizer, (a.config, b.config), window=window, stride=stride, limit=limit)
        states = states_of(a.model, cut, tick)
    targets, found, done = torch.tensor(cut.ids, device=head.device), [], 0
    for first, second in zip(states, states_of(b.model, cut, tick), strict=True):
        found.append(compare_states(head, first, b.model, second, targets[done : done + len(first)], done))
        done += len(first)
    return Comparison(cut.ids, cut.scored, *map(torch.cat, zip(*found, strict=True)))


def compare_states(
    a: Gemma2, first: Tensor, b: Gemma2, second: Tensor, targets: Tensor, start: int = 0
) -> tuple[Tensor, ...]:
    """kl, before, after, top and sure of a `Comparison`, for tokens whose states [n d] the heads of two models read.

    Args:
        start: which token of the text is the first, for messages.
    Raises:
        NonFiniteError: the predictions of a model hold NaN.
    """
    found, few = [], max(1, WIDE // a.config.vocab_size)
    for (part, ours), (_, theirs) in zip(logits_in_parts(a, first), logits_in_parts(b, second), strict=True):
        rows = zip(ours.split(few), theirs.to(ours.device).split(few), targets[part].split(few), strict=True)
        found += [_of_logits(*each) for each in rows]
    joined = tuple(map(torch.cat, zip(*found, strict=True)))
    bad = (~joined[0].isfinite()).nonzero()
    if len(bad):
        raise NonFiniteError(f"at token {start + int(bad[0]):,} of the text, the predictions of a model hold NaN")
    return joined


def check_comparable(a: Tokenizer, b: Tokenizer, rows: tuple[int, int], names: tuple[str, str] = ("A", "B")) -> None:
    """Raises ValueError unless two models have the same vocabulary.

    Args:
        rows: how many logits a token has in each model.
        names: of the models, for messages.
    """
    only = "only models of the same vocabulary can be compared"
    if rows[0] != rows[1] or len(a) != len(b):
        sizes = [
            f"{name} has {len(one):,} pieces and {n:,} logits" for one, n, name in zip((a, b), rows, names, strict=True)
        ]
        raise ValueError(f"{sizes[0]}, {sizes[1]}: {only}")
    if not same_tokenizer(a, b):
        other = next((i for i in range(len(a)) if a.piece(i) != b.piece(i)), None)
        how = (
            "the same pieces, which merge otherwise"
            if other is None
            else f"as id {other} {a.piece(other)!r} and {b.piece(other)!r}"
        )
        raise ValueError(f"{names[0]} and {names[1]} have different tokenizers, {how}: {only}")


def percentile(values: Tensor, fraction: float) -> float:
    """Between the two nearest values it is linear, as in llama.cpp. torch.quantile refuses more than 16 million."""
    ordered = values.sort().values
    place = fraction * (len(ordered) - 1)
    low, part = int(place), place - int(place)
    return float((1 - part) * ordered[low] + part * ordered[min(low + 1, len(ordered) - 1)])


def _of_logits(a: Tensor, b: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Of logits [m v] of two models: kl, before, after [m], top, sure [m 2]."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    both = [logits.to(wide).log_softmax(dim=-1) for logits in (a, b)]
    kl = (both[0].exp() * (both[0] - both[1])).sum(dim=-1)
    picked = [rows.gather(1, targets[:, None])[:, 0] for rows in both]
    tops = torch.stack([rows.argmax(dim=-1) for rows in both], dim=1)
    sure = torch.cat([rows.gather(1, top[:, None]) for rows, top in zip(both, tops.unbind(1), strict=True)], dim=1)
    return tuple(found.cpu() for found in (kl, *picked, tops, sure))
