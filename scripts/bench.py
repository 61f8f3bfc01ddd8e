"""Prefill, decode and load, beside transformers on the same weights in the same run.

    python scripts/bench.py [--shapes pocket 2b] [--layers N] [--prompt 512] [--new 32] [--rounds 3]

`2b` is random bfloat16 weights in the published shapes (5.2 GB on disk, in --folder); --layers takes fewer of them.
Every figure is the median over rounds; each system loads and runs in a process of its own, in turn, so that a
drifting machine affects both alike. The machine's own limits are measured in the same run: at best, a decode step reads
every weight once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import gemma2
from gemma2.checkpoints.folder import open_folder
from gemma2.checkpoints.hf_config import config_dict, configs, published_config, read_config
from gemma2.checkpoints.weights import build
from gemma2.generate import generate_ids
from gemma2.load import POCKET

SYSTEMS = ("gemma2", "transformers")
FIGURES = {"load": "load, s", "prefill": "prefill, tok/s", "decode": "decode, tok/s", "peak": "peak memory, GB"}


def make_2b(folder: Path, layers: int) -> Path:
    """A Hugging Face folder with random weights in 2B shapes; kept if it is already there."""
    target = folder / f"random-2b-{layers}-layers"
    if (target / "model.safetensors").is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    whole = published_config("gemma-2-2b")
    config = dataclasses.replace(whole, num_hidden_layers=layers, layer_types=whole.layer_types[:layers])
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in gemma2.Gemma2(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        for name, shape in tqdm(shapes.items(), desc="random weights", disable=None)
    }
    (target / "config.json").write_text(json.dumps({**config_dict(config), "dtype": "bfloat16"}), encoding="utf-8")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def run_gemma2(folder: Path, ids: list[int], new: int, device: str) -> dict[str, float]:
    started = time.perf_counter()
    config = read_config(folder / "config.json")
    model = build(open_folder(folder), config, torch.device(device), torch.bfloat16)
    load = time.perf_counter() - started
    for _ in generate_ids(model, [ids], 2):
        pass  # the first call touches every weight and sets up kernels
    stats = gemma2.Stats()
    for _ in generate_ids(model, [ids], new, stats=stats):
        pass
    return {
        "load": load,
        "prefill": stats.prompt_tokens / stats.prefill_seconds,
        "decode": stats.decoded_tokens / stats.decode_seconds,
    }


@torch.no_grad()
def run_transformers(folder: Path, ids: list[int], new: int, device: str) -> dict[str, float]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", device_map=None
    ).to(device)
    load = time.perf_counter() - started

    def greedy(prompt: list[int], steps: int) -> tuple[float, float]:
        tokens = torch.tensor([prompt], device=device)
        begin = time.perf_counter()
        out = model(tokens, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        int(token)
        middle = time.perf_counter()
        for _ in range(steps - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            int(token)
        return middle - begin, time.perf_counter() - middle

    greedy(ids, 2)
    prefill, decode = greedy(ids, new)
    return {"load": load, "prefill": len(ids) / prefill, "decode": (new - 1) / decode}


def child(system: str, folder: Path, prompt: int, new: int, device: str) -> None:
    ids = torch.randint(4, 4000, (prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    figures: dict[str, float] = {"peak": float("nan")}
    figures |= {"gemma2": run_gemma2, "transformers": run_transformers}[system](folder, ids, new, device)
    status = Path("/proc/self/status")  # ru_maxrss of a child starts at what its parent held when it forked
    if status.exists():
        figures["peak"] = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))[1]) * 1024 / 1e9  # type: ignore[index]
    print(json.dumps(figures))


def limits() -> dict[str, float]:
    """The machine's own: memory read in GB/s, bfloat16 matrix products in GFLOP/s (medians of 5)."""

    def median(function: Any) -> float:
        times = []
        for _ in range(6):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    big = torch.ones(256 * 2**20)  # 1 GB
    a, b = torch.ones(1024, 2304, dtype=torch.bfloat16), torch.ones(9216, 2304, dtype=torch.bfloat16)
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[0]
    return {"read": big.nbytes / median(big.sum) / 1e9, "gemm": flops / median(lambda: a @ b.T) / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=("pocket", "2b"))
    parser.add_argument("--layers", type=int, help="of the 2B shapes")
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--new", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gemma2-bench")
    parser.add_argument("--child", nargs=2, metavar=("SYSTEM", "FOLDER"), help=argparse.SUPPRESS)
    parser.set_defaults(**json.loads((configs() / "bench" / "generate.json").read_text(encoding="utf-8")))
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], Path(args.child[1]), args.prompt, args.new, args.device)

    machine = limits()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {args.device}, bfloat16, batch 1")
    print(f"limits: {machine['read']:.1f} GB/s memory read, {machine['gemm']:.0f} GFLOP/s bfloat16 matrix product")
    print(f"prompt {args.prompt}, new {args.new}, median of {args.rounds} rounds, systems in turn\n")
    print("| shapes | system | " + " | ".join(FIGURES.values()) + " |")
    print("|---|---|" + "---|" * len(FIGURES))
    bounds = []  # printed after the table, which they would cut in two
    for shape in args.shapes:
        folder = POCKET if shape == "pocket" else make_2b(args.folder, args.layers)
        found: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
        for _ in tqdm(range(args.rounds), desc=shape, disable=None, leave=False):
            for system in SYSTEMS:
                command = [sys.executable, __file__, "--child", system, str(folder), "--prompt", str(args.prompt)]
                command += ["--new", str(args.new), "--device", args.device]
                out = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
                if out.returncode:
                    sys.exit(f"{system} failed: {out.stderr.strip().splitlines()[-1]}")
                found[system].append(json.loads(out.stdout.splitlines()[-1]))
        middle = {s: {f: statistics.median(r[f] for r in rows) for f in FIGURES} for s, rows in found.items()}
        label = "pocket" if shape == "pocket" else f"2B, {args.layers} layers"
        for system in SYSTEMS:
            print(f"| {label} | {system} | " + " | ".join(f"{middle[system][f]:.3g}" for f in FIGURES) + " |")
        ratios = [middle["gemma2"][f] / middle["transformers"][f] for f in FIGURES]
        print(f"| {label} | ratio | " + " | ".join(f"{ratio:.2f} x" for ratio in ratios) + " |", flush=True)
        count = (folder / "model.safetensors").stat().st_size
        bound = machine["read"] * 1e9 / count
        bounds.append(f"limit of decode, {label}: all {count / 1e9:.3g} GB of weights once a token, {bound:.1f} tok/s")
    print("\n" + "\n".join(bounds))


if __name__ == "__main__":
    main()
