"""Measure MODEL on benchmarks by lm-evaluation-harness (package lm-eval): tasks by
name, or Gemma 2's model card, with published values beside the measured ones. A
folder keeps one result file a task; the same command goes on where it was stopped."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from gemma2.checkpoints.dtypes import dtype_name
from gemma2.checks import check_count
from gemma2.cli.options import (
    ADAPTER,
    add_command,
    add_common_options,
    add_loading_options,
    add_model,
    add_placing_options,
    load_model,
    versions,
)
from gemma2.cli.show import table
from gemma2.evaluate.card import Card, default_card, read_card
from gemma2.evaluate.identity import fingerprint, folder_hash, held_bytes
from gemma2.evaluate.report import Report, lines, preface
from gemma2.evaluate.report import table as section_table
from gemma2.evaluate.results import Folder
from gemma2.evaluate.run import Run, keys, label, of_tasks
from gemma2.gemma import Gemma, chat_note

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

NEEDED = "gemma2 eval needs lm-eval: pip install 'gemma2[eval]'"
BOS = ("once", "every", "hf")
USAGE = """gemma2 eval MODEL --tasks NAME,... [options]
       gemma2 eval MODEL --model-card -o DIR [options]"""
EXAMPLE = """examples:
  gemma2 eval google/gemma-2-2b --tasks hellaswag --shots 10 --limit 100
  gemma2 eval google/gemma-2-2b --model-card --section pre-trained -o card-2b"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "eval", __doc__, EXAMPLE)
    parser.usage = USAGE
    add_model(parser)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--tasks", metavar="NAME,...", help="tasks or groups of the harness, or of --include-path")
    what.add_argument("--model-card", action="store_true", help="the benchmarks of Gemma 2's model card")
    what.add_argument("--card", metavar="FILE", type=Path, help="another card (JSON, see docs/evaluation.md)")
    what.add_argument(
        "--section", action="append", default=[], metavar="S", help="of the card: pre-trained, safety; default: all"
    )
    what.add_argument(
        "--size", metavar="S", help="published values to show: 2b, 9b, 27b; default: by the model's shape"
    )
    what.add_argument(
        "--include-path", action="append", default=[], metavar="DIR", type=Path, help="a folder of tasks; repeatable"
    )
    what.add_argument("--shots", type=int, metavar="N", help="examples before each question; default: the task's")
    what.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task; default: all")
    what.add_argument("--chat", action="store_true", help="write prompts as turns of a conversation")
    what.add_argument("--run-code", action="store_true", help="also measure what runs code that the model wrote")
    how = parser.add_argument_group("how")
    how.add_argument("-o", "--output", metavar="DIR", type=Path, help="keep results and a report there")
    how.add_argument("--force", action="store_true", help="measure again what DIR has of another model or setting")
    how.add_argument("--json", action="store_true", help="print JSON")
    how.add_argument(
        "--batch", default="auto", metavar="N", help="texts computed at once; default: auto, by their tokens and memory"
    )
    how.add_argument("--max-length", type=int, metavar="N", help="tokens read at once; default: the model's context")
    how.add_argument(
        "--bos",
        choices=BOS,
        default="once",
        help="where the BOS stands: once before each text; in every window of a long one; or as lm-eval's hf model has "
        "it, twice in rolling windows; default: once",
    )
    group = parser.add_argument_group("model")
    add_loading_options(group)
    group.add_argument("--adapter", metavar="A", help=f"{ADAPTER}; default: none")
    add_placing_options(group)
    group.add_argument("--fast", action="store_true", help="compute by the faster twins; default: the exact reference")
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    card, folder = check_arguments(args)
    if find_spec("lm_eval") is None:
        raise ImportError(NEEDED)
    say("reading the names of tasks")
    from gemma2.evaluate.harness import GemmaLM
    from gemma2.evaluate.tasks import Tasks

    tasks = Tasks(args.include_path)
    card = checked(card, tasks, args)
    about: dict[str, Any] = {"settings": settings(args), "versions": package_versions()}
    if folder and not args.force:
        folder.check(keys(card), about)
    if args.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # without it the harness's metric refuses
    args.reference = not args.fast
    gemma = load_model(args)
    model = GemmaLM(gemma, args.batch, args.max_length, args.bos)
    about["model"] = identity(args, gemma)
    size = args.size or card.size_of(gemma.config)
    report = Report(card, str(args.model), size, {}, {}, args.limit, notes(args, card, gemma), foot(args, gemma))
    found = Run(
        report,
        tasks,
        folder,
        about,
        {"name": str(args.model), **versions(gemma)},
        args.chat,
        args.run_code,
        args.force,
        say,
    )
    try:
        report = found.all(model)
    except KeyboardInterrupt:
        if folder:
            say(f"interrupted: finished tasks are in {folder.path}; the same command goes on from there")
        raise
    print_report(report, args.json)
    if found.failed:
        say(f"not measured, for the reasons above: {'; '.join(map(label, found.failed))}")
    return 1 if found.failed else 0


