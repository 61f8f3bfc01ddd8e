"""Write what MODEL computes at named sites for one text, in a file that
`gemma2 parity --against FILE` compares with. Any program can write such a file:
docs/traces.md says how. With --pack, write a small JSON file without weights and
without values instead, by which a port in any language is checked: docs/packs.md."""

from __future__ import annotations

import argparse
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from gemma2.atomic import check_target, replacing
from gemma2.checkpoints.dtypes import dtype_name
from gemma2.cli.options import (
    add_command,
    add_common_options,
    add_loading_options,
    add_model,
    load_model,
    versions,
)
from gemma2.cli.prompts import add_text_options, read_text
from gemma2.cli.show import size
from gemma2.errors import ContextOverflow
from gemma2.gemma import Gemma
from gemma2.parity.machine import stated
from gemma2.parity.pack import PASSES, dumped, make_pack
from gemma2.parity.trace import About, TraceWriter, dtypes
from gemma2.research import watching
from gemma2.research.sites import chosen, listing

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = """example:
  gemma2 trace pocket --prompt "In the beginning" --sites 'blocks.*.hook_resid_post' -o trace.safetensors
  gemma2 trace pocket --prompt "In the beginning" --pack golden.json"""
USAGE = """gemma2 trace MODEL (--prompt TEXT | --file FILE | --ids IDS) (-o FILE | --pack FILE) [options]
       gemma2 trace --list"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "trace", __doc__, EXAMPLE)
    parser.usage = USAGE
    add_model(parser, nargs="?")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="the .safetensors file to write")
    parser.add_argument("--pack", metavar="FILE", type=Path, help="write FILE, a pack in JSON, instead; on the CPU")
    parser.add_argument(
        "--sites",
        action="append",
        metavar="GLOB",
        help="the sites to write, as 'blocks.*.hook_resid_*'; repeatable; default: all",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--list", action="store_true", help="print the table of sites and end; needs nothing else")
    add_text_options(parser, "required")
    add_loading_options(parser.add_argument_group("model"))
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.list:
        print_sites()
        return 0
    if args.model is None or (args.output is None and args.pack is None):
        raise ValueError(
            "MODEL and -o FILE are required, or --pack FILE in place of -o: gemma2 trace MODEL --prompt TEXT -o FILE "
            "(MODEL may be pocket)"
        )
    if args.output and args.pack:
        raise ValueError("-o writes a trace and --pack a pack: give one of them")
    given = read_text(args)
    if given is None:
        raise ValueError("say for which text: --prompt TEXT, --file FILE or --ids IDS")
    check_target(args.output or args.pack, force=args.force)
    if args.pack:
        return write_pack(args, given)
    gemma = load_model(args)
    ids = ids_for(given, gemma)
    patterns = args.sites or ["*"]
    about = About(f"gemma2 {version('gemma2')}", dtype_name(gemma.model.dtype), gemma.config, versions(gemma))
    trace = TraceWriter(args.output, about, ids, patterns, dtypes(gemma.model, patterns), args.force)
    tokens = torch.tensor([ids], device=gemma.model.device)
    held = f"{len(trace.sites)} sites of {len(ids)} tokens, {size(trace.bytes)}"
    print(f"{args.output}: {held}", flush=True)
    bar = tqdm(total=len(trace.sites), desc="sites", disable=None, leave=False, delay=1)  # shown from a second on

    def see(name: str, value: torch.Tensor) -> None:
        trace.add(name, value)
        bar.update()

    with torch.no_grad(), bar, trace, watching(gemma.model, see, trace.sites):
        gemma.model(tokens)
    return 0


def write_pack(args: argparse.Namespace, given: str | list[int]) -> int:
    if args.weights is not None or args.device not in (None, "cpu"):
        raise ValueError("a pack is of the plain model on the CPU: leave out --weights and --device")
    args.device = "cpu"
    gemma = load_model(args)
    ids = ids_for(given, gemma)
    patterns = args.sites or ["*"]
    named = chosen(gemma.config, patterns)
    dtype = dtype_name(gemma.model.dtype)
    kept = versions(gemma) | stated(gemma.config, len(ids), gemma.model.dtype)
    about = About(f"gemma2 {version('gemma2')}", dtype, gemma.config, kept)
    print(f"{args.pack}: {len(named)} sites of {len(ids)} tokens", flush=True)
    with tqdm(total=PASSES * len(named), desc="sites", disable=None, leave=False, delay=1) as bar:
        text = given if isinstance(given, str) else None
        pack = make_pack(gemma.model, ids, about, patterns, text, lambda name: bar.update())
    with replacing(args.pack, last=partial(check_target, args.pack, force=args.force)) as (unfinished,):
        unfinished.write_text(dumped(pack), encoding="utf-8")
    return 0


def print_sites() -> None:
    """The table of sites; docs/sites.md shows it."""
    rows = listing()
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for *cells, what in rows:
        print(*(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)), what, sep="  ")


def ids_for(given: str | list[int], gemma: Gemma) -> list[int]:
    """Raises ContextOverflow for more than the model's context."""
    ids = gemma.tokenizer.encode(given) if isinstance(given, str) else given
    context = gemma.config.max_position_embeddings
    if len(ids) > context:
        raise ContextOverflow(f"{len(ids):,} tokens exceed the model's context of {context:,}")
    return ids
