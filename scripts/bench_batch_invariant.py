"""What `numerics="batch-invariant"` costs: some layers of a size with random weights, with it and without, in turns.

python scripts/bench_batch_invariant.py --layers 4 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gemma2.cache import HybridCache
from gemma2.checkpoints.hf_config import read_config
from gemma2.config import Gemma2Config
from gemma2.load import parse_dtype
from gemma2.model import Gemma2
from gemma2.numerics import with_numerics

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SOME = 1009 * 521  # random numbers, which repeat: weights are made in little time
IDS = 4096  # of the model whose layers are measured; its head is measured apart
clock = time.perf_counter

CASES = {  # tokens in the cache, rows, tokens computed
    "prefill 512": (0, 1, 512),
    "decode at 128": (128, 1, 1),
    "decode at 1024": (1024, 1, 1),
    "decode at 128, 8 rows": (128, 8, 1),
}


def published(size: str) -> Gemma2Config:
    return read_config(json.loads((CONFIGS / f"gemma-2-{size}.json").read_text(encoding="utf-8")))


def made(size: str, layers: int, dtype: torch.dtype, vocabulary: int) -> Gemma2:
    config = published(size)
    config = replace(config, num_hidden_layers=layers, layer_types=config.layer_types[:layers], vocab_size=vocabulary)
    with torch.device("meta"):
        model = Gemma2(config)
    some = torch.randn(SOME, generator=torch.Generator().manual_seed(0))
    state = {}
    for name, parameter in model.named_parameters():
        std = 0.1 if "norm" in name else parameter.shape[-1] ** -0.5
        count = parameter.numel()
        state[name] = (some * std).to(dtype).repeat(-(-count // SOME))[:count].view(parameter.shape)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb.to("cpu")
    return model.eval()


@torch.no_grad()
def step(model: Gemma2, held: int, rows: int, count: int) -> Callable[[], float]:
    """Seconds that the layers take for so many tokens of each row."""
    tokens = torch.arange(rows * (held + count)).view(rows, -1) % model.config.vocab_size
    cache = HybridCache(model.config, rows, held + count)
    if held:
        model.model(tokens[:, :held], None, cache)

    @torch.no_grad()
    def run() -> float:
        if cache.length > held:
            cache.rollback(held)
        started = clock()
        model.model(tokens[:, held:], None, cache)
        return clock() - started

    return run


@torch.no_grad()
def head(model: Gemma2, x: Tensor) -> float:
    started = clock()
    model.softcap(model.lm_head(x, model.model.embed_tokens))
    return clock() - started


def compared(name: str, plain: Callable[[], float], exact: Callable[[], float], rounds: int) -> None:
    plain(), exact()
    times = [(plain(), exact()) for _ in range(rounds)]
    first, second = (statistics.median(each) for each in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(f"| {name} | {1e3 * first:.1f} ms | {1e3 * second:.1f} ms | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="2b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    if args.cpu_time:
        global clock
        clock = time.process_time
        torch.set_num_threads(1)
    dtype = parse_dtype(args.dtype)
    assert dtype is not None
    model = made(args.size, args.layers, dtype, IDS)
    exact = with_numerics(model, "batch-invariant")
    about = f"{args.size}, {args.layers} layers, {args.dtype}, {torch.get_num_threads()} threads, {clock.__name__}"
    print(f"{about}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    print("| case | default | batch-invariant | ratio |\n|---|---|---|---|")
    for name, case in CASES.items():
        compared(name, step(model, *case), step(exact, *case), args.rounds)
    model = made(args.size, 1, dtype, published(args.size).vocab_size)
    exact = with_numerics(model, "batch-invariant")
    x = torch.randn(1, 1, model.config.hidden_size).to(dtype)
    compared("head, one row", lambda: head(model, x), lambda: head(exact, x), args.rounds)


if __name__ == "__main__":
    main()
