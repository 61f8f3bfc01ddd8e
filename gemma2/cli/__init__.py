"""The `gemma2` command: one file per subcommand; here, what they share in failing well."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from gemma2.cli import chat, generate
from gemma2.errors import BadModelFile, ContextOverflow, NonFiniteError

ARGUMENTS, FAILED, INTERRUPTED = 2, 1, 130


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_complain(message, ARGUMENTS))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for arguments, 1 for files and failed runs, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    parser = Parser(prog="gemma2", description="Gemma 2 in plain PyTorch.")
    parser.add_argument("--version", action="version", version=f"gemma2 {version('gemma2')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (generate, chat):
        command.add(commands)
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except KeyboardInterrupt:
        print()  # what was written so far stays, on a line of its own
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains on its way out
        return 128 + signal.SIGPIPE


def _run(args: argparse.Namespace) -> int:
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        raise
    except (BadModelFile, ContextOverflow, NonFiniteError, OSError, RuntimeError, ImportError) as error:
        return _failed(args, error, FAILED)
    except (ValueError, TypeError) as error:
        return _failed(args, error, ARGUMENTS)


def _failed(args: argparse.Namespace, error: Exception, code: int) -> int:
    if args.debug:
        raise error
    return _complain(str(error) or type(error).__name__, code)


def _complain(message: str, code: int) -> int:
    sys.stdout.flush()
    line = " ".join(message.split())
    print(f"gemma2: error: {line}", file=sys.stderr)
    return code
