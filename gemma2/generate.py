"""The loop from a prompt to a continuation: prefill in chunks, decode a token at a time, stop each row on its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from gemma2.cache import HybridCache
from gemma2.errors import ContextOverflow, NonFiniteError
from gemma2.model import Gemma2
from gemma2.sampling import Sampling, checked_count, choose, make_generator
from gemma2.tokenizer import parse_ids

PREFILL_CHUNK = 512  # positions a forward pass of the prompt takes: bounds the [b h t s] scores in memory
MAX_NEW_TOKENS = 256

Conversation = Sequence[Mapping[str, str]]  # {"role": ..., "content": ...}, see `chat_ids`


@dataclass
class Stats:
    """Filled in while generating, for whoever passes one in. Seconds are wall-clock, tokens are summed over rows."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0  # from the first new token to the last
    decoded_tokens: int = 0  # tokens made in that time: all but each row's first
    finish_reasons: list[str] = field(default_factory=list)  # a row each: "stop" or "length"


def generate_ids(
    model: Gemma2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    *,
    finished: set[int] | None = None,
    chunk: int = PREFILL_CHUNK,
    progress: bool | None = None,
    stats: Stats | None = None,
) -> Iterator[list[int]]:
    """Iterate over the next id of every row, step by step. Everything is checked before this returns.

    Args:
        prompts: ids of each row, of any lengths; shorter rows are padded on the left.
        max_new_tokens: steps at most.
        finished: rows that have ended. The caller adds to it between steps; such a row costs its place in the batch
            but its further ids mean nothing. The loop ends when all rows are in it.
        chunk: positions of the prompt computed at once.
        progress: a bar on standard error for prompts longer than a chunk; None shows it on a terminal only.
    Raises:
        ContextOverflow: the longest prompt and max_new_tokens exceed the context; raised before computing.
        NonFiniteError: a row's logits are not finite.
        ValueError: no prompt, an empty prompt, ids outside the vocabulary, a wrong count.
    """
    config, sampling, stats = model.config, sampling or Sampling(), stats or Stats()
    finished = set() if finished is None else finished
    checked_count("max_new_tokens", max_new_tokens)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk!r}")
    rows = [parse_ids(prompt, config.vocab_size) for prompt in prompts]
    if not rows or not all(rows):
        raise ValueError("nothing to continue: a prompt needs at least one id (the BOS)")
    width = max(map(len, rows))
    if width + max_new_tokens > config.max_position_embeddings:
        raise ContextOverflow(
            f"prompt of {width} tokens and {max_new_tokens} new ones exceed the context of "
            f"{config.max_position_embeddings}"
        )
    generator = generator or make_generator(None, model.model.embed_tokens.weight.device)
    return _steps(model, rows, max_new_tokens, sampling, generator, finished, chunk, progress, stats)


@torch.no_grad()
def _steps(
    model: Gemma2,
    rows: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    finished: set[int],
    chunk: int,
    progress: bool | None,
    stats: Stats,
) -> Iterator[list[int]]:
    if max_new_tokens == 0:
        return
    config, width = model.config, max(map(len, rows))
    device, dtype = model.model.embed_tokens.weight.device, model.model.embed_tokens.weight.dtype
    pads = torch.tensor([[width - len(row)] for row in rows], device=device)
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    cache = HybridCache(config, len(rows), width + max_new_tokens, dtype, device)
    seen = _seen(rows, config.vocab_size, device) if sampling.repetition_penalty != 1.0 else None

    clock = time.perf_counter()
    positions = torch.arange(width, device=device) - pads  # [b t], negative on padding
    logits = _prefill(model, tokens, positions, cache, chunk, progress)
    for step in range(max_new_tokens):
        if finished:
            logits = logits.index_fill(0, torch.tensor(sorted(finished), device=device), 0.0)
        _refuse_non_finite(logits, step)
        ids = choose(logits, sampling, generator, seen)
        chosen: list[int] = ids.tolist()
        now, live = time.perf_counter(), len(rows) - len(finished)
        if step == 0:
            stats.prompt_tokens, stats.prefill_seconds, clock = sum(map(len, rows)), now - clock, now
            stats.new_tokens = stats.decoded_tokens = 0
        else:
            stats.decoded_tokens += live
        stats.new_tokens, stats.decode_seconds = stats.new_tokens + live, now - clock
        yield chosen
        if len(finished) == len(rows) or step == max_new_tokens - 1:
            return
        if seen is not None:
            seen.scatter_(1, ids[:, None], True)
        here = torch.full_like(pads, width + step) - pads
        logits = model.unembed(model.model(ids[:, None], here, cache)[:, -1])


def _prefill(
    model: Gemma2, tokens: Tensor, positions: Tensor, cache: HybridCache, chunk: int, progress: bool | None
) -> Tensor:
    """Feed the prompt chunk by chunk; only the last position's logits [b v] are ever computed."""
    width = tokens.shape[1]
    hidden = None
    disable = True if width <= chunk else None if progress is None else not progress
    with tqdm(total=width, desc="prompt", unit="tok", disable=disable, leave=False) as bar:
        for start in range(0, width, chunk):
            part = slice(start, min(start + chunk, width))
            hidden = model.model(tokens[:, part], positions[:, part], cache)
            bar.update(part.stop - part.start)
    assert hidden is not None
    return model.unembed(hidden[:, -1])


def _seen(rows: list[list[int]], vocab_size: int, device: torch.device) -> Tensor:
    """[b v] bool: the ids of each prompt, padding not among them."""
    seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
    for row, ids in enumerate(rows):
        seen[row, ids] = True
    return seen


def _refuse_non_finite(logits: Tensor, step: int) -> None:
    finite = torch.isfinite(logits).all(dim=-1)
    if not bool(finite.all()):
        row = int(finite.logical_not().nonzero()[0])
        raise NonFiniteError(f"step {step}: the logits of row {row} are not finite; generation stops here")
