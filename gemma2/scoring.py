"""How likely a model finds a text: the log-probability of each token. The logits of a whole text are never held.

A text longer than a window is cut into windows that overlap. Each begins with the BOS, and each token is counted once,
in the first window that holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from gemma2.cache import HybridCache
from gemma2.checks import check_count
from gemma2.errors import ContextOverflow
from gemma2.feed import any_hooked
from gemma2.head import inside, is_plain, slices, wide
from gemma2.model import Gemma2
from gemma2.ops import upcast
from gemma2.scored_text import Pair, Text, as_list, scored_ids
from gemma2.tied import check_same_device
from gemma2.tokenizer import Tokenizer, parse_ids
from gemma2.tokens import left_padded

PIECE = 256  # tokens that a layer takes at once: bounds the scores [b h t s] and the width of the MLP
LOGITS = 2**23  # of one part: 32 rows of Gemma's vocabulary
WIDE = 2**21  # of those that are in float32 at once
TOKENS = 2048  # of a batch

Tick = Callable[[int], object]  # called with a number of tokens whenever so many were computed


class Scoring(TypedDict, total=False):
    """What `Gemma.score` takes, and says what each means."""

    window: int | None
    stride: int | None
    batch: int | None
    special: bool
    tick: Tick


@dataclass(frozen=True)
class Scored:
    """Of n tokens that a model was asked about: natural log-probabilities [n] (float32, or float64 for a float64
    model), and whether each was the likeliest [n] (bool); both on the CPU."""

    logprobs: Tensor
    greedy: Tensor


@dataclass(frozen=True)
class Score(Scored):
    """How likely a model finds a text, or the continuation of a context.

    Attributes:
        ids: of the tokens that were scored: all but the BOS, and not the context's.
        bytes: of the text that these tokens spell, in UTF-8; a BOS that the text begins with is not among them.
        windows: in how many windows it was computed; 1 means that every token saw all that is before it.
    """

    ids: list[int]
    bytes: int
    windows: int

    @property
    def total(self) -> float:
        """Log-probability of all tokens together, in nats."""
        return float(self.logprobs.double().sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token."""
        return perplexity_of(-self.total / len(self.ids))

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of the text: comparable between tokenizers. Infinite where control
        tokens alone were scored, which spell no byte."""
        return -self.total / math.log(2) / self.bytes if self.bytes else math.inf

    @property
    def is_greedy(self) -> bool:
        """Whether each token was the likeliest: greedy decoding would have written the text."""
        return bool(self.greedy.all())


@dataclass(frozen=True)
class _Window:
    """One row to compute: the model reads `ids` and is asked about the `asked` tokens that follow its last places."""

    ids: list[int]
    asked: list[int]


@torch.no_grad()
def score(
    model: Gemma2,
    tokenizer: Tokenizer,
    texts: Text | Pair | Sequence[Text | Pair],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    special: bool = False,
    tick: Tick = lambda tokens: None,
) -> Score | list[Score]:
    """What `Gemma.score` does, which says what the arguments are."""
    every, alone = as_list(texts)
    context = model.config.max_position_embeddings
    window = check_count("window", context if window is None else window, least=2)
    if window > context:
        raise ValueError(f"window {window:,} is longer than the model's context of {context:,}")
    stride = check_windows(window, stride)
    spans, rows = [], list[_Window]()
    for number, one in enumerate(every):
        ids, first, size = scored_ids(one, tokenizer, special, "the text" if alone else f"text {number}")
        cut = list(windows(len(ids) - 1, first - 1, window, stride))
        rows += [_Window([ids[0], *ids[a + 1 : end]], ids[scored + 1 : end + 1]) for a, scored, end in cut]
        spans.append((ids[first:], size, len(cut)))
    found = iter(_score_rows(model, rows, batch, tick))
    scores = []
    for asked, size, count in spans:
        scored = _chained([next(found) for _ in range(count)], model.dtype)
        scores.append(Score(scored.logprobs, scored.greedy, asked, size, count))
    return scores[0] if alone else scores


def check_windows(window: int, stride: int | None) -> int:
    """The stride of such windows: the one given, or half of the window. Raises ValueError for one that cannot be."""
    stride = check_count("stride", max(1, window // 2) if stride is None else stride, least=1)
    if stride > window:
        raise ValueError(f"stride {stride} is longer than the window of {window}: tokens between them would not count")
    return stride


def perplexity_of(nats: float) -> float:
    """exp of the mean nats of a token; infinite beyond what a float holds, and NaN for NaN."""
    return math.inf if nats >= 700 else math.exp(nats)


@torch.no_grad()
def score_ids(
    model: Gemma2,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch: int | None = None,
    tick: Tick = lambda tokens: None,
) -> list[Scored]:
    """Score the second ids of each pair behind the first, which begin with the BOS. The order is that of `pairs`.

    Args:
        pairs: (context, continuation); the context has at least one id. An empty continuation has no log-probabilities.
        batch: pairs that are computed at once, sorted by length; default: as many as have 2,048 tokens together.
    Raises:
        ValueError: an empty context, or ids outside the vocabulary.
        ContextOverflow: a pair that the context does not hold; raised before anything is computed.
    """
    rows = []
    for number, (context, asked) in enumerate(pairs):
        ids = parse_ids([*context, *asked], model.config.vocab_size)
        if not context:
            raise ValueError(f"pair {number} has no context: it begins with the BOS")
        if len(ids) - 1 > model.config.max_position_embeddings:
            raise ContextOverflow(
                f"pair {number} has {len(ids):,} tokens, and the context is {model.config.max_position_embeddings:,}"
            )
        rows.append(_Window(ids[: len(ids) - bool(asked)], list(asked)))
    return _score_rows(model, rows, batch, tick)


def windows(n: int, first: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over n tokens of which those from `first` on are scored: (start, first that is scored, end).

    The model reads the BOS and the tokens from `start` to `end` - 1, at most `window` with the BOS. The first window is
    as long as it can be; each next one ends `stride` tokens later, and scores these.
    """
    scored, end = first, max(window, first + stride)
    while scored < n:
        end = min(n, end)
        yield max(0, end - window), scored, end
        scored, end = end, end + stride


