"""google-deepmind/gemma 3.3.0: gemma/gm/nn and gemma/gm/math.

The operations as they are written, each rounded to its own dtype, and what XLA leaves out of that when it compiles the
whole, as Google's `Transformer` always is (`nn.jit`): the changes named `=compiled`. Without these two the profile is
JAX with compilation off, operation by operation.

Measured against Google's own module with jax 0.10.2 on a processor, in bfloat16, 64 ids and a window of 16, shapes like
each of the three sizes: every operation between two products has its bits. The products themselves XLA leaves to a
library (YNNPACK) that sums them in an order of its own, another for another shape. Where XLA is told to use Eigen
instead, it sums in the order of k (in blocks where k is long), and with products summed in that order here too all
sites of Google's run are met to the bit (tests/parity/test_deepmind.py), but for one attention weight of 131,072 in the
shape of 9B, 2e-9 off. In float32, reciprocal roots, powers, cosines and the order in which norms and softmax sum are
XLA's own, an ulp or a few off, and no change here follows them: caps, products in that order and, not compiled, GELU
are met. The vocabulary of Google's files has 128 rows more, all unused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2 import ops
from gemma2.numerics.changes import Change, replacing
from gemma2.numerics.parts import (
    ActivationInParts,
    ApplyRotaryInParts,
    CapInParts,
    NormInParts,
    RotaryInParts,
    ScoresInParts,
)
from gemma2.numerics.profiles.gemma_pytorch import HIDDEN, apply_rotary_wide, unscaled_scores
from gemma2.numerics.profiles.litgpt import gain

# Between these two the ratio is taken; below the first tanh(x) is x.
TANH_START, TANH_END = 0.0004, 7.99881172180175781
TANH_ABOVE = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
TANH_BELOW = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def like(x: Tensor, value: float) -> Tensor:
    """A Python number beside an array has the array's dtype in JAX; torch would compute with all its digits."""
    return torch.tensor(value, dtype=x.dtype, device="cpu")


def normal(x: Tensor) -> Tensor:
    """XLA takes numbers below the smallest normal one for 0."""
    return x.masked_fill(x.abs() < torch.finfo(x.dtype).tiny, 0.0)


def inverse_scale(x: Tensor, eps: float) -> Tensor:
    mean = ops.upcast(x * x).mean(-1, keepdim=True).to(x.dtype)  # jnp.mean sums in float32
    # Wide, then rounded: torch's own bfloat16 reciprocal root is rounded twice.
    return torch.rsqrt(ops.upcast(mean + like(x, eps))).to(x.dtype)


def inverse_scale_compiled(x: Tensor, eps: float) -> Tensor:
    mean = ops.upcast(x).square().mean(-1, keepdim=True).to(x.dtype)
    return torch.rsqrt(ops.upcast(mean + like(x, eps))).to(x.dtype)


def normalized(x: Tensor, inverse: Tensor) -> Tensor:
    return x * inverse


