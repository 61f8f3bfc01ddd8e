"""gemma2 convert SRC DST: write a model in another format or type. The name of DST decides the format: a .gguf, a .ckpt
as Google's, or a folder with safetensors."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from gemma2.convert import TYPES, convert

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add(commands: Commands) -> None:
    parser = commands.add_parser("convert", help="write a model in another format or type", description=__doc__)
    parser.add_argument(
        "source",
        metavar="SRC",
        help="hub name (owner/repo, or owner/repo:FILE.gguf), folder or file; pocket: the one inside",
    )
    parser.add_argument("target", metavar="DST", help="NAME.gguf, NAME.ckpt, or a folder")
    parser.add_argument("--type", metavar="T", help=f"{', '.join(TYPES)}; default: the source's own, bf16 if quantized")
    parser.add_argument("--force", action="store_true", help="replace DST if it is there")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.model elsewhere than beside the weights")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub name")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    done = convert(
        args.source,
        args.target,
        type=args.type,
        force=args.force,
        tokenizer=args.tokenizer,
        revision=args.revision,
    )
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    kinds = ", ".join(f"{count} {kind}" for kind, count in done.tensors.items())
    print(f"{done.path}: {done.bytes:,} bytes, {sum(done.tensors.values())} tensors ({kinds})")
    return 0