def hidden(model: Gemma2, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """What the head reads for tokens [b t]: [b t d], as `model.model` gives it. No gradients.

    A long text is computed in pieces, one layer after the other, so that keys and values of one layer are held at a
    time. Where a hook is set, all layers take one piece after the other, as in a pass with a cache.
    """
    (b, t), inner = tokens.shape, model.model
    piece = max(1, PIECE // b)
    with torch.no_grad():
        if t <= piece:
            return inner(tokens, positions)
        store = HybridCache(model.config, b, t)
        positions = store.next_positions(tokens, positions)
        at = positions.split(piece, dim=1)
        if any_hooked(model):
            ids = tokens.split(piece, dim=1)
            return torch.cat([inner(*part, store) for part in zip(ids, at, strict=True)], dim=1)
        x = inner.embed_tokens(tokens)
        rotary = list(zip(*(part.split(piece, dim=1) for part in inner.rotary_emb(positions, x.dtype)), strict=True))
        after = torch.empty_like(x)  # two buffers in turn: what lives long is made once, and memory does not fragment
        for layer, slots in zip(inner.layers, store.layers, strict=True):
            for part, into, *more in zip(*(y.split(piece, dim=1) for y in (x, after)), at, rotary, strict=True):
                into.copy_(layer(part, *more, slots))
            slots.reset()
            x, after = after, x
        for part, into in zip(x.split(piece, dim=1), after.split(piece, dim=1), strict=True):
            into.copy_(inner.norm(part))
        return after


def logits_in_parts(model: Gemma2, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Capped logits [m v] in the model's dtype for what the head reads, [n d]: a few rows at a time, with their
    slice of n."""
    step = max(1, LOGITS // model.config.vocab_size)
    for start in range(0, len(states), step):
        part = slice(start, start + step)
        yield part, model.softcap(model.lm_head(states[part], model.model.embed_tokens))


def token_logprobs(model: Gemma2, states: Tensor, targets: Tensor) -> Scored:
    """Of tokens [n], for what the head reads where they are predicted, [n d]. No gradients.

    The softmax is computed in float32, or float64 for float64, as everywhere in this package. Of equal logits the one
    of the least id is the likeliest.
    """
    with torch.no_grad():
        if is_plain(model):
            return _by_vocabulary(model, states, targets)
        found = [_picked(logits, targets[part]) for part, logits in logits_in_parts(model, states)]
        return _chained(found, states.dtype)


def _by_vocabulary(model: Gemma2, states: Tensor, targets: Tensor) -> Scored:
    weight, empty = model.model.embed_tokens.weight, states.new_zeros(len(states), dtype=wide(states))
    check_same_device(states, weight)
    picked, total, most, likeliest = empty, empty - torch.inf, empty - torch.inf, torch.zeros_like(targets)
    for start, rows, capped in slices(states, weight, model.softcap.cap):
        total = torch.logaddexp(total, capped.logsumexp(dim=1))
        here, at = inside(targets, start, len(rows))
        picked = torch.where(here, capped.gather(1, at)[:, 0], picked)
        top = capped.max(dim=1)
        likeliest = torch.where(top.values > most, top.indices + start, likeliest)
        most = torch.maximum(most, top.values)
    return Scored((picked - total).cpu(), (likeliest == targets).cpu())


def _picked(logits: Tensor, targets: Tensor) -> Scored:
    """Of the targets [n] under logits [n v]; few rows at a time are in float32."""
    picked = upcast(logits.gather(1, targets[:, None]))[:, 0]
    few = max(1, WIDE // logits.shape[1])
    total = torch.cat([upcast(rows).logsumexp(dim=1) for rows in logits.split(few)])
    return Scored((picked - total).cpu(), (logits.argmax(dim=1) == targets).cpu())


def _chained(parts: Sequence[Scored], dtype: torch.dtype = torch.float32) -> Scored:
    """Parts of one text, joined; none are an empty one."""
    empty = torch.empty(0, dtype=torch.promote_types(dtype, torch.float32), device="cpu")
    logprobs = torch.cat([empty, *(one.logprobs for one in parts)])
    return Scored(logprobs, torch.cat([empty.bool(), *(one.greedy for one in parts)]))


def _score_rows(model: Gemma2, rows: Sequence[_Window], batch: int | None, tick: Tick) -> list[Scored]:
    if batch is not None:
        check_count("batch", batch, least=1)
    found = [Scored(*torch.empty(2, 0))] * len(rows)
    alike: dict[tuple[int, ...], list[int]] = {}  # one token asked after the same ids: choices of one question
    for i, row in enumerate(rows):
        alike.setdefault(tuple(row.ids) if len(row.asked) == 1 else (-1, i), []).append(i)
    # The longest first: what fits once, fits always.
    order = sorted(alike.values(), key=lambda group: -len(rows[group[0]].ids))
    while order:
        many = batch or max(1, TOKENS // len(rows[order[0][0]].ids))
        now, order = [i for group in order[:many] for i in group], order[many:]
        scored = _score_batch(model, [rows[i] for i in now])
        for i, one in zip(now, scored, strict=True):
            found[i] = one
        tick(sum(len(rows[i].ids) for i in now))
    return found


def _score_batch(model: Gemma2, rows: Sequence[_Window]) -> list[Scored]:
    """Rows that read the same ids are computed once."""
    places = {ids: place for place, ids in enumerate(dict.fromkeys(tuple(row.ids) for row in rows))}
    at = [places[tuple(row.ids)] for row in rows]
    tokens, positions = left_padded([list(ids) for ids in places], model.device)
    if any_hooked(model):
        return _score_hooked(model, rows, at, tokens, positions)
    states, asked = hidden(model, tokens, positions), [len(row.asked) for row in rows]
    t = states.shape[1]
    states = torch.cat([states[place, t - count :] for place, count in zip(at, asked, strict=True)])
    targets = torch.tensor([id for row in rows for id in row.asked], device=states.device, dtype=torch.int64)
    scored = token_logprobs(model, states, targets)
    parts = zip(scored.logprobs.split(asked), scored.greedy.split(asked), strict=True)
    return [Scored(logprobs, greedy) for logprobs, greedy in parts]


def _score_hooked(
    model: Gemma2, rows: Sequence[_Window], at: Sequence[int], tokens: Tensor, positions: Tensor
) -> list[Scored]:
    """The same in whole passes of the model, so that hooks see all tokens at every site, the head's among them."""
    (b, t), parts = tokens.shape, list[list[Scored]]([[] for _ in rows])
    piece = max(1, min(PIECE, 4 * LOGITS // model.config.vocab_size) // b)
    store = HybridCache(model.config, b, t)
    for start in range(0, t, piece):
        part = slice(start, start + piece)
        logits = model(tokens[:, part], positions[:, part], store)
        for place, window, found in zip(at, rows, parts, strict=True):
            before = t - len(window.asked)  # columns that no token is asked after
            first, end = max(start, before), start + logits.shape[1]
            if first < end:
                targets = torch.tensor(window.asked[first - before : end - before], device=logits.device)
                found.append(_picked(logits[place, first - start :], targets))
    return [_chained(found, model.dtype) for found in parts]
