"""Run the study, or print its page."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from studies.who_computes_what import __doc__ as about
from studies.who_computes_what.implementations import IMPLEMENTATIONS
from studies.who_computes_what.outcomes import read, write
from studies.who_computes_what.page import page
from studies.who_computes_what.runs import look_at


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m studies.who_computes_what",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run implementations, and keep in outcomes.json what was found")
    run.add_argument("--environments", type=Path, required=True, help="where they are or will be installed")
    names = [one.name for one in IMPLEMENTATIONS]
    run.add_argument("--only", action="append", choices=names, metavar="NAME", default=[], help="repeatable [all]")
    commands.add_parser("page", help="print docs/who-computes-what.md from outcomes.json")
    args = parser.parse_args()
    if args.command == "page":
        print(page(read()), end="")
        return 0
    return run_all(args.environments, args.only or names)


def run_all(environments: Path, names: list[str]) -> int:
    """What is found is kept after each implementation. One that cannot be run keeps what was found before."""
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        for one in IMPLEMENTATIONS:
            if one.name in names:
                print(one.name, file=sys.stderr, flush=True)
                try:
                    new = {one.name: look_at(one, environments, Path(place))}
                except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as reason:
                    print(f"not run: {reason}", file=sys.stderr, flush=True)
                    failed += 1
                    continue
                found = read() | new
                write(found[it.name] for it in IMPLEMENTATIONS if it.name in found)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
