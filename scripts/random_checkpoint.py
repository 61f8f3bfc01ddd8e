"""Random weights in the published shapes, to measure speed and memory: a folder, and GGUF files of the same weights.

    python scripts/random_checkpoint.py --size 2b
    python scripts/random_checkpoint.py --size layers=6 --gguf BF16,Q8_0,Q4_K_M

The folder has config.json, model.safetensors in bfloat16 and tokenizer.model: the pocket model's, filled up with unused
pieces to the size of the vocabulary. gemma2 writes the GGUF types BF16, F16 and F32; llama.cpp's own quantizer makes
the others from the BF16 file (the extra llama-cpp). Everything is written one tensor at a time, and what is
already there is kept. The same --size and --seed always give the same weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import gemma2
from gemma2.atomic import check_space, naming_a_full_disk, replacing
from gemma2.checkpoints.hf_config import config_dict, published_config
from gemma2.checkpoints.safetensors import SINGLE, header_bytes
from gemma2.checkpoints.sentencepiece_proto import UNUSED, Vocabulary, read_proto, write_proto
from gemma2.checkpoints.weights import shapes_of
from gemma2.config import Gemma2Config
from gemma2.load import POCKET

SIZES = ("2b", "9b", "27b")
OURS = ("BF16", "F16", "F32")  # the types that gemma2 writes itself
TOKENIZER = "tokenizer.model"
STD = 0.02  # of every weight: norms near 0, which is a gain near 1, and logits of ordinary size


def parse_size(text: str) -> tuple[str, Gemma2Config]:
    """`2b`, `9b`, `27b`, or `layers=N`: the first N layers of the 2B. Returns a name for the folder, and the config."""
    if text in SIZES:
        config = published_config(f"gemma-2-{text}")
        return f"random-{text}-{config.num_hidden_layers}-layers", config
    whole = published_config("gemma-2-2b")
    word, _, number = text.partition("=")
    if word != "layers" or not number.isdecimal() or not 1 <= int(number) <= whole.num_hidden_layers:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: give {', '.join(SIZES)}, or layers=N with N from 1 to {whole.num_hidden_layers}"
        )
    n = int(number)
    return f"random-2b-{n}-layers", dataclasses.replace(whole, num_hidden_layers=n, layer_types=whole.layer_types[:n])


def parse_types(text: str) -> list[str]:
    return [name.strip().upper() for name in text.split(",") if name.strip()]


def random_tensors(config: Gemma2Config, seed: int) -> Iterator[Tensor]:
    """Every weight in bfloat16, in the order of `shapes_of`. Each is made when it is asked for."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for shape in shapes_of(config).values():
        yield torch.empty(shape, dtype=torch.bfloat16, device="cpu").normal_(std=STD, generator=generator)


def filled_tokenizer(rows: int) -> bytes:
    """The bytes of a tokenizer.model with so many pieces: the pocket model's, and unused ones after them. These are not
    called [PAD4096] and so on: readers of GGUF take pieces of that name for none."""
    found = read_proto((POCKET / TOKENIZER).read_bytes(), TOKENIZER)
    pieces = [*found.pieces, *(f"[ROW{i}]" for i in range(len(found.pieces), rows))]
    missing = rows - len(found.pieces)
    scores = np.append(found.scores, np.zeros(missing, np.float32))
    kinds = np.append(found.kinds, np.full(missing, UNUSED, np.int32))
    return write_proto(Vocabulary(pieces, scores, kinds, found.space_prefix))


def make_folder(target: Path, config: Gemma2Config, seed: int) -> None:
    """A Hugging Face folder with random weights; what is already there is kept."""
    target.mkdir(parents=True, exist_ok=True)
    if not (target / TOKENIZER).is_file():
        with replacing(target / TOKENIZER) as (unfinished,):
            unfinished.write_bytes(filled_tokenizer(config.vocab_size))
    if (target / SINGLE).is_file():
        return
    described = [(name, "BF16", shape, 2 * torch.Size(shape).numel()) for name, shape in shapes_of(config).items()]
    size = sum(entry[-1] for entry in described)
    check_space(target, size)
    (target / "config.json").write_text(json.dumps({**config_dict(config), "dtype": "bfloat16"}), encoding="utf-8")
    with (
        naming_a_full_disk(target),
        replacing(target / SINGLE) as (unfinished,),
        unfinished.open("wb") as file,
        tqdm(total=size, desc=target.name, unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        file.write(header_bytes(described, {"format": "pt"}))
        for tensor in random_tensors(config, seed):
            file.write(tensor.view(torch.uint8).numpy().data)
            bar.update(tensor.nbytes)


def make_gguf(folder: Path, kind: str) -> Path:
    """One GGUF file of the folder's weights, beside the folder; kept if it is already there."""
    target = folder.with_name(f"{folder.name}-{kind}.gguf")
    if target.is_file():
        return target
    if kind in OURS:
        gemma2.convert(folder, target, type=kind.lower())
    else:
        quantize(make_gguf(folder, "BF16"), target, kind)
    return target


def quantize(source: Path, target: Path, kind: str) -> None:
    """llama.cpp's own quantizer, on all cores. It reports to standard error."""
    library, number = quantizer(kind)
    options = library.llama_model_quantize_default_params()
    options.ftype, options.nthread = number, torch.get_num_threads()
    with naming_a_full_disk(target), replacing(target) as (unfinished,):
        code = library.llama_model_quantize(str(source).encode(), str(unfinished).encode(), options)
        if code:
            sys.exit(f"{source}: llama.cpp's quantizer ended with code {code}")


def quantizer(kind: str) -> tuple[Any, int]:
    """llama-cpp-python, and llama.cpp's number for a type. Exits with a line where either is missing."""
    try:
        import llama_cpp
    except ImportError:
        sys.exit(f"{kind} is made by llama.cpp's quantizer: pip install 'gemma2[llama-cpp]'")
    number = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}", None)
    if number is None:
        named = sorted(name.partition("MOSTLY_")[2] for name in dir(llama_cpp) if "FTYPE_MOSTLY_" in name)
        sys.exit(f"{kind} is not a type of llama.cpp; it has {', '.join(named)}")
    return llama_cpp, number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", required=True, type=parse_size, metavar="2b|9b|27b|layers=N")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "gemma2-bench",
        help="where to write; default: %(default)s",
    )
    parser.add_argument("--gguf", type=parse_types, default=[], metavar="TYPE,...", help="such as BF16,Q8_0,Q4_K_M")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for kind in args.gguf:
        if kind not in OURS:
            quantizer(kind)  # before anything is written
    name, config = args.size
    folder = args.folder / (name if args.seed == 0 else f"{name}-seed-{args.seed}")
    make_folder(folder, config, args.seed)
    print(folder)
    for kind in args.gguf:
        path = make_gguf(folder, kind)
        print(f"{path}  {path.stat().st_size / 1e9:.3g} GB", flush=True)


if __name__ == "__main__":
    main()
