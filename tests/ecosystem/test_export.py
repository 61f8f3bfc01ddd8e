"""torch.export: the whole model as one graph, for any length and batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import ids, tiny


@torch.no_grad()
def test_an_exported_model_computes_what_the_model_computes_for_other_shapes_too(tmp_path: Path) -> None:
    model = tiny("2b")
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", min=2, max=256)
    exported = torch.export.export(model, (ids(2, 20),), dynamic_shapes={"tokens": {0: batch, 1: length}})
    torch.export.save(exported, tmp_path / "model.pt2")
    for run in (exported.module(), torch.export.load(tmp_path / "model.pt2").module()):
        for tokens in (ids(2, 20), ids(1, 37), ids(3, 5)):  # longer than the window of 16, and shorter
            assert torch.equal(run(tokens), model(tokens))


@torch.no_grad()
def test_ids_are_not_checked_in_an_exported_model() -> None:
    """Its checks of values are left out of a graph: an id outside fails in the embedding."""
    model = tiny("2b")
    exported = torch.export.export(model, (ids(1, 5),))
    with pytest.raises((IndexError, RuntimeError)):
        exported.module()(torch.full((1, 5), 512))
