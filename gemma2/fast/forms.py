"""The forms that weights can be held in: `gemma2.load(..., weights=NAME)`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import nn

from gemma2.checkpoints.checkpoint import Checkpoint
from gemma2.checkpoints.weights import bytes_with, empty_model, shapes_of
from gemma2.fast.blocks import LAYOUTS
from gemma2.fast.bnb import EACH, NF4, LLMInt8, bitsandbytes
from gemma2.fast.embedding import HeldEmbedding, HeldHead
from gemma2.fast.held import HeldLinear, HeldMatrix
from gemma2.fast.int4 import GROUP, Int4
from gemma2.fast.int8 import Int8
from gemma2.fast.packed import Blocks, PackedMatrix
from gemma2.model import ScaledEmbedding, TiedHead
from gemma2.tied import EMBEDDING
from gemma2.twins import Make

# From an opened checkpoint, of which no weight is read yet, the device and the dtype of the activations to the twins
# that take the weights in, and a line for `Gemma.notes`. Raises ValueError where this checkpoint cannot be held so.
Form = Callable[[Checkpoint, torch.device, torch.dtype], tuple[Make, str]]
PLAIN = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


Held = Callable[[int, int], HeldMatrix]  # rows and width -> what holds a matrix


def holding(linears: Held, embedding: Held | None) -> Make:
    """Twins of all linears and, unless they are to stay as they are, of the embedding and the head, which reads it."""

    def make(path: str, module: nn.Module) -> nn.Module | None:
        if type(module) is nn.Linear:
            return HeldLinear(module, linears(module.out_features, module.in_features))
        if embedding and type(module) is ScaledEmbedding:
            return HeldEmbedding(module, embedding(*module.weight.shape))
        return HeldHead() if embedding and type(module) is TiedHead else None

    return make


def _int8(opened: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[Make, str]:
    check_floats("int8", opened)
    int8 = partial(Int8, dtype=dtype)
    return holding(int8, int8), "the weights are int8, with one scale a row"


def _int4(opened: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[Make, str]:
    check_floats("int4", opened)
    check_groups("int4", opened, GROUP)
    # The head adds most to the error of int4: held in int8, it halves that of the pocket model's predictions.
    return (
        holding(partial(Int4, dtype=dtype), partial(Int8, dtype=dtype)),
        f"the weights are int4, with a scale and a zero every {GROUP} values; the embedding, which is also the head, "
        "is int8",
    )


def _packed(opened: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[Make, str]:
    """Every matrix as its own tensor of the file has it. Floats are loaded as they would be without this."""
    if opened.form != "gguf":
        raise ValueError(
            f'{opened.path}: weights="packed" keeps the blocks of a GGUF, and this is none: weights="int8" and "int4" '
            "quantize it while it is loaded"
        )
    stored = {
        name: opened.weights.stored(name) for name, (shape, _) in opened.weights.tensors.items() if len(shape) > 1
    }

    def make(path: str, module: nn.Module) -> nn.Module | None:
        if type(module) is TiedHead:
            return None if stored[EMBEDDING] in PLAIN else HeldHead()
        held = stored.get(f"{path}.weight", "F32")
        if held in PLAIN:
            return None
        kind: Callable[[int, int, torch.dtype, str], HeldMatrix] = PackedMatrix if held in LAYOUTS else Blocks
        if isinstance(module, nn.Linear):
            return HeldLinear(module, kind(module.out_features, module.in_features, dtype, held))
        if isinstance(module, ScaledEmbedding):
            rows, width = module.weight.shape
            return HeldEmbedding(module, kind(rows, width, dtype, held))
        return None

    kept, slow = sorted({*stored.values()} & {*LAYOUTS}), sorted({*stored.values()} - {*LAYOUTS} - PLAIN)
    if not kept and not slow:
        raise ValueError(
            f"{opened.path}: its weights are floats, so there is nothing to keep packed: leave weights= out"
        )
    said = f"the weights stay packed as {', '.join([*kept, *slow])}"
    if slow:
        said += f"; {', '.join(slow)} has no kernel here, so its tiles are dequantised at every product, which is slow"
    return make, said


def _nf4(opened: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[Make, str]:
    check_floats("bnb-nf4", opened)
    check_narrow("bnb-nf4", dtype)
    check_groups("bnb-nf4", opened, EACH)
    return holding(partial(NF4, dtype=dtype), None), "the linears are nf4 of bitsandbytes; the embedding is as it was"


def _llm_int8(opened: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[Make, str]:
    check_floats("bnb-int8", opened)
    check_narrow("bnb-int8", dtype)
    said = "the linears are int8 of bitsandbytes, and what they get is rounded to int8; the embedding is as it was"
    return holding(partial(LLMInt8, dtype=dtype), None), said


FORMS: dict[str, Form] = {"int8": _int8, "int4": _int4, "packed": _packed, "bnb-nf4": _nf4, "bnb-int8": _llm_int8}


def check_form(name: str) -> Form:
    """A form by its name. It is called before anything is opened.

    Raises:
        ValueError: there is no such form.
        ImportError: a package that it needs is missing.
    """
    if name not in FORMS:
        raise ValueError(f"weights {name!r} is not one of {', '.join(FORMS)}")
    if name.startswith("bnb"):
        bitsandbytes()
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


def check_groups(name: str, opened: Checkpoint, each: int) -> None:
    """Raises ValueError unless the rows of all matrices divide into groups of so many values."""
    for tensor, shape in shapes_of(opened.config).items():
        if len(shape) > 1 and shape[1] % each:
            raise ValueError(
                f'{opened.path}: weights="{name}" holds groups of {each} values, and the rows of {tensor} have '
                f'{shape[1]}: weights="int8" takes rows of any length'
            )


def check_narrow(name: str, dtype: torch.dtype) -> None:
    """Raises ValueError for a dtype that bitsandbytes does not have."""
    if dtype == torch.float64:
        raise ValueError(f'weights="{name}" computes in bfloat16, float16 or float32, not in float64: give dtype=')


def sizes_of(opened: Checkpoint, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    """Form -> bytes of the weights in it, for those that need no further package and that the checkpoint can have."""
    sizes, empty = {}, empty_model(opened.config)
    for name, form in FORMS.items():
        with suppress(ValueError, ImportError):
            if not name.startswith("bnb"):
                sizes[name] = bytes_with(opened.weights, empty, dtype, form(opened, device, dtype)[0])
    return sizes
