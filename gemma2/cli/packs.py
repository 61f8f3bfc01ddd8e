"""`gemma2 parity PACK --against PORT`: what a pack says of a port. docs/packs.md has the format."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gemma2.cli.show import escaped, table
from gemma2.load import POCKET, parse_dtype
from gemma2.parity.judge import DIFFERENCE
from gemma2.parity.judge_pack import PackJudgement, PackRow, judge_pack, open_port
from gemma2.parity.pack import read_pack

COLUMNS = ("site", "rms", "of pack", "largest", "of pack", "distance", "ours", "allowed", "")
LEGEND = (
    ("rms, largest", "root mean square and largest |value| of PORT, and of the model in float64"),
    ("distance", "how far PORT is from the model in float64, earlier errors included, by the rms (from projections)"),
    ("ours", "the same of our model in PORT's dtype (from the values themselves)"),
    ("allowed", "the distance by that which rounding explains; above 1: DIFFERS"),
    ("equal bits", "the hash of PORT's values equals that of our model in the same dtype"),
)


def is_pack(model: str) -> bool:
    """Whether what stands in MODEL's place is a pack."""
    return model.endswith(".json")


def run_pack(args: argparse.Namespace) -> int:
    """As `run` of `gemma2 parity`."""
    given = {
        "--prompt": args.prompt,
        "--file": args.file,
        "--ids": args.ids,
        "--numerics": args.numerics,
        "--explain": args.explain,
        "--from": args.start,
        "--html": args.html,
        "--no-cases": args.no_cases or None,
        "--gradients": args.gradients or None,
        "--revision": args.revision,
    }
    unused = [option for option, value in given.items() if value is not None]
    if unused:
        raise ValueError(f"a pack has its own token ids and no model to compute with: leave out {', '.join(unused)}")
    dtype = parse_dtype(args.dtype, force_float16=True)
    name, colon, file = args.model.partition(":")
    beside = name == "pocket" and colon and not Path(args.model).exists()
    pack = read_pack(POCKET / file if beside else Path(args.model))
    sites = args.sites or "*"
    found = judge_pack(pack, open_port(args.against, pack, sites, dtype), sites)
    if args.json:
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        show(found, args.all)
    return 1 if found.verdict == DIFFERENCE else 0


def show(found: PackJudgement, everything: bool) -> None:
    about = [("PACK", f"{found.pack}, by {found.made_by}"), ("PORT", f"{found.port}, {found.system}, in {found.dtype}")]
    about += [("text", f"{found.tokens} token ids from the pack"), ("sites", f"{len(found.rows)} of {found.sites}")]
    print(*table([(name, escaped(value)) for name, value in about], left=(0, 1)), "", sep="\n")
    first = [row for row in found.rows if row.site == found.first]
    rows = [line(row) for row in found.rows if everything or row in first or notable(row)]
    print(*table([COLUMNS, *rows], left=(0, 8)), sep="\n")
    if len(rows) < len(found.rows):
        print(f"... {len(found.rows) - len(rows)} more sites (--all shows them)")
    print("", *table(LEGEND, left=(0, 1)), sep="\n")
    print(f"\nverdict: {found.verdict}{explanation(found, first)}")


def explanation(found: PackJudgement, first: list[PackRow]) -> str:
    if not first:
        same = sum(row.bitwise for row in found.rows)
        return f" ({same} of {len(found.rows)} sites equal ours in every bit)"
    row, later = first[0], sum(row.differs for row in found.rows) - 1
    why = row.why or f"{row.ratio:.3g} times the distance that rounding explains"
    said = f", first at {row.site}: {why}"
    if row.moved:
        said += "; its values have the right sizes in other places: look at the order of axes and at the signs"
    more = "so does 1 site" if later == 1 else f"so do {later} sites"
    return said + (f"; {more} after it, perhaps for no other reason" if later else "")


def notable(row: PackRow) -> bool:
    return row.site.endswith(("hook_embed", "hook_resid_post", "ln_final", "logits"))


def line(row: PackRow) -> tuple[str, ...]:
    numbers = (row.rms, row.pack_rms, row.largest, row.pack_largest)
    ratio = "equal bits" if row.bitwise else f"{row.ratio:.3g}"
    said = (f"DIFFERS: {row.why}" if row.why else "DIFFERS") if row.differs else ""
    return (row.site, *(f"{x:.5g}" for x in numbers), f"{row.relative:.2e}", f"{row.own_relative:.2e}", ratio, said)
