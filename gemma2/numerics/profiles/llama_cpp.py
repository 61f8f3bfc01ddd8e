"""llama.cpp on a processor, as in llama-cpp-python 0.3.36: src/models/gemma2.cpp and ggml/src/ggml-cpu.

The profile is that of keys and values kept in float32 (`type_k` and `type_v` 0) and no flash attention: the only
setting in which nothing but the arithmetic of the weights' type is rounded to less than float32.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2.numerics.changes import Change, Storage, replacing
from gemma2.numerics.parts import (
    ActivationInParts,
    ApplyRotaryInParts,
    CapInParts,
    EmbeddingInParts,
    HeadInParts,
    LinearInParts,
    NormInParts,
    RotaryInParts,
    ScoresInParts,
)
from gemma2.numerics.profiles.gemma_pytorch import scaled_queries, unscaled_scores
from gemma2.numerics.profiles.ggml_math import exp, f32, fma, halved_sum, lane_product, over, tanh
from gemma2.numerics.profiles.ggml_products import partner, rounded, summed
from gemma2.tied import EMBEDDING


def wide_rows(rows: Tensor) -> Tensor:
    return rows.float()


def unrounded_scale(scale: float, dtype: torch.dtype) -> Tensor:
    return f32(scale)


def inverse_scale(x: Tensor, eps: float) -> Tensor:
    """float32 squares summed in float64; one float32 root, one float32 division."""
    mean = (x.float().square().double().sum(-1, keepdim=True) / x.shape[-1]).float() + f32(eps)
    root = mean.double().sqrt().float()  # torch's float32 root is not always the nearest
    return over(f32(1.0), root)


def recurrent_cos_sin(positions: Tensor, c: int, theta: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The angle of each pair is that of the pair before it times theta ** (-2/c), rounded each time."""
    ratio = f32(theta ** (-2 / c))
    angles = [positions.float()]
    for _ in range(c // 2 - 1):
        angles.append(angles[-1] * ratio)
    angle = torch.stack(angles, dim=-1)
    turn = torch.polar(torch.ones_like(angle), angle)  # the C library's cosine and sine, where torch.cos has its own
    turn = torch.cat((turn, turn), dim=-1)
    return turn.real, turn.imag


def apply_rotary_fused(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The compiler makes one of each pair of products part of a fused multiply-add."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = (part[:, :, None, : x.shape[-1] // 2] for part in (cos, sin))
    turned = fma(first, cos, -(second * sin)), fma(first, sin, second * cos)
    return torch.cat(turned, dim=-1).to(x.dtype)


def divided(x: Tensor, cap: float) -> Tensor:
    return x * over(f32(1.0), f32(cap)).to(x.dtype)


def tanh_of_c(x: Tensor) -> Tensor:
    return tanh(x.float()).to(x.dtype)


def masked(scores: Tensor, visible: Tensor) -> Tensor:
    """llama.cpp has no rows of padding, which see nothing: they stay finite here."""
    hidden = torch.where(visible.any(-1, keepdim=True), -torch.inf, torch.finfo(scores.dtype).min)
    return torch.where(visible, scores, hidden.to(scores.dtype))


def softmaxed(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Its own exp; sums of 16 by halves in float32, the sum of those in float64."""
    scores = scores.float()
    powers = exp((scores - scores.amax(-1, keepdim=True)).clamp(min=-1e4))
    total = (
        halved_sum(F.pad(powers, (0, -powers.shape[-1] % 16)).unflatten(-1, (-1, 16))).double().sum(-1, keepdim=True)
    )
    return (powers * (1.0 / total).float()).to(dtype)


def matched_in_lanes(q: Tensor, k: Tensor) -> Tensor:
    """Queries lie scattered in memory, which llamafile's kernels do not take. (ggml-cpu.c, src1_cont)"""
    return lane_product(q, k, lanes=64).to(q.dtype)


def mixed_in_lanes(pattern: Tensor, v: Tensor) -> Tensor:
    return lane_product(pattern, v.transpose(-1, -2), lanes=64 if pattern.shape[-2] == 1 else 16).to(v.dtype)


def gelu_by_table(gate: Tensor) -> Tensor:
    """GELU of a float16, as a float16: ggml looks it up in a table of all 65,536. (vec.h, ggml_vec_geglu_f32)"""
    x = gate.half().float()
    inner = f32(0.79788456080286535587989211986876) * x * fma(f32(0.044715) * x, x, f32(1.0))
    looked_up = (0.5 * x * (1.0 + tanh(inner))).half().float()
    return torch.where(gate <= -10, 0.0, torch.where(gate >= 10, gate, looked_up)).to(gate.dtype)


def round_activations(path: str, module: nn.Module, storage: Storage) -> None:
    if isinstance(module, LinearInParts | HeadInParts):
        module.received = partial(rounded, to=partner(storage[weight_of(path, module)].type))


def sum_in_lanes(path: str, module: nn.Module, storage: Storage) -> None:
    if isinstance(module, LinearInParts | HeadInParts):
        stored = storage[weight_of(path, module)]
        module.product = partial(summed, kind=stored.type, scales=stored.scales() if stored.scales else None)
    replacing(ScoresInParts, product=matched_in_lanes, mixed=mixed_in_lanes)(path, module, storage)


def weight_of(path: str, module: nn.Module) -> str:
    return EMBEDDING if isinstance(module, HeadInParts) else f"{path}.weight"


CHANGES = (
    Change(
        "stream=float32",
        "activations are float32 from the embedding on, whatever the weights are stored in",
        "ggml.c, ggml_get_rows",
        replacing(EmbeddingInParts, stream=wide_rows),
    ),
    Change(
        "embed_scale=float32",
        "the embedding is scaled by sqrt(d) in float32; transformers rounds the scale to the weights' dtype",
        "gemma2.cpp, ggml_scale(inpL, sqrtf(n_embd))",
        replacing(EmbeddingInParts, rounded_scale=unrounded_scale),
    ),
    Change(
        "gelu=float16",
        "GELU is looked up in a table over float16, so its input and output are rounded to that; 0 and x beyond +-10",
        "ggml-cpu/vec.h, ggml_vec_geglu_f32",
        replacing(ActivationInParts, gelu=gelu_by_table),
    ),
    Change(
        "activations=partner",
        "what meets a weight is first rounded to the weight type's partner: float16, bfloat16, or 8 bits in blocks",
        "ggml-cpu/ggml-cpu.c, type_traits_cpu[].vec_dot_type",
        round_activations,
    ),
    Change(
        "sums=lanes",
        "products are summed in float32 in the lanes of a vector unit, whole blocks of 8-bit products at a time",
        "ggml-cpu/llamafile/sgemm.cpp, ggml-cpu/tiled/tiled-kernel.cpp, ggml-cpu/vec.cpp",
        sum_in_lanes,
    ),
    Change(
        "norm_sum=float64",
        "squares are summed in float64, and the root is one float32 division",
        "ggml-cpu/ops.cpp, ggml_compute_forward_rms_norm_f32",
        replacing(NormInParts, inverse_scale=inverse_scale),
    ),
    Change(
        "rope_turn=recurrence",
        "a pair's angle is the one before it times theta ** (-2/c) in float32; transformers takes each power anew",
        "ggml-cpu/ops.cpp, ggml_rope_cache_init",
        replacing(RotaryInParts, cos_sin=recurrent_cos_sin),
    ),
    Change(
        "rope_mul=fused",
        "rotation is in float32, and one of its two products is not rounded",
        "ggml-cpu/ops.cpp, rotate_pairs",
        replacing(ApplyRotaryInParts, apply_rotary=apply_rotary_fused),
    ),
    Change(
        "q_scale=before",
        "rotated queries are scaled before they meet the keys; transformers scales the products",
        "gemma2.cpp, ggml_scale(Qcur, f_attention_scale)",
        replacing(ScoresInParts, scaled_queries=scaled_queries, scaled_scores=unscaled_scores),
    ),
    Change(
        "cap=reciprocal",
        "caps multiply by 1 / cap, rounded to float32; transformers divides by the cap",
        "gemma2.cpp and llama-graph.cpp, ggml_scale(1.0f / softcapping)",
        replacing(CapInParts, divided=divided),
    ),
    Change(
        "tanh=glibc",
        "tanh is the C library's tanhf, up to 2 ulp off",
        "ggml-cpu/unary-ops.cpp, op_tanh; glibc 2.36, s_tanhf.c",
        replacing(CapInParts, tanh=tanh_of_c),
    ),
    Change(
        "mask=-inf",
        "masked scores are minus infinity; transformers fills in the lowest finite number",
        "llama-graph.cpp, attn_inp_kq_mask",
        replacing(ScoresInParts, masked=masked),
    ),
    Change(
        "softmax=ggml",
        "softmax has its own exp, sums of 16 in float32, and a sum of those in float64",
        "ggml-cpu/vec.cpp, ggml_vec_soft_max_f32",
        replacing(ScoresInParts, softmaxed=softmaxed),
    ),
)
