"""How ggml packs numbers into tables: the formats whose integers are places in a list of levels or in a grid.

One function a format, as in `ggml_blocks`. The tables are ggml's constants; gguf-py has them, and nobody should type
them anew.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gemma2.checkpoints.ggml_blocks import Parts, bits, field, half, halves

# A number is an index into a table of 16 levels.


def _levels(raw: Tensor, run: int, levels: Sequence[int]) -> Tensor:
    """[n, m] bytes -> int8 [n, m / run, 2, run]; both halves of a byte are looked up at once."""
    pairs = _pairs(tuple(levels), raw.device).index_select(0, raw.flatten().int())
    return pairs.view(torch.int8).view(len(raw), -1, run, 2).transpose(2, 3)


@cache
def _pairs(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """int16 [256]: the levels of the low and the high half of every byte, as two bytes."""
    pairs = [[levels[byte & 15], levels[byte >> 4]] for byte in range(256)]
    return torch.tensor(pairs, dtype=torch.int8, device="cpu").view(torch.int16).flatten().to(device)


def iq4_nl(blocks: Tensor) -> Parts:
    return Parts(_levels(field(blocks, 2, 18), 16, _tables("IQ4_NL").kvalues), half(blocks, 0))


def iq4_xs(blocks: Tensor) -> Parts:
    high = (field(blocks, 2, 4, torch.int16).int() >> _row(range(0, 16, 2), blocks)) & 3
    scale = half(blocks, 0) * ((halves(field(blocks, 4, 8)) | high << 4) - 32)
    return Parts(_levels(field(blocks, 8, 136), 16, _tables("IQ4_NL").kvalues), scale)


def mxfp4(blocks: Tensor) -> Parts:
    # A power of two, halved because the levels are doubled: 2^(e - 128), subnormal below e = 2.
    scale = torch.tensor([2.0 ** (e - 128) for e in range(256)], dtype=torch.float32, device=blocks.device)
    return Parts(_levels(field(blocks, 1, 17), 16, _tables("MXFP4").kvalues), scale[field(blocks, 0, 1).int()])


def nvfp4(blocks: Tensor) -> Parts:
    # Unsigned 4-bit exponent and 3-bit mantissa, halved likewise; 0x7F is what the format calls NaN, taken as 0.
    scales = [(m * 2.0**-9 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)) / 2 for e in range(16) for m in range(8)]
    scale = torch.tensor(scales * 2, dtype=torch.float32, device=blocks.device)
    scale[0x7F] = 0.0
    q = _levels(field(blocks, 4, 36), 8, _tables("NVFP4").kvalues)
    return Parts(q, scale[field(blocks, 0, 4).int()])


# A number is a place in a grid of 8 (or 4) neighbours, perhaps with a sign each.


def iq2_xxs(blocks: Tensor) -> Parts:
    words = field(blocks, 2, 66, torch.int32).view(-1, 8, 2)
    places = words[..., :1].contiguous().view(torch.uint8)  # [n, 8, 4]
    scale = half(blocks, 0) * (0.5 + (words[..., 1] >> 28 & 15)) * 0.25
    return Parts(_grid("IQ2_XXS", places) * _packed_signs(words[..., 1]), scale)


def iq2_xs(blocks: Tensor) -> Parts:
    words = field(blocks, 2, 66, torch.int16).int()
    q = _grid("IQ2_XS", words & 511) * _signs(_parity_signs(blocks.device)[words >> 9 & 127])
    return Parts(q, half(blocks, 0) * (0.5 + halves(field(blocks, 66, 74))) * 0.25)


def iq2_s(blocks: Tensor) -> Parts:
    high = field(blocks, 66, 74).int()
    places = field(blocks, 2, 34).int() | ((high[..., None] >> _row(range(0, 8, 2), blocks)) & 3).flatten(1) << 8
    q = _grid("IQ2_S", places) * _signs(field(blocks, 34, 66))
    return Parts(q, half(blocks, 0) * (0.5 + halves(field(blocks, 74, 82))) * 0.25)


def iq3_xxs(blocks: Tensor) -> Parts:
    words = field(blocks, 66, 98, torch.int32)
    q = _grid("IQ3_XXS", field(blocks, 2, 66)).view(-1, 8, 4, 8) * _packed_signs(words)
    return Parts(q, half(blocks, 0) * (0.5 + (words >> 28 & 15)) * 0.5)


def iq3_s(blocks: Tensor) -> Parts:
    places = field(blocks, 2, 66).int() | bits(field(blocks, 66, 74)).flatten(1).int() << 8
    q = _grid("IQ3_S", places).view(-1, 32, 8) * _signs(field(blocks, 74, 106))
    return Parts(q, half(blocks, 0) * (1 + 2 * halves(field(blocks, 106, 110))))


def iq1_s(blocks: Tensor) -> Parts:
    high = field(blocks, 34, 50, torch.int16).int()
    places = field(blocks, 2, 34).int() | ((high[..., None] >> _row(range(0, 12, 3), blocks)) & 7).flatten(1) << 8
    scale = half(blocks, 0) * (2 * (high >> 12 & 7) + 1)
    return Parts(_off_centre(_grid("IQ1_S", places).view(-1, 8, 32), high >> 15 & 1), scale * 0.125)


def iq1_m(blocks: Tensor) -> Parts:
    words = field(blocks, 48, 56, torch.int16).int()
    # The float16 scale lies in the top four bits of each of four words.
    d = ((words & 0xF000) >> _row((12, 8, 4, 0), blocks)).sum(1).to(torch.int16).view(torch.float16).float()
    scale = d[:, None] * (2 * ((words[..., None] >> _row(range(0, 12, 3), blocks)) & 7).flatten(1) + 1)
    high = halves(field(blocks, 32, 48)).int()
    q = _off_centre(_grid("IQ1_M", field(blocks, 0, 32).int() | (high & 7) << 8), high >> 3)
    return Parts(q, scale * 0.125)


def _row(numbers: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=like.device)


def _off_centre(q: Tensor, below: Tensor) -> Tensor:
    """Eight times q + 1/8, or q - 1/8 where `below` is 1, as integers; exact, as the scale is divided by 8."""
    return q * 8 + (1 - 2 * below.to(torch.int8)).unsqueeze(-1)


def _grid(name: str, places: Tensor) -> Tensor:
    """Rows of a format's grid: places [n, ...] -> int8 [n, ..., 8 or 4]."""
    table = _grid_table(name, places.device)
    wide = table.view(torch.int64 if table.shape[1] == 8 else torch.int32).flatten()  # a row is fetched as one number
    return wide.index_select(0, places.flatten().int()).view(torch.int8).view(*places.shape, -1)


