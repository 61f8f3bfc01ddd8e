"""torch.func: the model as a function of its parameters, over several of them, and a gradient for each row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn import functional as F

from tests.conftest import ids, tiny

MODEL = tiny("2b").double()
ROWS = ids(3, 20)
PARAMETERS = {name: parameter.detach() for name, parameter in MODEL.named_parameters()}


def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
    logits = functional_call(MODEL, parameters, (row[None],))
    return F.cross_entropy(logits[0, :-1], row[1:])


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-10 * b.abs().max())


def test_gradients_of_each_row_are_those_of_rows_alone() -> None:
    found = vmap(grad(loss), in_dims=(None, 0))(PARAMETERS, ROWS)
    for number, row in enumerate(ROWS):
        MODEL.zero_grad(set_to_none=True)
        F.cross_entropy(MODEL(row[None])[0, :-1], row[1:]).backward()
        for name, parameter in MODEL.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name
            assert close(found[name][number], parameter.grad), name
    MODEL.zero_grad(set_to_none=True)


@torch.no_grad()
def test_several_models_run_at_once_under_vmap() -> None:
    models = [MODEL, tiny("2b", seed=1).double()]
    parameters, buffers = stack_module_state(models)
    found = vmap(lambda p, b: functional_call(MODEL, (p, b), (ROWS,)))(parameters, buffers)
    assert all(close(logits, model(ROWS)) for logits, model in zip(found, models, strict=True))
    assert not torch.allclose(found[0], found[1])


def test_a_derivative_along_a_direction_is_a_finite_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in PARAMETERS.items()
    }
    along = jvp(lambda parameters: loss(parameters, ROWS[0]), (PARAMETERS,), (direction,))[1]
    step = 1e-6
    ends = [
        loss({name: value + sign * step * direction[name] for name, value in PARAMETERS.items()}, ROWS[0])
        for sign in (1, -1)
    ]
    assert abs(float(along - (ends[0] - ends[1]) / (2 * step))) < 1e-4 * abs(float(along))
