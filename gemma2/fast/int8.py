"""int8 with one scale a row: half of bfloat16's memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma2.fast.held import HeldMatrix

MOST = 127  # the largest code; -128 is left out, so that a row and its negative are held alike
FEW = 24  # rows of x up to which the kernel is faster than tiles, in bfloat16; in float32 it never is


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

    def values(self, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        return self._numbers(start, stop, room).mul_(self.scales[start:stop, None])

    def multiply(self, x: Tensor, start: int, stop: int, room: Tensor, out: Tensor) -> None:
        torch.mul(F.linear(x, self._numbers(start, stop, room)), self.scales[start:stop], out=out)

    def _numbers(self, start: int, stop: int, room: Tensor | None) -> Tensor:
        """The codes of some rows as numbers, which all dtypes hold exactly."""
        shape = (stop - start, self.width)
        numbers = torch.empty(shape, dtype=self.like.dtype, device=self.like.device) if room is None else room
        return numbers.flatten()[: (stop - start) * self.width].view(shape).copy_(self.codes[start:stop])

    def at(self, ids: Tensor) -> Tensor:
        return self.codes[ids].to(self.like.dtype) * self.scales[ids][..., None]

    def kernel(self, x: Tensor) -> Tensor | None:
        few = x.device.type == "cpu" and x.dtype == torch.bfloat16 and len(x) <= FEW
        return torch._weight_int8pack_mm(x.contiguous(), self.codes, self.scales) if few else None
