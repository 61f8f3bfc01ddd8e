"""gemma2 inspect FILE|FOLDER: what a checkpoint is, states and leaves out, and everything that is wrong with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gemma2.inspect import Inspection, inspect

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

WIDEST = 76  # characters of a stated value


def add(commands: Commands) -> None:
    parser = commands.add_parser("inspect", help="say what a checkpoint is, and if it is whole", description=__doc__)
    parser.add_argument("source", help="a .gguf, .safetensors or .ckpt file, a folder, or a hub name")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--values", action="store_true", help="read every weight and count those that are not finite")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.model elsewhere than in or beside the weights")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub name")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    found = inspect(args.source, values=args.values, tokenizer=args.tokenizer, revision=args.revision)
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
        yield "runs as", table(pairs, words=(0, 1))
    if found.metadata:
        stated = found.metadata.items()
        yield "states", table([(escaped(key), f"{kind} {shown(value)}") for key, (kind, value) in stated], words=(0, 1))
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
        yield "tokenizer", [f"{found.tokenizer['pieces']:,} pieces; {special}"]
    if found.memory and found.config:
        rows = [("dtype", "weights", "cache", "together")]
        for name, need in found.memory.items():
            rows.append((name, size(need["weights"]), size(need["cache"]), size(need["weights"] + need["cache"])))
        yield f"memory to run one text of {found.config['max_position_embeddings']:,} tokens", table(rows)


def fine(found: Inspection) -> str:
    looked = "every value is finite" if found.values_checked else "values were not read; --values checks them"
    return f"none: header, names, shapes and tokenizer are those of a Gemma 2 ({looked})"


def table(rows: Sequence[Sequence[str]], words: Collection[int] = (0,)) -> list[str]:
    """Columns under each other: those that hold words from the left, numbers from the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sides = ["<" if i in words else ">" for i in range(len(widths))]
    lines = (zip(row, sides, widths, strict=True) for row in rows)
    return ["  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip() for cells in lines]


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


def escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
