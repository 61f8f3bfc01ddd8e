"""An embedding whose matrix is held in a form of its own, not as floats, and the head that is tied to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma2.fast.held import HeldMatrix, Holding
from gemma2.model import ScaledEmbedding
from gemma2.tied import check_same_device
from gemma2.tokens import check_tokens


class HeldEmbedding(Holding, ScaledEmbedding):  # type: ignore[misc]
    """A twin of `ScaledEmbedding`. `HeldHead` reads its matrix backwards; `Gemma2.dtype` and `Gemma2.device` go on
    working."""

    def __init__(self, plain: ScaledEmbedding, matrix: HeldMatrix) -> None:
        nn.Module.__init__(self)  # not ScaledEmbedding's, which would make the matrix
        self.scale, self.matrix = plain.scale, matrix

    def shared(self) -> HeldEmbedding:
        """Another twin with the same matrix, for `gemma2.twins.sharing`."""
        return HeldEmbedding(self, self.matrix)

    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens(tokens, self.matrix.rows)
        rows = self.matrix.at(tokens).to(self.matrix.like.dtype)
        return rows * torch.tensor(self.scale, dtype=rows.dtype, device="cpu")


class HeldHead(nn.Module):
    """A twin of `TiedHead` for a `HeldEmbedding`: [b t d] -> [b t v], before the cap."""

    def shared(self) -> HeldHead:
        """Another one, for `gemma2.twins.sharing`."""
        return HeldHead()

    def forward(self, x: Tensor, embedding: HeldEmbedding) -> Tensor:
        check_same_device(x, embedding.matrix.like)
        logits: Tensor = embedding.matrix(x)
        return logits
