"""How far every GGUF file's logits are from llama.cpp's, and what the distance is made of.

    python scripts/compare_llama_cpp.py FOLDER         # *.gguf, ids.json and llama_cpp_logits.safetensors
    python scripts/compare_llama_cpp.py --live [FILE]  # runs llama-cpp-python itself; default: the pocket model
                                                       # in every type that `gemma2 convert` writes

The rows are ours in float32 on the file's dequantised weights; then, step by step, with what llama.cpp's processor
kernels do otherwise: GELU from a table of 16-bit numbers, and activations rounded to what a weight's type is multiplied
with (8 bits in blocks for quantized weights, 16 for F16 and BF16).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import gemma2
from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.checkpoints.gguf_weights import GGUFWeights
from gemma2.checkpoints.weights import EMBEDDING
from gemma2.convert import TYPES, convert
from gemma2.model import MLP

# ggml-cpu.c, type_traits_cpu: what the activations become before they meet weights of a type. Q8_K for all others.
PARTNERS = {"F32": "F32", "F16": "F16", "BF16": "BF16"} | dict.fromkeys(
    ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4"), "Q8_0"
)
SCORED = 48  # last positions, as in the stored logits


class TableMLP(nn.Module):
    """The MLP with llama.cpp's GELU: a table over float16 (ggml's vec.h, ggml_vec_geglu_f32)."""

    def __init__(self, plain: MLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = plain.gate_proj, plain.up_proj, plain.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        looked_up = F.gelu(gate.half().float(), approximate="tanh").half().float()
        gelu = torch.where(gate <= -10, 0.0, torch.where(gate >= 10, gate, looked_up))
        return self.down_proj(gelu * self.up_proj(x))


def rounded(x: Tensor, partner: str) -> Tensor:
    """x [... d] as llama.cpp hands it to a product with weights of a type."""
    if partner == "F32":
        return x
    if partner in ("F16", "BF16"):
        return x.to(torch.float16 if partner == "F16" else torch.bfloat16).float()
    if partner == "Q8_0":  # blocks of 32, the scale in float16 (quantize_row_q8_0)
        blocks = x.unflatten(-1, (-1, 32))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        q = (blocks * torch.where(scale == 0, 0.0, 1 / scale)).round()
        return (q * scale.half().float()).flatten(-2)
    blocks = x.unflatten(-1, (-1, 256))  # Q8_K: the largest becomes -127, the scale stays float32
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(largest == 0, 0.0, -127 / largest)
    q = (blocks * inverse).round().clamp(max=127)
    return (q * torch.where(inverse == 0, 0.0, 1 / inverse)).flatten(-2)


def stages(path: Path) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The model of a file as it is, then with llama.cpp's GELU, then with its activations too."""
    gemma = gemma2.load(path, dtype="float32", device="cpu")
    yield "float32", gemma.model
    for layer in gemma.model.model.layers:
        assert isinstance(layer.mlp, MLP)
        layer.mlp = TableMLP(layer.mlp)
    yield "16-bit GELU", gemma.model
    weights = open_checkpoint(path).weights
    assert isinstance(weights, GGUFWeights)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        partner = PARTNERS.get(weights.stored(name).kind.name, "Q8_K")
        return lambda module, args: (rounded(args[0], partner), *args[1:])

    for name, module in gemma.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    gemma.model.lm_head.register_forward_pre_hook(hook(EMBEDDING))
    yield "and activations", gemma.model


def llama_cpp_logits(path: Path, ids: list[int]) -> Tensor:
    """llama.cpp's logits [t v]: keys and values in float32, and no flash attention, its default here."""
    try:
        import llama_cpp
    except ImportError:
        raise SystemExit("--live needs llama-cpp-python: pip install 'gemma2[llama-cpp]'") from None
    other = llama_cpp.Llama(
        str(path),
        n_ctx=len(ids),
        n_batch=len(ids),
        logits_all=True,
        type_k=0,
        type_v=0,
        flash_attn=False,
        verbose=False,
    )
    other.eval(ids)
    return torch.from_numpy(other.scores[: len(ids)].copy())


def row(path: Path, ids: list[int], reference: Tensor) -> str:
    cells = []
    for name, model in stages(path):
        with torch.no_grad():
            ours = model(torch.tensor([ids]))[0, -len(reference) :]
        apart = (ours - reference).double()
        cells.append(f"{apart.abs().max():.4f} / {apart.pow(2).mean().sqrt():.4f}")
        if name == "float32":
            same = (ours.argmax(-1) == reference.argmax(-1)).double().mean()
    return f"| {path.stem} | {' | '.join(cells)} | {same:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, help="the folder; with --live, a model to convert")
    parser.add_argument("--live", action="store_true", help="run llama.cpp here")
    args = parser.parse_args()
    print("| file | float32 | with 16-bit GELU | and its activations | same top token |\n|---|---|---|---|---|")
    if not args.live:
        if args.source is None:
            parser.error("name the folder with the files and llama.cpp's logits, or --live")
        ids = json.loads((args.source / "ids.json").read_text())
        for name, reference in sorted(load_file(args.source / "llama_cpp_logits.safetensors").items()):
            print(row(args.source / f"{name}.gguf", ids, reference), flush=True)
        return
    with tempfile.TemporaryDirectory() as place:
        for kind in TYPES:
            path = convert(args.source, Path(place) / f"{kind}.gguf", type=kind, progress=False).path
            config = open_checkpoint(path).config
            count = min(256, config.max_position_embeddings)
            ids = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()
            print(row(path, ids, llama_cpp_logits(path, ids)[-SCORED:]), flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
