"""What a record says: rates, their spread, ratios, and shares of what the machine can do at most."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """A median, and the least and the greatest of what it is of."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])


@dataclass(frozen=True)
class Row:
    """One system in one case.

    Attributes:
        rate: tokens a second, over all rows of a batch; the median over rounds of each round's median.
        share: of the machine's limit; None where the machine was not measured.
        ratio: how much faster the first system is: the median over rounds of the ratio within a round.
    """

    system: str
    rate: Spread
    share: float | None
    ratio: Spread


def prefill_rows(record: Record, case: Mapping[str, Any]) -> list[Row]:
    """The systems' rows for one prompt."""
    rates = {name: [case["tokens"] / one for one in times] for name, times in case["seconds"].items()}
    bound = prefill_bound(record, case["tokens"])
    return _rows(rates, dict.fromkeys(rates, case["tokens"] / bound) if bound else {})


def decode_rows(record: Record, case: Mapping[str, Any]) -> list[Row]:
    """The systems' rows for one context and batch."""
    rates = {
        name: [case["batch"] / statistics.median(turn) for turn in rounds] for name, rounds in case["seconds"].items()
    }
    bounds = {
        row["name"]: bound
        for row in record["systems"]
        if (bound := decode_bound(record, row, case["filled"], case["batch"]))
    }
    return _rows(rates, {name: case["batch"] / bound for name, bound in bounds.items()})


def _rows(rates: Mapping[str, Sequence[float]], limits: Mapping[str, float]) -> list[Row]:
    first = next(iter(rates.values()))
    return [
        Row(
            name,
            Spread.of(found),
            statistics.median(found) / limits[name] if name in limits else None,
            Spread.of(one / other for one, other in zip(first, found, strict=True)),
        )
        for name, found in rates.items()
    ]


def limit(record: Record, name: str) -> Spread:
    """One of the machine's limits over the whole run, in GB/s or GFLOP/s."""
    return Spread.of(record["limits"][name])


def added(system: Mapping[str, Any], when: str) -> int | None:
    """Bytes of memory, files that are mapped included, beyond what the process held before it loaded: at most while
    "loading", at most in the whole run ("peak"), or after loading ("loaded"). None where the system does not say."""
    memory = system["memory"]
    return None if memory[when] is None else max(0, int(memory[when] - memory["before"]))


def decode_bound(record: Record, system: Mapping[str, Any], context: int, batch: int) -> float:
    """Seconds that a step takes at least: every weight is read once, and every key and value that is seen, at the
    fastest that memory was read in this run."""
    return step_bytes(record, system, context, batch) / (limit(record, "read_best").median * 1e9)


def step_bytes(record: Record, system: Mapping[str, Any], context: int, batch: int) -> int:
    """Bytes that one step of decoding reads at least."""
    model = record["model"]
    global_layers = model["num_hidden_layers"] - model["local_layers"]
    columns = global_layers * context + model["local_layers"] * min(context, model["sliding_window"])
    a_column = 2 * model["num_key_value_heads"] * model["head_dim"] * system["cache_bytes"]
    return int(system["weights"] + batch * columns * a_column)


def prefill_bound(record: Record, tokens: int) -> float:
    """Seconds that a prompt takes at least: its matrix products at the rate of bfloat16 ones in this run."""
    return prefill_flops(record["model"], tokens) / (limit(record, "gemm_bfloat16").median * 1e9)


def prefill_flops(model: Mapping[str, Any], tokens: int) -> int:
    """Multiplications and additions of a prompt: the layers' matrices, the scores and values that a query sees, and the
    head once."""
    layers, heads, width = model["num_hidden_layers"], model["num_attention_heads"], model["head_dim"]
    d, groups = model["hidden_size"], model["num_key_value_heads"]
    matrices = layers * (2 * d * width * (heads + groups) + 3 * d * model["intermediate_size"])
    seen = tokens * (tokens + 1) // 2  # pairs of a query and a key
    beyond = max(0, tokens - model["sliding_window"])
    pairs = layers * seen - model["local_layers"] * beyond * (beyond + 1) // 2
    return 2 * (matrices * tokens + 2 * heads * width * pairs + d * model["vocab_size"])
