"""The loop from prompts to continuations: prefill in chunks, decode a token at a time, end each row on its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from gemma2.cache import Cache, HybridCache
from gemma2.checks import check_count
from gemma2.errors import ContextOverflow
from gemma2.feed import Feed, Processor, model_feed, parse_processors, processed
from gemma2.model import Gemma2
from gemma2.sampling import Sampling, make_generator, refuse_non_finite, repetition_penalty, sample
from gemma2.stats import Stats, timed
from gemma2.tokenizer import parse_ids
from gemma2.tokens import left_padded

PREFILL_CHUNK = 512  # positions a forward pass of the prompt takes: bounds the [b h t s] scores in memory


def generate_ids(
    model: Gemma2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    *,
    processors: Sequence[Processor] = (),
    cache: Cache | None = None,
    feed: Feed | None = None,
    finished: set[int] | None = None,
    chunk: int = PREFILL_CHUNK,
    progress: bool | None = None,
    stats: Stats | None = None,
) -> Iterator[list[int]]:
    """Iterate over the next id of every row, step by step. Everything is checked before this returns.

    Args:
        prompts: ids of each row, of any lengths; shorter rows are padded on the left.
        max_new_tokens: steps at most.
        processors: change the logits before an id is chosen, in this order, after the repetition penalty. They have the
            signature of transformers' `LogitsProcessor`. Padding in the ids is id 0, on the left.
        cache: what these prompts continue, with room for them and the new tokens; default a new one. It then holds all
            ids but the last one chosen, and of a row that ended earlier also ids that mean nothing. Rows that continue
            it must be of equal length. Processors and the penalty know this call's ids alone.
        feed: computes the logits instead of `model(ids, positions, cache, last=1)`, as a compiled step does.
        finished: rows that have ended. The caller adds to it between steps; such a row keeps its place in the batch,
            but its further ids mean nothing. The loop ends when all rows are in it.
        chunk: positions of the prompt computed at once.
        progress: a bar on standard error for prompts longer than a chunk; None shows it on a terminal only.
        stats: filled in while generating.
    Raises:
        ContextOverflow: the prompts and max_new_tokens exceed the context or the cache; raised before computing.
        NonFiniteError: a row's logits hold NaN or +inf, or processors left no id.
        ValueError: no prompt, an empty prompt, ids outside the vocabulary, a wrong count.
    """
    sampling, finished = sampling or Sampling(), set() if finished is None else finished
    check_count("max_new_tokens", max_new_tokens)
    check_count("chunk", chunk, least=1)
    processors = parse_processors(processors)
    rows = [parse_ids(prompt, model.config.vocab_size) for prompt in prompts]
    if not rows or not all(rows):
        raise ValueError("nothing to continue: a prompt needs at least one id (the BOS)")
    generator = generator or make_generator(None, model.device)
    ids, positions = left_padded(rows, model.device)
    pads = (positions < 0).sum(dim=1, keepdim=True)
    if cache is None:
        cache = HybridCache(model.config, len(rows), ids.shape[1] + max_new_tokens)
    elif cache.length and pads.any():
        raise ValueError("rows that continue a cache must be of equal length: padding cannot follow their tokens")
    positions = cache.next_positions(ids, None if cache.length else positions)
    end, context = int(positions[:, -1].max()) + 1 + max_new_tokens, model.config.max_position_embeddings
    if end > context:
        raise ContextOverflow(
            f"prompt of {end - max_new_tokens} tokens and {max_new_tokens} new ones exceed the context of {context}"
        )
    if cache.length + ids.shape[1] + max_new_tokens - 1 > cache.capacity:  # the last new token is not fed
        raise ContextOverflow(
            f"the cache has room for {cache.capacity - cache.length} more columns; the prompt has {ids.shape[1]}, and "
            f"{max_new_tokens} new tokens are asked for"
        )
    if sampling.repetition_penalty != 1.0:
        processors = [repetition_penalty(sampling.repetition_penalty, pads), *processors]
    feed = feed or model_feed(model, cache)
    quiet = ids.shape[1] <= chunk or (None if progress is None else not progress)
    parts = tqdm(ids.split(chunk, dim=1), desc="prompt", unit=" chunks", leave=False, disable=quiet)
    steps = _steps(feed, ids, positions, parts, max_new_tokens, processors, sampling, generator, finished)
    return timed(steps, stats or Stats(), rows, finished)


@torch.no_grad()
def _steps(
    feed: Feed,
    ids: Tensor,
    positions: Tensor,
    parts: Sequence[Tensor],
    max_new_tokens: int,
    processors: Sequence[Processor],
    sampling: Sampling,
    generator: torch.Generator,
    finished: set[int],
) -> Iterator[list[int]]:
    done = 0
    for part in parts if max_new_tokens else ():
        logits = feed(part, positions[:, done : done + part.shape[1]])
        done += part.shape[1]
    for step in range(max_new_tokens):
        logits = processed(processors, ids, logits)
        if finished:  # whatever a row computes that has ended, it stops no other
            logits = logits.index_fill(0, torch.tensor(sorted(finished), device=logits.device), 0.0)
        refuse_non_finite(logits, step)
        new = sample(logits, sampling, generator)
        yield new.tolist()
        if len(finished) == len(ids) or step == max_new_tokens - 1:
            return
        ids, positions = torch.cat((ids, new[:, None]), dim=1), positions[:, -1:] + 1
        logits = feed(new[:, None], positions)
