"""Lightning: a training loop around our module, which is an ordinary one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gemma2
from tests.conftest import ids
from tests.ecosystem.conftest import needs

lightning = needs("lightning")


class Lit(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, model: gemma2.Gemma2) -> None:
        super().__init__()
        self.model, self.losses = model, list[float]()

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_three_steps_are_those_of_a_plain_loop(pocket: gemma2.Gemma, tmp_path: Path) -> None:
    batches = [ids(2, 20, seed=seed, vocab=4096) for seed in range(3)]
    plain, module = Lit(copy.deepcopy(pocket.model)), Lit(copy.deepcopy(pocket.model))
    (optimizer,) = [plain.configure_optimizers()]
    for number, batch in enumerate(batches):
        optimizer.zero_grad()
        plain.training_step(batch, number).backward()
        optimizer.step()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert module.losses == plain.losses and len(module.losses) == 3
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, module.model.get_parameter(name)), name
