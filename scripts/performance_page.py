"""The page about speed, printed from recorded runs of `gemma2 bench --json`, and its chart.

    python scripts/performance_page.py docs/performance/*.json > docs/performance.md
    python scripts/performance_page.py docs/performance/*.json --chart docs/performance.svg

Every figure is computed from the records. A new run needs no change here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma2.bench.measure import FORMAT
from gemma2.bench.summary import Record, Row, Spread, added, decode_rows, limit, prefill_rows
from gemma2.cli.bench import LIMITS, UNITS, versions
from gemma2.cli.bench import spread as shown
from gemma2.cli.show import size

HEAD = """# Speed and memory

This project beside other implementations: the same weights and the same token ids in the same run. Each system is a
process of its own and stays alive. The systems take turns, so that a machine whose speed drifts is the same for all of
them. Before anything is timed, the logits of all systems are compared; a system that computes something else is not
timed. `gemma2 bench` does all of this ([how](#how-it-is-measured)).

![The chart shows tokens a second of every system in every run, and the cost of context and batch.](performance.svg)

This page and the chart are printed from the recorded runs in [performance](performance):

```
python scripts/performance_page.py docs/performance/*.json > docs/performance.md
python scripts/performance_page.py docs/performance/*.json --chart docs/performance.svg
```

Loading GGUF files is measured in [gguf.md](gguf.md#speed-and-memory).
"""
TAIL = """## How it is measured

- The prompt and the ids to decode are random and the same for every system, so all do the same work. Each system also
  chooses an id at every step, and does not use it.
- A figure is a median, and in brackets the least and the most. Decoding takes turns of several tokens: the median of
  each turn, then the median over turns. A ratio is taken within a turn, then the median over turns. For speed, above 1
  means that the first system is faster.
- The machine's limits are measured between the turns, in a process of its own. Memory is read by one long sum, and by
  the best of several ways: sums of bfloat16, float32 and int32 numbers with one thread up to all. The rate of matrix
  products is that of a bfloat16 product of 512 x 2,304 by 2,304 x 9,216.
- The share of the read rate is what a step of decoding would take if it did nothing but read every weight once, and
  every key and value that it sees, by what it takes. The best of several ways is the rate. A share above 1 is possible:
  a system may read faster than all of PyTorch's sums.
- The share of the GEMM rate is what a prompt would take if it were nothing but its matrix products, by what it takes.
- All files are in the page cache before a system loads them. The first token is the time to load and to compute a
  prompt of 16 ids; what is compiled or read later counts there. gemma2's time to load includes its tokenizer, and a
  check that every weight is finite unless an option leaves it out.
- Memory is what a process holds beyond what it held before it loaded, with the pages of files that it maps.
- transformers runs its eager attention. llama.cpp runs as its own programs do by default, with float16 keys and values.
  gemma_pytorch runs as its `generate` calls it.
"""

POINTS = 3  # of a line in the chart: two say no more than the table


def read(path: Path) -> Record:
    """A record of `gemma2 bench --json`. Exits with a line where it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("gemma2 bench") != FORMAT:
            raise ValueError
    except (OSError, ValueError, AttributeError):
        sys.exit(f"{path}: not a record that gemma2 bench --json has written (format {FORMAT})")
    return record


def page(records: Sequence[Record]) -> str:
    parts = [HEAD]
    for record in records:
        parts += ["", *section(record)]
    return "\n".join([*parts, "", TAIL])


def title(record: Record) -> str:
    first, *others = (row["name"] for row in record["systems"])
    beside = f" beside {', '.join(others)}" if others else ""
    return f"{record['name']}: {first}{beside}"


def section(record: Record) -> Iterator[str]:
    machine, model, systems = record["machine"], record["model"], record["systems"]
    yield f"## {title(record)}"
    yield ""
    yield f"    {record['command']}"
    yield ""
    load = [f"{record[when][0]:g}" for when in ("load_before", "load_after") if record[when]]
    yield (
        f"{record['date']}; {model['parameters']:,} parameters in {model['num_hidden_layers']} layers; "
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, {machine['device']}; "
        f"{machine['system']}, Python {machine['python']}, gemma2 {record['gemma2']}, {versions(record)}"
        + (f"; load of the machine before and after: {', '.join(load)}." if load else ".")
    )
    if record.get("remark"):  # written into the record by whoever watched the run
        yield ""
        yield record["remark"]
    yield ""
    yield from table(
        ("limit of the machine", "in this run"),
        [(what, f"{shown(limit(record, name))} {UNITS[name]}") for name, what in LIMITS.items()],
    )
    yield ""
    yield from table(
        ("system", "load, s", "first token, s", "weights", "memory added by loading", "at most"),
        [system_cells(row) for row in systems],
    )
    if record["agreement"]:
        agreed = ", ".join(f"{row['system']} {row['distance']:.2g}" for row in record["agreement"])
        yield ""
        yield f"Distance of the logits to those of {systems[0]['name']}, by their spread: {agreed}."
    yield ""
    cases = [(f"prefill {case['tokens']:,}", "GEMM", prefill_rows(record, case)) for case in record["prefill"]]
    cases += [(f"decode at {at(case)}", "read", decode_rows(record, case)) for case in record["decode"]]
    head = ("", "system", "tokens/s", "share of the limit", f"{systems[0]['name']} is")
    yield from table(head, [line for case in cases for line in case_cells(*case)])
    for varied, fixed, unit in (("context", "batch", "columns"), ("batch", "context", "rows")):
        found = sweep(record, varied, fixed)
        if found:
            yield ""
            yield from table((f"decode, tokens/s, by {unit}", *(f"{number:,}" for number in found[0])), found[1])


def at(case: Record) -> str:
    return f"{case['filled']:,}" + (f", {case['batch']} rows" if case["batch"] > 1 else "")


def system_cells(row: Record) -> tuple[str, ...]:
    held = [size(found) if (found := added(row, name)) is not None else "-" for name in ("loading", "peak")]
    return (
        row["name"],
        shown(Spread.of(row["seconds"])),
        shown(Spread.of(row["first_token"])),
        size(row["weights"]),
        *held,
    )


def case_cells(name: str, kind: str, rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for number, row in enumerate(rows):
        share = f"{row.share:.2g} of {kind}" if row.share is not None else "-"
        yield (
            name if number == 0 else "",
            row.system,
            shown(row.rate),
            share,
            f"{shown(row.ratio, 2)} x" if number else "",
        )


def sweep(record: Record, varied: str, fixed: str) -> tuple[list[int], list[tuple[str, ...]]] | None:
    """The decode rate of every system against context or batch, where the run had several; the other as in its first
    case."""
    found = swept(record, varied, fixed)
    if len(found) < 2:
        return None
    names = [row["name"] for row in record["systems"]]
    rates = {case[varied]: {row.system: row.rate for row in decode_rows(record, case)} for case in found}
    return list(rates), [(name, *(number(rate[name]) for rate in rates.values())) for name in names]


def swept(record: Record, varied: str, fixed: str) -> list[Record]:
    cases = record["decode"]
    return [case for case in cases if case[fixed] == cases[0][fixed]] if cases else []


def number(rate: Spread) -> str:
    return f"{rate.median:.3g}" if rate.median < 1000 else f"{rate.median:,.0f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"


def draw(records: Sequence[Record], target: Path) -> None:
    """The chart: a bar for the decode rate of every system in every run that has several implementations, and lines
    against context and batch."""
    import matplotlib

    matplotlib.use("svg")
    with matplotlib.rc_context({"svg.hashsalt": "gemma2", "svg.fonttype": "none", "font.size": 9}):
        _draw(records, target)


def _draw(records: Sequence[Record], target: Path) -> None:
    from matplotlib import pyplot

    bars: list[tuple[str, Spread, bool]] = []
    for record in records:
        beside = any(row["kind"] != record["systems"][0]["kind"] for row in record["systems"])
        rows = decode_rows(record, record["decode"][0]) if record["decode"] and beside else []
        bars += [(f"{row.system}  ({record['name']})", row.rate, n == 0) for n, row in enumerate(rows)]
    lines = [
        (record, varied, fixed)
        for varied, fixed in (("context", "batch"), ("batch", "context"))
        for record in records
        if len(swept(record, varied, fixed)) >= POINTS
    ]
    height = 1.2 + 0.28 * len(bars)
    figure, axes = pyplot.subplots(
        1 + len(lines),
        1,
        figsize=(8, height + 3 * len(lines)),
        height_ratios=[height, *[3] * len(lines)],
        squeeze=False,
    )
    top = axes[0][0]
    for place, (_, rate, own) in enumerate(reversed(bars)):
        errors = [[rate.median - rate.least], [rate.most - rate.median]]
        top.barh(place, rate.median, xerr=errors, color="#1f6fb4" if own else "#b8c4ce", ecolor="#444444", capsize=2)
        top.annotate(number(rate), (rate.most, place), xytext=(5, 0), textcoords="offset points", va="center")
    top.set_yticks(range(len(bars)), [name for name, *_ in reversed(bars)])
    top.margins(x=0.2)
    top.set_xlabel("decode, tokens/s (median; least to most)")
    for axis, (record, varied, fixed) in zip((row[0] for row in axes[1:]), lines, strict=True):
        draw_lines(axis, record, varied, fixed)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


def draw_lines(axis: Any, record: Record, varied: str, fixed: str) -> None:
    cases = swept(record, varied, fixed)
    for place, system in enumerate(record["systems"]):
        rates = [next(row.rate for row in decode_rows(record, case) if row.system == system["name"]) for case in cases]
        axis.plot(
            [case[varied] for case in cases],
            [rate.median for rate in rates],
            marker="o",
            linewidth=2.5 if place == 0 else 1.2,
            label=system["name"],
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks([case[varied] for case in cases], [f"{case[varied]:,}" for case in cases])
    axis.margins(y=0.1)
    axis.set_ylim(bottom=0)
    axis.set_xlabel({"context": "columns in the cache", "batch": "rows decoded together"}[varied])
    axis.set_ylabel("tokens a second")
    axis.set_title(record["name"])
    axis.legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD.json")
    parser.add_argument("--chart", type=Path, metavar="FILE.svg", help="write the chart, and print no page")
    args = parser.parse_args()
    records = [read(path) for path in args.records]
    if args.chart:
        draw(records, args.chart)
    else:
        sys.stdout.write(page(records))


if __name__ == "__main__":
    main()
