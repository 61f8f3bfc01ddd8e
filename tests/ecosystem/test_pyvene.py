"""pyvene: interventions at places that are named by their path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.conftest import ids
from tests.ecosystem.conftest import needs

pyvene = needs("pyvene")


@torch.no_grad()
def test_an_intervention_by_path_is_that_of_a_hook(face: Any) -> None:
    tokens = ids(1, 12, vocab=4096)
    plain = face(tokens).logits
    hook = face.model.layers[2].mlp.register_forward_hook(lambda module, inputs, output: output * 0.5)
    hooked = face(tokens).logits
    hook.remove()

    def half(base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        return base * 0.5

    wrapped = pyvene.IntervenableModel([{"component": "model.layers[2].mlp.output", "intervention": half}], model=face)
    before, after = wrapped({"input_ids": tokens}, output_original_output=True)
    assert torch.equal(after.logits, hooked) and torch.equal(before.logits, plain) and not torch.equal(hooked, plain)
