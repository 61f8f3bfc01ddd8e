"""Where the `gemma2` command starts. --version, --help and Ctrl-C are answered at once, before PyTorch is imported.

PyTorch takes seconds to import, and every module in the package imports it, so this module stands beside the package.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # as typing has it, which takes its time to import
if TYPE_CHECKING:
    import argparse
    from typing import NoReturn

INTERRUPTED = 130
# Each command with its line in --help, in the order of that page.
COMMANDS = {
    "generate": "continue a text",
    "chat": "talk to a model",
    "convert": "write a model in another format or type",
    "inspect": "show a checkpoint's config, tensors and errors",
    "parity": "find where another implementation differs",
    "bench": "time a model beside other implementations",
    "score": "print how likely a model finds a text",
    "perplexity": "measure perplexity as llama.cpp, transformers or by documents",
    "trace": "write what a model computes at named sites to a file",
    "lens": "show what a model would say after each layer",
    "attention": "show where each head of a model looks",
    "explain": "write a page that shows the whole forward pass of a text",
    "ablate": "change one part of the architecture at a time and measure it on a text",
    "eval": "measure a model on benchmarks, beside the values of the model card",
    "compare": "measure how far models are from one of them on a text",
    "verify": "check batch, cache, compile, device and save against one plain pass",
}


def main() -> int:
    """Run the command line of this process and return its exit code."""
    end_quietly()
    if sys.argv[1:] in ([], ["--version"], ["--help"], ["-h"]):
        parser = top_parser()
        commands = parser.add_subparsers(metavar="COMMAND")
        for name, line in COMMANDS.items():
            commands.add_parser(name, help=line)
        parser.parse_args(sys.argv[1:] or ["--help"])
    from gemma2.cli import main as run

    code = run()
    end_quietly()  # the interpreter takes its time to end, too
    return code


def top_parser(kind: type[argparse.ArgumentParser] | None = None) -> argparse.ArgumentParser:
    import argparse
    from importlib.metadata import version

    parser = (kind or argparse.ArgumentParser)(prog="gemma2", description="Gemma 2 in plain PyTorch.")
    parser.add_argument("--version", action="version", version=f"gemma2 {version('gemma2')}")
    return parser


def end_quietly() -> None:
    """From here on Ctrl-C ends the process at once, with exit code 130. A KeyboardInterrupt would not do: extension
    modules swallow it while they are imported. A caller that ignores Ctrl-C, as `nohup` does with others, is obeyed."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def interruptible() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: object) -> NoReturn:
    os._exit(INTERRUPTED)
