"""trl: its trainers over transformers' face have the losses of transformers' own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ecosystem.conftest import needs

trl, datasets, peft, transformers = needs("trl"), needs("datasets"), needs("peft"), needs("transformers")

TEXTS = [
    "And God said, Let there be light: and there was light.",
    "In the beginning God created the heaven and the earth.",
    "And the evening and the morning were the first day.",
    "And he died.",
]
OPTIONS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "max_grad_norm": 0.0,  # the norm of all gradients is summed in the order of modules, which is another
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def losses_of(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_supervised_tuning_has_the_losses_of_transformers_own_model(
    lora: bool, face: Any, theirs: Any, their_tokenizer: Any, tmp_path: Path
) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    found = []
    for model in (face, theirs):
        transformers.set_seed(0)
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(output_dir=str(tmp_path), **OPTIONS),
            train_dataset=rows,
            processing_class=their_tokenizer,
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=4) if lora else None,
        )
        found.append(losses_of(trainer))
    assert len(found[0]) == 3 and found[0] == found[1]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_preference_tuning_has_the_losses_of_transformers_own_model(
    face: Any, theirs: Any, their_tokenizer: Any, tmp_path: Path
) -> None:
    answers = {"chosen": [" Let there be light"] * 4, "rejected": [" no", " the dog is blue", " yes yes", " it was"]}
    rows = datasets.Dataset.from_dict({"prompt": ["And God said"] * 4, **answers})
    found = []
    for model in (face, theirs):
        transformers.set_seed(0)
        trainer = trl.DPOTrainer(
            model,
            args=trl.DPOConfig(output_dir=str(tmp_path), **OPTIONS),
            train_dataset=rows,
            processing_class=their_tokenizer,
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=4),
        )
        found.append(losses_of(trainer))
    assert found[0] == found[1] and found[0][2] < found[0][0] == pytest.approx(0.6931, abs=1e-3)  # log 2
