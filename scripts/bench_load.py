"""Loading a quantized GGUF into bfloat16, beside gguf-py and transformers on the same file in the same run.

    python scripts/bench_load.py [--type Q4_K_M] [--layers 26] [--rounds 3] [--systems gemma2 gguf-py transformers]

The file has the shapes of Gemma 2 2B, 256,000 pieces and random blocks (1.7 GB for Q4_K_M, in --folder), and is in
the page cache. Each system loads it in a process of its own, in turn, and is judged by seconds from the path to all
weights in bfloat16, and by its peak memory over what its imports take. For comparison, a plain copy on all cores reads
as many bytes as the file has and writes as many as the final weights have; it is timed once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import gemma2
from gemma2.checkpoints.ggml import GGMLType
from gemma2.checkpoints.gguf import Value
from gemma2.checkpoints.gguf_tokenizer_write import tokenizer_metadata
from gemma2.checkpoints.gguf_weights import llama_cpp_name
from gemma2.checkpoints.gguf_write import BLOCKS, FILE_TYPES, architecture_metadata, header_bytes, padding
from gemma2.checkpoints.hf_config import configs, published_config
from gemma2.checkpoints.weights import shapes_of
from gemma2.load import POCKET

SYSTEMS = ("gemma2", "gguf-py", "transformers")
# Where float16 scales lie in a block: they get small finite values, all other bytes are random.
SCALES = {"Q4_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,)}


def type_of(name: str, layer: int, layers: int, mix: str) -> str:
    """llama.cpp's choice for a tensor (llama-quant.cpp); Q4_K_M keeps the head and some of the rest in Q6_K."""
    if name.endswith("norm.weight"):
        return "F32"
    if mix != "Q4_K_M":
        return mix
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    return "Q6_K" if "embed" in name or (more and ("v_proj" in name or "down_proj" in name)) else "Q4_K"


