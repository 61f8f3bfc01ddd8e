"""What an ablation costs on a text: windows, effects and their intervals, held against whole logits written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gemma2.config import GLOBAL
from gemma2.research.ablate import NoCap
from gemma2.research.ablation import Effect, batches, bootstrap, likelihoods, measure, standard, windows, work
from gemma2.scoring import hidden
from tests.conftest import ids
from tests.research.ablated import CONFIG, MODEL, TOKENS, under


def test_windows_hold_each_token_once_behind_a_bos() -> None:
    text = list(range(10, 33))
    found = windows(text, 8, bos=2)
    assert [window[0] for window in found] == [2] * 4 and [len(window) for window in found] == [8, 8, 8, 3]
    assert [token for window in found for token in window[1:]] == text
    made = batches(text, 8, bos=2)
    assert [list(batch.shape) for batch in made] == [[3, 8], [1, 3]]
    for wrong, message in (([], "the text has no tokens"), ([3], "context must be an integer of at least 2")):
        with pytest.raises(ValueError, match=message):
            windows(wrong, 1 if wrong else 8, bos=2)


TEXT = ids(1, 70, seed=4)[0].tolist()


@torch.no_grad()
def test_effects_are_those_of_whole_logits_written_out() -> None:
    switches: dict[str, dict[str, Any]] = {"cap": {"final_softcap": 4.0}, "same window": {"window": 16}}
    ticks: list[int] = []
    found = {effect.name: effect for effect in measure(MODEL, TEXT, switches, 32, bos=2, tick=ticks.append)}
    assert sum(ticks) == work(TEXT, [32], switches) == 70 * 3
    nats, kl, other = [], [], []
    for row in windows(TEXT, 32, bos=2):
        tokens = torch.tensor([row])
        p, q = (
            MODEL(tokens).log_softmax(-1)[0, :-1],
            under(switches["cap"], tokens=tokens).log_softmax(-1)[0, :-1],
        )
        nats.append(F.nll_loss(q, tokens[0, 1:], reduction="none"))
        kl.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
        other.append((p.argmax(-1) != q.argmax(-1)).double())
    cap = found["cap"]
    assert (cap.windows, cap.tokens, cap.context) == (3, 70, 32)
    for estimate, parts in ((cap.nats, nats), (cap.kl, kl), (cap.top, other)):
        assert estimate.value == pytest.approx(float(torch.cat(parts).mean()), rel=1e-9)
        assert estimate.low is not None and estimate.high is not None
        assert estimate.low <= estimate.value <= estimate.high
    assert cap.more.value == pytest.approx(cap.nats.value - found["unchanged"].nats.value, rel=1e-9)
    assert cap.kl.value > 0.1 and cap.ratio == pytest.approx(cap.perplexity / found["unchanged"].perplexity)
    same = found["same window"]
    assert (same.kl.value, same.more.value, same.top.value) == (0, 0, 0)


def test_only_a_part_of_a_windows_logits_is_held_at_once_and_that_changes_no_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switches: dict[str, dict[str, Any]] = {"cap": {"final_softcap": 4.0}, "window": {"window": 5}}
    whole = measure(MODEL, TEXT, switches, 40, bos=2)
    shapes: list[int] = []
    monkeypatch.setattr("gemma2.research.ablation.LOGITS", 512 * 6)
    monkeypatch.setattr("gemma2.scoring.PIECE", 8)
    monkeypatch.setattr("gemma2.research.ablation.PASS", 40)
    with MODEL.lm_head.register_forward_hook(lambda module, inputs, out: shapes.append(out.shape[0] * out.shape[1])):
        parted = measure(MODEL, TEXT, switches, 40, bos=2)
    assert max(shapes) == 6
    for one, other in zip(whole, parted, strict=True):
        for kind in ("nats", "more", "kl", "top"):
            assert getattr(one, kind).value == pytest.approx(getattr(other, kind).value, rel=1e-8, abs=1e-12)


def test_the_bootstrap_is_seeded_and_its_interval_is_that_of_the_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.full((400,), 10.0, dtype=torch.float64)
    sums = 10 * torch.randn(400, 1, generator=generator, dtype=torch.float64)
    (found,) = bootstrap(sums, tokens, samples=2000, seed=3)
    assert found == bootstrap(sums, tokens, samples=2000, seed=3)[0] != bootstrap(sums, tokens, samples=2000, seed=4)[0]
    assert found.low is not None and found.high is not None
    spread = 1.96 * float((sums / 10).std()) / 20  # of a mean of 400
    assert found.high - found.value == pytest.approx(spread, rel=0.1)
    assert found.value - found.low == pytest.approx(spread, rel=0.1)
    (alone,) = bootstrap(sums[:1], tokens[:1])
    assert (alone.low, alone.high) == (None, None)


def test_the_standard_switches_all_change_a_model_in_which_every_feature_bites() -> None:
    switches = standard(CONFIG, layers=True, heads=True)
    assert len(switches) == 10 + 4 + 4 * 8
    some = {name: switches[name] for name in switches if not name.startswith(("head", "without"))}
    effects: list[Effect] = measure(MODEL, TEXT, some | {"x": {"heads": [(3, 7)]}}, 64, bos=2)
    assert all(effect.kl.value > 1e-6 for effect in effects[1:])
    everywhere = replace(CONFIG, layer_types=(GLOBAL,) * 4)
    assert not any("window" in name or "global" in name for name in standard(everywhere) if "swapped" not in name)


def test_the_parts_of_the_measurement_compute_what_the_model_computes() -> None:
    with torch.no_grad():
        plain = MODEL(TOKENS)
        assert torch.equal(likelihoods(MODEL, hidden(MODEL, TOKENS)), plain.log_softmax(-1))
    assert isinstance(NoCap(MODEL.softcap)(plain), Tensor)
