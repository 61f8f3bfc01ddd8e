"""Dtypes and their names: PyTorch's, and those that safetensors and ggml write into files."""

from __future__ import annotations

import torch

# What a model can run in. float64 also holds what any checkpoint stores, and is the dtype of truth; float16 must be
# forced, see `load`.
RUNNABLE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "float16": torch.float16}
# What a Gemma 2 checkpoint may store. safetensors and ggml have the same names for these; llama.cpp runs no F64.
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PLAIN = FLOATS | {"F64": torch.float64}
FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # bfloat16 holds all their values
# safetensors' names. The others are known only to be named in a refusal.
SAFETENSORS = (PLAIN | FLOAT8) | {
    "C64": torch.complex64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_STORED = {dtype: name for name, dtype in SAFETENSORS.items()}


def dtype_name(dtype: torch.dtype | str) -> str:
    """PyTorch's name for a dtype without `torch.`, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def stored_name(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype, and ggml too where it has one, such as "BF16"; else PyTorch's name."""
    return _STORED.get(dtype, dtype_name(dtype))