def make_file(folder: Path, mix: str, layers: int) -> Path:
    """A GGUF of random blocks in 2B shapes; kept if it is already there."""
    path = folder / f"random-2b-{layers}-layers-{mix}.gguf"
    if path.is_file():
        return path
    whole = published_config("gemma-2-2b")
    config = dataclasses.replace(whole, num_hidden_layers=layers, layer_types=whole.layer_types[:layers])
    words = tokenizer_metadata((POCKET / "tokenizer.model").read_bytes())
    more = config.vocab_size - len(words["tokenizer.ggml.tokens"].value)
    words["tokenizer.ggml.tokens"] = Value(
        "str[]", [*words["tokenizer.ggml.tokens"].value, *(f"{i}▁" for i in range(more))]
    )
    for name, number_type, filler in (
        ("scores", "f32", -np.arange(1e5, 1e5 + more)),
        ("token_type", "i32", np.ones(more)),
    ):
        values = np.concatenate((words[f"tokenizer.ggml.{name}"].value, filler))
        words[f"tokenizer.ggml.{name}"] = Value(f"{number_type}[]", values)
    number = {"Q4_K_M": 15}.get(mix) or FILE_TYPES[mix]
    metadata = architecture_metadata(config, "random") | {"general.file_type": Value("u32", number)} | words
    tensors: list[tuple[str, tuple[int, ...], GGMLType, int]] = []
    for name, shape in shapes_of(config).items():
        layer = int(found[1]) if (found := re.search(r"layers\.(\d+)\.", name)) else -1
        kind = BLOCKS[type_of(name, layer, layers, mix)]
        size = torch.Size(shape).numel() // kind.values * kind.bytes
        tensors.append((llama_cpp_name(name), shape, kind, size))
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".partial").open("wb") as file:
        file.write(header_bytes(metadata, tensors))
        for _, _, kind, size in tqdm(tensors, desc="random blocks", disable=None):
            if kind.name == "F32":
                raw = torch.ones(size // 4).view(torch.uint8)
            else:
                raw = torch.randint(2**62, (-(-size // 8),), generator=generator).view(torch.uint8)[:size].clone()
                for start in SCALES[kind.name]:
                    raw.view(-1, kind.bytes)[:, start : start + 2] = torch.tensor([0.001]).half().view(torch.uint8)
            file.write(raw.numpy().data)
            file.write(bytes(padding(size)))
    return path.with_suffix(".partial").rename(path)


def memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found
    return int(found[1]) * 1024


def child(system: str, path: Path) -> dict[str, Any]:
    """Load once; seconds, peak bytes over imports, bytes of the final weights and a sum to compare systems by."""
    if system == "transformers":
        import transformers

        transformers.utils.logging.disable_progress_bar()
        from transformers.models.gemma2 import modeling_gemma2  # noqa: F401  (imported before the clock starts)
    import gguf
    from gguf import quants

    before, start = memory("VmRSS"), time.perf_counter()
    tensors: dict[str, torch.Tensor]
    if system == "gemma2":
        tensors = dict(gemma2.load(path, dtype="bfloat16", device="cpu", progress=False).model.named_parameters())
    elif system == "gguf-py":
        tensors = {
            tensor.name: torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type)).bfloat16()
            for tensor in gguf.GGUFReader(path).tensors
        }
    else:
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
        tensors = dict(model.named_parameters())
    seconds = time.perf_counter() - start
    final = sum(tensor.nbytes for tensor in tensors.values())
    some = next(tensor for name, tensor in tensors.items() if "q_proj" in name or "attn_q" in name)
    return {
        "seconds": seconds,
        "peak": memory("VmHWM") - before,
        "final": final,
        "sum": some.detach().float().abs().double().sum().item(),
    }


def copy_seconds(read: int, written: int) -> float:
    """A plain copy of so many bytes, half of them a read and half a write, into memory never touched before."""
    source = torch.ones(2**26, dtype=torch.uint8)
    target = torch.empty(2**29, dtype=torch.uint8)
    start = time.perf_counter()
    target.view(-1, len(source)).copy_(source)
    fresh = (time.perf_counter() - start) / target.nbytes
    start = time.perf_counter()
    for _ in range(8):
        source.sum()
    return fresh * written + (time.perf_counter() - start) / (8 * source.nbytes) * read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", choices=("Q4_K_M", "Q8_0", "Q4_0"))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gemma2-bench")
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(**json.loads((configs() / "bench" / "load.json").read_text(encoding="utf-8")))
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.path)))
        return
    path = make_file(args.folder, args.type, args.layers)
    path.read_bytes()  # into the page cache
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in args.systems}
    for _ in range(args.rounds):
        for system in args.systems:
            command = [sys.executable, __file__, "--child", system, "--path", str(path)]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
            runs[system].append(json.loads(done.stdout.splitlines()[-1]))
    final = runs[args.systems[0]][0]["final"]
    copy = copy_seconds(path.stat().st_size, final)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, median of {args.rounds}"
    )
    print(
        f"{args.type}, 2B shapes, {args.layers} layers: {path.stat().st_size / 1e9:.2f} GB in the page cache, ", end=""
    )
    print(f"{final / 1e9:.2f} GB of bfloat16; a plain copy of as many bytes takes {copy:.2f} s\n")
    print("| system | seconds | times gemma2's | peak over imports, GB | of the final weights |\n|---|---|---|---|---|")
    middle = {system: statistics.median(run["seconds"] for run in runs[system]) for system in args.systems}
    for system in args.systems:
        peak = max(run["peak"] for run in runs[system])
        ratio = middle[system] / middle[args.systems[0]]
        print(f"| {system} | {middle[system]:.2f} | {ratio:.1f} | {peak / 1e9:.2f} | {peak / final:.2f} |")
    sums = {system: runs[system][0]["sum"] for system in args.systems}
    print(f"\nsum of |w| of the first q_proj, so that all loaded the same: {sums}")


if __name__ == "__main__":
    main()
