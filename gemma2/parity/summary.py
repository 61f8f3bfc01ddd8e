"""A site in 64 numbers: what a pack (docs/packs.md) keeps of a value, and how far two values are apart by it.

A projection adds all values up with signs that are spread like noise. With independent signs, the mean square of 32
differences of projections estimates the squared length of the difference itself, whatever its shape, so that nothing is
lost but a few percent of precision. Signs are the bits of one 64-bit word for each place (`mix`), so that a port in any
language has the same ones.

Two kinds are taken. `projection` is of the values. `channels` is of their squares, with one sign for all tokens: what
errors have in common over tokens, as a wrong gain has, adds up there, while rounding cancels out. Scores and patterns,
whose last axis is that of keys, have none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gemma2.parity.compare import FEWEST, MASKED, SCORES

NUMBERS = 32  # of a projection; bit k of a place's word is its sign in number k
DIGITS = 10  # that are kept of a number
CHUNK, KEPT = 2**16, 16  # places whose signs are made at once, and of how many chunks they are kept: 34 MB
KEYED = ("hook_scores_raw", SCORES, "hook_pattern")  # sites whose last axis is that of keys
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's


@dataclass(frozen=True)
class Summary:
    """What is kept of a value.

    Attributes:
        rms, largest, at: root mean square; the largest |value|, and where it is.
        projection: 32 sums of the values with signs.
        channels: 32 sums of their squares, signed by the place on the last axis; () where that has few places, or is
            that of keys.
        masked: how many scores are masked, which count as 0 in all else; None where nothing is.
        bits: a hash of the value as it was computed, "" where none was asked for.
    """

    shape: tuple[int, ...]
    rms: float
    largest: float
    at: tuple[int, ...]
    projection: tuple[float, ...]
    channels: tuple[float, ...] = ()
    masked: int | None = None
    bits: str = ""

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "shape": list(self.shape),
            "rms": short(self.rms),
            "max": short(self.largest),
            "at": list(self.at),
            "projection": [short(x) for x in self.projection],
        }
        if self.channels:
            found["channels"] = [short(x) for x in self.channels]
        if self.masked is not None:
            found["masked"] = self.masked
        if self.bits:
            found["bits"] = self.bits
        return found


def summarise(name: str, value: Tensor, bits: bool = False) -> Summary:
    """Of a site's value, without the batch axis.

    Args:
        bits: also hash it, as it is.
    """
    plain, masked = unmasked(name, value)
    flat = plain.flatten()
    place = int(flat.abs().argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), plain.shape))
    return Summary(
        tuple(value.shape),
        math.sqrt(flat.square().mean().item()),
        flat[place].abs().item(),
        at,
        projected(flat),
        projected(powers(plain)) if has_channels(name, plain) else (),
        masked,
        hashed(value) if bits else "",
    )


def unmasked(name: str, value: Tensor) -> tuple[Tensor, int | None]:
    """The value in float64. In scores, those that the softmax never sees are 0, and counted."""
    plain = value.detach().to("cpu", torch.float64)
    if not name.endswith(SCORES):
        return plain, None
    hidden = plain < MASKED
    return plain.masked_fill(hidden, 0.0), int(hidden.sum())


def has_channels(name: str, plain: Tensor) -> bool:
    return plain.shape[-1] >= FEWEST and not name.endswith(KEYED)


def powers(plain: Tensor) -> Tensor:
    """The sum of squares at each place of the last axis."""
    return plain.square().reshape(-1, plain.shape[-1]).sum(0)


def projected(flat: Tensor) -> tuple[float, ...]:
    """Sums of float64 [n] with the signs of 32 projections."""
    total = torch.zeros(NUMBERS, dtype=torch.float64)
    for number, part in enumerate(flat.split(CHUNK)):
        total += part @ _signs(number)[: len(part)].double()
    return tuple(total.tolist())


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """What two values' projections say of the length of their difference."""
    return math.dist(one, other) / math.sqrt(NUMBERS)


def mix(place: int) -> int:
    """A 64-bit word for a place: splitmix64 of its number."""
    word = (place + 1) * GOLDEN % 2**64
    word = (word ^ word >> 30) * FIRST % 2**64
    word = (word ^ word >> 27) * SECOND % 2**64
    return word ^ word >> 31


def _signs(chunk: int) -> Tensor:
    """[CHUNK, NUMBERS] of 1 and -1, in int8."""
    return _kept(chunk) if chunk < KEPT else _made(chunk)


@lru_cache(maxsize=KEPT)
def _kept(chunk: int) -> Tensor:
    return _made(chunk)


def _made(chunk: int) -> Tensor:
    """As `mix` for every place of a chunk. int64 wraps as 64 bits do; a shift keeps its sign, which is masked away."""
    word = torch.arange(chunk * CHUNK + 1, (chunk + 1) * CHUNK + 1, dtype=torch.int64) * _signed(GOLDEN)
    for shift, factor in ((30, FIRST), (27, SECOND)):
        word = (word ^ _shifted(word, shift)) * _signed(factor)
    word = word ^ _shifted(word, 31)
    low = word.to(torch.int32)[:, None]  # keeps the 32 low bits
    return (low >> torch.arange(NUMBERS, dtype=torch.int32) & 1).to(torch.int8).mul_(2).sub_(1)


def _shifted(word: Tensor, count: int) -> Tensor:
    return word >> count & (1 << 64 - count) - 1


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def hashed(value: Tensor) -> str:
    """16 hexadecimal digits of SHA-256 of the values' bytes, as they are in memory, little end first."""
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


def short(number: float) -> float:
    """With as many digits as are kept."""
    return float(f"{number:.{DIGITS}g}")
