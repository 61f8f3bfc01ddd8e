"""Find where another implementation differs from MODEL: on the same weights and the
same token ids, the first site that differs, and whether that is rounding or a
mistake. MODEL runs on the CPU, in the dtype of REF and once more in float64.
Exit 0 if both agree up to rounding, 1 if they differ, 2 if the comparison could
not run. In MODEL's place may stand a pack (PACK.json): docs/packs.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from gemma2.checkpoints.checkpoint import Checkpoint, open_checkpoint
from gemma2.cli.options import REVISION, add_command, add_debug, add_model
from gemma2.cli.packs import is_pack, run_pack
from gemma2.cli.prompts import add_text_options, read_text
from gemma2.cli.show import escaped, table
from gemma2.load import locate, parse_dtype
from gemma2.numerics import PROFILES
from gemma2.parity.cases import DIFFERS
from gemma2.parity.compare import Row
from gemma2.parity.judge import DIFFERENCE, OURS, Judgement, Step, explain, judge
from gemma2.parity.references import Reference, open_reference
from gemma2.parity.references.trace import Recorded
from gemma2.parity.report import COLUMNS, cells, check_page, write_report

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

MORE = """REF is one of
  transformers            Hugging Face's, eager attention (pip install transformers)
  llama.cpp               through llama-cpp-python (pip install llama-cpp-python)
  gemma_pytorch:FOLDER    Google's, from a checkout, whose code is run
  FILE.safetensors        a trace: what any program computed (docs/traces.md);
                          trace:FILE if its name ends otherwise
  self:model=MODEL2       another checkpoint of the same shape, as a modified or
                          quantized copy of MODEL
  FILE.jsonl              MaxText's golden logits: its first line, or line N of
                          maxtext:FILE:N
  self:KEY=VALUE,...      MODEL again with another dtype=, device=, numerics= or
                          weights=; these and model= go together, as in
                          self:model=copy,dtype=float32; self changes nothing
With a pack in MODEL's place, REF is what a port wrote (port.json), a trace, or
self:model=MODEL.

