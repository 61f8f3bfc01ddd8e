"""4 bits a weight, in groups of 32 along the input: less than a third of bfloat16's memory."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma2.fast.held import HeldMatrix

GROUP = 32  # weights that share a scale and a zero; the kernel takes 32, 64, 128 and 256
BLOCK = 64  # rows that are packed together, where no kernel says otherwise
FEW = 64  # rows of x up to which the kernel is faster than tiles, in bfloat16; in float32 it never is


class Int4(HeldMatrix):
    """Weight j of a row is (code - 8) * scale + zero, where the scale and zero are of its group of 32.

    Scales and zeros are bfloat16 numbers in every dtype, as the kernel wants them. The codes are packed as the kernel
    of this machine reads them: for each block of rows and each column, the codes of rows i and i + block / 2 in one
    byte. Where there is no kernel, the blocks are of 64 rows. The last block is filled up with empty rows.
    """

    packed: Tensor  # uint8 [blocks, width, block / 2]
    scales: Tensor  # [width / 32, blocks * block, 2]: scale and zero

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__(rows, width, dtype)
        self.block = kernel_block() or BLOCK
        self.step = self.block
        self.blocks = -(-rows // self.block)

    @property
    def held_bytes(self) -> int:
        values = self.blocks * self.block * self.width
        return values // 2 + values // GROUP * 2 * self.like.itemsize

    def reserve(self, device: torch.device) -> None:
        shape = (self.blocks, self.width, self.block // 2)
        self.register_buffer("packed", torch.empty(shape, dtype=torch.uint8, device=device))
        # Zeros are what the rows after the last one have, which nothing else fills.
        shape = (self.width // GROUP, self.blocks * self.block, 2)
        self.register_buffer("scales", torch.zeros(shape, dtype=self.like.dtype, device=device))

    def keep(self, start: int, values: Tensor) -> None:
        codes, scales, zeros = quantize(values.view(len(values), -1, GROUP))
        codes = F.pad(codes.view(len(values), -1), (0, 0, 0, -len(values) % self.block))
        blocks = pack(codes, self.block)
        self.packed[start // self.block : start // self.block + len(blocks)] = blocks
        self.scales[:, start : start + len(values)] = torch.stack((scales, zeros), 2).transpose(0, 1)

    def values(self, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        first, last = start // self.block, -(-stop // self.block)
        shape = (self.width, last - first, self.block)
        made = torch.empty(shape, dtype=self.like.dtype, device=self.like.device) if room is None else room
        made = unpack(self.packed[first:last], made.flatten()[: shape[0] * shape[1] * shape[2]].view(shape))
        # Adding up along contiguous rows is several times as fast: so scale and zero are copied, and the matrix lies
        # the other way round.
        scale, zero = self.scales[:, first * self.block : last * self.block].movedim(-1, 0).contiguous()
        made = made.view(-1, GROUP, shape[1] * shape[2])
        torch.addcmul(zero[:, None], made, scale[:, None], out=made)
        return made.flatten(0, 1).t()[: stop - start]

    def at(self, ids: Tensor) -> Tensor:
        flat = ids.flatten()
        lane = flat % self.block
        pairs = self.packed[flat // self.block, :, lane % (self.block // 2)]  # [t width]
        codes = torch.where((lane < self.block // 2)[:, None], pairs & 15, pairs >> 4).to(self.like.dtype) - 8
        scale, zero = self.scales[:, flat].transpose(0, 1)[..., None].unbind(2)  # [t groups 1] each
        made = torch.addcmul(zero, codes.unflatten(1, (-1, GROUP)), scale)
        return made.flatten(1).unflatten(0, ids.shape)

    def kernel(self, x: Tensor) -> Tensor | None:
        if x.device.type != "cpu" or x.dtype != torch.bfloat16 or len(x) > FEW or not kernel_block():
            return None
        packed = self.packed.view(self.blocks * self.block, self.width // 2)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, GROUP, self.scales)[:, : self.rows]


def quantize(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Groups [... 32] in float32 -> codes 0 to 15 in uint8, and their scales and zeros [...].

    The scale and the zero are rounded to bfloat16 before the codes are chosen, so that their rounding is no error.
    """
    low, high = groups.aminmax(dim=-1)
    scale = ((high - low) / 15).clamp_min(torch.finfo(torch.float32).tiny).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    codes = (groups - zero[..., None]).div_(scale[..., None]).round_().add_(8).clamp_(0, 15)
    return codes.to(torch.uint8), scale, zero


def pack(codes: Tensor, block: int) -> Tensor:
    """Codes uint8 [rows, width], whole blocks -> [blocks, width, block / 2]: rows i and i + block / 2 in one byte."""
    low, high = codes.unflatten(0, (-1, block)).transpose(1, 2).chunk(2, dim=2)
    return low | high << 4


def unpack(packed: Tensor, out: Tensor) -> Tensor:
    """What was packed, less 8, as numbers into `out` [width, blocks, block].

    8 is taken off the whole numbers: zero - 8 * scale would be rounded once more in bfloat16.
    """
    low, high = out.chunk(2, dim=2)
    low.copy_((packed & 15).view(torch.int8).sub_(8).transpose(0, 1))
    high.copy_((packed >> 4).view(torch.int8).sub_(8).transpose(0, 1))
    return out


@functools.cache
def kernel_block() -> int | None:
    """How many rows the processor's kernel wants packed together; None if it wants another packing than `pack`'s.

    PyTorch does not say how it packs. So a matrix is packed both ways and compared.
    """
    codes = torch.arange(128 * 32, device="cpu").mul_(7).remainder_(16).view(128, 32).roll(1, 0)
    codes = (codes + torch.arange(128, device="cpu")[:, None] // 3) % 16
    for block in (64, 32, 16):
        try:
            theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        except (RuntimeError, NotImplementedError):
            return None
        if torch.equal(theirs.flatten(), pack(codes.byte(), block).flatten()):
            return block
    return None