def _signs(raw: Tensor) -> Tensor:
    """[n, ...] bytes -> int8 [n, ..., 8]: -1 for a bit that is set."""
    table = _sign_table(raw.device).view(torch.int64).flatten()
    return table.index_select(0, raw.flatten().int()).view(torch.int8).view(*raw.shape, 8)


def _packed_signs(words: Tensor) -> Tensor:
    """int32 [n, m] -> int8 [n, m, 4, 8]: four times 7 bits of a word; the eighth sign makes their number even."""
    sevens = (words[..., None] >> _row(range(0, 28, 7), words)) & 127
    return _signs(_parity_signs(words.device)[sevens])


@cache
def _grid_table(name: str, device: torch.device) -> Tensor:
    traits = _tables(name)
    traits.init_grid()
    return torch.from_numpy(traits.grid.reshape(traits.grid_shape)).to(torch.int8).to(device)


@cache
def _sign_table(device: torch.device) -> Tensor:
    signs = [[1 - 2 * (byte >> i & 1) for i in range(8)] for byte in range(256)]
    return torch.tensor(signs, dtype=torch.int8, device=device)


@cache
def _parity_signs(device: torch.device) -> Tensor:
    """uint8 [128]: seven signs and the one that makes the number of minuses even."""
    return torch.tensor([i | (i.bit_count() & 1) << 7 for i in range(128)], dtype=torch.uint8, device=device)


def _tables(name: str) -> Any:
    """gguf-py's class for a format, which holds its grid and levels: constants of ggml that nobody should type anew."""
    quants = importlib.import_module("gguf.quants")  # 40 ms, and numpy: only for the formats that need it
    return getattr(quants, name)
