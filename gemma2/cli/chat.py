"""Talk to a model. It remembers the conversation; /reset forgets it, /quit (or
Ctrl-D) ends."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import TYPE_CHECKING

from gemma2.chat import chat_ids
from gemma2.cli.options import add_command, add_options, load_model, report, sampling_options
from gemma2.errors import ContextOverflow
from gemma2.stats import Stats
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
    history: list[dict[str, str]] = []
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
            history = []
        elif line.startswith("/"):
            print(f"no command {line.split()[0]}; there are /reset and /quit", file=sys.stderr)
        elif line:
            stats, reply = Stats(), ""
            turn = [*history, {"role": "user", "content": line}]
            try:
                for piece in gemma.stream_chat(turn, stats=stats, **options):
                    print(piece, end="", flush=True)
                    reply += piece
            except ContextOverflow as error:
                print(f"gemma2: error: {error}; /reset forgets the history", file=sys.stderr)
                continue
            print()
            history = [*turn, {"role": "assistant", "content": reply}]
            if args.verbose:
                report(stats)
