"""int8 with one scale a row: half of bfloat16's memory."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2.fast.held import HeldMatrix

MOST = 127  # the largest code; -128 is left out, so that a row and its negative are held alike
FEW = 8  # rows of x up to which the kernel is faster than tiles, in bfloat16


class Int8(HeldMatrix):
    """Row i is codes[i] * scales[i], which is symmetric about zero. The scales are bfloat16 numbers in every dtype."""

    codes: Tensor
    scales: Tensor

    @property
    def held_bytes(self) -> int:
        return self.rows * (self.width + self.like.itemsize)

    def reserve(self, device: torch.device) -> None:
        self.register_buffer("codes", torch.empty(self.rows, self.width, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.empty(self.rows, dtype=self.like.dtype, device=device))

    def keep(self, start: int, values: Tensor) -> None:
        # The scale is rounded first, so that its rounding is no error of the values. 2^-126 stands for an empty row's.
        scales = (values.abs().amax(1) / MOST).clamp_min(torch.finfo(torch.float32).tiny).bfloat16().float()
        codes = (values / scales[:, None]).round_().clamp_(-MOST, MOST)
        self.codes[start : start + len(values)] = codes.to(torch.int8)
        self.scales[start : start + len(values)] = scales

    def values(self, start: int, stop: int) -> Tensor:
        return self.codes[start:stop].to(self.like.dtype) * self.scales[start:stop, None]

    def at(self, ids: Tensor) -> Tensor:
        return self.codes[ids].to(self.like.dtype) * self.scales[ids][..., None]

    def kernel(self, x: Tensor) -> Tensor | None:
        few = x.device.type == "cpu" and len(x) <= (FEW if x.dtype == torch.bfloat16 else 1)
        return torch._weight_int8pack_mm(x, self.codes, self.scales) if few and x.dtype != torch.float64 else None
