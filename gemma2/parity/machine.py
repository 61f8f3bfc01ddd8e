"""Whether a recording's bits can be demanded of this machine: what its processor makes of a few fixed operations.

PyTorch leaves products, sums and exponentials to libraries that choose a kernel by processor, and kernels add in
different orders. So the same code gives other last bits on another processor. A recording therefore keeps fingerprints:
for each operation of a forward pass, in the shapes of the recording, a hash of its result on fixed numbers. Where all
of them come out the same, equal code must give equal bits. Where one differs, only rounding can be demanded.

The operations are PyTorch's own functions and none of this project's, so no change of the model can change them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

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


def factors(rows: int, columns: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[rows n] and [columns n] whose products nearly cancel in a sum over n. What is left of it shows how the sum was
    rounded on the way, even in bfloat16, which would hide it in any other."""
    half, rest = n // 2, n % 2
    x, w = numbers(rows, half).to(dtype), numbers(columns, half).to(dtype)
    pairs = torch.cat((x, x), dim=1), torch.cat((w, -(w + w * 2**-7)), dim=1)
    return F.pad(pairs[0], (0, rest)), F.pad(pairs[1], (0, rest))


@torch.no_grad()
def fingerprints(config: Gemma2Config, t: int, dtype: torch.dtype) -> dict[str, str]:
    """Operation -> hash of what this machine makes of it, for a prompt of t ids."""
    d, f, v, c = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    h, g = config.num_attention_heads, config.num_key_value_heads
    linears = {(d, h * c), (d, g * c), (d, (h + 2 * g) * c), (h * c, d), (d, f), (f, d), (d, v)}  # the third: q k v

    def linear(n: int, m: int) -> Tensor:
        x, w = factors(t, m, n, dtype)
        return F.linear(x[None], w)

    def by_head(columns: int, n: int) -> Tensor:
        x, y = factors(h * t, h * columns, n, dtype)
        return x.view(1, h, t, n) @ y.view(1, h, columns, n).transpose(2, 3)

    wide, scores, gate = numbers(1, t, d), numbers(1, h, t, t), numbers(1, t, f)
    found = {f"linear {n} to {m}": linear(n, m) for n, m in sorted(linears)}
    found |= {"scores": by_head(t, c), "mix": by_head(c, t)}
    found["mean"] = wide.square().mean(-1, keepdim=True)
    found["root"] = torch.rsqrt(wide.abs() + 1e-6)
    found["softmax"] = F.softmax(scores, dim=-1, dtype=torch.float32)
    found["turn"] = torch.view_as_real(torch.polar(torch.ones(t, c // 2, dtype=torch.float32), numbers(t, c // 2) * t))
    for kind in {dtype, torch.float32}:  # narrow ones are computed in float32 inside, and rounding hides much of it
        found[f"gelu {kind}"] = F.gelu(gate.to(kind), approximate="tanh")
        found[f"tanh {kind}"] = torch.tanh(scores.to(kind))
    return {name: _hash(value) for name, value in found.items()}


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
    raw = result.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]
