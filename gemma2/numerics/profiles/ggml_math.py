"""Arithmetic of ggml's processor kernels and of the C library under them, rounding for rounding, in torch.

Checked against llama-cpp-python 0.3.36, compiled for a processor with AVX-512 (with its VNNI and BF16 parts) over
glibc 2.36. Kernels for other processors add in other orders; glibc 2.41 rounds tanhf correctly and so differs.
"""

from __future__ import annotations

import torch
from torch import Tensor

CACHED = 2**16  # numbers of eight bytes that fit a processor core's cache


def f32(value: float | str) -> Tensor:
    """A float32 constant; torch would compute with a Python number in higher precision."""
    return torch.tensor(float.fromhex(value) if isinstance(value, str) else value, dtype=torch.float32, device="cpu")


def over(a: Tensor, b: Tensor) -> Tensor:
    """a / b as C divides; torch may take the reciprocal of b first when a is a Python number."""
    return torch.div(a, b)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c with one rounding: float64 holds the product exactly, and a sum that it rounds hardly ever ties."""
    return (a.double() * b.double() + c.double()).float()


def halved_sum(x: Tensor) -> Tensor:
    """The sum over the last axis, a power of two wide, as vector units take it: the upper half onto the lower."""
    while x.shape[-1] > 1:
        lower, upper = x.chunk(2, dim=-1)
        x = lower + upper
    return x[..., 0]


def padded(x: Tensor, multiple: int) -> Tensor:
    """x with zeros after its last axis, up to a multiple."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % multiple))


def lane_product(x: Tensor, w: Tensor, lanes: int, group: int = 1) -> Tensor:
    """x [... t n] times w [... m n] -> [... t m], summed in float32 as vector units do.

    Each of `lanes` running sums takes `group` neighbouring products at a time, which are added exactly; at the end the
    lanes are added by halves. (llamafile/sgemm.cpp, gemm_bloc and gemm4xN; vec.cpp, ggml_vec_dot_f32)
    """
    steps = (padded(part, lanes * group).double().unflatten(-1, (-1, lanes, group)) for part in (x, w))
    x, w = (part.movedim((-3, -2), (0, 1)) for part in steps)  # [steps lanes ... t group], [steps lanes ... m group]
    few = max(
        1, CACHED // (lanes * w[0, 0, ..., 0].numel())
    )  # rows at a time, so that sums stay in the cache: 5 x faster
    return torch.cat([_lane_sums(rows, w) for rows in x.split(few, dim=-2)], dim=-2)


def _lane_sums(x: Tensor, w: Tensor) -> Tensor:
    sums = torch.zeros((), dtype=torch.float32, device=x.device)
    for a, b in zip(x, w.transpose(-1, -2), strict=True):
        wide = torch.addcmul(sums.double(), a, b) if a.shape[-1] == 1 else sums.double() + a @ b
        sums = wide.float()
    return halved_sum(sums.movedim(0, -1))


def exp(x: Tensor) -> Tensor:
    """ggml's expf for x <= 0, good to 2.2 ulp: 2^n times a polynomial of what remains. (vec.h, ggml_v_expf)"""
    shift = f32("0x1.8p23")
    n = fma(x, f32("0x1.715476p+0"), shift) - shift
    b = fma(-n, f32("0x1.7f7d1cp-20"), fma(-n, f32("0x1.62e4p-1"), x))
    u = b * b
    upper = fma(
        fma(f32("0x1.0e4020p-7"), b, f32("0x1.573e2ep-5")), u, fma(f32("0x1.555e66p-3"), b, f32("0x1.fffdb6p-2"))
    )
    j = fma(upper, u, fma(f32("0x1.ffffecp-1"), b, f32(1.0)))
    return torch.where(n.abs() > 192, 0.0, torch.ldexp(j.double(), n.double()).float())


def expm1(x: Tensor) -> Tensor:
    """glibc 2.36's expm1f (s_expm1f.c, after FreeBSD's) where tanhf asks for it: x in (-2, 0] and in [2, 44]."""
    k = torch.where(x < 0, torch.trunc(f32(1.4426950216) * x - 0.5), torch.trunc(f32(1.4426950216) * x + 0.5))
    k = torch.where(x.abs() <= f32(0.34657359), 0.0, torch.where(x.abs() < f32(1.0397208), torch.sign(x), k))
    high, low = x - k * f32(6.9313812256e-01), k * f32(9.0580006145e-06)
    r = high - low
    lost = (high - r) - low
    half = 0.5 * r
    s = r * half
    polynomial = f32(-2.0109921195e-07)
    for coefficient in (4.0082177293e-06, -7.9365076090e-05, 1.5873016091e-03, -3.3333335072e-02, 1.0):
        polynomial = f32(coefficient) + s * polynomial
    t = 3.0 - polynomial * half
    e = s * ((polynomial - t) / (6.0 - r * t))
    small = torch.where(x.abs() < 2.0**-25, x, r - (r * e - s))
    e = (r * (e - lost) - lost) - s
    power = torch.exp2(k.double()).float()
    least = 1.0 / power
    wide = torch.where(k > 56, (1.0 - (e - r)) * power - 1.0, ((r - (e + least)) + 1.0) * power)
    middle = ((1.0 - least) - (e - r)) * power
    negative = torch.where(k == -1, 0.5 * (r - e) - 0.5, (1.0 - (e - r)) * power - 1.0)
    return torch.where(k == 0, small, torch.where(k < 0, negative, torch.where(k < 23, middle, wide)))


def tanh(x: Tensor) -> Tensor:
    """glibc 2.36's tanhf, which is up to 2 ulp off. (sysdeps/ieee754/flt-32/s_tanhf.c)"""
    size = x.abs()
    far, near = expm1(2.0 * size), expm1(-2.0 * size)
    value = torch.where(size >= 1, 1.0 - f32(2.0) / (far + 2.0), -near / (near + 2.0))
    value = torch.where(size < 22, value, 1.0)
    return torch.where(size < 2.0**-55, x, torch.copysign(value, x))
