"""torch.export: the whole model as one graph, for any length and batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import ids, tiny


@torch.no_grad()
def test_an_exported_model_computes_what_the_model_computes_for_other_shapes_too(tmp_path: Path) -> None:
    model = tiny("2b", num_hidden_layers=2)
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", min=2, max=256)
    exported = torch.export.export(model, (ids(2, 20),), dynamic_shapes={"tokens": {0: batch, 1: length}})
    torch.export.save(exported, tmp_path / "model.pt2")
    for run in (exported.module(), torch.export.load(tmp_path / "model.pt2").module()):
        for tokens in (ids(2, 20), ids(1, 37), ids(3, 5)):  # longer than the window of 16, and shorter
            assert torch.equal(run(tokens), model(tokens))
        with pytest.raises((IndexError, RuntimeError)):  # checks of values are no part of a graph
            run(torch.full((1, 5), 512))