def divided_cos_sin(positions: Tensor, c: int, theta: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    timescale = theta ** (2 / c * torch.arange(0, c // 2, dtype=wide, device=positions.device))
    angle = positions[..., None].to(wide) / timescale
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def scaled_queries(q: Tensor, scale: float) -> Tensor:
    return q * like(q, scale)


def masked(scores: Tensor, visible: Tensor) -> Tensor:
    return torch.where(visible, scores, like(scores, HIDDEN))


def softmaxed(scores: Tensor, dtype: torch.dtype) -> Tensor:
    powers = normal((scores - scores.amax(-1, keepdim=True)).exp())
    total = ops.upcast(powers).sum(-1, keepdim=True).to(scores.dtype)  # jnp.sum sums in float32
    return normal((powers / total).to(dtype))


def softmaxed_compiled(scores: Tensor, dtype: torch.dtype) -> Tensor:
    powers = normal(ops.upcast(scores - scores.amax(-1, keepdim=True)).exp())
    total = powers.sum(-1, keepdim=True).to(scores.dtype)
    return normal((ops.upcast(powers.to(scores.dtype)) * (1 / ops.upcast(total))).to(dtype))


def divided(x: Tensor, cap: float) -> Tensor:
    return (ops.upcast(x) * torch.tensor(1 / cap, dtype=torch.float32, device="cpu")).to(x.dtype)


def tanh(x: Tensor) -> Tensor:
    """XLA's, in float32: x times a ratio of polynomials in its square, each step fused, up to 4.3 ulp off."""
    wide = x.float().clamp(-TANH_END, TANH_END)
    square = (wide * wide).double()

    def polynomial(first: float, *others: float) -> Tensor:
        """In float64 a product of two float32 numbers is exact: rounded after the sum, as a fused step is."""
        value = torch.full_like(wide, first)
        for other in others:
            value = (square * value.double() + torch.tensor(other, dtype=torch.float32, device="cpu").double()).float()
        return value

    ratio = wide * polynomial(*TANH_ABOVE) / polynomial(*TANH_BELOW)
    return torch.where(wide.abs() < TANH_START, wide, ratio).to(x.dtype)


def gelu(gate: Tensor) -> Tensor:
    cubed = like(gate, 0.044715) * (gate * gate * gate)
    inner = like(gate, 0.7978845608028654) * (gate + cubed)  # sqrt(2 / pi)
    return gate * (like(gate, 0.5) * (like(gate, 1.0) + tanh(inner)))


CHANGES = (
    Change(
        "norm_compute=act_dtype",
        "squares, their mean, its root and the product are each rounded to the activations' dtype; "
        "transformers computes them in float32",
        "_layers.py, RMSNorm.__call__",
        replacing(NormInParts, inverse_scale=inverse_scale, normalized=normalized),
    ),
    Change(
        "norm_1p=param_dtype",
        "1 + w is rounded to the weights' dtype; transformers adds in float32",
        "_layers.py, RMSNorm.__call__",
        replacing(NormInParts, gain=gain),
    ),
    Change(
        "rope_turn=divided",
        "angles are positions over theta ** (2i/c); transformers multiplies with the reciprocal",
        "_positional_embeddings.py, apply_rope",
        replacing(RotaryInParts, cos_sin=divided_cos_sin),
    ),
    Change(
        "rope_mul=float32",
        "rotation is computed in float32 and rounded once; transformers rounds cosines, sines, products and sum",
        "_positional_embeddings.py, apply_rope",
        replacing(ApplyRotaryInParts, apply_rotary=apply_rotary_wide),
    ),
    Change(
        "q_scale=before_rounded",
        "rotated queries are scaled by a number rounded to their dtype (27B in bfloat16: 0.0835 for 1/12)",
        "_modules.py, Attention.__call__",
        replacing(ScoresInParts, scaled_queries=scaled_queries, scaled_scores=unscaled_scores),
    ),
    Change(
        "mask=-2.38e38",
        "hidden scores become that number, in their own dtype; transformers fills in the dtype's lowest",
        "_modules.py, K_MASK",
        replacing(ScoresInParts, masked=masked),
    ),
    Change(
        "softmax=act_dtype",
        "powers, their sum and the quotient are each rounded to the scores' dtype, subnormal ones to 0; transformers "
        "computes in float32",
        "_modules.py, jax.nn.softmax",
        replacing(ScoresInParts, softmaxed=softmaxed),
    ),
    Change(
        "gelu=act_dtype",
        "every operation of GELU is rounded to the activations' dtype, and tanh is XLA's; torch rounds once",
        "_modules.py, nn.gelu",
        replacing(ActivationInParts, gelu=gelu),
    ),
    Change(
        "cap=reciprocal",
        "caps multiply by 1 / cap, rounded to float32, as XLA rewrites the division; transformers divides by the cap",
        "_modules.py, Attention.__call__; _transformer.py, Transformer.__call__; XLA's algebraic simplifier",
        replacing(CapInParts, divided=divided),
    ),
    Change(
        "tanh=xla",
        "the caps' tanh is XLA's, a ratio of polynomials in float32, up to 4.3 ulp off",
        "_modules.py, Attention.__call__; _transformer.py, Transformer.__call__; XLA, tanh in float32",
        replacing(CapInParts, tanh=tanh),
    ),
    Change(
        "norm_sum=compiled",
        "compiled, XLA leaves out one rounding of the norm: squares are summed as they are in float32",
        "_layers.py, RMSNorm.__call__, under the nn.jit of _transformer.py",
        replacing(NormInParts, inverse_scale=inverse_scale_compiled),
    ),
    Change(
        "softmax_sum=compiled",
        "compiled, XLA sums the powers as they are in float32, and multiplies by the sum's reciprocal in float32",
        "_modules.py, jax.nn.softmax, under the nn.jit of _transformer.py",
        replacing(ScoresInParts, softmaxed=softmaxed_compiled),
    ),
)
