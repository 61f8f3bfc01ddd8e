"""What each form of the weights costs, on the pocket model: python scripts/weights_cost.py TEXT_FOLDER

TEXT_FOLDER is the one of `train_pocket.py`. For each form it prints how many bytes the weights take, the loss and the
perplexity on the held-out texts of the model's reported loss, how far the predictions are from those of the plain model
(KL divergence, over all positions), and at how many positions the likeliest token is another. A form whose package is
missing is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from train_pocket import SELECTION, SETTINGS, documents

import gemma2
from gemma2.fast.forms import FORMS


class Sums:
    """What one form's predictions add up to over the texts, beside those of the plain model."""

    def __init__(self) -> None:
        self.nats = self.divergence = 0.0
        self.changed = 0

    def add(self, got: Tensor, plain: Tensor, targets: Tensor) -> None:
        """Logarithms of probabilities [t v] of both, and the ids [t] that follow."""
        self.nats += F.nll_loss(got, targets, reduction="sum").item()
        self.divergence += F.kl_div(got, plain, reduction="sum", log_target=True).item()
        self.changed += int((got.argmax(-1) != plain.argmax(-1)).sum())


def loaded(dtype: str) -> dict[str, gemma2.Gemma2]:
    """The pocket model in a dtype, and in every form that can be had here."""
    models = {}
    for name in (None, *FORMS):
        try:
            models[name or dtype] = gemma2.load(device="cpu", dtype=dtype, weights=name).model
        except (ImportError, ValueError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return models


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, metavar="TEXT_FOLDER")
    parser.add_argument("--dtype", default="bfloat16", help="of the activations; default: bfloat16")
    parser.add_argument("--most", type=int, metavar="N", help="score the first N texts only")
    args = parser.parse_args()
    held = documents(args.texts)[1]
    random.Random(json.loads(SETTINGS.read_text(encoding="utf-8"))["seed"]).shuffle(held)  # as for training
    texts = held[SELECTION:][: args.most]
    plain, models = gemma2.load(device="cpu", dtype="float32"), loaded(args.dtype)
    pieces, context = plain.tokenizer, plain.config.max_position_embeddings
    sums, count = {name: Sums() for name in models}, 0
    for text in tqdm(texts, unit="text", disable=None, leave=False):
        ids = [*pieces.encode(text), pieces.special["eos"]][:context]  # as in train_pocket.py: BOS, then the text
        inputs, targets = torch.tensor([ids[:-1]]), torch.tensor(ids[1:])
        wanted = plain.model(inputs)[0].log_softmax(-1)
        for name, model in models.items():
            sums[name].add(model(inputs)[0].float().log_softmax(-1), wanted, targets)
        count += len(targets)
    print("| weights | MB | nats per token | perplexity | KL from float32, nats | other likeliest token |")
    print("|---|---|---|---|---|---|")
    for name, found in sums.items():
        size = sum(tensor.nbytes for tensor in models[name].state_dict().values()) / 1e6
        loss, divergence, changed = found.nats / count, found.divergence / count, found.changed / count
        print(f"| {name} | {size:.2f} | {loss:.4f} | {math.exp(loss):.3f} | {divergence:.5f} | {changed:.2%} |")
    print(f"\n{count:,} tokens of {len(texts)} held-out texts, activations in {args.dtype}")


if __name__ == "__main__":
    main()
