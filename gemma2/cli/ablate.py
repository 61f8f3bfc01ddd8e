"""Change the architecture of MODEL, one part at a time, and measure on a text
what that does: nats per token, KL from the unchanged model, top tokens; each
with a bootstrap interval, at a short and a long context. Also how near scores
and logits come to their caps. The weights stay as they are."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from gemma2.atomic import check_target
from gemma2.checkpoints.dtypes import dtype_name
from gemma2.checks import check_count
from gemma2.cli.options import (
    add_command,
    add_common_options,
    add_loading_options,
    add_model,
    add_report_options,
    load_model,
    versions,
)
from gemma2.cli.prompts import read_file
from gemma2.cli.show import table
from gemma2.config import Gemma2Config
from gemma2.gemma import Gemma
from gemma2.pictures.ablate import draw, in_page
from gemma2.pictures.ablate_words import POCKET, Report, few_windows, interval, near_rows, share, windows_of
from gemma2.pictures.drawing import check_drawing
from gemma2.pictures.page import write
from gemma2.research.ablation import Effect, measure, standard, work
from gemma2.research.saturation import saturation
from gemma2.strict_json import finite

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

TOKENS = 8192
HEAD = ("change", "nats per token", "more than unchanged", "x perplexity", "KL in nats", "other top token")
EXAMPLE = """example:
  gemma2 ablate pocket --text genesis.txt -o ablation.html --png ablation.png"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "ablate", __doc__, EXAMPLE)
    add_model(parser)
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="a text in UTF-8; required")
    parser.add_argument(
        "--context",
        metavar="N,...",
        help="tokens of a window, BOS included; up to three, as 64,1024; default: half the local window, and the "
        "model's context",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=TOKENS,
        metavar="N",
        help=f"use the first N tokens of the text; default: {TOKENS:,}",
    )
    parser.add_argument("--layers", action="store_true", help="also leave out each layer, one at a time")
    parser.add_argument("--heads", action="store_true", help="also silence each head, one at a time; takes long")
    add_report_options(parser)
    group = parser.add_argument_group("model")
    add_loading_options(group)
    group.add_argument("--fast", action="store_true", help="compute by the faster twins; default: the exact reference")
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    given = check_arguments(args)
    text = read_file(args.text, "--text")
    args.reference = not args.fast
    gemma = load_model(args)
    found = gemma.tokenizer.encode(text, bos=False)
    ids = found[: args.tokens]
    contexts = contexts_for(gemma.config, given, len(ids))
    switches = standard(gemma.config, layers=args.layers, heads=args.heads)
    bos, model = gemma.tokenizer.special["bos"], gemma.model
    total = work(ids, contexts, switches) + len(ids)
    bar = tqdm(total=total, desc="tokens", unit=" tokens", unit_scale=True, disable=None, leave=False, delay=1)
    effects: list[Effect] = []
    with bar:
        for context in contexts:
            effects += measure(
                model, ids, switches, context, bos, samples=args.samples, seed=args.seed, tick=bar.update
            )
        near = saturation(model, ids, contexts[-1], bos, tick=bar.update)
    part = (
        f"the first {len(ids):,} of {len(found):,} tokens"
        if len(ids) < len(found)
        else f"{len(ids):,} token{'s' * (len(ids) > 1)}"
    )
    report = Report(
        model=str(args.model),
        text=f"The text is {args.text.name}, {part}.",
        about=foot(args, gemma),
        switches=switches,
        effects=effects,
        near=near,
        pocket=args.model.partition(":")[0] == "pocket",
    )
    print_report(report, args.json)
    if args.output is not None:
        write(args.output, in_page(report), force=True)  # the target was checked before
    if args.png is not None:
        draw(report, args.png)
    return 0


def check_arguments(args: argparse.Namespace) -> list[int] | None:
    """The contexts that were given. Everything that can be refused before the model is loaded."""
    check_count("tokens", args.tokens, least=1)
    check_count("samples", args.samples, least=1)
    check_count("seed", args.seed)
    for path in (args.output, args.png):
        if path is not None:
            check_target(path, force=args.force)
    if args.output is not None and args.png is not None and args.output.resolve() == args.png.resolve():
        raise ValueError(f"-o and --png are the same file, {args.png}: give two names")
    if args.png is not None:
        check_drawing()
    if args.context is None:
        return None
    parts = args.context.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len(parts) > 3:
        raise ValueError(f"--context takes up to three numbers of tokens, as 64,1024, not {args.context!r}")
    return sorted({check_count("context", int(part), least=2) for part in parts})


def contexts_for(config: Gemma2Config, given: list[int] | None, tokens: int) -> list[int]:
    """Raises ValueError for contexts beyond the model's, or beyond a text of so many tokens; and for no text."""
    if not tokens:
        raise ValueError("the text has no tokens")
    most = min(config.max_position_embeddings, tokens + 1)
    if given is None:
        return sorted({max(2, min(config.sliding_window // 2, most)), most})
    if given[-1] > most:
        longest = f"the model's context is {config.max_position_embeddings:,}"
        raise ValueError(f"--context {given[-1]}: {longest} and the text has {tokens:,} tokens and a BOS")
    return given


def foot(args: argparse.Namespace, gemma: Gemma) -> str:
    """What the numbers depend on."""
    found = versions(gemma)
    weights = f", weights {args.weights}" if args.weights else ""
    fast = ", faster twins" if args.fast else ""
    return (
        f"gemma2 {found['gemma2']}, torch {found['torch']}, {dtype_name(gemma.model.dtype)}{weights}{fast} on "
        f"{found['device']}; intervals: 95 %, {args.samples:,} draws of whole windows, seed {args.seed}"
    )


def print_report(report: Report, as_json: bool) -> None:
    if as_json:
        print(json.dumps(in_json(report), indent=2, allow_nan=False))
        return
    print(report.text, report.about, sep="\n")
    for context in report.contexts:
        found = list(report.at(context).values())
        print(f"\ncontext {context:,}: {windows_of(found[0])}, {found[0].tokens:,} predicted tokens")
        warning = few_windows(found[0])
        if warning:
            print(warning)
        print(*table([HEAD, *map(row, found)]), sep="\n")
    print(f"\ncaps, at context {report.contexts[-1]:,}")
    print(*table(near_rows(report.near)), sep="\n")
    if report.pocket:
        print("", POCKET, sep="\n")


def row(effect: Effect) -> tuple[str, ...]:
    top = effect.top
    others = share(top.value) if top.low is None else f"{top.value:.1%} [{top.low:.1%}, {top.high:.1%}]"
    return (
        effect.name,
        interval(effect.nats),
        interval(effect.more, "+.3f"),
        f"{effect.ratio:.4g}",
        interval(effect.kl, ".3g"),
        others,
    )


def in_json(report: Report) -> dict[str, Any]:
    """What is printed, with the arguments of each change. What is not finite becomes null, since JSON has no such."""
    found = dataclasses.asdict(report)
    for effect, entry in zip(report.effects, found["effects"], strict=True):
        entry |= {"perplexity": effect.perplexity, "ratio": effect.ratio}
    plain: dict[str, Any] = finite(found)
    return plain
