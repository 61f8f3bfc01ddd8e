"""Options that commands share, and what they turn into. Everything is checked before weights are read."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from gemma2.checkpoints.dtypes import dtype_name
from gemma2.detokenizer import checked_stops
from gemma2.gemma import MAX_NEW_TOKENS, Gemma
from gemma2.generate import Stats
from gemma2.load import load, parse_device, parse_dtype
from gemma2.sampling import Sampling, checked_count

SOURCE = "hub name (owner/repo, or owner/repo:FILE.gguf), folder or file"


def add_options(parser: argparse.ArgumentParser, new_tokens: int = MAX_NEW_TOKENS) -> None:
    """Model, sampling and what every command has."""
    model = add_model_options(parser)
    model.add_argument("--model", metavar="M", help=f"{SOURCE}; default: the pocket model inside")
    add_sampling_options(parser, new_tokens)
    add_common_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """How a model is loaded. Which one is the caller's to ask for, as `--model` or as an argument called `model`."""
    model = parser.add_argument_group("model")
    model.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.model elsewhere than beside the weights")
    model.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub name")
    model.add_argument("--device", metavar="D", help="cuda, mps or cpu; default: the best present")
    model.add_argument("--dtype", metavar="T", help="bfloat16, float32 or float64; default: the checkpoint's own")
    model.add_argument("--force-float16", action="store_true", help="allow --dtype float16, which overflows")
    model.add_argument("--allow-nonfinite", action="store_true", help="take weights with NaN or infinity in them")
    return model


def add_sampling_options(parser: argparse.ArgumentParser, new_tokens: int) -> None:
    sampling = parser.add_argument_group("sampling (greedy without --temperature)")
    sampling.add_argument("-n", "--max-new-tokens", type=int, default=new_tokens, metavar="N", help=f"[{new_tokens}]")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps all")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P")
    sampling.add_argument("--min-p", type=float, default=0.0, metavar="P")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    sampling.add_argument("--seed", type=int, metavar="S")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verbose", action="store_true", help="timings and memory on standard error")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `Gemma.stream`. Raises ValueError for any that cannot be."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    chosen = {name: getattr(args, name) for name in names}
    Sampling(**chosen)
    checked_count("max_new_tokens", args.max_new_tokens)
    if args.seed is not None:
        checked_count("seed", args.seed)
    checked_stops(args.stop)
    return {**chosen, "max_new_tokens": args.max_new_tokens, "seed": args.seed, "stop": args.stop}


def load_model(args: argparse.Namespace) -> Gemma:
    parse_device(args.device)
    parse_dtype(args.dtype, args.force_float16)
    started = time.perf_counter()
    gemma = load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        revision=args.revision,
        allow_nonfinite=args.allow_nonfinite,
        force_float16=args.force_float16,
    )
    if args.verbose:
        weight = gemma.model.model.embed_tokens.weight
        count = gemma.config.parameter_count
        seconds = time.perf_counter() - started
        print(
            f"load     {seconds:.2f} s, {count:,} parameters, {dtype_name(weight.dtype)} on {weight.device}",
            file=sys.stderr,
        )
        for note in gemma.notes:
            print(f"note     {note}", file=sys.stderr)
    return gemma


def report(stats: Stats) -> None:
    """Timings and peak memory, on standard error."""
    rows = (
        ("prefill", stats.prompt_tokens, stats.prefill_seconds),
        ("decode", stats.decoded_tokens, stats.decode_seconds),
    )
    for name, tokens, seconds in rows:
        rate = f"{tokens / seconds:.1f} tokens/s" if tokens and seconds else "-"
        print(f"{name:8} {tokens} tokens in {seconds:.3f} s, {rate}", file=sys.stderr)
    print(f"ended    {', '.join(stats.finish_reasons)}", file=sys.stderr)
    try:
        import resource
    except ImportError:  # Windows has none
        return
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, kilobytes elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    device = f", {torch.cuda.max_memory_allocated() / 1e6:.0f} MB on the device" if torch.cuda.is_initialized() else ""
    print(f"memory   {peak / 1e6:.0f} MB peak{device}", file=sys.stderr)
