"""Continue a text, and print the continuation as it is generated. A text from
standard input is UTF-8 and taken as it is: a newline at its end is part of it,
and makes the continuation begin on a new line (printf has none, echo has). An
empty text begins with the BOS alone. What is printed into a pipe or a file is
UTF-8 too."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from gemma2.cli.options import add_command, add_options, load_model, report, sampling_options
from gemma2.cli.prompts import read_prompt
from gemma2.errors import NonFiniteError
from gemma2.stats import Stats

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = 'example:\n  gemma2 generate "In the beginning" -n 20 --temperature 0.7 --seed 7'


def add(commands: Commands) -> None:
    parser = add_command(commands, "generate", __doc__, EXAMPLE)
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from standard input")
    parser.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    parser.add_argument(
        "--special",
        action="store_true",
        help="read <start_of_turn> and other control tokens in PROMPT as tokens; default: they are plain text",
    )
    add_options(parser, new_tokens=64)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = sampling_options(args)
    prompt = read_prompt(args.prompt)
    gemma = load_model(args)
    stats = Stats()
    pieces = gemma.stream(prompt, stats=stats, special=args.special, **options)
    if args.echo:
        print(prompt, end="", flush=True)
    written = False
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            written = True
    except NonFiniteError:
        if written:
            print()  # the text so far stays, and the error has a line of its own
        raise
    print()
    if args.verbose:
        report(stats)
    return 0
