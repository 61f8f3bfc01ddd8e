"""Options that commands share, and what they turn into. Everything is checked before weights are read."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma2.checkpoints.dtypes import dtype_name
from gemma2.checks import check_count
from gemma2.detokenizer import parse_stops
from gemma2.fast.forms import FORMS, check_form
from gemma2.gemma import MAX_NEW_TOKENS, Gemma, idle_options
from gemma2.load import load, parse_device, parse_dtype
from gemma2.research.ablation import SAMPLES
from gemma2.sampling import Sampling
from gemma2.stats import Stats
from gemma2_command import COMMANDS

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

MODEL = (
    "pocket (the model in this package), a hub name (owner/repo, owner/repo:FILE.gguf), a folder, or a .gguf, "
    ".safetensors or .ckpt file"
)
TOKENIZER = (
    "a tokenizer.model, a tokenizer.json, a folder or GGUF with a tokenizer, or a hub name; default: the one in or "
    "beside the weights"
)
ADAPTER = "a PEFT adapter (LoRA, DoRA, IA3): a folder, or a hub name (owner/repo); needs the package peft"
REVISION = "branch, tag or commit of a hub name; default: main"


def add_command(commands: Commands, name: str, about: str | None, more: str) -> argparse.ArgumentParser:
    """A command's parser. Its line in `gemma2 --help` is in COMMANDS; `about` and `more` are its own."""
    kind = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=COMMANDS[name], description=about, epilog=more, formatter_class=kind)


