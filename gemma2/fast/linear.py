"""Twins for products with float weights: linears, embedding and head. They serve a stream of float32 numbers too.

A prompt is computed in the weights' dtype, as the reference computes it. A single token is a stream of float32 numbers,
which costs nothing, since a step's time goes into reading the weights: so it is rounded nowhere but in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2 import ops
from gemma2.cache import Held, LayerStore
from gemma2.fast.embedding import HeldEmbedding
from gemma2.fast.rows import FEW, few_rows
from gemma2.model import Attention, ScaledEmbedding, TiedHead
from gemma2.tied import check_same_device
from gemma2.tokens import check_tokens

SMALL = 2**20  # weights of a matrix


def product(weight: Tensor, x: Tensor) -> Tensor:
    """x [... k] times the rows of weight [n k], in the dtype of x. In a compiled step the matrix meets x in float32."""
    if torch.compiler.is_compiling() and _are_few(x):
        return _few_rows(weight, x)
    rows = x.to(weight.dtype)
    if x.device.type == "cpu" and x.numel() == x.shape[-1] and weight.numel() <= SMALL and not torch.is_grad_enabled():
        return _natively(rows, weight).to(x.dtype)
    return F.linear(rows, weight).to(x.dtype)


def _natively(x: Tensor, weight: Tensor) -> Tensor:
    """A product by PyTorch's own code. oneDNN takes longer to begin than a small product with one row takes."""
    switch: Any = torch.backends.mkldnn
    was = switch.enabled
    switch.enabled = False
    try:
        return F.linear(x, weight)
    finally:
        switch.enabled = was


def _are_few(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() <= FEW * x.shape[-1]


def _few_rows(weight: Tensor, x: Tensor) -> Tensor:
    return few_rows(weight, x.flatten(0, -2)).to(x.dtype).unflatten(0, x.shape[:-1])


class FastLinear(nn.Linear):
    """A linear without bias that shares its weight with the plain one, and takes x in another dtype too."""

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a matrix
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_parameter("bias", None)
        self.weight = plain.weight

    def forward(self, x: Tensor) -> Tensor:
        return product(self.weight, x)


class FastHead(TiedHead):
    """A head that takes x in another dtype than the embedding's too."""

    is_product = True  # so `gemma2.head` may compute it by slices of the vocabulary

    def forward(self, x: Tensor, embedding: ScaledEmbedding) -> Tensor:
        check_same_device(x, embedding.weight)
        return product(embedding.weight, x)


class WideHead(FastHead):
    """A head that multiplies single tokens in float32, by a loop that is compiled at the first of them."""

    def forward(self, x: Tensor, embedding: ScaledEmbedding) -> Tensor:
        weight = embedding.weight
        if x.dtype == weight.dtype or not _are_few(x) or torch.is_grad_enabled():
            return super().forward(x, embedding)
        check_same_device(x, weight)
        return _few_rows(weight, x)


class WideEmbedding(ScaledEmbedding):
    """`ScaledEmbedding` that begins a stream of float32 numbers where each row of the batch has a single token."""

    def __init__(self, plain: ScaledEmbedding) -> None:
        nn.Module.__init__(self)
        self.scale, self.weight = plain.scale, plain.weight

    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens(tokens, len(self.weight))
        return _scaled(F.embedding(tokens, self.weight), self.scale, self.weight.dtype)


class WideHeldEmbedding(HeldEmbedding):
    """The same for an embedding that is held in a form of its own."""

    def __init__(self, plain: HeldEmbedding) -> None:
        super().__init__(plain, plain.matrix)

    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens(tokens, self.matrix.rows)
        return _scaled(self.matrix.at(tokens), self.scale, self.matrix.like.dtype)


def _scaled(rows: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Embedded tokens [b t d] times the scale as `dtype` has it: in `dtype`, or wider for single tokens."""
    factor = torch.tensor(scale, dtype=dtype, device="cpu")
    return rows.to(dtype) * factor if rows.shape[1] > 1 else ops.upcast(rows) * ops.upcast(factor)


class WideAttention(Attention):
    """`Attention` that stores keys and values in the dtype of the weights, whatever it computes in."""

    def __init__(self, plain: Attention, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.head_dim, self.dtype = plain.head_dim, dtype
        for name, child in plain.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerStore) -> Tensor:
        return super().forward(x, positions, rotary, _Rounding(cache, self.dtype))


class _Rounding:
    """A `LayerStore` that rounds keys and values before it stores them in another."""

    def __init__(self, store: LayerStore, dtype: torch.dtype) -> None:
        self.store, self.dtype = store, dtype

    def update(self, keys: Tensor, values: Tensor, positions: Tensor) -> Held:
        return self.store.update(keys.to(self.dtype), values.to(self.dtype), positions)
