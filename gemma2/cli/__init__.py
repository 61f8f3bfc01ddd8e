"""The `gemma2` command: one file per subcommand; here, what they share in failing well."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from gemma2.cli import (
    ablate,
    attention,
    bench,
    chat,
    compare,
    convert,
    eval,
    explain,
    generate,
    inspect,
    lens,
    parity,
    perplexity,
    score,
    trace,
    verify,
)
from gemma2.errors import BadModelFile, ContextOverflow, NonFiniteError
from gemma2_command import INTERRUPTED, interruptible, top_parser

ARGUMENTS, FAILED = 2, 1
LONGEST = 2000  # characters of an error; a file's name for a tensor may be any length


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_complain(message, ARGUMENTS))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for arguments, 1 for files and failed runs, 130 for Ctrl-C.
    Where 1 is a verdict, as in `diff`, a command sets `trouble=2`, and files and failed runs are 2 too."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: nothing to read, and nobody reads
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    _set_encodings()
    try:
        interruptible()
        return _run(_parsed(argv))
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # in a pipeline, Ctrl-C ends the reader too
            print(flush=True)  # what was written so far stays, on a line of its own
            return INTERRUPTED
        _drop_stdout()
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return 128 + getattr(signal, "SIGPIPE", 13)  # Windows has no such signal


def _set_encodings() -> None:
    """Text in pipes and files is UTF-8, whatever the locale or code page. A terminal keeps its encoding, and shows a
    question mark where it cannot show a character."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        terminal, errors = stream.isatty(), "strict" if stream is sys.stdin else "replace"
        with contextlib.suppress(io.UnsupportedOperation):  # standard input that was read from before
            if not (terminal and stream is sys.stdin):
                stream.reconfigure(encoding=None if terminal else "utf-8", errors=errors)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = top_parser(Parser)
    parser.set_defaults(trouble=FAILED)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (
        generate,
        chat,
        convert,
        inspect,
        parity,
        bench,
        score,
        perplexity,
        trace,
        lens,
        attention,
        explain,
        ablate,
        eval,
        compare,
        verify,
    ):
        command.add(commands)
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> int:
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        raise
    except (BadModelFile, ContextOverflow, NonFiniteError, OSError, RuntimeError, ImportError, MemoryError) as error:
        return _failed(args, error, args.trouble)
    except (ValueError, TypeError) as error:
        return _failed(args, error, ARGUMENTS)
    except Exception as error:  # a fault of this program: one line all the same
        return _failed(args, error, args.trouble, f"{type(error).__name__}: {error} (--debug shows where)")


def _failed(args: argparse.Namespace, error: Exception, code: int, message: str = "") -> int:
    if args.debug:
        raise error
    return _complain(message or str(error) or type(error).__name__, code)


def _complain(message: str, code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:  # a full disk, a closed pipe: perhaps the error itself
        _drop_stdout()
    line = " ".join(message.split())  # names from a file may hold anything, also what steers a terminal
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(f"gemma2: error: {line[:LONGEST]}", file=sys.stderr)
    return code


def _drop_stdout() -> None:
    """Send what is still buffered nowhere, else the interpreter complains on its way out."""
    with contextlib.suppress(io.UnsupportedOperation):  # no descriptor, where a program runs the command inside itself
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
