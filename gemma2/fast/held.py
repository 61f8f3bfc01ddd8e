"""Matrices that are held in a form of their own, not as floats, and the linear that multiplies by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemma2.checkpoints.threads import one_thread_per_core
from gemma2.checkpoints.weights import Weights
from gemma2.errors import BadModelFile
from gemma2.fast.unmade import Unmade

READ = 2**20  # values of the file, read at once by each thread
MADE = 6 * 2**20  # values of a matrix, made anew at once: more leave the caches, fewer make the products slower


class HeldMatrix(nn.Module):
    """A matrix [rows, width] in some form, which it takes from a file a few rows at a time.

    A form is a subclass. It makes its buffers in `reserve`, fills them in `keep`, and gives values back in `values` and
    `at`. Where there is a kernel that computes with the form itself, `kernel` calls it. Otherwise, and for many rows of
    x, tiles of the matrix are made anew and multiplied by.

    Args:
        dtype: of the activations; of `values` too.
    Attributes:
        like: an empty tensor, with the dtype of the activations and on the device of the form.
        step: rows are kept in multiples of so many, the last ones excepted.
    """

    step = 1
    takes_any = False  # whether `kernel` takes x in any dtype, and gives that

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.width = rows, width
        self.like: Tensor
        self.register_buffer("like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)

    @property
    def held_bytes(self) -> int:
        """Bytes of all buffers once they are filled."""
        raise NotImplementedError  # each form's own

    def reserve(self, device: torch.device) -> None:
        """Make the buffers."""
        raise NotImplementedError  # each form's own

    def keep(self, start: int, values: Tensor) -> None:
        """Put rows of the matrix, float32 on the CPU, from row `start` on. Several threads call it."""
        raise NotImplementedError  # each form's own

    def values(self, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        """Rows [start, stop), in the dtype of the activations. A run begins at a multiple of `step`.

        Args:
            room: memory for them, from `room`; what is returned may be in it.
        """
        raise NotImplementedError  # each form's own

    def at(self, ids: Tensor) -> Tensor:
        """The rows of these ids, in ids' shape: [... width], in the dtype of the activations or as exact as they are
        held."""
        raise NotImplementedError  # each form's own

    def multiply(self, x: Tensor, start: int, stop: int, room: Tensor, out: Tensor) -> None:
        """x [m, width] times rows [start, stop), which are made anew in `room`, into `out` [m, stop - start]."""
        torch.mm(x, self.values(start, stop, room).t(), out=out)

    def kernel(self, x: Tensor) -> Tensor | None:
        """x [m, width] times every row: [m, rows]; None where tiles are the faster way."""
        return None

    def fill(self, weights: Weights, name: str, device: torch.device) -> None:
        """Take a tensor of the file, a tile at a time, on all cores.

        Raises:
            BadModelFile: it holds NaN or infinity, which no form here can hold.
        """
        self.like = self.like.to(device)
        self.reserve(device)

        def take(start: int, stop: int) -> int:
            tile = torch.empty(stop - start, self.width, dtype=torch.float32, device="cpu")
            weights.read(name, start, tile)
            if not tile.sum().isfinite() and not bool(tile.isfinite().all()):
                raise BadModelFile(
                    f"{weights.where}: {weights.in_file(name)} holds NaN or infinity, which cannot be quantized: load "
                    "it without weights="
                )
            self.keep(start, tile)
            return tile.nbytes

        read = 0
        with one_thread_per_core() as pool:
            for done in pool.map(take, *zip(*self.tiles(READ), strict=True)):
                read += done
                if read > 32 * READ:
                    weights.release()
                    read = 0
        weights.release()

    def room(self) -> Tensor:
        """Memory for the values of any tile. Taking it once for all tiles saves more time than making their values."""
        rows = -(-self.tiles(MADE)[0][1] // self.step) * self.step
        return torch.empty(rows * self.width, dtype=self.like.dtype, device=self.like.device)

    def tiles(self, most: int) -> list[tuple[int, int]]:
        """The rows in runs [start, stop) of at most about so many values, all but the last of equal length."""
        runs = max(1, round(self.rows * self.width / most))
        each = -(-self.rows // (runs * self.step)) * self.step
        return [(start, min(start + each, self.rows)) for start in range(0, self.rows, each)]

    def forward(self, x: Tensor) -> Tensor:
        """x [... width] -> [... rows]. Gradients reach x."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.product(x)
        product: Tensor = _Product.apply(x, self)
        return product

    def product(self, x: Tensor) -> Tensor:
        """What `forward` computes, without gradients."""
        flat = x.flatten(0, -2) if self.takes_any else x.flatten(0, -2).to(self.like.dtype)
        out = self.kernel(flat)
        if out is None:
            flat = flat.to(self.like.dtype)
            out = torch.empty(len(flat), self.rows, dtype=flat.dtype, device=x.device)
            room = self.room()
            for start, stop in self.tiles(MADE):
                self.multiply(flat, start, stop, room, out[:, start:stop])
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    def unmade(self) -> Tensor:
        """The matrix as a tensor whose values are made when something computes with them."""
        return Unmade((self.rows, self.width), self.like.dtype, self.like.device, lambda: self.values(0, self.rows))

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.width}, {str(self.like.dtype).removeprefix('torch.')}"


class _Product(torch.autograd.Function):
    """The product, and its gradient with respect to x: nothing but the form itself is kept for that."""

    @staticmethod
    def forward(x: Tensor, matrix: HeldMatrix) -> Tensor:
        return matrix.product(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.matrix = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """grad [... rows] times the matrix: [... width], summed over tiles in float32 or wider."""
        (grad,), matrix = grads, ctx.matrix
        flat = grad.flatten(0, -2)
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(len(flat), matrix.width, dtype=wide, device=grad.device)
        room = matrix.room()
        for start, stop in matrix.tiles(MADE):
            total += flat[:, start:stop] @ matrix.values(start, stop, room)
        return total.to(grad.dtype).unflatten(0, grad.shape[:-1]), None


class Holding(nn.Module):
    """What a linear and an embedding have in common whose matrix is held in a form.

    `weight` is no parameter: its shape, dtype and device cost nothing, and its values are made when something computes
    with them.
    """

    matrix: HeldMatrix

    @property
    def weight(self) -> Tensor:
        return self.matrix.unmade()

    @property
    def held_bytes(self) -> int:
        return self.matrix.held_bytes

    def fill(self, weights: Weights, path: str, device: torch.device) -> None:
        self.matrix.fill(weights, f"{path}.weight", device)


class HeldLinear(Holding, nn.Linear):  # type: ignore[override]
    """A twin of a linear without bias, whose matrix is held in a form.

    It is an `nn.Linear`, so that PEFT and whatever else looks for linears finds it.
    """

    def __init__(self, plain: nn.Linear, matrix: HeldMatrix) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make the matrix
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_parameter("bias", None)
        self.matrix = matrix

    def shared(self) -> HeldLinear:
        """Another twin with the same matrix, for `gemma2.twins.sharing`."""
        return HeldLinear(self, self.matrix)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.matrix(x)
        return product
