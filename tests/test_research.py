"""Twins that show more than the model does, and compute the same."""

from __future__ import annotations

from typing import Any

import torch

from gemma2.research.heads import OutputByHead
from tests.conftest import ids, tiny


@torch.no_grad()
def test_output_by_head_shows_each_heads_share_and_changes_nothing_else() -> None:
    model, tokens = tiny().double(), ids(2, 20)
    plain, names = model(tokens), set(model.state_dict())
    attention: Any = model.model.layers[1].self_attn
    seen: dict[str, torch.Tensor] = {}
    attention.attend.hook_z.register_forward_hook(lambda m, i, output: seen.update(z=output))
    attention.o_proj = OutputByHead(attention.o_proj, heads=8)
    attention.o_proj.hook_result.register_forward_hook(lambda m, i, output: seen.update(result=output))
    assert (model(tokens) - plain).abs().max() < 1e-10
    assert set(model.state_dict()) == names
    assert seen["result"].shape == (2, 20, 8, 288)
    third = seen["z"][:, :, 3] @ attention.o_proj.weight[:, 3 * 16 : 4 * 16].T
    assert torch.allclose(seen["result"][:, :, 3], third)