def add_options(parser: argparse.ArgumentParser, new_tokens: int = MAX_NEW_TOKENS) -> None:
    """Model, sampling and what every command has."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="MODEL", help=f"{MODEL}; default: pocket")
    add_loading_options(model)
    model.add_argument("--adapter", metavar="A", help=f"{ADAPTER}; default: none")
    add_placing_options(model)
    add_speed_options(model)
    add_sampling_options(parser, new_tokens)
    add_common_options(parser)


def add_model(parser: argparse.ArgumentParser, **options: Any) -> None:
    """The model as an argument, for commands that have no default for it."""
    parser.add_argument("model", metavar="MODEL", help=MODEL, **options)


def add_loading_options(group: argparse._ArgumentGroup) -> None:
    """How a model is loaded, whichever it is."""
    group.add_argument("--tokenizer", metavar="FILE", help=TOKENIZER)
    group.add_argument("--revision", metavar="R", help=REVISION)
    group.add_argument("--device", metavar="D", help="cuda, mps or cpu; default: the best present, in this order")
    group.add_argument(
        "--dtype",
        metavar="T",
        help="bfloat16, float32 or float64; default: the checkpoint's, bfloat16 for a GGUF not in F32",
    )
    group.add_argument(
        "--weights",
        metavar="W",
        help=f"hold the weights as {', '.join(FORMS)}, quantized as they are read; default: as floats",
    )
    group.add_argument("--force-float16", action="store_true", help="allow --dtype float16, in which values overflow")
    group.add_argument(
        "--mapped", action="store_true", help="leave safetensors weights in their file: loads at once, on the CPU alone"
    )
    group.add_argument("--allow-nonfinite", action="store_true", help="take weights with NaN or infinity in them")


def add_speed_options(group: argparse._ArgumentGroup) -> None:
    """For commands that write text: the faster twins unless they are not wanted."""
    speed = group.add_mutually_exclusive_group()
    speed.add_argument(
        "--reference", action="store_true", help="compute as the exact reference does; default: by the faster twins"
    )
    speed.add_argument(
        "--compile", action="store_true", help="compile the decode step first, for long texts (needs a C++ compiler)"
    )


def add_placing_options(group: argparse._ArgumentGroup) -> None:
    """Where the layers of a model go that does not fit on one device."""
    group.add_argument(
        "--device-map",
        metavar="M",
        help="auto spreads the layers over GPUs, memory and the disk (needs accelerate); also balanced, sequential",
    )
    group.add_argument(
        "--offload-folder", metavar="DIR", help="where layers on the disk go; default: a temporary folder"
    )


def add_sampling_options(parser: argparse.ArgumentParser, new_tokens: int) -> None:
    sampling = parser.add_argument_group("generation (greedy without --temperature)")
    sampling.add_argument(
        "-n",
        "--max-new-tokens",
        type=int,
        default=new_tokens,
        metavar="N",
        help=f"generate at most N tokens; default: {new_tokens}",
    )
    sampling.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="divide the logits by T and sample; 0 takes the likeliest token; 0 to 1e30, default: 0",
    )
    sampling.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="sample from the K likeliest tokens; 0 and -1 keep all; default: 0",
    )
    sampling.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that together have probability P; 0 (the likeliest) to 1, default: 1",
    )
    sampling.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="drop tokens less than P times as likely as the likeliest; 0 to 1, default: 0",
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="divide positive logits of tokens seen so far by R, multiply negative ones; 1e-30 to 1e30, default: 1",
    )
    sampling.add_argument(
        "--seed", type=int, metavar="S", help="the same S samples the same text again; -1 and the default: random"
    )
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable; default: none"
    )


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """What commands have that measure on a text and write a page and a picture."""
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, metavar="N", help=f"draws of the bootstrap; default: {SAMPLES:,}"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the bootstrap; default: 0")
    parser.add_argument("-o", "--output", metavar="HTML", type=Path, help="write a page; default: none")
    parser.add_argument("--png", metavar="PNG", type=Path, help="write a picture (needs matplotlib); default: none")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--force", action="store_true", help="replace the page and the picture if they are there")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verbose", action="store_true", help="print timings and memory on standard error")
    add_debug(parser)


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `Gemma.stream`. Raises ValueError for any that cannot be."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    chosen = {name: getattr(args, name) for name in names}
    Sampling(**chosen)
    check_count("max_new_tokens", args.max_new_tokens)
    if args.seed not in (None, -1):
        check_count("seed", args.seed)
    parse_stops(args.stop)
    return {**chosen, "max_new_tokens": args.max_new_tokens, "seed": args.seed, "stop": args.stop}


def load_model(args: argparse.Namespace) -> Gemma:
    parse_device(args.device)
    parse_dtype(args.dtype, args.force_float16)
    if args.weights is not None:
        check_form(args.weights)
    compile = getattr(args, "compile", False)  # trace and verify have neither
    fast = compile or not (getattr(args, "reference", True) or getattr(args, "device_map", None))
    started = time.perf_counter()
    gemma = load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        revision=args.revision,
        weights=args.weights,
        adapter=getattr(args, "adapter", None),  # trace and verify have none
        mapped=args.mapped,
        fast=fast,
        compile=compile,
        allow_nonfinite=args.allow_nonfinite,
        force_float16=args.force_float16,
        device_map=getattr(args, "device_map", None),
        offload_folder=getattr(args, "offload_folder", None),
    )
    if args.verbose:
        device, count = gemma.model.device, gemma.config.parameter_count
        seconds = time.perf_counter() - started
        print(
            f"load     {seconds:.2f} s, {count:,} parameters, {dtype_name(gemma.model.dtype)} on {device}",
            file=sys.stderr,
        )
        for note in gemma.notes:
            print(f"note     {note}", file=sys.stderr)
    if "temperature" in args:
        note_idle(args)
    return gemma


def note_idle(args: argparse.Namespace) -> None:
    """Say which sampling options have no effect, on standard error."""
    warnings.filterwarnings("ignore", message="no effect without a temperature")  # said here, by option
    idle = [f"--{name.replace('_', '-')}" for name in idle_options(vars(args))]
    if idle and Sampling(args.temperature).greedy:
        print(f"note: {', '.join(idle)}: no effect in greedy decoding; give --temperature to sample", file=sys.stderr)


def versions(gemma: Gemma) -> dict[str, str]:
    """What results depend on beside the model: they may differ by rounding with any of it."""
    device = gemma.model.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "gemma2": version("gemma2"),
        "torch": str(torch.__version__),
        "device": f"{device.type} ({kind})",
        "threads": str(torch.get_num_threads()),
    }


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
