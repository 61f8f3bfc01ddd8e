"""Measure MODEL's perplexity on a text, by the protocol that a published figure
followed: llama.cpp's (chunks of 512 tokens, the second half of each scored),
that of transformers' guide (windows that overlap), or whole documents."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from gemma2.checks import check_count
from gemma2.cli.documents import JSONL, read_documents
from gemma2.cli.options import (
    add_command,
    add_common_options,
    add_loading_options,
    add_model,
    add_speed_options,
    load_model,
    versions,
)
from gemma2.evaluate.perplexity import (
    DOCUMENTS,
    LLAMA_CPP,
    PROTOCOLS,
    Perplexity,
    check_protocol,
    ids_of,
    perplexity,
    work,
)

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

MOST = 2**31  # as a context, before the model is known
EXAMPLE = """examples:
  gemma2 perplexity gemma-2-2b-it-Q4_K_M.gguf --text wiki.test.raw
  gemma2 perplexity google/gemma-2-2b --text stories.jsonl --protocol documents"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "perplexity", __doc__, EXAMPLE)
    add_model(parser)
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help=f"{JSONL}; required")
    parser.add_argument("--protocol", choices=PROTOCOLS, default=LLAMA_CPP, help=f"default: {LLAMA_CPP}")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of a chunk or window, BOS included; default: 512 (llama.cpp), 1,024 (transformers), the model's "
        "context (documents)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from a window to the next; default: 512 or a shorter context (transformers), half the context "
        "(documents)",
    )
    parser.add_argument("--chunks", type=int, metavar="N", help="use the first N chunks, windows or documents")
    parser.add_argument("--batch", type=int, metavar="N", help="chunks at once; default: 2,048 tokens of them")
    parser.add_argument("--running", action="store_true", help="print the perplexity after each chunk, as llama.cpp")
    parser.add_argument("--json", action="store_true", help="print JSON")
    group = parser.add_argument_group("model")
    add_loading_options(group)
    add_speed_options(group)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_protocol(args.protocol, MOST, args.context, args.stride)
    for name in ("chunks", "batch"):
        if getattr(args, name) is not None:
            check_count(f"--{name}", getattr(args, name), least=1)
    documents = [text for text in read_documents(args.text, "--text") if isinstance(text, str)]
    if args.protocol != DOCUMENTS and args.text.suffix == ".jsonl":
        raise ValueError(f"{args.protocol}'s protocol takes one text, and {args.text} holds {len(documents)}")
    gemma = load_model(args)
    context, stride = check_protocol(args.protocol, gemma.config.max_position_embeddings, args.context, args.stride)
    tokens = sum(len(ids_of(gemma, text, args.protocol)) for text in documents[: args.chunks])
    total = work(tokens, args.protocol, context, stride, args.chunks)
    bar = tqdm(total=total, desc="tokens", unit=" tokens", unit_scale=True, disable=None, leave=False, delay=1)
    with bar:
        found = perplexity(
            gemma,
            documents,
            args.protocol,
            context=context,
            stride=stride,
            chunks=args.chunks,
            batch=args.batch,
            tick=bar.update,
        )
    if args.json:
        print(json.dumps(as_json(found) | {"model": str(args.model), "versions": versions(gemma)}, indent=2))
        return 0
    if args.running:
        print(",".join(f"[{number}]{value:.4f}" for number, value in enumerate(found.running, 1)))
    print(*lines(found), sep="\n")
    return 0


def as_json(found: Perplexity) -> dict[str, object]:
    plain = dict(vars(found))
    return {"perplexity": found.value, "plus_minus": found.plus_minus, "bits_per_byte": found.bits_per_byte, **plain}


def lines(found: Perplexity) -> list[str]:
    """What people read."""
    parts = {LLAMA_CPP: "chunks", DOCUMENTS: "texts in windows"}.get(found.protocol, "windows")
    length = f"{len(found.running):,} {parts} of at most {found.context:,} tokens"
    step = "" if found.stride is None else f", stride {found.stride:,}"
    error = "" if found.plus_minus is None else f" +/- {found.plus_minus:.5f}"
    shown = [
        f"protocol    {found.protocol}: {length}{step}, {found.tokens:,} tokens scored",
        f"perplexity  {found.value:.4f}{error}",
        f"nats        {found.nats:.6f} per token",
    ]
    return shown if found.bits_per_byte is None else [*shown, f"bits        {found.bits_per_byte:.6f} per byte"]
