"""What the loss costs in memory and time: `gemma2.losses.cross_entropy` beside the plain one, in a process each.

python scripts/loss_memory.py --tokens 2048 --vocab 256000 --width 256

Printed is the peak of resident memory above what both have: the states, the embedding, and the gradients of the two.
Both get the same states and the same embedding, whose logits reach the cap. It needs Linux, and about 10 GB for the
plain loss at the default sizes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import gemma2
from gemma2.checkpoints.dtypes import RUNNABLE
from gemma2.load import POCKET
from gemma2.losses import cross_entropy
from gemma2.ops import upcast

CASES = ("plain", "gemma2.losses")


def memory(line: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (found,) = (row for row in lines if row.startswith(line))
    return int(found.split()[1]) * 1024


def given(tokens: int, vocab: int, width: int, dtype: torch.dtype) -> tuple[gemma2.Gemma2, Tensor, Tensor]:
    """A model with an embedding whose logits reach the cap, states and targets; all inputs have a gradient already."""
    config = replace(
        gemma2.read_config(POCKET / "config.json"),
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=1,
        layer_types=("full_attention",),
    )
    torch.manual_seed(0)
    model = gemma2.Gemma2(config)
    weight = model.model.embed_tokens.weight
    with torch.no_grad():
        weight.normal_(std=15 * width**-0.5)
    model.to(dtype)
    return model, torch.randn(tokens, width).to(dtype).requires_grad_(), torch.randint(vocab, (tokens,))


def differentiate(case: str, model: gemma2.Gemma2, states: Tensor, targets: Tensor) -> list[Tensor]:
    """The loss, and its gradients by the states and by the embedding."""
    weight = model.model.embed_tokens.weight
    if case == "plain":
        loss = F.cross_entropy(upcast(model.softcap(model.lm_head(states, model.model.embed_tokens))), targets)
    else:
        loss = cross_entropy(model, states, targets)
    return [loss.detach(), *torch.autograd.grad(loss, (states, weight))]


def measure(case: str, tokens: int, vocab: int, width: int, dtype: torch.dtype, into: Path) -> dict[str, float]:
    """One loss and its gradients, which are saved in a file for the comparison."""
    differentiate(case, *given(16, 100, width, dtype))  # what the first call of a process loads and sets up
    model, states, targets = given(tokens, vocab, width, dtype)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before, started = memory("VmRSS"), (time.perf_counter(), time.process_time())
    found = differentiate(case, model, states, targets)
    most, seconds, busy = memory("VmHWM") - before, time.perf_counter() - started[0], time.process_time() - started[1]
    torch.save(found, into)
    return {"peak": most - sum(one.nbytes for one in found), "seconds": seconds, "busy": busy}


def apart(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The largest difference, and that by the largest value."""
    largest = (one - other).abs().max().item()
    return largest, largest / other.abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=256_000)
    parser.add_argument("--width", type=int, default=256, help="of the states; default: 256 (2B has 2304)")
    parser.add_argument("--dtype", choices=RUNNABLE, default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        found = measure(args.case, args.tokens, args.vocab, args.width, RUNNABLE[args.dtype], args.into)
        return print(json.dumps(found))
    results, gradients = {}, {}
    with tempfile.TemporaryDirectory() as place:
        for case in tqdm(CASES, desc="loss", disable=None, leave=False):
            into = Path(place) / f"{case}.pt"
            command = [sys.executable, __file__, *sys.argv[1:], "--case", case, "--into", str(into)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            results[case], gradients[case] = json.loads(done.stdout), torch.load(into)
    print(f"{args.tokens:,} tokens, {args.vocab:,} pieces, width {args.width}, {args.dtype}, {args.threads} threads\n")
    print("| loss | memory, MB | seconds | seconds of a processor |\n|---|---|---|---|")
    for case, found in results.items():
        print(f"| {case} | {found['peak'] / 1e6:,.0f} | {found['seconds']:.2f} | {found['busy']:.2f} |")
    plain, ours = (results[case] for case in CASES)
    ratios = [ours[name] / plain[name] for name in ("peak", "seconds", "busy")]
    print("| ratio | {:.3f} | {:.2f} | {:.2f} |\n".format(*ratios))
    for name, one, other in zip(
        ("loss", "gradient of states", "gradient of embedding"), *gradients.values(), strict=True
    ):
        print("{}: largest difference {:.2e}, {:.2e} of the largest value".format(name, *apart(other, one)))


if __name__ == "__main__":
    main()
