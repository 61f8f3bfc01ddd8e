"""Show the config, tensors, tokenizer and memory of a checkpoint, what its file
does not state, and every error in it. Weights are read only with --values.
Exit 0 if nothing is wrong, 1 if something is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gemma2.cli.options import REVISION, TOKENIZER, add_command, add_debug, add_model
from gemma2.cli.show import escaped, size, table
from gemma2.inspect import Inspection, inspect

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = "example:\n  gemma2 inspect pocket:pocket-q8_0.gguf --values"
WIDEST = 76  # characters of a stated value


def add(commands: Commands) -> None:
    parser = add_command(commands, "inspect", __doc__, EXAMPLE)
    add_model(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--values", action="store_true", help="read every weight and count those that are not finite")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--tokenizer", metavar="FILE", help=TOKENIZER)
    parser.add_argument("--revision", metavar="R", help=REVISION)
    add_debug(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    found = inspect(args.model, values=args.values, tokenizer=args.tokenizer, revision=args.revision)
    if args.json:
        print(json.dumps(found.to_dict(args.tensors), indent=2))
    else:
        for title, lines in sections(found, args.tensors):
            print(title, *(f"  {line}" for line in lines), "", sep="\n")
    return 1 if found.problems else 0


def sections(found: Inspection, tensors: bool) -> Iterable[tuple[str, Sequence[str]]]:
    """A title and its lines, in turn. Whatever comes from the file is escaped: it may hold what steers a terminal."""
    form = f"GGUF version {found.version}" if found.form == "gguf" else found.form
    bits = f", {8 * sum(t.bytes for t in found.tensors) / found.parameters:.2f} bits a weight" if found.tensors else ""
    known = f" ({found.model})" if found.model else ""
    yield (
        escaped(found.path),
        [
            f"{form}, architecture {escaped(found.architecture or 'not stated')}{known}, {size(found.bytes)}",
            f"{len(found.tensors):,} tensors, {found.parameters:,} parameters{bits}",
            {True: "tuned for chat", False: "not tuned for chat", None: "does not say whether it was tuned for chat"}[
                found.chat_tuned
            ],
        ],
    )
    yield "problems", [escaped(problem) for problem in found.problems] or [fine(found)]
    if found.filled:
        yield "not stated by the file, and decided", [escaped(line) for line in found.filled]
    if found.config:
        skipped = ("architectures", "model_type", "layer_types")
        pairs = [(name, str(value)) for name, value in found.config.items() if name not in skipped]
        pairs.append(("layer_types", layer_pattern(found.config["layer_types"])))
        yield "runs as", table(pairs, left=(0, 1))
    if found.metadata:
        stated = found.metadata.items()
        yield "states", table([(escaped(key), f"{kind} {shown(value)}") for key, (kind, value) in stated], left=(0, 1))
    if found.types:
        by_type = [("type", "tensors", "parameters", "bytes", "bits a weight")]
        for name, line in found.types.items():
            counts = f"{line['tensors']:,}", f"{line['parameters']:,}"
            by_type.append((name, *counts, size(line["bytes"]), f"{line['bits_per_weight']:g}"))
        yield "tensors by type", table(by_type)
    if tensors:
        listed = [("name", "shape", "type", "bytes")]
        listed += [(escaped(t.name), " x ".join(map(str, t.shape)), t.type, f"{t.bytes:,}") for t in found.tensors]
        yield "tensors", table(listed)
    if found.tokenizer:
        special = ", ".join(f"{name} {token}" for name, token in found.tokenizer["special"].items())
        ends = [f"a text ends at {', '.join(map(str, found.end_ids))}"] if found.end_ids else []
        yield "tokenizer", [f"{found.tokenizer['pieces']:,} pieces; {special}", *ends]
    if found.memory and found.config:
        rows = [("dtype", "weights", "cache", "together")]
        for name, need in found.memory.items():
            rows.append((name, size(need["weights"]), size(need["cache"]), size(need["weights"] + need["cache"])))
        yield f"memory to run one text of {found.config['max_position_embeddings']:,} tokens", table(rows)


def fine(found: Inspection) -> str:
    looked = "every value is finite" if found.values_checked else "values were not read; --values checks them"
    return f"none: header, names, shapes and tokenizer are those of a Gemma 2 ({looked})"


def layer_pattern(kinds: Sequence[str]) -> str:
    letters = "".join("L" if kind == "sliding_attention" else "G" for kind in kinds)
    alternating = letters == ("LG" * len(letters))[: len(letters)]
    return f"local and global in turn, {len(letters)} layers" if alternating else letters


def shown(value: Any) -> str:
    if isinstance(value, dict):  # an array, cut short
        first = ", ".join(shown(element) for element in value["first"])
        return f"[{value['length']:,}] {first}{', ...' if value['length'] > len(value['first']) else ''}"
    text = escaped(repr(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value))
    return text if len(text) <= WIDEST else f"{text[:WIDEST]}... ({len(text):,} characters)"
