"""A model in memory as a checkpoint, so that what was trained or edited is written as a file would be converted."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2.checkpoints.gguf_weights import NORM
from gemma2.checkpoints.weights import PlainWeights, chunks, shapes_of
from gemma2.errors import BadModelFile
from gemma2.model import Gemma2

WHERE = "the model in memory"


class MemoryWeights(PlainWeights):
    """A `Weights` over the parameters of a model, on whatever device they are.

    float64 values that float32 holds exactly count as float32: such a model is a checkpoint that runs in float64. So do
    norms that a GGUF states in float32.

    Raises:
        BadModelFile: the model's parameters are not exactly those of a Gemma 2 of its config, or have no values.
    """

    where = WHERE

    def __init__(self, model: Gemma2) -> None:
        check_parameters(model)
        self._parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        wide = {name for name, values in self._parameters.items() if _needs_float64(values)}
        # A norm may need float64 because of the GGUF it came from, which can state it; see `GGUFWeights.dtype_for`.
        norms = {name for name in wide if name.endswith(NORM)}
        self._gains = {name for name in norms if not _needs_float64(1.0 + self._parameters[name])}
        self.tensors = {}
        for name, values in self._parameters.items():
            narrow = values.dtype == torch.float64 and name not in wide - self._gains
            self.tensors[name] = (tuple(values.shape), torch.float32 if narrow else values.dtype)

    def dtype_for(self, name: str, wanted: torch.dtype) -> torch.dtype:
        return torch.float64 if name in self._gains else wanted

    def read(self, name: str, start: int, out: Tensor) -> None:
        out.copy_(self._parameters[name][start : start + len(out)])

    def release(self) -> None:
        """Nothing is mapped."""


def check_parameters(model: Gemma2) -> None:
    """Raises BadModelFile, naming a module, unless a model saves what a Gemma 2 of its config saves."""
    if not isinstance(model, Gemma2):
        raise BadModelFile(f"{WHERE} is of type {type(model).__name__}: give a Gemma whose model is a Gemma2")
    cure = "merge what was added into the weights of Gemma 2, or put its own module back"
    found, expected = model.state_dict(), shapes_of(model.config)
    modules = dict(model.named_modules())
    for name, shape in expected.items():
        path, _, own = name.rpartition(".")
        if name not in found:
            if hasattr(modules.get(path), "held_bytes"):
                raise BadModelFile(
                    f"{WHERE}: {path} ({type(modules[path]).__name__}) holds no floats: load the model without "
                    "weights= to write it"
                )
            there = f" ({type(modules[path]).__name__})" if path in modules else ""
            raise BadModelFile(f"{WHERE}: {path}{there} has no {own} {list(shape)}, as a Gemma 2 has there; {cure}")
        if found[name].shape != shape:
            raise BadModelFile(f"{WHERE}: {name} is {list(found[name].shape)}, and its config makes it {list(shape)}")
        if found[name].is_meta:
            offloaded = "; accelerate has moved it away: load the model whole, without device_map"
            raise BadModelFile(f"{WHERE}: {name} has no values here, because it is on the meta device{offloaded}")
    foreign = [name for name in found if name not in expected]
    if foreign:
        raise BadModelFile(f"{WHERE}: {', '.join(foreign[:3])}: no Gemma 2 has that; {cure}")


def _needs_float64(values: Tensor) -> bool:
    if values.dtype != torch.float64:
        return False
    runs = chunks(tuple(values.shape), values.dtype)
    return not all(torch.equal(values[start:stop].float().double(), values[start:stop]) for start, stop in runs)
