"""Show what MODEL would say after each of its layers, for every token of a text:
a page of layers by positions with the likeliest token in each cell, and a PNG."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from gemma2.cli.options import add_command, add_common_options, add_loading_options, add_model, load_model
from gemma2.cli.pictures import add_picture_options, foot, given_text, ids_of, report, targets
from gemma2.cli.prompts import add_text_options
from gemma2.pictures.lens import draw_lens, lens_page
from gemma2.pictures.page import write
from gemma2.research.fitted import open_lens
from gemma2.research.lens import STREAM, lens_table, sites_of_width

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = """example:
  gemma2 lens pocket --prompt "And God said, Let there be light" -o lens.html"""
EMBEDDING = "hook_embed"


def add(commands: Commands) -> None:
    parser = add_command(commands, "lens", __doc__, EXAMPLE)
    parser.usage = "gemma2 lens MODEL (--prompt TEXT | --file FILE | --ids IDS) [-o FILE] [options]"
    add_model(parser)
    add_picture_options(parser, "lens")
    parser.add_argument(
        "--sites",
        action="append",
        metavar="GLOB",
        help="what to read, as 'blocks.*.hook_resid_*'; repeatable; default: the embedding and every layer's output",
    )
    parser.add_argument(
        "--fitted",
        metavar="FILE",
        type=Path,
        help="a Jacobian or tuned lens, as gemma2.research saves it; default: the logit lens",
    )
    add_text_options(parser, "required")
    add_loading_options(parser.add_argument_group("model"))
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    page, png = targets(args)
    given = given_text(args)
    fitted = None if args.fitted is None else open_lens(args.fitted)
    gemma = load_model(args)
    ids = ids_of(given, gemma)
    sites = args.sites or ([EMBEDDING, STREAM] if fitted is None else list(fitted.weights))
    tokens = torch.tensor([ids], device=gemma.model.device)
    names = sites_of_width(gemma.model, sites)
    bar = tqdm(total=len(names), desc="sites", disable=None, leave=False, delay=1)
    with bar:
        table = lens_table(
            gemma,
            tokens,
            names,
            positions=slice(max(0, len(ids) - args.last), None),
            fitted=fitted,
            progress=lambda name: bar.update(),
        )
    kind = "logit" if fitted is None else fitted.kind
    title = f"{'Jacobian' if kind == 'jacobian' else kind.capitalize()} lens of {Path(args.model).name}"
    text = lens_page(table, ids, gemma.config, gemma.tokenizer, title=title, lens=kind, foot=foot(args, gemma))
    write(page, text, force=args.force)
    if png is not None:
        draw_lens(table, ids, gemma.config, gemma.tokenizer, png, force=args.force)
    report(ids, args.last, page, png)
    return 0
