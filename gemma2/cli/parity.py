"""gemma2 parity MODEL --against REF: whether another system computes this Gemma 2, where it parts from it, and whether
that is rounding. Exit 0 if it does, 1 if it does not, 2 if that could not be told."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from gemma2.checkpoints.checkpoint import Checkpoint, open_checkpoint
from gemma2.cli.inspect import table
from gemma2.cli.options import SOURCE
from gemma2.cli.trace import add_text_options, read_text
from gemma2.load import locate, parse_dtype
from gemma2.numerics import PROFILES
from gemma2.parity.cases import DIFFERS
from gemma2.parity.compare import Row
from gemma2.parity.judge import DIFFERENCE, OURS, Judgement, Step, explain, judge
from gemma2.parity.references import SPECS, Reference, open_reference
from gemma2.parity.references.trace import Recorded
from gemma2.parity.report import check_page, write_report

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add(commands: Commands) -> None:
    parser = commands.add_parser("parity", help="hold a model against another system", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help=f"{SOURCE}; pocket: the one inside")
    parser.add_argument("--against", required=True, metavar="REF", help=SPECS)
    add_text_options(parser)
    parser.add_argument("--dtype", metavar="T", help="to compute in, where REF leaves a choice [the checkpoint's]")
    parser.add_argument("--sites", action="append", metavar="GLOB", help="as 'blocks.*.hook_resid_*'; repeatable [*]")
    parser.add_argument("--numerics", choices=PROFILES, help="our arithmetic, so that it counts as rounding")
    parser.add_argument(
        "--explain",
        choices=PROFILES,
        metavar="PROFILE",
        help="show how much of the distance each change of a profile explains",
    )
    parser.add_argument(
        "--from", dest="start", choices=PROFILES, metavar="PROFILE", help="where --explain begins [ours]"
    )
    parser.add_argument("--no-cases", action="store_true", help="one pass only: no window, cache, chunks or batches")
    parser.add_argument(
        "--all", action="store_true", help="print every site, not only blocks' ends and where they part"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page with a chart of the error by depth")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub name")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=run, trouble=2)


def run(args: argparse.Namespace) -> int:
    refuse_unused(args)
    dtype = parse_dtype(args.dtype, force_float16=True)
    if args.html:
        check_page(args.html)  # before anything is computed
    path = locate(args.model, args.revision)
    opened = open_checkpoint(path)
    reference = open_reference(args.against, path, dtype)
    ids = read_ids(args, reference, opened)
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
            tell=bar.set_description_str,
        )
    if args.json:
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        show(found, args.all)
        kind = args.against.partition(":")[0]
        if found.verdict == DIFFERENCE and kind in PROFILES and args.numerics is None and PROFILES[kind]:
            print(f"what is documented of {kind}'s rounding counts as agreement with --numerics {kind}")
    if args.html:  # last, so that a disk that has become full does not take the verdict along
        write_report(found, args.html)
    return 1 if found.verdict == DIFFERENCE else 0


def refuse_unused(args: argparse.Namespace) -> None:
    """Raises ValueError for options that would do nothing."""
    if args.start and not args.explain:
        raise ValueError("--from says where --explain begins: give --explain PROFILE too")
    judged = {"--html": args.html, "--sites": args.sites, "--numerics": args.numerics, "--all": args.all}
    unused = [option for option, value in judged.items() if value]
    if args.explain and unused:
        raise ValueError(f"--explain walks by the logits and prints its own table: leave out {', '.join(unused)}")


def read_ids(args: argparse.Namespace, reference: Reference, opened: Checkpoint) -> list[int]:
    """What the command line asks for; without that a trace's own ids, and else a text every vocabulary has."""
    if args.ids is None and args.file is None and args.prompt is None:
        if isinstance(reference, Recorded):
            return reference.ids
        context = opened.config.max_position_embeddings
        return opened.tokenizer.encode(DEFAULT)[: min(64, context, reference.longest or context)]
    given = read_text(args)
    return opened.tokenizer.encode(given) if isinstance(given, str) else given


DEFAULT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was "
    "upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be "
    "light: and there was light."
)


def show(found: Judgement, everything: bool) -> None:
    """The table, the cases and the verdict."""
    head = ("site", "max abs", "relative", "ours", "cosine", "here / rounding", "")
    rows = [line(row) for row in found.rows if everything or row.parts or notable(row)]
    profile = f", held against our arithmetic as {found.numerics}" if found.numerics else ""
    print(f"{found.system}, {found.dtype}, {found.ids} ids{profile}; {len(found.rows)} of {found.places} sites shown\n")
    print(*table([head, *rows], words=(0, 6)), sep="\n")
    if len(rows) < len(found.rows):
        print(f"... {len(found.rows) - len(rows)} more sites, where the systems do not part (--all shows them)")
    if found.logits:
        it = found.logits
        flips = f"{it.flips} of {it.positions} top tokens flip"
        flips += f", which led by {it.margin:.3g} at most" if it.margin is not None else ""
        print(f"\npredictions: KL {it.kl_mean:.3g} nats on average, {it.kl_largest:.3g} at most; {flips}")
    if found.cases:
        print("", *table([(case.name, case.outcome, case.detail) for case in found.cases], words=(0, 1, 2)), sep="\n")
    print(f"\nverdict: {found.verdict}{explanation(found)}")


def explanation(found: Judgement) -> str:
    parting = [row for row in found.rows if row.parts]
    if found.first and parting and found.first == parting[0].site:
        why = f": {parting[0].why}" if parting[0].why else f", {parting[0].ratio:.3g} times what rounding explains"
        more = f"; and at {len(parting) - 1} more sites of their own" if len(parting) > 1 else ""
        return f", first at {found.first}{why}{more}"
    if found.first:
        return f", already in the {found.first}"
    wrong = [case.name for case in found.cases if case.outcome == DIFFERS]
    if wrong:
        return f" in: {', '.join(wrong)}"
    same = sum(row.bitwise for row in found.rows)
    return f" ({same} of {len(found.rows)} sites have our bits)"


def notable(row: Row) -> bool:
    return row.site.endswith(("hook_embed", "hook_resid_post", "ln_final", "logits"))


def line(row: Row) -> tuple[str, ...]:
    ratio = "equal bits" if row.bitwise else row.why or f"{row.ratio:.3g}"
    numbers = f"{row.largest:.3g}", f"{row.relative:.2e}", f"{row.own_relative:.2e}", f"{row.cosine:.8f}"
    return (row.site, *numbers, ratio, "PARTS" if row.parts else "")


def show_steps(steps: Sequence[Step], as_json: bool) -> None:
    if as_json:
        print(json.dumps([vars(step) for step in steps], indent=2, allow_nan=False))
        return
    rows = [("change", "distance", "closes", "equal sites", "")]
    for step in steps:
        shown = step.change or "(start)", f"{step.distance:.3e}", f"{step.closed:.1%}" if step.change else ""
        rows.append((*shown, f"{step.bitwise} of {step.sites}", step.about))
    print(*table(rows, words=(0, 4)), sep="\n")
    remains = steps[-1].distance / steps[0].distance if steps[0].distance else 0.0
    print(f"\nremains: {remains:.2%} of the first distance")
