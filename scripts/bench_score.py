"""Time and memory of scoring one text, beside transformers on the same weights: each in a process of its own.

    python scripts/random_checkpoint.py 2b FOLDER
    python scripts/bench_score.py FOLDER --tokens 2048 --rounds 5

Memory is what a process has at most, above what it has with its weights loaded and touched. The peer's score is its
loss: `model(ids, labels=ids).loss`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss_memory import memory

OURS, FAST, PEER = "gemma2", "gemma2, fast=True", "transformers"


def scorer(name: str, model: str, dtype: str) -> Callable[[list[int]], float]:
    """What computes the mean nats of a token of some ids, behind the first one."""
    if name == PEER:
        import transformers

        peer: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager")

        def score(ids: list[int]) -> float:
            tokens = torch.tensor([ids])
            return float(peer(tokens, labels=tokens, use_cache=False).loss)

        return score
    import gemma2

    gemma = gemma2.load(model, dtype=dtype, device="cpu", fast=name == FAST)
    return lambda ids: -gemma.score(ids).total / (len(ids) - 1)


@torch.no_grad()
def measure(name: str, model: str, tokens: int, rounds: int, dtype: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = [2, *torch.randint(300, 4000, (tokens,), generator=generator).tolist()]
    score = scorer(name, model, dtype)
    score(ids[:16])  # which touches every weight
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins again
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        nats = score(ids)
        times.append(time.perf_counter() - started)
    return {"name": name, "nats": nats, "seconds": times, "memory": memory("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", choices=(OURS, FAST, PEER), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.model, args.tokens, args.rounds, args.dtype)))
        return
    found = []
    for name in (OURS, FAST, PEER):
        run = subprocess.run([sys.executable, *sys.argv, "--only", name], stdout=subprocess.PIPE, check=True)
        found.append(json.loads(run.stdout.splitlines()[-1]))
    peer = found[-1]
    print(f"{args.tokens:,} tokens, {args.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | nats per token | seconds, median | x transformers | memory above the weights | x transformers |")
    print("|---|---:|---:|---:|---:|---:|")
    for one in found:
        seconds, theirs = statistics.median(one["seconds"]), statistics.median(peer["seconds"])
        memory = one["memory"] / 1e6
        ratio = one["memory"] / peer["memory"]
        print(
            f"| {one['name']} | {one['nats']:.5f} | {seconds:.2f} | {seconds / theirs:.2f} | "
            f"{memory:,.0f} MB | {ratio:.3f} |"
        )


if __name__ == "__main__":
    main()
