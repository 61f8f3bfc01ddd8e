"""How long a generation took, and how its rows ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass
class Stats:
    """Filled in while generating, for whoever passes one in. Seconds are wall-clock, tokens are summed over rows."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0  # from the first new token to the last
    decoded_tokens: int = 0  # tokens made in that time: all but each row's first
    finish_reasons: list[str] = field(default_factory=list)  # a row each: "stop" or "length"


def timed(
    steps: Iterator[list[int]], stats: Stats, prompts: Sequence[Sequence[int]], finished: set[int]
) -> Iterator[list[int]]:
    """The same steps, counted in `stats` as they come. Rows in `finished` do not count."""
    started = time.perf_counter()
    for number, ids in enumerate(steps):
        now, live = time.perf_counter(), len(prompts) - len(finished)
        if number == 0:
            stats.prompt_tokens, stats.prefill_seconds = sum(map(len, prompts)), now - started
            stats.new_tokens = stats.decoded_tokens = 0
            started = now
        else:
            stats.decoded_tokens += live
        stats.new_tokens, stats.decode_seconds = stats.new_tokens + live, now - started
        yield ids
