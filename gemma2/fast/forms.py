"""The forms that weights can be held in: `gemma2.load(..., weights=NAME)`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from gemma2.checkpoints.checkpoint import Checkpoint
from gemma2.checkpoints.weights import shapes_of
from gemma2.fast.embedding import HeldEmbedding, HeldHead
from gemma2.fast.held import HeldLinear, HeldMatrix
from gemma2.fast.int4 import GROUP, Int4
from gemma2.fast.int8 import Int8
from gemma2.model import ScaledEmbedding, TiedHead
from gemma2.twins import Make

# From an opened checkpoint, of which no weight is read yet, the device and the dtype of the activations to the twins
# that take the weights in, and a line for `Gemma.notes`. Raises ValueError where this checkpoint cannot be held so.
Form = Callable[[Checkpoint, torch.device, torch.dtype], tuple[Make, str]]
PLAIN = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def holding(matrix: Callable[[int, int], HeldMatrix]) -> Make:
    """Twins of all linears, the embedding and the head. `matrix(rows, width)` makes what holds each matrix."""

    def make(path: str, module: nn.Module) -> nn.Module | None:
        if type(module) is nn.Linear:
            return HeldLinear(module, matrix(module.out_features, module.in_features))
        if type(module) is ScaledEmbedding:
            return HeldEmbedding(module, matrix(*module.weight.shape))
        return HeldHead() if type(module) is TiedHead else None

    return make


def _int8(opened: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[Make, str]:
    check_floats("int8", opened)
    return holding(partial(Int8, dtype=dtype)), "the weights are int8, with one scale a row"


def _int4(opened: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[Make, str]:
    check_floats("int4", opened)
    for name, shape in shapes_of(opened.config).items():
        if len(shape) > 1 and shape[1] % GROUP:
            raise ValueError(
                f'{opened.path}: weights="int4" holds groups of {GROUP} values, and the rows of {name} have {shape[1]}'
            )
    return holding(partial(Int4, dtype=dtype)), f"the weights are int4, with a scale and a zero every {GROUP} values"


FORMS: dict[str, Form] = {"int8": _int8, "int4": _int4}


def check_form(name: str) -> Form:
    """A form by its name. Raises ValueError for one that there is not. It is called before anything is opened."""
    if name not in FORMS:
        raise ValueError(f"weights {name!r} is not one of {', '.join(FORMS)}")
    return FORMS[name]


def check_floats(name: str, opened: Checkpoint) -> None:
    """Raises ValueError for a checkpoint whose matrices are quantized already: the errors of both would add up."""
    tensors = opened.weights.tensors
    held = {opened.weights.stored(tensor) for tensor, (shape, _) in tensors.items() if len(shape) > 1}
    other = sorted(held - PLAIN)
    if other and opened.form == "gguf":
        raise ValueError(
            f"{opened.path}: its weights are {', '.join(other)}, quantized already, and the errors of that and of "
            f'weights="{name}" would add up: give a checkpoint of floats'
        )
