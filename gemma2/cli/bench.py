"""Time MODEL beside other implementations: prefill, decoding, loading and memory, on
the same weights and token ids. Each system is a process of its own that stays
alive, and they take turns, so that a machine whose speed drifts is the same for
all. What the machine can do at most is measured between the turns. Before
anything is timed, the logits of all systems are compared; a system that computes
something else is refused. Exit 0 if all were timed, 1 if one was refused or
failed."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from gemma2.atomic import check_target, replacing
from gemma2.bench.agreement import ALLOWED, OTHERWISE, allowed_for
from gemma2.bench.machine import BYTES
from gemma2.bench.measure import Plan, measure
from gemma2.bench.summary import Record, Row, Spread, added, decode_rows, limit, prefill_rows
from gemma2.bench.systems import LLAMA, System, check_room, distinct, our_system, peers
from gemma2.checkpoints.checkpoint import Checkpoint, open_checkpoint
from gemma2.checks import check_number
from gemma2.cli.options import add_command, add_debug, add_model
from gemma2.cli.show import size, table
from gemma2.load import locate, parse_device, parse_dtype

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

MORE = """systems for --against, separated by commas:
  transformers            Hugging Face's, eager attention, on MODEL's file or folder
  llama.cpp               through llama-cpp-python, where MODEL is a GGUF
  llama.cpp:FILE.gguf     the same weights in a GGUF, where MODEL is none
  gemma_pytorch:FOLDER    Google's, from a checkout, whose code is run
  self                    MODEL again without --fast, --compile and --weights
  self:WORD+WORD          MODEL again with fast, compile, weights=W or dtype=T

examples:
  gemma2 bench pocket --against transformers
  gemma2 bench model-Q8_0.gguf --weights packed --against llama.cpp,self
  gemma2 bench folder --fast --contexts 128,1024,8192 --batch 1,4,16 --json run.json"""
UNITS = {"read": "GB/s", "read_best": "GB/s", "copy": "GB/s", "gemm_bfloat16": "GFLOP/s", "gemm_float32": "GFLOP/s"}
LIMITS = {
    "read": "memory read, one long sum",
    "read_best": "memory read, the best of several ways",
    "copy": "memory copied, read and written",
    "gemm_bfloat16": "matrix product in bfloat16",
    "gemm_float32": "matrix product in float32",
}


def add(commands: Commands) -> None:
    parser = add_command(commands, "bench", __doc__, MORE)
    add_model(parser)
    parser.add_argument(
        "--against", action="append", default=[], metavar="SYSTEMS", help="see below; repeatable; default: none"
    )
    ours = parser.add_argument_group("how MODEL is loaded, as in gemma2.load")
    ours.add_argument("--fast", action="store_true", help="with the faster twins of its parts")
    ours.add_argument("--compile", action="store_true", help="compiled")
    ours.add_argument("--weights", metavar="W", help="how weights are kept: packed, int8, int4; default: as numbers")
    ours.add_argument(
        "--dtype", metavar="T", help="bfloat16 or float32, of PyTorch's systems; default: the checkpoint's"
    )
    ours.add_argument("--device", metavar="D", help="of PyTorch's systems; default: cpu")
    ours.add_argument("--threads", type=int, metavar="N", help="of every system; default: PyTorch's choice")
    what = parser.add_argument_group("what is timed")
    what.add_argument(
        "--prompt", type=numbers, default=(512,), metavar="N,...", help="lengths of prompts; default: 512"
    )
    what.add_argument(
        "--contexts",
        type=numbers,
        default=(128,),
        metavar="N,...",
        help="columns in the cache when decoding begins; default: 128",
    )
    what.add_argument(
        "--batch",
        type=numbers,
        default=(1,),
        metavar="N,...",
        help="rows that are decoded together: the first at every context, the others at the first context; default: 1",
    )
    what.add_argument("--rounds", type=int, default=6, metavar="N", help="turns of each system in decoding; default: 6")
    what.add_argument("--tokens", type=int, default=12, metavar="N", help="decoded in a turn; default: 12")
    what.add_argument(
        "--prefill-rounds", type=int, default=3, metavar="N", help="turns of each system with each prompt; default: 3"
    )
    what.add_argument("--load-rounds", type=int, default=3, metavar="N", help="times each is loaded; default: 3")
    what.add_argument(
        "--read",
        type=int,
        default=BYTES,
        metavar="BYTES",
        help="read at once to measure the memory, more than its caches hold; default: 512 MiB",
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="SYSTEM=PATH",
        help="run transformers, llama.cpp or gemma_pytorch by another Python, which has its package; repeatable",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="how far logits may be apart, by their spread, before a system is refused; default: "
        f"{OTHERWISE:g}, and {ALLOWED[torch.float32]:g} where all compute in float32",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write everything that was measured")
    parser.add_argument("--force", action="store_true", help="let --json replace a file")
    add_debug(parser)
    parser.set_defaults(run=run)


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, such as 128,1024") from None


def run(args: argparse.Namespace) -> int:
    if args.json:
        check_target(args.json, force=args.force)  # before anything is computed
    parse_device(args.device)
    parse_dtype(args.dtype)
    if args.tolerance is not None:
        check_number("tolerance", args.tolerance, "above 0", lambda x: x > 0)
    options = {name: getattr(args, name) for name in ("fast", "compile", "weights", "dtype") if getattr(args, name)}
    options["device"] = args.device or "cpu"
    plan = Plan(
        prompts=args.prompt,
        contexts=args.contexts,
        batches=args.batch,
        rounds=args.rounds,
        tokens=args.tokens,
        prefill_rounds=args.prefill_rounds,
        load_rounds=args.load_rounds,
        threads=args.threads,
        device=options["device"],
        read=args.read,
    )
    opened = open_checkpoint(locate(args.model))
    plan.check(opened.config)
    specs = [spec for text in args.against for spec in text.split(",")]
    systems = with_pythons(distinct([our_system(opened.path, options), *peers(specs, opened, options)]), args.python)
    check_room(systems, opened)
    allowed = args.tolerance or max(allowed_for(computes_in(system, opened)) for system in systems)
    about = {
        "command": command_line(sys.argv[1:]),
        "gemma2": version("gemma2"),
        "name": opened.path.name,
    }
    with tqdm(total=plan.steps(len(systems)), disable=None, leave=False) as bar:

        def tell(what: str) -> None:
            bar.set_description_str(what)
            bar.update()

        record = measure(systems, opened.config, plan, allowed, tell, about)
    show(record)
    if args.json:
        with replacing(args.json) as (unfinished,):
            unfinished.write_text(lines_of(record), encoding="utf-8")
    return 0


def command_line(arguments: list[str]) -> str:
    """The command as it was typed, without this machine's folders: of an absolute path the last name alone."""
    return shlex.join(["gemma2", *(re.sub(r"(?<![^=:,])/[^=:,]*/", "", text) for text in arguments)])