def check_arguments(args: argparse.Namespace) -> tuple[Card, Folder | None]:
    """What is asked for. Everything that can be refused before the harness or a model is read."""
    whole_card = args.model_card or args.card is not None
    if whole_card == (args.tasks is not None):
        raise ValueError("say what to measure: --tasks NAME,... or --model-card (or --card FILE), one of them")
    for name in ("shots", "limit", "max_length"):
        if getattr(args, name) is not None:
            check_count(f"--{name.replace('_', '-')}", getattr(args, name), least=0 if name == "shots" else 1)
    if args.batch != "auto":
        if not str(args.batch).isdecimal():
            raise ValueError(f"--batch is a number of texts, or auto, not {args.batch!r}")
        args.batch = check_count("--batch", int(args.batch), least=1)
    if args.fast and args.device_map is not None:
        raise ValueError("--fast is not for layers that --device-map spreads: give one of them")
    for path in args.include_path:
        if not path.is_dir():
            raise FileNotFoundError(f"--include-path {path}: no such folder")
    if not whole_card:
        names = list(dict.fromkeys(name.strip() for name in args.tasks.split(",") if name.strip()))
        if not names or args.section or args.size:
            raise ValueError("--tasks takes names, with commas between them; --section and --size belong to a card")
        return of_tasks(names, args.shots), None if args.output is None else Folder(args.output)
    if args.shots is not None:
        raise ValueError("--shots belongs to --tasks: a card says how many examples each benchmark has")
    if args.output is None:
        raise ValueError("-o DIR is needed with a card: it keeps each result, so that a stopped run can go on")
    card = read_card(args.card or default_card()).only(args.section)
    if args.size is not None and args.size not in card.sizes:
        raise ValueError(f"--size {args.size}: the card has {', '.join(card.sizes) or 'no sizes'}")
    return card, Folder(args.output)


def checked(card: Card, tasks: Any, args: argparse.Namespace) -> Card:
    """The card, with the tasks of a tag in its place where tasks were named. Raises ValueError for unknown names."""
    names = list(dict.fromkeys(task for task, _ in keys(card)))
    found: list[str] = tasks.check(names)
    if found == names:
        return card
    if args.tasks is None:
        tags = [name for name in names if name not in found]
        raise ValueError(f"{tags[0]} is a tag of several tasks, which have no number together: a row names one task")
    return of_tasks(found, args.shots)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What changes results beside the model; the number of texts at once changes their rounding alone."""
    return {
        "limit": args.limit,
        "chat": args.chat,
        "bos": args.bos,
        "max_length": args.max_length,
        "tasks": folder_hash(args.include_path),
    }


def package_versions() -> dict[str, str]:
    return {name: version(name) for name in ("gemma2", "lm-eval", "torch")}


def identity(args: argparse.Namespace, gemma: Gemma) -> dict[str, Any]:
    """The model of a result. Reading all weights for it takes a second for each gigabyte or two."""
    with tqdm(total=held_bytes(gemma), desc="weights", unit="B", unit_scale=True, disable=None, delay=1) as bar:
        found = fingerprint(gemma, bar.update)
    return {
        "fingerprint": found,
        "dtype": dtype_name(gemma.model.dtype),
        "weights": args.weights,
        "fast": args.fast,
        "device": gemma.model.device.type,
    }


def notes(args: argparse.Namespace, card: Card, gemma: Gemma) -> list[str]:
    """What the reader should know of this checkpoint and this card."""
    found = []
    for section in card.sections:
        if section.tuned is not None and section.tuned != bool(gemma.chat_tuned):
            says = "says that it was" if gemma.chat_tuned else "does not say that it was"
            found.append(f"{section.name}: {section.about.split('.')[0]}; this checkpoint {says} tuned for chat.")
    if args.chat and chat_note(gemma):
        found.append(f"--chat: {chat_note(gemma)}")
    return found


def foot(args: argparse.Namespace, gemma: Gemma) -> str:
    """What the numbers depend on."""
    found = versions(gemma)
    parts = [
        f"gemma2 {found['gemma2']}, lm-eval {version('lm-eval')}, torch {found['torch']}",
        f"{dtype_name(gemma.model.dtype)} on {found['device']}",
        f"weights {args.weights}" if args.weights else "",
        "faster twins" if args.fast else "",
        f"adapter {args.adapter}" if args.adapter else "",
        "prompts as turns" if args.chat else "",
        f"BOS {args.bos}",
        f"at most {args.max_length or gemma.config.max_position_embeddings:,} tokens at once",
    ]
    return "; ".join(part for part in parts if part)


def print_report(report: Report, as_json: bool) -> None:
    if as_json:
        print(json.dumps(in_json(report), indent=2, allow_nan=False))
        return
    for line in preface(report):
        print(line)
    for section in report.card.sections:
        print(f"\n{section.name}: {section.about}" if section.about else f"\n{section.name}")
        found = section_table(report, section)
        used = [i for i in range(len(found[0])) if any(row[i] for row in found[1:])]
        shown = [[row[i] for i in used] for row in found]
        print(*table(shown, [i for i, column in enumerate(used) if column in (0, 1, len(found[0]) - 1)]), sep="\n")
    print("", report.about, sep="\n")


def in_json(report: Report) -> dict[str, Any]:
    """The table as objects."""
    rows = [
        {
            "section": section.name,
            "benchmark": line.name,
            "measured": line.value,
            "standard_error": line.error,
            "how": line.how,
            "published": {f"{size} {source}": value for (size, source), value in line.published.items()},
            "verdict": line.verdict,
        }
        for section in report.card.sections
        for line in lines(report, section)
    ]
    return {"card": report.card.name, "model": report.model, "size": report.size, "rows": rows, "about": report.about}


def say(line: str) -> None:
    """News on standard error, above the bars."""
    tqdm.write(line, file=sys.stderr)
