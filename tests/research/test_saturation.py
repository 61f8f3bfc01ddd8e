"""How near scores and logits come to their caps, held against values that were captured whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemma2 import ops
from gemma2.research import capture
from gemma2.research.ablation import windows
from gemma2.research.saturation import BINS, END, saturation
from gemma2.twins import sharing
from tests.conftest import ids
from tests.research.ablated import CONFIG, MODEL, state

TEXT = ids(1, 70, seed=4)[0].tolist()


@torch.no_grad()
def test_saturation_counts_what_is_seen_before_the_cap() -> None:
    found = {near.name: near for near in saturation(MODEL, TEXT, 40, bos=2)}
    scores: dict[int, list[Tensor]] = {i: [] for i in range(4)}
    tops, logits = [], []
    for row in windows(TEXT, 40, bos=2):
        tokens = torch.tensor([row[:-1]])
        with capture(MODEL, ["blocks.*.attn.hook_scores_raw", "logits_raw"]) as seen:
            MODEL(tokens)
        at = torch.arange(tokens.shape[1])[None]
        for i in range(4):
            raw, visible = seen[f"blocks.{i}.attn.hook_scores_raw"], ops.visible(at, at, CONFIG.window(i))
            scores[i].append(raw.masked_select(visible))
            tops.append(raw.masked_fill(~visible, -torch.inf).amax(-1).flatten())
        logits.append(seen["logits_raw"][0])
    expected = {f"scores, layer {i}": (torch.cat(parts), 50) for i, parts in scores.items()}
    expected["scores, all layers"] = (torch.cat([x for parts in scores.values() for x in parts]), 50)
    expected["largest score of each query and head"] = (torch.cat(tops), 50)
    expected["logits"] = (torch.cat(logits).flatten(), 30)
    expected["top logit of each token"] = (torch.cat(logits).amax(-1), 30)
    assert list(found) == list(expected)
    for name, (x, cap) in expected.items():
        near, ratio = found[name], x.abs() / cap
        assert (near.cap, near.count) == (cap, x.numel()), name
        assert near.largest == pytest.approx(float(x.abs().max()))
        assert near.half == pytest.approx(float((ratio > 0.5).double().mean()))
        assert near.most == pytest.approx(float((ratio > 0.9).double().mean()))
        gradient = torch.autograd.functional.jvp(lambda x, cap=cap: ops.softcap(x, cap), x, torch.ones_like(x))[1]
        assert near.slope == pytest.approx(float(gradient.mean()), rel=1e-9)
        middle = int(0.5 / END * BINS)
        assert sum(near.shares) == pytest.approx(1) and sum(near.shares[middle:]) == pytest.approx(near.half)
    assert found["top logit of each token"].most > 0 and found["scores, all layers"].half > 0  # these caps bite here


def test_a_compiled_model_is_counted_as_the_plain_one() -> None:
    """Compiled code passes hooks by."""
    torch._dynamo.reset()
    model = sharing(MODEL)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")  # type: ignore[assignment]
    with torch.no_grad():
        model(torch.tensor(windows(TEXT, 40, bos=2)[0])[None, :-1])
    assert saturation(model, TEXT, 40, bos=2) == saturation(MODEL, TEXT, 40, bos=2)


def test_a_cache_in_chunks_counts_the_same_and_no_hook_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saturation(MODEL, TEXT, 70, bos=2)
    monkeypatch.setattr("gemma2.scoring.PIECE", 9)  # rings of 16 wrap
    before = state(MODEL)
    for one, other in zip(whole, saturation(MODEL, TEXT, 70, bos=2), strict=True):
        assert (one.name, one.count) == (other.name, other.count)
        assert one.slope == pytest.approx(other.slope, rel=1e-9) and one.largest == pytest.approx(other.largest)
    with pytest.raises(ValueError, match="outside"):
        saturation(MODEL, [600, 3], 70, bos=2)
    assert state(MODEL) == before
