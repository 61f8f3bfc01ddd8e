"""One pass over a text: what is captured of it, and what all scores of each layer come to."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma2.errors import NonFiniteError
from gemma2.model import Gemma2
from gemma2.research import Seen, capture, watching
from gemma2.research.sites import sites
from gemma2.research.watch import check_shown

ENDS = 24  # of a text longer than twice this, so many tokens of each end are drawn
BINS = 48  # of a histogram


@dataclass
class Scores:
    """What all scores of one layer come to, of every query in the text and not only of those that are drawn.

    Attributes:
        first, count: for each query, the first key that it sees and how many; they follow each other.
        most: the score of the largest magnitude, of the pairs that are seen; `at` is its head, query and key.
        mean: of their magnitudes; half: the share of them beyond half the cap.
        bins: a histogram of them between -reach and reach.
    """

    first: list[int]
    count: list[int]
    most: float
    at: tuple[int, int, int]
    mean: float
    half: float
    reach: float
    bins: list[int]

    @property
    def seen(self) -> float:
        """The share of keys that are seen, of those that are not later than their query."""
        return 2 * sum(self.count) / (len(self.count) * (len(self.count) + 1))


@dataclass
class Run:
    """One pass: the model and the tokens, those that are drawn, what was captured there, and each layer's scores."""

    model: Gemma2
    ids: list[int]
    drawn: list[int]
    seen: Seen
    scores: dict[int, Scores]
    embedded: Tensor  # rows of the embedding before they are scaled, [n d]


def compute(model: Gemma2, ids: list[int]) -> Run:
    """Run the model once over `ids`. Raises ValueError where a twin hides a site, NonFiniteError for NaN."""
    t = len(ids)
    check_shown(model, sites(model.config))
    drawn = list(range(t)) if t <= 2 * ENDS else [*range(ENDS), *range(t - ENDS, t)]
    tokens = torch.tensor([ids], device=model.device)
    scores, raw, cap = dict[int, Scores](), dict[int, Tensor](), model.config.attn_logit_softcapping

    def see(name: str, value: Tensor) -> None:
        layer = int(name.split(".")[1])
        if name.endswith("raw"):
            raw[layer] = value[0].cpu().double()
        else:
            scores[layer] = _scores(raw.pop(layer), value[0].cpu(), cap)

    unscaled = copy.copy(model.model.embed_tokens)  # shares the rows, whatever form they are held in
    unscaled.scale = 1.0
    both = ["blocks.*.attn.hook_scores_raw", "blocks.*.attn.hook_attn_scores"]
    with torch.no_grad():
        embedded = unscaled(tokens[:, drawn])[0].cpu()
        with watching(model, see, both), capture(model, positions=drawn, device="cpu") as seen:
            model(tokens)
    for name, value in seen.items():
        if not value.isfinite().all():
            raise NonFiniteError(f"{name} was computed as NaN or infinity, so no page is made")
    return Run(model, ids, drawn, seen, scores, embedded)


def _scores(raw: Tensor, masked: Tensor, cap: float) -> Scores:
    """From the scores [h t s] before the cap, and after the cap and the mask."""
    visible = masked != torch.finfo(masked.dtype).min
    count, first = visible[0].sum(dim=-1), visible[0].int().argmax(dim=-1)
    shown = raw[visible]
    size = shown.abs()
    at = torch.where(visible, raw.abs(), -1.0).flatten().argmax()
    head, query, key = (int(one) for one in torch.unravel_index(at, raw.shape))
    most = float(raw[head, query, key])
    reach = max(1.2 * cap, abs(most))
    return Scores(
        first.tolist(),
        count.tolist(),
        most,
        (head, query, key),
        float(size.mean()),
        float((size > cap / 2).double().mean()),
        reach,
        histogram(shown[None], -reach, reach)[0],
    )


def histogram(rows: Tensor, low: float, high: float) -> list[list[int]]:
    """How many of each row's numbers [n k] fall into each of `BINS` equal parts of low ... high."""
    part = ((rows.double() - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
    return [torch.bincount(row, minlength=BINS).tolist() for row in part]
