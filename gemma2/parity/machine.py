"""Whether a recording's bits can be demanded of this machine: what its processor makes of a few fixed operations.

PyTorch leaves products, sums and exponentials to libraries that choose a kernel by processor, and kernels add in
different orders. So the same code gives other last bits on another processor. A recording therefore keeps fingerprints:
for each operation of a forward pass, in the shapes of the recording, a hash of its result on fixed numbers. Where all
of them come out the same, equal code must give equal bits. Where one differs, only rounding can be demanded.

The operations are PyTorch's own functions and none of this project's, so no change of the model can change them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma2.config import Gemma2Config

PREFIX = "bits of "  # before an operation's name, among a trace's versions


def numbers(*shape: int) -> Tensor:
    """Fixed numbers within +-2, spread like noise: whole numbers by a power of two, so the same ones everywhere."""
    count = torch.Size(shape).numel()
    whole = (torch.arange(1, count + 1, dtype=torch.int64) * 2_654_435_761 % 2**32) >> 16
    return ((whole - 2**15).float() / 2**14).view(shape)


@torch.no_grad()
def fingerprints(config: Gemma2Config, t: int, dtype: torch.dtype) -> dict[str, str]:
    """Operation -> hash of what this machine makes of it, for a prompt of t ids."""
    d, f, v, c = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    h, g = config.num_attention_heads, config.num_key_value_heads
    linears = {(d, h * c), (d, g * c), (d, (h + 2 * g) * c), (h * c, d), (d, f), (f, d), (d, v)}  # the third: q k v
    wide = numbers(1, t, d)
    scores = numbers(1, h, t, t)
    asked: dict[str, Callable[[], Tensor]] = {
        "scores": lambda: numbers(1, h, t, c).to(dtype) @ numbers(1, h, t, c).to(dtype).transpose(2, 3),
        "mix": lambda: scores.to(dtype) @ numbers(1, h, t, c).to(dtype),
        "mean": lambda: wide.square().mean(-1, keepdim=True),
        "root": lambda: torch.rsqrt(wide.abs() + 1e-6),
        "softmax": lambda: F.softmax(scores, dim=-1, dtype=torch.float32),
        "gelu": lambda: F.gelu(numbers(1, t, f).to(dtype), approximate="tanh"),
        "tanh": lambda: torch.tanh(scores.to(dtype)),
        "turn": lambda: torch.polar(torch.ones(t, c // 2), numbers(t, c // 2) * t),
    }
    asked |= {
        f"linear {n} to {m}": lambda n=n, m=m: F.linear(numbers(1, t, n).to(dtype), numbers(m, n).to(dtype))  # type: ignore[misc]
        for n, m in sorted(linears)
    }
    return {name: _hash(compute()) for name, compute in asked.items()}


def stated(config: Gemma2Config, t: int, dtype: torch.dtype) -> dict[str, str]:
    """The fingerprints as a trace's `versions` hold them."""
    return {PREFIX + name: value for name, value in fingerprints(config, t, dtype).items()}


def other_bits(versions: Mapping[str, str], config: Gemma2Config, t: int, dtype: torch.dtype) -> list[str]:
    """The operations that have other bits here than on the machine of a recording.

    Raises:
        ValueError: the recording keeps no fingerprints, or those of other operations.
    """
    kept = {name.removeprefix(PREFIX): value for name, value in versions.items() if name.startswith(PREFIX)}
    here = fingerprints(config, t, dtype)
    if kept.keys() != here.keys():
        raise ValueError(f"the recording has fingerprints of {sorted(kept)}, and not of {sorted(here)}: record it anew")
    return [name for name, value in here.items() if value != kept[name]]


def _hash(result: Tensor) -> str:
    raw = result.resolve_conj().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]
