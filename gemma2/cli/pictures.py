"""What commands share that draw a text: where the page and the PNG go, how much of the text they show."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gemma2.atomic import check_target
from gemma2.checkpoints.dtypes import dtype_name
from gemma2.checks import check_count
from gemma2.cli.options import versions
from gemma2.cli.prompts import read_text
from gemma2.cli.trace import ids_for
from gemma2.gemma import Gemma

LAST = 64  # tokens that a page shows unless it is told otherwise


def add_picture_options(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        default=Path(f"{name}.html"),
        help=f"the HTML page to write; default: {name}.html. The PNG has the same name with .png",
    )
    parser.add_argument("--no-png", action="store_true", help="write the page alone, which needs no matplotlib")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    parser.add_argument(
        "--last", type=int, default=LAST, metavar="N", help=f"show the last N tokens of the text; default: {LAST}"
    )


def targets(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Where the page and the PNG go. Raises OSError where they cannot be written, ValueError for a name of another
    kind, ImportError without matplotlib."""
    page = args.output.expanduser()
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"-o {page}: the page's name must end in .html")
    check_count("--last", args.last, 1)
    check_target(page, force=args.force)
    if args.no_png:
        return page, None
    png = page.with_suffix(".png")
    check_target(png, force=args.force)
    from gemma2.pictures.drawing import check_drawing

    check_drawing()
    return page, png


def given_text(args: argparse.Namespace) -> str | list[int]:
    """The text or the token ids. Raises as `read_text`; ValueError where there is none."""
    given = read_text(args)
    if given is None:
        raise ValueError("say for which text: --prompt TEXT, --file FILE or --ids IDS")
    return given


def ids_of(given: str | list[int], gemma: Gemma, least: int = 1) -> list[int]:
    """Raises ContextOverflow for more than the model's context, ValueError for fewer tokens than are needed."""
    ids = ids_for(given, gemma)
    if len(ids) < least:
        raise ValueError(f"the text has {len(ids)} token, and {least} are needed")
    return ids


def foot(args: argparse.Namespace, gemma: Gemma) -> str:
    """A page's last line: what it was made with."""
    made = ", ".join(f"{name} {value}" for name, value in versions(gemma).items())
    return f"gemma2 {args.command} {args.model}: {dtype_name(gemma.model.dtype)}; {made}"


def report(ids: list[int], last: int, *written: Path | None) -> None:
    """Say what was written, and what of the text it shows."""
    print(", ".join(str(path) for path in written if path is not None))
    if len(ids) > last:
        print(f"note: the last {last:,} of {len(ids):,} tokens are shown; --last N shows more", file=sys.stderr)
