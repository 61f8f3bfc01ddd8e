"""Talk to a model. It remembers the conversation; /reset forgets it, /quit (or
Ctrl-D) ends. Ctrl-C ends a reply and keeps the conversation; at the prompt it
ends the program. From a pipe or a file, in UTF-8, each line is what you say, and
each reply begins on a new line; if one does not fit the context, the exit code
is 1."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from gemma2.chat import chat_ids
from gemma2.cli.options import add_command, add_options, load_model, report, sampling_options
from gemma2.cli.prompts import read_lines
from gemma2.errors import ContextOverflow, NonFiniteError
from gemma2.gemma import chat_note
from gemma2.stats import Stats
from gemma2.talk import Talk
from gemma2.tokenizer import check_text

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = "example:\n  gemma2 chat --model google/gemma-2-2b-it --temperature 0.7"


def add(commands: Commands) -> None:
    parser = add_command(commands, "chat", __doc__, EXAMPLE)
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="instructions for the whole conversation; Gemma 2 has no system role, so TEXT is merged into your first "
        "message, with an empty line between; default: none",
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = sampling_options(args)
    check_text(args.system or "")
    terminal = sys.stdin.isatty()
    if terminal:
        try:
            import readline  # noqa: F401  (line editing for input(), where Python was built with it)
        except ImportError:
            pass
    gemma = load_model(args)
    chat_ids([{"role": "user", "content": ""}], gemma.tokenizer)  # a vocabulary without turns is refused at once
    note = chat_note(gemma)
    if note:
        print(f"note: {note}", file=sys.stderr)
        warnings.filterwarnings("ignore", message=re.escape(note))
    beginning = [] if args.system is None else [{"role": "system", "content": args.system}]
    talk = Talk(gemma, messages=beginning, system="merge", **options)
    code = 0
    for line in map(str.strip, typed() if terminal else read_lines()):
        check_text(line)
        if line == "/quit":
            break
        if line == "/reset":
            talk.reset()
        elif line.startswith("/"):
            print(f"no command {line.split()[0]}; there are /reset and /quit", file=sys.stderr)
        elif line:
            stats = Stats()
            try:
                with contextlib.closing(talk.say(line, stats)) as reply:
                    for piece in trimmed(reply):
                        print(piece, end="", flush=True)
            except ContextOverflow as error:
                advice = "/reset forgets the conversation, -n asks for fewer new tokens"
                print(f"gemma2: error: {error}; {advice}", file=sys.stderr)
                code = 0 if terminal else 1
                continue
            except NonFiniteError:
                print()  # the text so far stays, and the error has a line of its own
                raise
            except KeyboardInterrupt:  # what was said so far stays part of the talk
                pass
            print(flush=True)
            if args.verbose:
                report(stats)
    return code


def typed() -> Iterator[str]:
    """The lines that are typed at the prompt."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def trimmed(pieces: Iterable[str]) -> Iterator[str]:
    """A reply without the white space before and after it, still piece by piece."""
    held, begun = "", False
    for piece in pieces:
        held += piece
        text = held.rstrip() if begun else held.strip()
        if text:
            yield text
            held, begun = held[len(held.rstrip()) :], True
