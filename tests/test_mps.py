"""On Apple's MPS, as far as the CPU can show it: no float64, no complex values, no operation that MPS does not have.

`tests/mps.py` says what is checked and what is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gemma2
from gemma2.cache import HybridCache
from gemma2.checkpoints.threads import _compute_alone
from gemma2.load import POCKET, parse_device
from gemma2.parity.verify import verify
from gemma2.research import capture
from gemma2.research.sites import chosen
from tests.conftest import ids, tiny
from tests.mps import OnMps, StandIn, kernels, runs_on_mps, stand_in

PROMPT = "In the beginning God created"


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    if torch.backends.mps.is_available():
        pytest.skip("the real one is here")
    with stand_in(monkeypatch, _compute_alone) as mode:
        yield mode


def test_the_stand_in_refuses_what_mps_refuses(mps: StandIn) -> None:
    x = torch.ones(3, device="mps")
    assert isinstance(x, OnMps) and (x + x).device.type == "mps" and (x + x).cpu().tolist() == [2, 2, 2]
    for what in (x.double, lambda: x.to(torch.complex64), lambda: torch.zeros(2, dtype=torch.float64, device="mps")):
        with pytest.raises(TypeError, match="MPS does not have torch"):
            what()
    with pytest.raises(TypeError, match=r"MPS does not have torch.float64"):
        torch.ones(2, dtype=torch.float64).to("mps")
    with pytest.raises(RuntimeError, match="tensors of cpu and of mps"):
        x + torch.ones(3)
    with pytest.raises(NotImplementedError, match=r"aten::linalg_eig has no kernel"):
        torch.linalg.eig(torch.eye(2, device="mps"))
    assert len(kernels()) > 2000 and runs_on_mps("aten::mm") and not runs_on_mps("aten::linalg_eig")


def test_a_whole_session_stays_within_what_mps_has(mps: StandIn, tmp_path: Path) -> None:
    assert parse_device(None).type == "mps"  # chosen where it is present
    gemma = gemma2.load(dtype="bfloat16", progress=False)
    plain = gemma2.load(dtype="bfloat16", device="cpu", progress=False)
    assert {parameter.device.type for parameter in gemma.model.parameters()} == {"mps"}
    assert gemma.model.model.rotary_emb.inv_freq.device.type == "mps"

    tokens = ids(2, 20, vocab=4096)
    with torch.no_grad(), capture(gemma) as seen:
        logits = gemma.model(tokens.to("mps"))
    assert seen.keys() == chosen(gemma.config).keys()
    assert all(value.device.type == "mps" for value in seen.values())
    with torch.no_grad():
        assert torch.equal(logits.cpu(), plain.model(tokens))

    def texts(model: gemma2.Gemma) -> list[object]:
        talk = gemma2.Talk(model, 3, repetition_penalty=1.2)
        prompts = [PROMPT, "And"]  # of unequal length
        return [
            model.generate(prompts, 4, repetition_penalty=1.3, stop="the"),
            model.generate(prompts, 3, temperature=0.9, top_p=0.9, min_p=0.01, seed=3),
            model.generate(prompts, 3, temperature=0.9, top_k=20, top_p=0.95, seed=3),
            model.chat([{"role": "user", "content": "Who?"}], 3),
            "".join(talk.say("Who?")) + "".join(talk.say("And why?")),
        ]

    assert texts(gemma) == texts(plain)
    gemma2.convert(gemma, tmp_path / "out", progress=False)
    again = gemma2.load(tmp_path / "out", device="cpu", progress=False)
    assert all(
        torch.equal(one, other) for one, other in zip(plain.model.parameters(), again.model.parameters(), strict=True)
    )
    assert {"aten::multinomial", "aten::topk", "aten::cumsum", "aten::index_copy_", "aten::argmax"} <= mps.seen


def test_a_window_that_wraps_and_a_rollback_stay_within_what_mps_has(mps: StandIn) -> None:
    gemma = gemma2.load(dtype="bfloat16", progress=False)
    cache = HybridCache(gemma.config, 1, 400, slack=8)
    tokens = ids(1, 300, vocab=4096).to("mps")
    with torch.no_grad():
        for part in (tokens[:, :200], tokens[:, 200:299]):
            gemma.model(part, None, cache)
        cache.rollback(296)
        gemma.model(tokens[:, 296:], None, cache)
    assert {layer.keys.device.type for layer in cache.layers} == {"mps"}


@pytest.mark.parametrize("form", ["q4_0", "q8_0", "f16"])
def test_ggufs_are_dequantised_on_mps(form: str, mps: StandIn, tmp_path: Path) -> None:
    made = gemma2.convert(POCKET, tmp_path / "m.gguf", type=form, progress=False)
    gemma = gemma2.load(made.path, progress=False)
    plain = gemma2.load(made.path, device="cpu", progress=False)
    assert all(
        torch.equal(one.cpu(), other)
        for one, other in zip(gemma.model.parameters(), plain.model.parameters(), strict=True)
    )


@pytest.mark.long
def test_verify_runs_on_mps(mps: StandIn) -> None:
    model = tiny("2b", num_hidden_layers=2).to("mps")
    checks = {check.name: check for check in verify(model, compiled=False, length=16)}
    assert not [name for name, check in checks.items() if check.passed is False], checks
    ran = {name for name, check in checks.items() if check.passed}
    assert ran >= {"batch = solo", "cached = uncached", "chunked = whole", "device = CPU"}, checks
    assert "decode = prefill" in ran or "would show nothing" in checks["decode = prefill"].why_not
    assert checks["device = CPU"].passed


def test_training_stays_within_what_mps_has(mps: StandIn) -> None:
    gemma = gemma2.load(dtype="float32", progress=False)
    tokens = ids(1, 12, vocab=4096).to("mps")
    logits = gemma.model(tokens)[0, :-1]
    torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).backward()
    assert all(parameter.grad is not None for parameter in gemma.model.parameters())


def test_float64_is_refused_on_mps_before_a_weight_is_read(mps: StandIn) -> None:
    with pytest.raises(gemma2.BadModelFile, match="needs float64, which mps does not have; use cpu"):
        gemma2.load(dtype="float64", progress=False)