examples:
  gemma2 parity pocket --against transformers
  gemma2 parity pocket --against self:model=my-modified-copy"""
LEGEND = (
    ("max abs, relative, cosine", "how far REF is from the float64 model, earlier errors included"),
    ("ours", "how far MODEL in REF's dtype is from it (relative)"),
    ("error / rounding", "the error made at this site, divided by the most that rounding explains; above 1: DIFFERS"),
    ("equal bits", "every value of REF equals MODEL's in REF's dtype"),
)


def add(commands: Commands) -> None:
    parser = add_command(commands, "parity", __doc__, MORE)
    add_model(parser)
    parser.add_argument(
        "--against", required=True, metavar="REF", help="the other implementation; required; listed below"
    )
    parser.add_argument("--dtype", metavar="T", help="compute in T where REF leaves a choice; default: MODEL's")
    parser.add_argument(
        "--sites",
        action="append",
        metavar="GLOB",
        help="the sites to compare, as 'blocks.*.hook_resid_*'; repeatable; default: all that REF records",
    )
    parser.add_argument(
        "--numerics",
        choices=PROFILES,
        metavar="PROFILE",
        help="round in MODEL as another implementation does, so that its documented rounding counts as agreement: "
        f"{', '.join(PROFILES)}; default: {OURS}, MODEL as it is",
    )
    parser.add_argument(
        "--explain",
        choices=PROFILES,
        metavar="PROFILE",
        help="instead of a verdict, make the changes of a --numerics profile one at a time, and print how much of the "
        "distance between the logits of MODEL and REF each one closes",
    )
    parser.add_argument(
        "--from",
        dest="start",
        choices=PROFILES,
        metavar="PROFILE",
        help=f"begin --explain with the changes of this profile, which it first undoes; default: {OURS}, no changes",
    )
    parser.add_argument(
        "--no-cases", action="store_true", help="one pass only; default: also with caches, chunks, batches and windows"
    )
    parser.add_argument(
        "--gradients",
        action="store_true",
        help="also compare the gradient of every weight (REF: transformers or self), in the order of the backward "
        "pass, and name the first that differs",
    )
    parser.add_argument(
        "--all", action="store_true", help="print every site; default: the ends of blocks and the sites that differ"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="also write a page with a chart of the error by depth"
    )
    parser.add_argument("--revision", metavar="R", help=REVISION)
    add_text_options(parser, "default: the beginning of Genesis 1, at most 64 token ids; for a trace, its own")
    add_debug(parser)
    parser.set_defaults(run=run, trouble=2)


def run(args: argparse.Namespace) -> int:
    if is_pack(args.model):
        return run_pack(args)
    refuse_unused(args)
    dtype = parse_dtype(args.dtype, force_float16=True)
    if args.html:
        check_page(args.html)  # before anything is computed
    path = locate(args.model, args.revision)
    opened = open_checkpoint(path)
    reference = open_reference(args.against, path, dtype)
    ids, text = read_ids(args, reference, opened)
    if args.explain:
        show_steps(explain(reference, opened, ids, args.explain, args.start or OURS), args.json)
        return 0
    with tqdm(desc="parity", bar_format="{desc}", disable=True if args.json else None, leave=False) as bar:
        found = judge(
            reference,
            opened,
            ids,
            args.sites or "*",
            numerics=args.numerics,
            cases=not args.no_cases,
            gradients=args.gradients,
            model=args.model,
            text=text,
            tell=bar.set_description_str,
        )
    if args.json:
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        show(found, args.all)
        kind = args.against.partition(":")[0]
        if found.verdict == DIFFERENCE and kind in PROFILES and args.numerics is None and PROFILES[kind]:
            print(f"--numerics {kind} counts the documented rounding of {kind} as agreement")
    if args.html:  # last, so that a disk that has become full does not take the verdict along
        write_report(found, args.html)
    return 1 if found.verdict == DIFFERENCE else 0


def refuse_unused(args: argparse.Namespace) -> None:
    """Raises ValueError for options that would do nothing."""
    if args.start and not args.explain:
        raise ValueError("--from says where --explain begins: give --explain PROFILE too")
    judged = {"--html": args.html, "--sites": args.sites, "--numerics": args.numerics}
    judged |= {"--gradients": args.gradients, "--all": args.all}
    unused = [option for option, value in judged.items() if value]
    if args.explain and unused:
        raise ValueError(f"--explain compares logits and prints a table of its own: leave out {', '.join(unused)}")


def read_ids(args: argparse.Namespace, reference: Reference, opened: Checkpoint) -> tuple[list[int], str]:
    """The token ids to compare on, and where they are from: the command line, else a trace, else the default text."""
    given = read_text(args)
    if isinstance(given, list):
        return given, "given by --ids"
    if isinstance(given, str):
        return opened.tokenizer.encode(given), f"of {args.file or shortened(given)}"
    if isinstance(reference, Recorded):
        return reference.ids, "from the trace"
    context = opened.config.max_position_embeddings
    ids = opened.tokenizer.encode(DEFAULT)[: min(64, context, reference.longest or context)]
    return ids, "of Genesis 1 (default text)"


def shortened(text: str) -> str:
    return ascii(text) if len(text) <= 40 else f"{text[:40]!a}..."


DEFAULT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was "
    "upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be "
    "light: and there was light."
)


def show(found: Judgement, everything: bool) -> None:
    """What was compared, the table, the cases and the verdict."""
    about = [("MODEL", found.model), ("REF", f"{found.system}, computed in {found.dtype}")]
    about += [("text", f"{found.tokens} token ids {found.text}".rstrip())]
    about += [("numerics", f"MODEL is rounded as {found.numerics}")] if found.numerics else []
    about += [("sites", f"{len(found.rows)} of {found.sites} compared")]
    print(*table([(name, escaped(value)) for name, value in about], left=(0, 1)), "", sep="\n")
    rows = [line(row) for row in found.rows if everything or row.differs or notable(row)]
    print(*table([COLUMNS, *rows], left=(0, 6)), sep="\n")
    if len(rows) < len(found.rows):
        print(f"... {len(found.rows) - len(rows)} more sites, none of which differs (--all shows them)")
    print("", *table(LEGEND, left=(0, 1)), sep="\n")
    if found.logits:
        it = found.logits
        flips = f"{it.flips} of {it.positions} top tokens differ"
        flips += f", which led by {it.margin:.3g} at most" if it.margin is not None else ""
        kl = f"KL {it.kl_mean:.3g} nats on average, {it.kl_largest:.3g} at most"
        print(f"\npredictions of REF against float64: {kl}; {flips}")
    if found.cases:
        print("", *table([(case.name, case.outcome, case.detail) for case in found.cases], left=(0, 1, 2)), sep="\n")
    print(f"\nverdict: {found.verdict}{explanation(found)}")


def explanation(found: Judgement) -> str:
    differing = [row for row in found.rows if row.differs]
    if found.first and differing and found.first == differing[0].site:
        why = (
            f": {differing[0].why}" if differing[0].why else f", {differing[0].ratio:.3g} times what rounding explains"
        )
        more = f"; {len(differing)} sites differ" if len(differing) > 1 else ""
        return f", first at {found.first}{why}{more}"
    if found.first:
        return f", already in the {found.first}"
    wrong = [case.name for case in found.cases if case.outcome == DIFFERS]
    if wrong:
        return f" in: {', '.join(wrong)}"
    same = sum(row.bitwise for row in found.rows)
    return f" ({same} of {len(found.rows)} sites equal ours in every bit)"


def notable(row: Row) -> bool:
    return row.site.endswith(("hook_embed", "hook_resid_post", "ln_final", "logits"))


def line(row: Row) -> tuple[str, ...]:
    return (*cells(row), f"DIFFERS{f': {row.why}' if row.why else ''}" if row.differs else "")


def show_steps(steps: Sequence[Step], as_json: bool) -> None:
    if as_json:
        print(json.dumps([vars(step) for step in steps], indent=2, allow_nan=False))
        return
    rows = [("change", "distance", "closes", "equal sites", "")]
    for step in steps:
        shown = step.change or "(start)", f"{step.distance:.3e}", f"{step.closed:.1%}" if step.change else ""
        rows.append((*shown, f"{step.bitwise} of {step.sites}", step.about))
    print(*table(rows, left=(0, 4)), sep="\n")
    remains = steps[-1].distance / steps[0].distance if steps[0].distance else 0.0
    print(f"\nremains: {remains:.2%} of the distance at the start")