def lines_of(record: Record) -> str:
    """The record as JSON, a line for each of its parts."""
    parts = (f"{json.dumps(name)}: {json.dumps(part, allow_nan=False)}" for name, part in record.items())
    return "{" + ",\n ".join(parts) + "}\n"


def computes_in(system: System, opened: Checkpoint) -> torch.dtype:
    """The narrowest dtype in a system's arithmetic, as far as it matters to how near its logits are to others'."""
    if system.kind == LLAMA or system.options.get("weights"):
        return torch.bfloat16  # of activations, keys and values, or narrower
    return parse_dtype(system.options.get("dtype")) or opened.weights.dtype


def with_pythons(systems: list[System], given: list[str]) -> list[System]:
    """The systems, each with the interpreter that --python names for its kind."""
    kinds = {system.kind for system in systems if system.kind != "gemma2"}
    chosen = {}
    for text in given:
        kind, equals, path = text.partition("=")
        if kind not in kinds or not equals or not Path(path).expanduser().is_file():
            there = ", ".join(sorted(kinds)) or "none"
            raise ValueError(f"--python {text!r}: give SYSTEM=PATH with one of the systems ({there}) and a Python")
        chosen[kind] = str(Path(path).expanduser())
    return [replace(system, python=chosen.get(system.kind, system.python)) for system in systems]


def show(record: Record) -> None:
    """The machine, the systems, whether they agree, and a table for each thing that was timed."""
    machine, model = record["machine"], record["model"]
    about = [
        ("model", f"{record['name']} ({model['parameters']:,} parameters)"),
        ("machine", f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, {machine['device']}"),
        ("versions", f"gemma2 {record['gemma2']}, {versions(record)}, Python {machine['python']}"),
    ]
    about += [(f"note, {row['name']}", note) for row in record["systems"] for note in row["notes"]]
    print(*table(about, left=(0, 1)), "", sep="\n")
    limits = [(what, f"{spread(limit(record, name))} {UNITS[name]}") for name, what in LIMITS.items()]
    print(
        "limits of this machine, measured between the turns: median (least-most)", *table(limits, left=(0,)), sep="\n"
    )
    print("", *table([SYSTEM, *map(system_cells, record["systems"])], left=(0,)), sep="\n")
    if record["agreement"]:
        print("", f"distance of logits to those of {record['systems'][0]['name']}, by their spread", sep="\n")
        agreed = [
            (row["system"], f"{row['distance']:.2g}", f"{row['top']} of {row['steps']} likeliest ids are equal")
            for row in record["agreement"]
        ]
        print(*table(agreed, left=(0, 2)), sep="\n")
    for case in record["prefill"]:
        head = f"prefill of {case['tokens']:,}"
        show_case(head, "share of the GEMM rate", prefill_rows(record, case))
    for case in record["decode"]:
        rows = f", {case['batch']} rows together" if case["batch"] > 1 else ""
        show_case(f"decoding at {case['filled']:,}{rows}", "share of the read rate", decode_rows(record, case))


SYSTEM = ("system", "load, s", "first token, s", "weights", "memory added by loading", "at most")


def system_cells(row: Record) -> tuple[str, ...]:
    held = [size(found) if (found := added(row, name)) is not None else "-" for name in ("loading", "peak")]
    return (
        row["name"],
        spread(Spread.of(row["seconds"])),
        spread(Spread.of(row["first_token"])),
        size(row["weights"]),
        *held,
    )


def show_case(title: str, share: str, rows: list[Row]) -> None:
    first = rows[0].system
    head = (title, "tokens/s", share, f"{first} is")
    print("", *table([head, *(cells(row, first) for row in rows)], left=(0,)), sep="\n")


def cells(row: Row, first: str) -> tuple[str, ...]:
    share = f"{row.share:.2g}" if row.share is not None else "-"
    return (row.system, spread(row.rate), share, "" if row.system == first else f"{spread(row.ratio, 2)} x")


def spread(found: Spread, places: int | None = None) -> str:
    """A median with the least and the most: "5.36 (5.1-5.6)"."""
    median, *ends = (
        f"{one:.{places}f}" if places else f"{one:.3g}" if one < 1000 else f"{one:,.0f}"
        for one in (found.median, found.least, found.most)
    )
    return f"{median} ({'-'.join(ends)})"


def versions(record: Record) -> str:
    found: dict[str, Any] = {}
    for row in record["systems"]:
        found |= row["versions"]
    return ", ".join(f"{name} {number}" for name, number in found.items() if name != "gemma2")
