"""GGUF's quantized blocks laid out for a processor's registers, and products with them. No value is rounded again.

A group is what shares one scale: 16 or 32 weights of a row, of 4 to 8 bits each. Its codes lie in 32-bit words, and
sixteen rows side by side, so that one load brings a word of each row:

    words   int32 [tiles, groups, words of a group, 16]
    scales  [tiles, groups, 16], or [tiles, blocks, groups of a block, 16] with a float16 unit a block

A code is never shifted to be multiplied. Masked where it lies, field j of a word is the code times 2^(bits j), and x is
divided by that beforehand; both are exact. The field at a word's top end comes out signed, as code - 2^(bits - 1),
since that bit is stored flipped. Where a word has bits to spare they hold, together, the group's last weights.

A product is then scale * (sum of fields times x, plus a correction) - minimum * (sum of x), summed over the groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma2.fast.compiling import kernel, stored, tree

SMALL = 2**16  # words, below which nothing is compiled to unpack them
LANES = 16  # rows side by side: float32 numbers in a register of AVX-512
WORD = 32  # bits
STREAMS, CHAINS = 4, 8  # runs of tiles that a thread reads side by side, and running sums in each


@dataclass(frozen=True)
class Layout:
    """How the weights of a ggml type lie in words.

    Attributes:
        bits: of a code.
        group: weights that share a scale.
        zero: the code of the value 0 before the minimum is taken off.
        block: groups that share a float16 unit; 1 where each group's scale is float16 itself.
        minimum: whether a minimum is taken off.
    """

    bits: int
    group: int
    zero: int = 0
    block: int = 1
    minimum: bool = False

    @property
    def fields(self) -> int:
        """Codes that lie whole in one word."""
        return WORD // self.bits

    @property
    def words(self) -> int:
        """Words of a group."""
        return self.group * self.bits // WORD

    @property
    def whole(self) -> int:
        """Codes of a group that lie whole in a word; the others are in the spare bits."""
        return self.words * self.fields

    @property
    def rest(self) -> int:
        """Codes of a group that lie in the spare bits."""
        return self.group - self.whole

    @property
    def spare(self) -> int:
        """Spare bits of a word, at its top end."""
        return WORD - self.bits * self.fields

    @property
    def pieces(self) -> int:
        """Runs of words of a group that are summed apart: fewer terms compile faster, and two words are enough."""
        return self.words // 2 if self.spare == 0 and self.words > 1 else 1

    def mask(self, field: int) -> int:
        """The bits of a field, as int32."""
        mask = ((1 << self.bits) - 1) << (self.bits * field)
        return mask - (1 << WORD) if mask >> (WORD - 1) else mask

    def is_top(self, field: int) -> bool:
        """Whether a field has the sign bit of its word."""
        return self.spare == 0 and field == self.fields - 1

    def scattered(self, rest: int) -> list[tuple[int, int, int, int]]:
        """Where the bits of the code `rest`, counted from the first not whole one, are: word, lowest bit there, how
        many, and lowest bit of the code."""
        found, bit = [], rest * self.bits
        while bit < (rest + 1) * self.bits:
            word, inside = divmod(bit, self.spare)
            count = min(self.spare - inside, (rest + 1) * self.bits - bit)
            found.append((word, WORD - self.spare + inside, count, bit - rest * self.bits))
            bit += count
        return found


LAYOUTS = {
    "Q4_0": Layout(4, 32, zero=8),
    "Q4_1": Layout(4, 32, minimum=True),
    "Q4_K": Layout(4, 32, block=8, minimum=True),
    "Q5_0": Layout(5, 32, zero=16),
    "Q5_1": Layout(5, 32, minimum=True),
    "Q5_K": Layout(5, 32, block=8, minimum=True),
    "Q6_K": Layout(6, 16, zero=32, block=16),
    "Q8_0": Layout(8, 32, zero=128),
}
# words; scales; units of them; minima; units of those. What a layout does not have is empty.
Packed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def pack_words(codes: Tensor, layout: Layout) -> Tensor:
    """Codes uint8 [rows, groups, group], rows a multiple of 16: int32 [tiles, groups, words, 16]."""
    groups = codes.shape[1]
    if layout.bits == 8:
        words = codes.view(torch.int32)  # the four bytes of a word, as they lie
    elif layout.bits == 4:
        pairs = codes.view(torch.int16)
        words = (pairs | pairs >> 4).to(torch.uint8).view(torch.int32)
    else:
        words = _words(codes, layout)
    if layout.is_top(layout.fields - 1):
        words = words ^ -(1 << (WORD - 1))
    return words.view(-1, LANES, groups, layout.words).permute(0, 2, 3, 1).contiguous()


def _words(codes: Tensor, layout: Layout) -> Tensor:
    """Words of codes of any number of bits: int32 [rows, groups, words]."""
    whole = codes[..., : layout.whole].unflatten(-1, (layout.words, layout.fields))
    words = whole[..., 0].int()
    for field in range(1, layout.fields):
        words |= whole[..., field].int() << (layout.bits * field)
    for rest in range(layout.rest):
        code = codes[..., layout.whole + rest].int()
        for word, place, count, low in layout.scattered(rest):
            words[..., word] |= (code >> low & (1 << count) - 1) << place
    return words


def by_tiles(numbers: Tensor) -> Tensor:
    """[rows, ...] -> [rows / 16, ..., 16], contiguous."""
    return numbers.unflatten(0, (-1, LANES)).movedim(1, -1).contiguous()


def codes_of(words: Tensor, layout: Layout) -> Tensor:
    """The codes of the weights of each group: int32 [tiles, groups, group, 16]."""
    shifts = torch.arange(layout.fields, dtype=torch.int32, device=words.device)[:, None] * layout.bits
    plain = words if layout.spare else words ^ -(1 << (WORD - 1))  # the flipped bit as it was
    whole = (plain[:, :, :, None] >> shifts & (1 << layout.bits) - 1).flatten(2, 3)
    if layout.spare == 0:
        return whole
    return torch.cat((whole, torch.stack([_scattered(words, layout, i) for i in range(layout.rest)], 2)), 2)


def _scattered(words: Tensor, layout: Layout, rest: int) -> Tensor:
    """A code that lies in the spare bits: int32 [tiles, groups, ..., 16]."""
    parts = [
        ((words[..., word, :] >> (place - low)) & ((1 << count) - 1 << low))
        for word, place, count, low in layout.scattered(rest)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total | part
    return total


def _scale(scales: Tensor, units: Tensor, layout: Layout) -> Tensor:
    """Scales or minima as float32 [tiles, groups, 16]."""
    if layout.block == 1:
        return scales.float()
    return (units.float()[:, :, None] * scales.float()).flatten(1, 2)


@kernel
def few_rows(packed: Packed, layout: Layout, x: Tensor) -> Tensor:
    """x [m k] times the rows of a packed matrix [n k]: float32 [m n], products and sums in float32."""
    tiles, groups = packed[0].shape[:2]
    m, whole, size = len(x), layout.whole // layout.pieces, layout.group // layout.pieces
    streams = max(1, (2 if size > 16 else STREAMS) // m)
    run = tiles // streams if tiles % streams == 0 else tiles
    plain = x.float().view(m, groups, layout.pieces, size)
    powers = [2.0 ** (-layout.bits * (i % layout.fields)) if i < whole else 1.0 for i in range(size)]
    divided = stored(torch.stack([plain[..., i] * power for i, power in enumerate(powers)], 0)[..., None])
    sums = plain.sum(-1)
    tops = [plain[..., i] for i in range(whole) if layout.is_top(i % layout.fields)]
    top = torch.stack(tops, -1).sum(-1) * (1 << (layout.bits - 1)) if tops else 0.0
    correction, sums = stored(top - layout.zero * sums), stored(sums)  # [m groups pieces]

    def product(row: int, start: int) -> Tensor:
        words, scales, units, minima, steps = (part[start : start + run] if len(part) else part for part in packed)
        words = words.unflatten(2, (layout.pieces, -1))
        by = divided[:, row].unbind(0)  # [groups pieces 1] each
        word = words.unbind(3)
        terms = [(word[i // layout.fields] & layout.mask(i % layout.fields)) * by[i] for i in range(whole)]
        terms += [_scattered(words, layout, i) * by[whole + i] for i in range(size - whole)]
        total = tree(terms, CHAINS) + correction[row][..., None]
        total = total * _scale(scales, units, layout)[:, :, None]
        if layout.minimum:
            total = total - _scale(minima, steps, layout)[:, :, None] * sums[row][..., None]
        return total.sum((1, 2)).flatten()

    return torch.stack([torch.cat([product(row, start) for start in range(0, tiles, run)]) for row in range(m)])


def values_of(packed: Packed, layout: Layout) -> Tensor:
    """The float32 values of a packed matrix: [tiles, groups, group, lanes], with the bits of `ggml.dequantize`."""
    words, scales, units, minima, steps = packed
    codes = codes_of(words, layout) - layout.zero
    values = codes.float() * _scale(scales, units, layout)[:, :, None]
    return values - _scale(minima, steps, layout)[:, :, None] if layout.minimum else values


@kernel
def _columns(packed: Packed, layout: Layout, dtype: torch.dtype) -> Tensor:
    return values_of(packed, layout).to(dtype).permute(1, 2, 0, 3).contiguous()


def columns(packed: Packed, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The values of a packed matrix [n k], transposed: [k n], rounded once to `dtype`. One graph serves all sizes."""
    if torch.compiler.is_compiling() or packed[0].numel() < SMALL:
        return values_of(packed, layout).to(dtype).permute(1, 2, 0, 3).reshape(-1, len(packed[0]) * LANES)
    for part in packed:
        if len(part):
            torch._dynamo.maybe_mark_dynamic(part, 0)
            torch._dynamo.maybe_mark_dynamic(part, 1)
    return _columns(packed, layout, dtype).view(-1, len(packed[0]) * LANES)
