"""One matrix, read twice: what a head that is tied to the embedding demands of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
OFFLOAD = (
    "the embedding cannot be offloaded by itself, because the head reads it too; offload the layers instead, as "
    "accelerate.cpu_offload(model.model.layers)"
)


def check_same_device(x: Tensor, weight: Tensor) -> None:
    """Refuse a weight that is somewhere else: PyTorch answers a product with a meta tensor with uninitialised memory.

    Raises:
        RuntimeError: says what to do where a weight was moved away between two modules, as accelerate's offload does.
    """
    if weight.device != x.device:
        raise RuntimeError(
            f"the embedding's weight is on {weight.device} and what the head gets on {x.device}: {OFFLOAD}"
        )


def check_here(device: torch.device) -> None:
    """Raises RuntimeError for the meta device: an embedding that was offloaded is there."""
    if device.type == "meta":
        raise RuntimeError(f"the embedding's weight is on {device}: {OFFLOAD}")


def drop_equal_head(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, *keys: list[str]
) -> None:
    """Before `load_state_dict`: take out a head that only repeats the embedding, as transformers' `state_dict` has it.

    A head of other values is an error of the loading, and without the embedding beside it there is nothing to compare.
    """
    head, embedding = state.get(prefix + HEAD), state.get(prefix + EMBEDDING)
    if head is None or embedding is None:
        return
    del state[prefix + HEAD]
    known = not (head.is_meta or embedding.is_meta)
    if head is not embedding and known and not torch.equal(head, embedding.to(head.device)):
        keys[-1].append(f"{prefix + HEAD} differs from {prefix + EMBEDDING}, and Gemma 2's head is tied.")
