"""How far every GGUF file's logits are from llama.cpp's, and what the distance is made of.

    python scripts/compare_llama_cpp.py FOLDER         # *.gguf, ids.json and llama_cpp_logits.safetensors
    python scripts/compare_llama_cpp.py --live [FILE]  # runs llama-cpp-python itself; default: the pocket model
                                                       # in every type that `gemma2 convert` writes

The rows are ours in float32 on the file's dequantised weights; then, step by step, with what llama.cpp's processor
kernels do otherwise (`gemma2/numerics/profiles/llama_cpp.py`): GELU from a table of 16-bit numbers; activations rounded
to what a weight's type is multiplied with; and all the rest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import gemma2
from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.convert import TYPES, convert
from gemma2.numerics import storage_of, with_numerics

SCORED = 48  # last positions, as in the stored logits
# What is added at each step, as changes of the profile `llama.cpp`; None is all of it.
STEPS: dict[str, tuple[str, ...] | None] = {
    "ours, float32": (),
    "+ llama.cpp's GELU table": ("gelu=float16",),
    "+ its 8/16-bit activations": ("gelu=float16", "activations=partner"),
    "+ all the rest": None,
}


def llama_cpp_logits(path: Path, ids: list[int]) -> Tensor:
    """llama.cpp's logits [t v]: keys and values in float32, and no flash attention, its default here."""
    try:
        import llama_cpp
    except ImportError:
        raise SystemExit("--live needs llama-cpp-python: pip install llama-cpp-python") from None
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


@torch.no_grad()
def row(path: Path, ids: list[int], reference: Tensor) -> str:
    plain = gemma2.load(path, dtype="float32", device="cpu").model
    kinds = storage_of(open_checkpoint(path).weights)
    cells = []
    for changes in STEPS.values():
        model = with_numerics(plain, "llama.cpp", changes, kinds) if changes != () else plain
        ours = model(torch.tensor([ids]))[0, -len(reference) :]
        apart = (ours - reference).double()
        equal = torch.equal(ours, reference)
        cells.append("equal bits" if equal else f"{apart.abs().max():.4f} / {apart.pow(2).mean().sqrt():.4f}")
        if changes == ():
            same = (ours.argmax(-1) == reference.argmax(-1)).double().mean()
    return f"| {path.stem} | {' | '.join(cells)} | {same:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, help="the folder; with --live, a model to convert")
    parser.add_argument("--live", action="store_true", help="run llama.cpp here")
    args = parser.parse_args()
    print(f"| file | {' | '.join(STEPS)} | same top token |\n|---|{'---|' * len(STEPS)}---|")
    if not args.live:
        if args.source is None:
            parser.error("name the folder with the files and llama.cpp's logits, or --live")
        ids = json.loads((args.source / "ids.json").read_text(encoding="utf-8"))
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
