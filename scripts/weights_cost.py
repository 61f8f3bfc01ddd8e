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
from torch.nn import functional as F
from train_pocket import SELECTION, SETTINGS, documents

import gemma2
from gemma2.fast.forms import FORMS


@torch.no_grad()
def distance(
    plain: gemma2.Gemma2, other: gemma2.Gemma2, texts: list[list[int]], bos: int, context: int
) -> tuple[float, float, float, int]:
    """(nats, mean KL from plain, share of positions with another likeliest token, tokens), texts each behind a BOS."""
    nats, divergence, changed, count = 0.0, 0.0, 0, 0
    for ids in texts:
        targets = torch.tensor([ids[: context - 1]])
        inputs = torch.cat((torch.tensor([[bos]]), targets[:, :-1]), dim=1)
        wanted, got = (model(inputs)[0].double().log_softmax(-1) for model in (plain, other))
        nats += F.nll_loss(got, targets[0], reduction="sum").item()
        divergence += F.kl_div(got, wanted, reduction="sum", log_target=True).item()
        changed += int((got.argmax(-1) != wanted.argmax(-1)).sum())
        count += targets.numel()
    return nats / count, divergence / count, changed / count, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, metavar="TEXT_FOLDER")
    parser.add_argument("--dtype", default="bfloat16", help="of the activations; default: bfloat16")
    parser.add_argument("--most", type=int, metavar="N", help="score the first N texts only")
    args = parser.parse_args()
    held = documents(args.texts)[1]
    random.Random(json.loads(SETTINGS.read_text(encoding="utf-8"))["seed"]).shuffle(held)  # as for training
    plain = gemma2.load(device="cpu", dtype="float32")
    pieces, bos = plain.tokenizer, plain.tokenizer.special["bos"]
    ids = [[*pieces.encode(text, bos=False), pieces.special["eos"]] for text in held[SELECTION:][: args.most]]
    print("| weights | MB | nats per token | perplexity | KL from float32, nats | other likeliest token |")
    print("|---|---|---|---|---|---|")
    count = 0
    for name in (None, *FORMS):
        try:
            gemma = gemma2.load(device="cpu", dtype=args.dtype, weights=name)
        except (ImportError, ValueError) as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
            continue
        size = sum(tensor.nbytes for tensor in gemma.model.state_dict().values()) / 1e6
        loss, divergence, changed, count = distance(
            plain.model, gemma.model, ids, bos, gemma.config.max_position_embeddings
        )
        shown = args.dtype if name is None else name
        print(f"| {shown} | {size:.2f} | {loss:.4f} | {math.exp(loss):.3f} | {divergence:.5f} | {changed:.2%} |")
    print(f"\n{count:,} tokens of {len(ids)} held-out texts, activations in {args.dtype}")


if __name__ == "__main__":
    main()
