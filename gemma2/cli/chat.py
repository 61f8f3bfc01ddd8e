"""Talk to a model. It remembers the conversation; /reset forgets it, /quit (or
Ctrl-D) ends. Ctrl-C ends a reply and keeps the conversation; at the prompt it
ends the program."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from typing import TYPE_CHECKING

from gemma2.chat import chat_ids
from gemma2.cli.options import add_command, add_options, load_model, report, sampling_options
from gemma2.errors import ContextOverflow
from gemma2.stats import Stats
from gemma2.talk import Talk
from gemma2.tokenizer import check_text

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = "example:\n  gemma2 chat --model google/gemma-2-2b-it --temperature 0.7"
NOT_TUNED = "note: this checkpoint does not say that it was tuned for chat: it continues text rather than answers"


def add(commands: Commands) -> None:
    parser = add_command(commands, "chat", __doc__, EXAMPLE)
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = sampling_options(args)
    terminal = sys.stdin.isatty()
    if terminal:
        try:
            import readline  # noqa: F401  (line editing for input(), where Python was built with it)
        except ImportError:
            pass
    gemma = load_model(args)
    chat_ids([{"role": "user", "content": ""}], gemma.tokenizer)  # a vocabulary without turns is refused at once
    if not gemma.chat_tuned:
        print(NOT_TUNED, file=sys.stderr)
        warnings.filterwarnings("ignore", message="this checkpoint does not say")
    talk = Talk(gemma, **options)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return 0
        check_text(line)
        if line == "/quit":
            return 0
        if line == "/reset":
            talk.reset()
        elif line.startswith("/"):
            print(f"no command {line.split()[0]}; there are /reset and /quit", file=sys.stderr)
        elif line:
            stats = Stats()
            try:
                with contextlib.closing(talk.say(line, stats)) as reply:
                    for piece in reply:
                        print(piece, end="", flush=True)
            except ContextOverflow as error:
                print(f"gemma2: error: {error}; /reset forgets the conversation", file=sys.stderr)
                continue
            except KeyboardInterrupt:  # what was said so far stays part of the talk
                pass
            print()
            if args.verbose:
                report(stats)
