"""Print how likely a model finds the text in FILE: nats per token, perplexity,
bits per byte. A text longer than the window is scored in windows that overlap;
each begins with the BOS, and each token is counted once."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from gemma2.checks import check_count
from gemma2.cli.documents import JSONL, Document, read_documents
from gemma2.cli.options import (
    MODEL,
    add_command,
    add_common_options,
    add_loading_options,
    add_speed_options,
    load_model,
)
from gemma2.cli.show import escaped, table
from gemma2.gemma import Gemma
from gemma2.pictures.page import readable
from gemma2.scoring import Score, check_windows

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = """examples:
  gemma2 score genesis.txt
  gemma2 score answers.jsonl --model google/gemma-2-2b --json
where answers.jsonl holds lines as
  {"context": "The capital of France is", "continuation": " Paris"}"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "score", __doc__, EXAMPLE)
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help=f'{JSONL}; a line {{"context": ..., "continuation": ...}} scores the continuation alone',
    )
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens the model reads at once; default and most: its context"
    )
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from a window to the next; default: half of it")
    parser.add_argument("--batch", type=int, metavar="N", help="windows at once; default: 2,048 tokens of them")
    show = parser.add_mutually_exclusive_group()
    show.add_argument("--tokens", action="store_true", help="print each token with its log-probability")
    show.add_argument("--json", action="store_true", help="print a line of JSON for each text, with all tokens")
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="MODEL", help=f"{MODEL}; default: pocket")
    add_loading_options(group)
    add_speed_options(group)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name, least in (("window", 2), ("stride", 1), ("batch", 1)):
        if getattr(args, name) is not None:
            check_count(f"--{name}", getattr(args, name), least=least)
    if args.window is not None:
        check_windows(args.window, args.stride)
    texts = read_documents(args.file, "FILE", pairs=True)
    gemma = load_model(args)
    with tqdm(desc="tokens", unit=" tokens", unit_scale=True, disable=None, leave=False, delay=1) as bar:
        scores = gemma.score(texts, window=args.window, stride=args.stride, batch=args.batch, tick=bar.update)
    if args.json:
        for score in scores:
            print(json.dumps(_as_json(score, gemma), ensure_ascii=False))
        return 0
    if args.tokens:
        for score in scores:
            print(*_tokens(score, gemma), "", sep="\n")
    print(*table(_rows(scores, texts)), sep="\n")
    return 0


def _rows(scores: Sequence[Score], texts: Sequence[Document]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("text", "tokens", "nats", "nats per token", "perplexity", "bits per byte", "greedy")]
    for score, text in zip(scores, texts, strict=True):
        begin = escaped(text if isinstance(text, str) else f"... {text[1]}")
        rows.append((f"{begin[:29]}..." if len(begin) > 32 else begin, *_figures([score])))
    return rows if len(scores) == 1 else [*rows, (f"all {len(scores):,}", *_figures(scores))]


def _figures(scores: Sequence[Score]) -> tuple[str, ...]:
    nats, tokens = -sum(one.total for one in scores), sum(len(one.ids) for one in scores)
    whole = Score(*(_joined(scores)), [id for one in scores for id in one.ids], sum(one.bytes for one in scores), 1)
    greedy = f"{sum(one.is_greedy for one in scores)} of {len(scores)}" if len(scores) > 1 else str(whole.is_greedy)
    cells = (f"{tokens:,}", f"{nats:.4f}", f"{nats / tokens:.6f}", f"{whole.perplexity:.6g}")
    return (*cells, f"{whole.bits_per_byte:.6f}", greedy.lower())


def _joined(scores: Sequence[Score]) -> tuple[Tensor, Tensor]:
    return torch.cat([one.logprobs for one in scores]), torch.cat([one.greedy for one in scores])


def _tokens(score: Score, gemma: Gemma) -> list[str]:
    rows = [("token", "id", "log-probability", "likeliest")]
    for id, logprob, greedy in zip(score.ids, score.logprobs.tolist(), score.greedy.tolist(), strict=True):
        rows.append((readable(gemma.tokenizer, id), str(id), f"{logprob:.6f}", "yes" if greedy else ""))
    return table(rows)


def _as_json(score: Score, gemma: Gemma) -> dict[str, Any]:
    return {
        "total": score.total,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "is_greedy": score.is_greedy,
        "bytes": score.bytes,
        "windows": score.windows,
        "ids": score.ids,
        "pieces": [gemma.tokenizer.decode([id]) for id in score.ids],
        "logprobs": score.logprobs.tolist(),
        "greedy": score.greedy.tolist(),
    }
