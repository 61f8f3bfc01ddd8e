"""The forms of the package bitsandbytes, quantized on the way in, for linears alone, as transformers does it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemma2.fast.held import HeldMatrix

EACH = 64  # values of nf4 that share a scale; the package's default
OUTLIERS = 6.0  # columns of x with larger values are multiplied in floats; the package's default in transformers


@functools.cache
def bitsandbytes() -> Any:
    """The package. Raises ImportError with what to install."""
    try:
        import bitsandbytes as found
        import bitsandbytes.functional
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f'weights="bnb-nf4" and "bnb-int8" need bitsandbytes, which cannot be imported: pip install bitsandbytes '
            f"({error})"
        ) from None
    # Every product says once more that LLM.int8() computes in float16 and int8.
    log = logging.getLogger("bitsandbytes.autograd._functions")
    log.addFilter(lambda record: "inputs will be cast" not in record.getMessage())
    return found


class _Held(HeldMatrix):
    """What both forms have: codes, and scales that stay float32 whatever the model is turned into."""

    codes: Tensor
    scales: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Held:
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.scales.device)
        return self


class NF4(_Held):
    """NF4: a code for one of 16 normal quantiles, and a float32 scale for every 64 values. QLoRA, arXiv:2305.14314."""

    @property
    def held_bytes(self) -> int:
        return self.rows * (self.width // 2 + self.width // EACH * 4)

    def reserve(self, device: torch.device) -> None:
        self.register_buffer("codes", torch.empty(self.rows, self.width // 2, dtype=torch.uint8, device=device))
        shape = (self.rows, self.width // EACH)
        self.register_buffer("scales", torch.empty(shape, dtype=torch.float32, device=device))

    def keep(self, start: int, values: Tensor) -> None:
        values = values.to(device=self.codes.device, dtype=self.like.dtype)
        codes, state = bitsandbytes().functional.quantize_4bit(values, blocksize=EACH, quant_type="nf4")
        self.codes[start : start + len(values)] = codes.view(len(values), -1)
        self.scales[start : start + len(values)] = state.absmax.view(len(values), -1)

    def values(self, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        made: Tensor = bitsandbytes().functional.dequantize_4bit(
            self.codes[start:stop].reshape(-1, 1), self._state(start, stop)
        )
        return made

    def kernel(self, x: Tensor) -> Tensor | None:
        if x.device.type != "cuda" or len(x) > 1:
            return None
        codes = self.codes.view(-1, 1)
        made: Tensor = bitsandbytes().matmul_4bit(x, codes.t(), quant_state=self._state(0, self.rows))
        return made

    def _state(self, start: int, stop: int) -> Any:
        package = bitsandbytes().functional
        return package.QuantState(
            absmax=self.scales[start:stop].flatten(),
            shape=torch.Size((stop - start, self.width)),
            code=package.get_4bit_type("nf4", device=self.codes.device, blocksize=EACH),
            blocksize=EACH,
            quant_type="nf4",
            dtype=self.like.dtype,
        )


class LLMInt8(_Held):
    """int8 with a float32 scale a row, times x in int8, but outlying columns in floats. LLM.int8(), arXiv:2208.07339.

    The product with a row of x depends on the other rows, because a column is outlying if it is in any of them.
    """

    @property
    def held_bytes(self) -> int:
        return self.rows * (self.width + 4)

    def reserve(self, device: torch.device) -> None:
        self.register_buffer("codes", torch.empty(self.rows, self.width, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.empty(self.rows, dtype=torch.float32, device=device))

    def keep(self, start: int, values: Tensor) -> None:
        values = values.to(device=self.codes.device, dtype=torch.float16)
        codes, scales, _ = bitsandbytes().functional.int8_vectorwise_quant(values)
        self.codes[start : start + len(values)] = codes
        self.scales[start : start + len(values)] = scales

    def values(self, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        scales = self.scales[start:stop, None] / 127
        return (self.codes[start:stop] * scales).to(self.like.dtype)

    def kernel(self, x: Tensor) -> Tensor | None:
        package = bitsandbytes()
        state = package.MatmulLtState()
        state.CB, state.SCB, state.threshold, state.has_fp16_weights = self.codes, self.scales, OUTLIERS, False
        state.is_training = False
        made: Tensor = package.matmul(x, self.codes, state=state)
        return made
