"""gemma2 trace MODEL -o FILE: what the model computes at named places for one text, in a file to compare with. Any
system can write such files; docs/traces.md says how."""

from __future__ import annotations

import argparse
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from gemma2.atomic import check_target
from gemma2.checkpoints.dtypes import dtype_name
from gemma2.checkpoints.hf_config import read_json
from gemma2.cli.generate import read_prompt
from gemma2.cli.inspect import size
from gemma2.cli.options import SOURCE, add_common_options, add_model_options, load_model
from gemma2.errors import BadModelFile, ContextOverflow
from gemma2.gemma import Gemma
from gemma2.parity.trace import About, TraceWriter, dtypes
from gemma2.research.capture import watching
from gemma2.research.sites import listing

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

NUMBERS = re.compile(r"\s*-?\d+\s*(,\s*-?\d+\s*)*")


def add(commands: Commands) -> None:
    parser = commands.add_parser("trace", help="write what a model computes at named places", description=__doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{SOURCE}; pocket: the one inside")
    add_text_options(parser)
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="the trace to write, a .safetensors file")
    parser.add_argument("--sites", action="append", metavar="GLOB", help="as 'blocks.*.hook_resid_*'; repeatable [*]")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--list", action="store_true", help="print the table of sites, and do nothing else")
    add_model_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """The three ways to say for what; one of them."""
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", help="a text, encoded with a BOS; - reads it from standard input")
    text.add_argument("--ids", metavar="IDS", help="token ids as 2,17,5 or a JSON file with a list of them")
    text.add_argument("--file", metavar="FILE", type=Path, help="a text file in UTF-8, encoded with a BOS")


def run(args: argparse.Namespace) -> int:
    if args.list:
        print_sites()
        return 0
    if args.model is None or args.output is None:
        raise ValueError(
            "say which model and where to: gemma2 trace MODEL --prompt TEXT -o FILE (pocket: the one inside)"
        )
    given = read_text(args)
    check_target(args.output, force=args.force)
    gemma = load_model(args)
    ids = ids_for(given, gemma)
    patterns = args.sites or ["*"]
    about = About(f"gemma2 {version('gemma2')}", name_of(gemma), gemma.config, versions(gemma))
    trace = TraceWriter(args.output, about, ids, patterns, dtypes(gemma.model, patterns), args.force)
    tokens = torch.tensor([ids], device=gemma.model.model.embed_tokens.weight.device)
    held = f"{len(trace.sites)} sites of {len(ids)} tokens, {size(trace.bytes)}"
    print(f"{args.output}: {held}", flush=True)
    bar = tqdm(total=len(trace.sites), desc="sites", disable=None, leave=False, delay=1)  # shown from a second on

    def see(name: str, value: torch.Tensor) -> None:
        trace.add(name, value)
        bar.update()

    with torch.no_grad(), bar, trace, watching(gemma.model, see, trace.sites):
        gemma.model(tokens)
    return 0


def print_sites() -> None:
    """The table of sites; docs/sites.md shows it."""
    rows = listing()
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for *cells, words in rows:
        print(*(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)), words, sep="  ")


def read_text(args: argparse.Namespace) -> str | list[int]:
    """The text or the ids that were given, read but not yet held against a vocabulary.

    Raises:
        ValueError: none was given, or it is not UTF-8; BadModelFile for a file of ids that is none; OSError for a file
            that cannot be read.
    """
    if args.ids is not None:
        return read_ids(args.ids)
    if args.file is not None:
        try:
            return str(args.file.read_bytes().decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.file}: not valid UTF-8 at byte {error.start}") from None
        except OSError as error:
            raise type(error)(f"--file {args.file}: {error.strerror}") from None
    if args.prompt is None:
        raise ValueError("say for what: --prompt TEXT, --ids IDS or --file FILE")
    return read_prompt(args.prompt)


def read_ids(given: str) -> list[int]:
    if NUMBERS.fullmatch(given):
        return [int(number) for number in given.split(",")]
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"--ids {given!r}: neither ids as 2,17,5 nor a file with a JSON list of them")
    found = read_json(path)
    if not isinstance(found, list) or not all(type(number) is int for number in found):
        raise BadModelFile(f"{path}: must be a JSON list of token ids")
    if not found:
        raise ValueError(f"{path}: an empty list; give at least one id")
    return found


def ids_for(given: str | list[int], gemma: Gemma) -> list[int]:
    """Raises ContextOverflow for more than the model's context."""
    ids = gemma.tokenizer.encode(given) if isinstance(given, str) else given
    context = gemma.config.max_position_embeddings
    if len(ids) > context:
        raise ContextOverflow(f"{len(ids):,} tokens exceed the model's context of {context:,}")
    return ids


def name_of(gemma: Gemma) -> str:
    """The dtype, as in `--dtype`."""
    return dtype_name(gemma.model.model.embed_tokens.weight.dtype)


def versions(gemma: Gemma) -> dict[str, str]:
    """What results depend on beside the model: they may differ by rounding with any of it."""
    device = gemma.model.model.embed_tokens.weight.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "gemma2": version("gemma2"),
        "torch": str(torch.__version__),
        "device": f"{device.type} ({kind})",
        "threads": str(torch.get_num_threads()),
    }
