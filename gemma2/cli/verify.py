"""Compare MODEL with itself on this machine: in a batch, with a cache, in chunks,
compiled, on another device, saved and loaded again, each against one plain
pass. It does not compare with another implementation; `gemma2 parity` does.
Exit 0 if everything agrees, 1 if something does not, 2 if the check could not
run."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2.checkpoints.dtypes import dtype_name
from gemma2.checks import check_count
from gemma2.cli.options import (
    add_command,
    add_common_options,
    add_loading_options,
    add_model,
    load_model,
    versions,
)
from gemma2.convert import convert
from gemma2.gemma import Gemma
from gemma2.load import load
from gemma2.model import Gemma2
from gemma2.parity.tolerances import TOLERANCES
from gemma2.parity.verify import LENGTH, SHORTEST, Check, check_length, narrowed, verify

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

TYPES = {
    "bfloat16": "bf16",
    "float16": "f16",
}  # dtype -> what is saved so that it loads again to the bit; else f64 or f32
VERDICT = {True: "passed", False: "FAILED", None: "not run"}
EXAMPLE = "example:\n  gemma2 verify pocket --dtype float32 --no-compile"


def add(commands: Commands) -> None:
    parser = add_command(commands, "verify", __doc__, EXAMPLE)
    add_model(parser)
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="leave out torch.compile, which takes seconds, and longer for a large model",
    )
    parser.add_argument(
        "--length",
        type=int,
        default=LENGTH,
        metavar="N",
        help=f"token ids in the random prompt; {SHORTEST} up to the context, default: {LENGTH}",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_loading_options(parser.add_argument_group("model"))
    add_common_options(parser)
    parser.set_defaults(run=run, trouble=2)


def run(args: argparse.Namespace) -> int:
    check_count("length", args.length)
    gemma = load_model(args)
    check_length(gemma.config, args.length)
    saved = {how: saver(args, gemma, name) for how, name in (("safetensors", "model"), ("GGUF", "model.gguf"))}
    about, checks = describe(args, gemma), list[Check]()
    if not args.json:
        print(*(f"{name:9} {value}" for name, value in about.items()), "", sep="\n")
    for check in verify(gemma.model, saved, compiled=not args.no_compile, length=args.length):
        checks.append(check)
        if not args.json:
            print(row(check), flush=True)
    failed = sum(check.passed is False for check in checks)
    if args.json:
        print(json.dumps({**about, "checks": [check.to_dict() for check in checks], "passed": not failed}, indent=2))
    else:
        ran = sum(check.passed is not None for check in checks)
        print("", f"{ran - failed} of {ran} passed, {len(checks) - ran} not run", sep="\n")
    return 1 if failed else 0


def saver(args: argparse.Namespace, gemma: Gemma, name: str) -> Callable[[], Gemma2]:
    """Convert MODEL into a temporary folder, and load it from there."""

    def save_and_load() -> Gemma2:
        with tempfile.TemporaryDirectory() as folder:
            target, dtype = Path(folder) / name, dtype_name(gemma.model.dtype)
            wide = "f64" if dtype == "float64" and target.suffix != ".gguf" else "f32"  # a GGUF has no float64
            type_ = TYPES.get(dtype, wide)
            options: dict[str, Any] = {"tokenizer": args.tokenizer, "progress": False}
            convert(args.model, target, type=type_, revision=args.revision, **options)
            same: dict[str, Any] = {"device": gemma.model.device, "dtype": gemma.model.dtype, "progress": False}
            same["weights"] = args.weights
            return load(target, force_float16=True, allow_nonfinite=args.allow_nonfinite, **same).model

    return save_and_load


def describe(args: argparse.Namespace, gemma: Gemma) -> dict[str, str]:
    """What was checked: model, dtype, machine, prompt and tolerance."""
    window = narrowed(gemma.model, args.length).config.sliding_window
    own = "" if window == gemma.config.sliding_window else f", narrowed from {gemma.config.sliding_window:,}"
    machine = versions(gemma)
    return {
        "model": f"{args.model} ({gemma.config.parameter_count:,} parameters)",
        "dtype": dtype_name(gemma.model.dtype) + (f", weights {args.weights}" if args.weights else ""),
        "device": machine["device"],
        "versions": f"gemma2 {machine['gemma2']}, torch {machine['torch']}, Python {platform.python_version()}, "
        f"{sys.platform}, {machine['threads']} threads",
        "prompt": f"{args.length} random token ids, window {window}{own}",
        "tolerance": str(TOLERANCES[gemma.model.dtype]),
    }


def row(check: Check) -> str:
    """name, how, distance and tolerance, verdict."""
    start = f"{check.name:17}  {VERDICT[check.passed]:7}  "
    if check.distance is None:
        return f"{start}{check.why_not} ({check.what})"
    bits = "every bit equal" if check.bitwise else f"off by {check.distance:.2g}, allowed {check.allowed:.2g}"
    return f"{start}{bits} ({check.what}; {check.seconds:.1f} s)"
