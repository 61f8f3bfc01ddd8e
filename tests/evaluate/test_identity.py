"""What a result belongs to: one changed value anywhere, in any form of the weights, is another model."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch

import gemma2
from gemma2.evaluate.identity import fingerprint, folder_hash, held_bytes


@pytest.mark.parametrize("form", [None, "packed"])
def test_one_changed_value_is_another_model(form: str | None) -> None:
    gemma = gemma2.load("pocket:pocket-q8_0.gguf", device="cpu", dtype="float32", weights=form)
    hashed: list[int] = []
    before = fingerprint(gemma, hashed.append)
    assert sum(hashed) == held_bytes(gemma)
    everything = chain(gemma.model.named_parameters(), gemma.model.named_buffers())
    names = {name: tensor for name, tensor in everything if name.startswith(("model.embed", "model.layers.5.mlp"))}
    assert len(names) > (6 if form else 3)
    for name, tensor in names.items():
        if not tensor.numel():
            continue
        with torch.no_grad():
            kept = tensor.flatten()[-1].clone()
            tensor.view(-1)[-1] = kept + 1
            assert fingerprint(gemma) != before, name
            tensor.view(-1)[-1] = kept
    assert fingerprint(gemma) == before


def test_a_changed_task_file_is_another_folder(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: a", encoding="utf-8")
    before = folder_hash([tmp_path])
    assert before == folder_hash([tmp_path]) and folder_hash([]) is None
    (tmp_path / "a.yaml").write_text("task: b", encoding="utf-8")
    assert folder_hash([tmp_path]) != before
