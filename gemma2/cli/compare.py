"""Compare the predictions of models on a text, token by token: KL from A, top
tokens, perplexities, and the passages that differ most. With several B it is a
table, as of all types of one model: size, bits a weight, KL, perplexity, speed.
The models have one vocabulary. They are in memory one after the other, with
--atlas two at a time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from gemma2.atomic import check_target
from gemma2.checkpoints.checkpoint import Checkpoint, NamedTokenizer, named_tokenizer, open_checkpoint
from gemma2.checkpoints.dtypes import PLAIN, dtype_name
from gemma2.checks import check_count
from gemma2.cli.options import (
    MODEL,
    add_command,
    add_common_options,
    add_loading_options,
    add_report_options,
    load_model,
    versions,
)
from gemma2.cli.prompts import read_file
from gemma2.cli.show import escaped, table
from gemma2.evaluate.atlas import LIMIT, atlas, check_plain, passes
from gemma2.evaluate.compare import check_comparable, compare
from gemma2.evaluate.compare_report import Measured, chart, groups, in_json, points, ranked, tables, told
from gemma2.evaluate.costs import Stored, speed, stored, total
from gemma2.evaluate.states import Cut, Recorded, cut_text
from gemma2.fast.forms import check_form
from gemma2.gemma import Gemma
from gemma2.load import locate, locate_tokenizer, parse_device, parse_dtype
from gemma2.pictures.ablate_words import FEWEST
from gemma2.pictures.compare import Report, draw, in_page
from gemma2.pictures.drawing import check_drawing
from gemma2.pictures.page import write

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

TOKENS = 8192
EXAMPLE = """example:
  gemma2 compare google/gemma-2-2b gemma-2-2b-Q4_K_M.gguf gemma-2-2b-Q8_0.gguf --text FILE -o compare.html"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "compare", __doc__, EXAMPLE)
    parser.add_argument("model", metavar="A", help=f"the model that the others are compared with: {MODEL}")
    parser.add_argument("others", metavar="B", nargs="+", help="the models to compare with A")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="a text in UTF-8; required")
    parser.add_argument(
        "--limit",
        type=int,
        default=TOKENS,
        metavar="N",
        help=f"use the first N tokens of the text; default: {TOKENS:,}",
    )
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens that a model reads at once; default: the models' least context"
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens that each next window scores; default: half of the window"
    )
    parser.add_argument("--passages", type=int, default=3, metavar="N", help="worst passages to show; default: 3")
    parser.add_argument(
        "--atlas", action="store_true", help="also find what each quantized matrix, layer and site costs; takes long"
    )
    parser.add_argument(
        "--atlas-limit", type=int, default=LIMIT, metavar="N", help=f"tokens of the text for that; default: {LIMIT:,}"
    )
    parser.add_argument("--no-speed", action="store_true", help="do not time the models")
    add_report_options(parser)
    group = parser.add_argument_group(
        "models",
        "for all models, but --revision is for A alone, and --weights for each B alone (packed leaves a GGUF of floats "
        "as it is). Without --dtype all of them compute in float32, so that only their weights differ.",
    )
    add_loading_options(group)
    group.add_argument("--fast", action="store_true", help="compute by the faster twins; default: the exact reference")
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_arguments(args)
    text = read_file(args.text, "--text")
    sources, names = [args.model, *args.others], labels([args.model, *args.others])
    opened, cut, tokens = open_all(args, sources, names, text)
    found = [
        Measured(name, source, total(stored(one.weights)))
        for name, source, one in zip(names, sources, opened, strict=True)
    ]
    a, others = found[0], found[1:]
    first = load_one(args, a.source, revision=args.revision)
    if args.atlas:
        check_plain(first.model)
    time_one(args, first, a, cut)
    about = foot(args, first)
    bar = tqdm(total=cut.work * len(found), desc="tokens", unit_scale=True, disable=None, leave=False, delay=1)
    with bar, Recorded(first, cut, tick=bar.update) as recorded:
        kept = first if args.atlas else None
        del first  # so that the next has room
        for one, checkpoint in zip(others, opened[1:], strict=True):
            gemma = load_one(args, one.source, weights=form_for(args.weights, checkpoint))
            tensors = as_held(gemma, stored(checkpoint.weights), args.weights)
            one.stored = total(tensors)
            time_one(args, gemma, one, cut)
            compared = compare(recorded, gemma, tick=bar.update)
            one.summary = compared.summary(args.samples, args.seed)
            one.passages = compared.worst(args.passages)
            if kept is not None:
                count = passes(gemma.config.num_hidden_layers)
                with tqdm(total=count, desc=f"atlas of {one.name}", disable=None, leave=False, delay=1) as steps:
                    one.atlas = atlas(kept, gemma, cut.ids, tensors, limit=args.atlas_limit, tick=steps.update)
            del gemma
    config, tokenizer = opened[0].config, opened[0].tokenizer
    report = Report(
        title=f"{', '.join(names[1:]) if len(others) < 4 else f'{len(others)} models'} beside {a.name}",
        text=said_of_text(args, cut, tokens),
        about=about,
        tables=tables(a, others),
        points=points(others),
        passages=[(one.name, [told(passage, tokenizer) for passage in one.passages]) for one in others],
        charts=[chart(one, one.atlas, a.name, config.num_hidden_layers) for one in others if one.atlas is not None],
    )
    if args.json:
        print(
            json.dumps(
                {"text": report.text, "about": about, **in_json(a, others, tokenizer)}, indent=2, allow_nan=False
            )
        )
    else:
        print_report(report, others)
    if args.output is not None:
        write(args.output, in_page(report), force=True)  # the target was checked before
    if args.png is not None:
        draw(report, args.png)
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raises for everything that can be refused before a file of weights is looked at."""
    for name, least in (("limit", 1), ("atlas_limit", 1), ("samples", 1), ("passages", 0), ("seed", 0)):
        check_count(name, getattr(args, name), least=least)
    for path in (args.output, args.png):
        if path is not None:
            check_target(path, force=args.force)
    if args.output is not None and args.png is not None and args.output.resolve() == args.png.resolve():
        raise ValueError(f"-o and --png are the same file, {args.png}: give two names")
    if args.png is not None:
        check_drawing()
    if args.atlas and args.fast:
        raise ValueError(
            "--atlas puts other matrices into A, and faster twins may hold copies of them: leave --fast out"
        )


def open_all(
    args: argparse.Namespace, sources: Sequence[str], names: Sequence[str], text: str
) -> tuple[list[Checkpoint], Cut, int]:
    """Every checkpoint, none of whose weights is read yet, the text in windows, and how many tokens it has in all.

    Raises:
        BadModelFile: a file that is no Gemma 2; ValueError: models that cannot be compared, or not in this form.
    """
    given = named_tokenizer(locate_tokenizer(args.tokenizer))
    opened = [open_one(source, args.revision if i == 0 else None, given) for i, source in enumerate(sources)]
    a = opened[0]
    for name, b in zip(names[1:], opened[1:], strict=True):
        check_comparable(a.tokenizer, b.tokenizer, (a.config.vocab_size, b.config.vocab_size), (names[0], name))
    args.dtype = args.dtype or "float32"
    device, dtype = parse_device(args.device), parse_dtype(args.dtype, args.force_float16)
    for b in opened[1:]:
        form = form_for(args.weights, b)
        if form is not None:
            check_form(form)(b, device, dtype or b.weights.dtype)
    ids = a.tokenizer.encode(text, bos=False)
    configs = [one.config for one in opened]
    return (
        opened,
        cut_text(ids, a.tokenizer, configs, window=args.window, stride=args.stride, limit=args.limit),
        len(ids),
    )


def open_one(source: str, revision: str | None, given: NamedTokenizer | None) -> Checkpoint:
    return open_checkpoint(locate(source, revision, tokenizer_given=given is not None), given)


def load_one(args: argparse.Namespace, source: str, revision: str | None = None, weights: str | None = None) -> Gemma:
    own = {"model": source, "revision": revision, "weights": weights, "reference": not args.fast}
    return load_model(argparse.Namespace(**vars(args) | own))


def form_for(weights: str | None, checkpoint: Checkpoint) -> str | None:
    """The form for the weights of a B. A GGUF of floats has no blocks to keep: with "packed" its floats stay floats."""
    stored = checkpoint.weights
    types = {stored.stored(name) for name, (shape, _) in stored.tensors.items() if len(shape) > 1}
    return None if weights == "packed" and checkpoint.form == "gguf" and types <= PLAIN.keys() else weights


def as_held(gemma: Gemma, tensors: dict[str, Stored], form: str | None) -> dict[str, Stored]:
    """The tensors as this model holds them, where its form is another than that of the file."""
    held = dict(tensors)
    for path, module in gemma.model.named_modules():
        size, name = getattr(module, "held_bytes", None), f"{path}.weight"
        if form not in (None, "packed") and size is not None and name in held:
            held[name] = Stored(str(form), size, held[name].weights)
    return held


def time_one(args: argparse.Namespace, gemma: Gemma, one: Measured, cut: Cut) -> None:
    if not args.no_speed:
        one.speed = speed(gemma, [cut.bos, *cut.ids])


def labels(sources: Sequence[str]) -> list[str]:
    """Short names: of a path what it ends with, where no other model is called so."""
    files = [Path(source.rpartition(":")[2]) for source in sources]  # owner/repo:FILE
    short = [file.stem if file.suffix == ".gguf" else file.name for file in files]
    names = [name if short.count(name) == 1 else source for name, source in zip(short, sources, strict=True)]
    return [name if name not in names[:i] else f"{name} ({i})" for i, name in enumerate(names)]


def said_of_text(args: argparse.Namespace, cut: Cut, tokens: int) -> str:
    part = (
        f"the first {len(cut.ids):,} of {tokens:,} tokens"
        if len(cut.ids) < tokens
        else f"{tokens:,} token{'s' * (tokens != 1)}"
    )
    count, stride = len(cut.rows), max(cut.scored[1:], default=0)
    apart = "side by side" if stride == cut.longest else f"of which each after the first scores its last {stride:,}"
    how = "one window" if count == 1 else f"{count:,} windows of {cut.longest:,} tokens, {apart}"
    few = " Windows are few, so intervals say little: give a longer text." if 1 < count < FEWEST else ""
    return f"The text is {args.text.name}, {part}, in {how}.{few}"


def foot(args: argparse.Namespace, gemma: Gemma) -> str:
    """What the numbers depend on."""
    found = versions(gemma)
    weights = f", B's weights {args.weights}" if args.weights else ""
    fast = ", faster twins" if args.fast else ""
    return (
        f"gemma2 {found['gemma2']}, torch {found['torch']}, {dtype_name(gemma.model.dtype)}{weights}{fast} on "
        f"{found['device']}, {found['threads']} threads; intervals: 95 %, {args.samples:,} draws of whole windows, "
        f"seed {args.seed}"
    )


def print_report(report: Report, others: Sequence[Measured]) -> None:
    print(report.text, report.about, sep="\n")
    for one in report.tables:
        print(f"\n{one.title}", *table([one.head, *one.lines]), sep="\n")
    charts = iter(report.charts)
    for (name, passages), measured in zip(report.passages, others, strict=True):
        if measured.atlas is not None:
            print(f"\nAtlas of {name}", next(charts).text, *table(groups(measured.atlas)), sep="\n")
            print("\nworth more bits", *table(ranked(measured.atlas), left=(0, 1)), sep="\n")
        if passages:
            print(f"\nWhere {name} differs most")
        for passage in passages:
            text = escaped("".join(piece for piece, _ in passage.tokens))
            print(passage.about, f"  {text}", f"  {escaped(passage.said)}", sep="\n")
