"""FSDP2 and DDP of PyTorch: two processes share a model and compute what one does alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

RANKS = 2
ROOT = Path(__file__).resolve().parents[2]
gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch is built without gloo, over which processes without GPUs talk",
)


@gloo
@pytest.mark.parametrize("what", ["fsdp", "ddp"])
def test_two_processes_have_the_logits_sites_gradients_and_texts_of_one(what: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.ecosystem.ranks", what]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        for rank in range(RANKS)
    ]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * RANKS, "\n".join(said)
