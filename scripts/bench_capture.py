"""What capturing costs: the pocket model with it and without, beside TransformerLens and nnsight where they are.

All in one process, in turns: each round runs every case once, in an order of its own. A ratio is the median of the
rounds' own ratios to our plain pass.

python scripts/bench_capture.py --tokens 256 --rounds 31
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import gemma2
from gemma2.research import capture, watching
from gemma2.research.sites import chosen
from gemma2.twins import sharing

RESIDUAL = "blocks.*.hook_resid_post"
SCORES = ("blocks.*.attn.hook_scores_raw", "blocks.*.attn.hook_attn_scores", "blocks.*.attn.hook_pattern")
Run = Callable[[], object]


def captured(model: Any, tokens: Tensor, sites: Iterable[str] | str) -> Run:
    def run() -> object:
        with capture(model, sites) as seen:
            model(tokens)
        return seen

    return run


def looked_at(model: Any, tokens: Tensor) -> Run:
    """Every site's hook is called, and nothing is kept."""

    def run() -> None:
        with watching(model, lambda name, value: None):
            model(tokens)

    return run


def ours(gemma: gemma2.Gemma, tokens: Tensor) -> dict[str, Run]:
    model = gemma.model
    scores = list(chosen(gemma.config, SCORES))
    others = [name for name in chosen(gemma.config) if name not in scores]
    return {
        "gemma2, plain": lambda: model(tokens),
        "gemma2, plain again, after captures": lambda: model(tokens),
        "gemma2, residual streams": captured(model, tokens, RESIDUAL),
        "gemma2, all sites": captured(model, tokens, "*"),
        "gemma2, all sites, called but not kept": looked_at(model, tokens),
        "gemma2, scores and patterns alone": captured(model, tokens, scores),
        "gemma2, all sites but scores and patterns": captured(model, tokens, others),
    }


def lens(gemma: gemma2.Gemma, tokens: Tensor) -> dict[str, Run]:
    from hooked_transformer import hooked_transformer

    model = hooked_transformer(gemma, n_ctx=max(256, tokens.shape[1]))
    return {
        "TransformerLens, plain": lambda: model(tokens),
        "TransformerLens, residual streams": lambda: model.run_with_cache(
            tokens, names_filter=lambda name: name.endswith("hook_resid_post")
        ),
        "TransformerLens, all": lambda: model.run_with_cache(tokens),
    }


def sight(gemma: gemma2.Gemma, tokens: Tensor) -> dict[str, Run]:
    nnsight = importlib.import_module("nnsight")
    model = nnsight.NNsight(sharing(gemma.model))  # it wraps the `forward` of what it is given
    paths = [site.module for site in chosen(gemma.config).values()]

    def residual() -> object:
        with model.trace(tokens):
            found = nnsight.save([layer.output for layer in model.model.layers])
        return found

    def everything() -> object:
        with model.trace(tokens):
            found = nnsight.save([model.get(path).output for path in paths])
        return found

    return {"nnsight over gemma2, residual streams": residual, "nnsight over gemma2, all sites": everything}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, for a machine that does other work too")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
    gemma = gemma2.load(dtype="float32", device="cpu")
    tokens = torch.randint(4096, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    cases = ours(gemma, tokens)
    for package, make in (("transformer_lens", lens), ("nnsight", sight)):
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed")
        else:
            cases |= make(gemma, tokens)
    times: dict[str, list[float]] = {name: [] for name in cases}
    order = random.Random(0)
    for number in range(args.rounds + 3):
        for name in order.sample(list(cases), len(cases)):  # what ran before has to do with the memory that is at hand
            started = clock()
            found = cases[name]()
            took = clock() - started
            del found  # outside: what was kept is given back
            if number >= 3:  # the first rounds warm up
                times[name].append(took)
    plain = times["gemma2, plain"]
    about = f"{args.tokens} tokens, {args.rounds} rounds, {clock.__name__}, {torch.get_num_threads()} threads"
    print(f"pocket model, float32, {about}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}\n")
    print("| case | median | x plain |\n|---|---:|---:|")
    for name, each in times.items():
        ratio = statistics.median(a / b for a, b in zip(each, plain, strict=True))
        print(f"| {name} | {1e3 * statistics.median(each):.1f} ms | {ratio:.2f} |")


if __name__ == "__main__":
    main()
