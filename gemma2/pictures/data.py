"""What a page's script reads: numbers and texts, compact, and safe inside a <script> element."""

from __future__ import annotations

import base64
import json
from typing import Any

import torch
from torch import Tensor

WHOLE = 65535  # a probability of 1


def script_json(value: Any) -> str:
    """JSON that no text in it can break out of a script. Raises ValueError for NaN, which is no JSON."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def packed(probabilities: Tensor) -> str:
    """Probabilities as unsigned 16-bit numbers, little-endian, in base64. One is 65535, so a step is 0.000015."""
    steps = (probabilities.double().clamp(0, 1) * WHOLE).round().to(torch.int32).flatten()
    low, high = (steps & 255).to(torch.uint8), (steps >> 8).to(torch.uint8)
    return base64.b64encode(torch.stack((low, high), dim=1).numpy().tobytes()).decode("ascii")
