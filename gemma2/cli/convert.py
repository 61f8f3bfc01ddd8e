"""Write a model in another format or type. The name of TARGET decides the format:
NAME.gguf, NAME.ckpt (Google's), or a folder (config.json, tokenizer.model and
safetensors, as transformers reads it)."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from gemma2.cli.options import ADAPTER, REVISION, TOKENIZER, add_command, add_debug, add_model
from gemma2.convert import TYPES, convert

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = "example:\n  gemma2 convert pocket pocket-q8.gguf --type q8_0"


def add(commands: Commands) -> None:
    parser = add_command(commands, "convert", __doc__, EXAMPLE)
    add_model(parser)
    parser.add_argument("target", metavar="TARGET", help="NAME.gguf, NAME.ckpt, or a folder")
    parser.add_argument(
        "--type", metavar="T", help=f"{', '.join(TYPES)}, f64; default: that of MODEL, bf16 if quantized"
    )
    parser.add_argument("--force", action="store_true", help="replace TARGET if it is there")
    parser.add_argument("--tokenizer", metavar="FILE", help=TOKENIZER)
    parser.add_argument("--revision", metavar="R", help=REVISION)
    parser.add_argument("--adapter", metavar="A", help=f"{ADAPTER}; it is merged into the weights")
    add_debug(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    done = convert(
        args.model,
        args.target,
        type=args.type,
        force=args.force,
        tokenizer=args.tokenizer,
        revision=args.revision,
        adapter=args.adapter,
    )
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    kinds = ", ".join(f"{count} {kind}" for kind, count in done.tensors.items())
    print(f"{done.path}: {done.bytes:,} bytes, {sum(done.tensors.values())} tensors ({kinds})")
    return 0
