"""One of two processes that run a model together, for test_distributed.py:

    python -m tests.ecosystem.ranks fsdp|ddp RANK STORE

STORE is a file that does not exist yet, over which the processes find each other. It exits with 0 if all was equal.
"""

from __future__ import annotations

import datetime
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gemma2
from gemma2.load import POCKET
from gemma2.research import capture
from tests.conftest import ids, tiny

RANKS = 2
PROMPTS = ["In the beginning", "And"]


def held() -> gemma2.Gemma:
    return gemma2.Gemma(tiny(vocab_size=4096), gemma2.Tokenizer.from_file(POCKET / "tokenizer.model"))


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def fsdp(rank: int) -> None:
    gemma = held()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in gemma.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(gemma.model, mesh=mesh)  # the rest, so also the embedding that the head reads
    shards = [parameter for parameter in gemma.model.parameters() if isinstance(parameter, DTensor)]
    assert len(shards) == len(list(gemma.model.parameters()))
    assert sum(p.to_local().numel() for p in shards) < 0.6 * sum(p.numel() for p in shards)
    equal_to_plain(gemma.model, gemma, rank)


def ddp(rank: int) -> None:
    gemma = held()
    equal_to_plain(DistributedDataParallel(gemma.model), gemma, rank)


def equal_to_plain(model: torch.nn.Module, gemma: gemma2.Gemma, rank: int) -> None:
    """`model` is that of `gemma` as the processes share it; each rank trains on a row of its own."""
    plain, rows = held(), ids(RANKS, 20, vocab=4096)
    tokens = rows[rank : rank + 1]
    with capture(plain, "*.hook_resid_post") as expected:
        logits = plain.model(tokens)
    with capture(gemma, "*.hook_resid_post") as seen:
        found = model(tokens)
    assert torch.equal(found, logits)
    assert seen.keys() == expected.keys() and all(torch.equal(seen[name], expected[name]) for name in seen)
    loss(found, tokens).backward()
    loss(plain.model(rows), rows).backward()  # the mean over rows, as the ranks' gradients are averaged
    wanted, grads = gradients(plain.model), gradients(gemma.model)
    assert wanted.keys() == grads.keys() == dict(plain.model.named_parameters()).keys()
    for name, grad in grads.items():
        assert torch.allclose(grad, wanted[name], rtol=1e-3, atol=1e-4 * wanted[name].abs().max().item()), name
    # Each rank has other texts, of the same number of tokens to write.
    prompts = PROMPTS if rank else PROMPTS[::-1]
    assert gemma.generate(prompts, 8) == plain.generate(prompts, 8)
    assert gemma.generate(prompts[0], 8, temperature=1.0, seed=rank) == plain.generate(
        prompts[0], 8, temperature=1.0, seed=rank
    )


def main() -> None:
    what, rank, store = sys.argv[1:]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=int(rank),
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    {"fsdp": fsdp, "ddp": ddp}[what](int(rank))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
