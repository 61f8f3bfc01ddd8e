"""Fine-tuning by LoRA with `scripts/finetune.py`: the adapter serves here and in transformers, a killed run goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetune
import pytest
import torch

import gemma2
from gemma2.load import POCKET
from gemma2.losses import cross_entropy, next_tokens
from tests.conftest import ids
from tests.ecosystem.conftest import needs
from tests.test_finetune import LINES, SCRIPT, losses, options, written

peft = needs("peft")

LORA: dict[str, Any] = {"settings": "lora", "rank": 4, "alpha": 8, "steps": 12, "rate": 5e-3, "recompute": True}


@pytest.fixture
def base(folder: Callable[..., Path]) -> Path:
    return folder("base", size="9b", num_hidden_layers=2)


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"])
def test_an_adapter_serves_here_in_transformers_and_merged_in_a_gguf(targets: str, base: Path, tmp_path: Path) -> None:
    transformers = needs("transformers")
    data, out = written(tmp_path / "data.jsonl"), tmp_path / "out"
    finetune.main([str(base), str(data), "--out", str(out), *options(**LORA, targets=targets)])
    found = losses(out)
    assert found[-1] < found[0]
    tokens = ids(2, 24, vocab=4096)
    tuned = gemma2.load(base, adapter=out / "adapter", device="cpu", dtype="float32")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32", attn_implementation="eager")
    with torch.no_grad():
        before = plain(tokens).logits
        theirs = peft.PeftModel.from_pretrained(plain, str(out / "adapter"))
        after = theirs(tokens).logits
        assert torch.equal(tuned.model(tokens), after) and (after - before).abs().max() > 1e-2
        gemma2.convert(base, tmp_path / "tuned.gguf", type="f32", adapter=out / "adapter")
        merged = gemma2.load(tmp_path / "tuned.gguf", device="cpu", dtype="float32").model(tokens)
        torch.testing.assert_close(merged, after, rtol=0, atol=1e-3)
    stated = json.loads((out / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert stated["task_type"] == "CAUSAL_LM" and stated["base_model_name_or_path"] == str(base)


def test_a_killed_run_with_dropout_goes_on_with_the_same_losses_to_the_bit(base: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "data.jsonl")
    common = [str(base), str(data), *options(**LORA | {"steps": 60}, dropout=0.3, save_every=3)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finetune.main([*common, "--out", str(whole)])
    child = subprocess.Popen([sys.executable, SCRIPT, *common, "--out", str(broken)], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (broken / "state.pt").exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (broken / "adapter").exists()
    state = torch.load(broken / "state.pt")
    assert all("lora_" in name for name in state["weights"])  # the model itself is not in it
    finetune.main([*common, "--out", str(broken), "--resume"])
    assert losses(whole) == losses(broken) and len(losses(whole)) == 60
    adapters = [place / "adapter" / "adapter_model.safetensors" for place in (whole, broken)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_an_adapter_is_trained_on_a_quantized_model(tmp_path: Path) -> None:
    data, out = written(tmp_path / "data.jsonl"), tmp_path / "out"
    gguf, gemma = POCKET / "pocket-q8_0.gguf", gemma2.load(device="cpu")
    given = options(**LORA, weights="packed", dtype="float32")
    finetune.main([str(gguf), str(data), "--out", str(out), *given])
    assert losses(out)[-1] < 0.7 * losses(out)[0]
    tokens = torch.tensor([gemma.tokenizer.encode(LINES[0]["text"])])
    found = []
    for adapter in (None, out / "adapter"):
        gemma = gemma2.load(gguf, weights="packed", adapter=adapter, device="cpu", dtype="float32")
        with torch.no_grad():
            states = gemma.model.model(tokens)
            found.append(cross_entropy(gemma.model, states, next_tokens(tokens)).item())
    assert found[1] < 0.7 * found[0]


def test_a_target_that_the_model_does_not_have_is_one_line(base: Path, tmp_path: Path) -> None:
    data, out = written(tmp_path / "data.jsonl"), tmp_path / "out"
    with pytest.raises(SystemExit, match=r"finetune: error: targets \['wi_proj'\]: PEFT does not take them"):
        finetune.main([str(base), str(data), "--out", str(out), *options(**LORA, targets="wi_proj")])
    assert not out.exists()
