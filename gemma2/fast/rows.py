"""Products of a float matrix with a few rows of x, for decoding on a CPU: as fast as the matrix can be read."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2.fast.compiling import kernel, stored

FEW = 4  # rows of x that one pass over a matrix serves
STREAMS = 4  # runs of rows that a thread reads side by side, since one run does not fill the memory's pipeline
LONGEST = 4096  # Inductor sums longer rows by a slower method, so they are cut


@kernel
def few_rows(weight: Tensor, x: Tensor) -> Tensor:
    """x [m k] times the rows of weight [n k]: float32 [m n], products and sums in float32.

    The matrix is read once for all rows of x, and is not rounded or copied.
    """
    n, k = weight.shape
    x = stored(x.float())
    cuts = 1 if k <= LONGEST else -(-k // (LONGEST // 2))
    while k % cuts:
        cuts += 1
    streams = next(count for count in (STREAMS, 2, 1) if n % count == 0)
    step, run = k // cuts, n // streams

    def part(row: int, stream: int) -> Tensor:
        rows = weight[stream * run : (stream + 1) * run]
        pieces = [slice(i * step, (i + 1) * step) for i in range(cuts)]
        total = (rows[:, pieces[0]].float() * x[row, pieces[0]]).sum(-1)
        for piece in pieces[1:]:
            total = total + (rows[:, piece].float() * x[row, piece]).sum(-1)
        return total

    return torch.stack([torch.cat([part(row, stream) for stream in range(streams)]) for row in range(len(x))])
