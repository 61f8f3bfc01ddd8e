"""Show where every head of MODEL looks in a text, how far back its local and
global layers look, and how near scores come to their cap: a page of heads by
layers, and a PNG."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gemma2.cli.options import add_command, add_common_options, add_loading_options, add_model, load_model
from gemma2.cli.pictures import add_picture_options, foot, given_text, ids_of, report, targets
from gemma2.cli.prompts import add_text_options
from gemma2.cli.show import table
from gemma2.pictures.attention import attention_page, draw_attention, shown_maps
from gemma2.pictures.page import write
from gemma2.research.attention import attention_maps, attention_stats

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = """example:
  gemma2 attention pocket --prompt "And God said, Let there be light" -o attention.html"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "attention", __doc__, EXAMPLE)
    parser.usage = "gemma2 attention MODEL (--prompt TEXT | --file FILE | --ids IDS) [-o FILE] [options]"
    add_model(parser)
    add_picture_options(parser, "attention")
    parser.add_argument(
        "--beyond",
        type=int,
        metavar="K",
        help="count attention to keys more than K tokens back; default: half of the window",
    )
    add_text_options(parser, "required")
    add_loading_options(parser.add_argument_group("model"))
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    page, png = targets(args)
    given = given_text(args)
    gemma = load_model(args)
    ids = ids_of(given, gemma, least=2)
    tokens = torch.tensor([ids], device=gemma.model.device)
    stats = attention_stats(gemma, tokens, beyond=args.beyond)
    queries = slice(max(0, len(ids) - args.last), None)
    maps = shown_maps(attention_maps(gemma, tokens, queries=queries), len(ids))
    title = f"Attention of {Path(args.model).name}"
    text = attention_page(maps, stats, ids, gemma.config, gemma.tokenizer, title=title, foot=foot(args, gemma))
    write(page, text, force=args.force)
    if png is not None:
        draw_attention(maps, stats, len(ids), png, force=args.force)
    for line in table(stats.rows(), left=(0, 1)):
        print(line)
    report(ids, args.last, page, png)
    return 0
