"""gemma2 generate PROMPT: continue a text, streaming it as it is made."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from gemma2.cli.options import add_options, load_model, report, sampling_options
from gemma2.errors import NonFiniteError
from gemma2.stats import Stats
from gemma2.tokenizer import check_text

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add(commands: Commands) -> None:
    parser = commands.add_parser("generate", help="continue a text", description=__doc__)
    parser.add_argument("prompt", help="the text to continue; - reads it from standard input")
    parser.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    parser.add_argument(
        "--special", action="store_true", help="let <start_of_turn> and the like in it be control tokens"
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


def read_prompt(given: str) -> str:
    """The prompt itself, or standard input for `-`. Raises ValueError where it is not UTF-8, naming the byte."""
    if given != "-":
        check_text(given)
        return given
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not valid UTF-8 at byte {error.start}") from None
