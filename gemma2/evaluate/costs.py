"""What a model costs: the bytes of its tensors as a file has them, and how many tokens a second it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gemma2.checkpoints.weights import Weights
from gemma2.gemma import Gemma
from gemma2.generate import generate_ids
from gemma2.stats import Stats
from gemma2.tied import HEAD

PROMPT, NEW = 256, 32  # tokens of the run that times a model


@dataclass(frozen=True)
class Speed:
    """Tokens a second: of a prompt, and one after the other."""

    prompt: float
    decode: float


@dataclass(frozen=True)
class Stored:
    """A tensor as a file has it: the type by ggml's name, its bytes, and how many weights it has."""

    type: str
    bytes: int
    weights: int

    @property
    def bits(self) -> float:
        """Of a weight."""
        return 8 * self.bytes / self.weights


def stored(weights: Weights) -> dict[str, Stored]:
    """Every tensor of an opened checkpoint as it is stored, a head that repeats the embedding left out."""
    found = {}
    for name, (shape, _) in weights.tensors.items():
        if name == HEAD and len(weights.tensors) > 1:
            continue
        rows = 1 if len(shape) == 1 else shape[0]
        found[name] = Stored(weights.stored(name), weights.raw(name, 0, 1).numel() * rows, torch.Size(shape).numel())
    return found


def total(tensors: Mapping[str, Stored]) -> Stored:
    """All tensors together; the type is that of most of the weights."""
    by_type: dict[str, int] = {}
    for one in tensors.values():
        by_type[one.type] = by_type.get(one.type, 0) + one.weights
    bytes, weights = (sum(getattr(one, field) for one in tensors.values()) for field in ("bytes", "weights"))
    return Stored(max(by_type, key=by_type.__getitem__), bytes, weights)


def speed(gemma: Gemma, ids: Sequence[int], rounds: int = 2) -> Speed:
    """Time a model on the first tokens of a text: the best of some rounds after one that does not count.

    Args:
        ids: of the text, with its BOS. The prompt is at most 256 tokens of them, and at most 32 follow it.
    """
    new = min(NEW, gemma.config.max_position_embeddings // 4)
    prompt = list(ids[: min(PROMPT, gemma.config.max_position_embeddings - new)])
    best = Speed(0.0, 0.0)
    for number in range(rounds + 1):
        stats = Stats()
        for _ in generate_ids(gemma.model, [prompt], new, cache=gemma.new_cache(1, len(prompt) + new), stats=stats):
            pass
        if number:
            found = [
                stats.prompt_tokens / stats.prefill_seconds,
                stats.decoded_tokens / max(stats.decode_seconds, 1e-9),
            ]
            best = Speed(max(best.prompt, found[0]), max(best.decode, found[1]))
    return best
