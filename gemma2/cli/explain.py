"""Run the model once over TEXT and write a page that shows the whole forward pass:
one panel a step, from the tokens to the ten likeliest next ones, with the numbers
that were computed. One layer is shown in full of each kind, local and global. The
page is one HTML file that needs no network. A text from standard input is UTF-8."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2.atomic import check_target
from gemma2.checkpoints.dtypes import dtype_name
from gemma2.cli.options import (
    ADAPTER,
    MODEL,
    add_command,
    add_common_options,
    add_loading_options,
    load_model,
    versions,
)
from gemma2.cli.prompts import read_prompt
from gemma2.cli.show import size
from gemma2.pictures.explain import explain
from gemma2.pictures.page import write

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = 'example:\n  gemma2 explain "In the beginning God created" -o page.html'


def add(commands: Commands) -> None:
    parser = add_command(commands, "explain", __doc__, EXAMPLE)
    parser.add_argument("text", metavar="TEXT", help="the text; BOS is put before it; - reads it from standard input")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="the page to write")
    parser.add_argument(
        "--layers",
        metavar="A,B",
        help="the layers to show in full, counted from 0; default: the first local and the first global one",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="MODEL", help=f"{MODEL}; default: pocket")
    add_loading_options(model)
    model.add_argument("--adapter", metavar="A", help=f"{ADAPTER}; default: none")
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_target(args.output, force=args.force)
    layers = None if args.layers is None else read_layers(args.layers)
    text = read_prompt(args.text)
    gemma = load_model(args)
    foot = ", ".join(f"{key} {value}" for key, value in versions(gemma).items())
    name = args.model or "pocket"
    page = explain(gemma, text, layers, name=name, foot=f"{name}, {dtype_name(gemma.model.dtype)}; {foot}")
    write(args.output, page, force=args.force)
    print(f"{args.output}: {size(len(page.encode()))}")
    return 0


def read_layers(given: str) -> list[int]:
    """Numbers of layers from `0,1`. Raises ValueError for anything else."""
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", given, re.ASCII):
        raise ValueError(f"--layers {given!r}: must be numbers of layers from 0, as 0,1")
    return [int(number) for number in given.split(",")]
