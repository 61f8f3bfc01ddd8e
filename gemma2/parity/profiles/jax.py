"""google-deepmind/gemma, revision 7691fd4: gemma/gm/nn and gemma/gm/math.

The operations as they are written, each rounded to its own dtype, which is what JAX does where it runs them one by one.
Compiled as a whole, XLA fuses them and may leave roundings out. Compared with the same operations in JAX 0.10.2 on a
processor, not with Google's own module: in bfloat16 all but the angles are the same to the bit. The vocabulary of
Google's files has 128 rows more, all unused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2 import ops
from gemma2.model import Rotation
from gemma2.parity.bits import Bit, replacing
from gemma2.parity.parts import AttentionInParts, MLPInParts, NormInParts, ScoresInParts
from gemma2.parity.profiles.gemma_pytorch import HIDDEN, rotated_wide, unscaled_scores
from gemma2.parity.profiles.litgpt import gain


def like(x: Tensor, value: float) -> Tensor:
    """A Python number beside an array has the array's dtype in JAX; torch would compute with all its digits."""
    return torch.tensor(value, dtype=x.dtype)


def inverse_scale(x: Tensor, eps: float) -> Tensor:
    mean = ops.widened(x * x).mean(-1, keepdim=True).to(x.dtype)  # jnp.mean sums in float32
    # Wide, then rounded: torch's own bfloat16 reciprocal root is rounded twice.
    return torch.rsqrt(ops.widened(mean + like(x, eps))).to(x.dtype)


def normalized(x: Tensor, inverse: Tensor) -> Tensor:
    return x * inverse


def divided_turns(positions: Tensor, c: int, theta: float, wide: torch.dtype) -> Rotation:
    timescale = theta ** (2 * torch.arange(0, c // 2, dtype=wide, device=positions.device) / c)
    angle = positions[..., None].to(wide) / timescale
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def scaled_queries(q: Tensor, scale: float) -> Tensor:
    return q * like(q, scale)


def masked(scores: Tensor, visible: Tensor) -> Tensor:
    return torch.where(visible, scores, like(scores, HIDDEN))


def softmaxed(scores: Tensor, dtype: torch.dtype) -> Tensor:
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    total = ops.widened(powers).sum(-1, keepdim=True).to(scores.dtype)  # jnp.sum sums in float32
    return (powers / total).to(dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    cubed = like(gate, 0.044715) * (gate * gate * gate)
    inner = like(gate, 0.7978845608028654) * (gate + cubed)  # sqrt(2 / pi)
    return gate * (like(gate, 0.5) * (like(gate, 1.0) + torch.tanh(inner))) * up


BITS = (
    Bit(
        "norm_compute=act_dtype",
        "squares, their mean, its root and the product are each rounded to the activations' dtype; "
        "transformers computes them in float32",
        "_layers.py, RMSNorm.__call__",
        replacing(NormInParts, inverse_scale=inverse_scale, normalized=normalized),
    ),
    Bit(
        "norm_1p=param_dtype",
        "1 + w is rounded to the weights' dtype; transformers adds in float32",
        "_layers.py, RMSNorm.__call__",
        replacing(NormInParts, gain=gain),
    ),
    Bit(
        "rope_turn=divided",
        "angles are positions over theta ** (2i/c); transformers multiplies with the reciprocal",
        "_positional_embeddings.py, apply_rope",
        replacing(AttentionInParts, turns=divided_turns),
    ),
    Bit(
        "rope_mul=float32",
        "rotation is computed in float32 and rounded once; transformers rounds cosines, sines, products and sum",
        "_positional_embeddings.py, apply_rope",
        replacing(AttentionInParts, rotated=rotated_wide),
    ),
    Bit(
        "q_scale=before_rounded",
        "rotated queries are scaled by a number rounded to their dtype (27B in bfloat16: 0.0835 for 1/12)",
        "_modules.py, Attention.__call__",
        replacing(ScoresInParts, scaled_queries=scaled_queries, scaled_scores=unscaled_scores),
    ),
    Bit(
        "mask=-2.38e38",
        "hidden scores become that number, in their own dtype; transformers fills in the dtype's lowest",
        "_modules.py, K_MASK",
        replacing(ScoresInParts, masked=masked),
    ),
    Bit(
        "softmax=act_dtype",
        "powers, their sum and the quotient are each rounded to the scores' dtype; transformers computes in float32",
        "_modules.py, jax.nn.softmax",
        replacing(ScoresInParts, softmaxed=softmaxed),
    ),
    Bit(
        "gelu=act_dtype",
        "every operation of GELU is rounded to the activations' dtype; torch rounds once",
        "_modules.py, nn.gelu",
        replacing(MLPInParts, gated=gated),
    ),
)
