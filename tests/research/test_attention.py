"""Maps are the captured patterns; counts of attention are those of a plain loop; scores are those before the cap."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma2 import left_padded
from gemma2.research import attention_maps, attention_stats, capture
from tests.conftest import ids, tiny

MODEL = tiny("27b").double()  # windows of 16 in layers 0 and 2
TOKENS = ids(2, 30)


def test_maps_are_the_captured_patterns_of_chosen_heads_in_the_order_given() -> None:
    with torch.no_grad(), capture(MODEL, "blocks.*.attn.hook_pattern") as seen:
        MODEL(TOKENS)
    whole = attention_maps(MODEL, TOKENS)
    assert list(whole) == [0, 1, 2, 3]
    assert all(torch.equal(whole[i], seen[f"blocks.{i}.attn.hook_pattern"]) for i in whole)
    some = attention_maps(MODEL, TOKENS, layers=[3, 1], heads=[6, 2], queries=[4, -1])
    assert list(some) == [3, 1] and some[3].shape == (2, 2, 2, 30)
    assert torch.equal(some[1], whole[1][:, [6, 2]][:, :, [4, 29]])
    assert torch.equal(attention_maps(MODEL, TOKENS, layers=0, heads=0)[0], whole[0][:, :1])


def test_counts_are_those_of_a_plain_loop() -> None:
    stats = attention_stats(MODEL, TOKENS, beyond=5)
    names = ["blocks.*.attn.hook_pattern", "blocks.*.attn.hook_scores_raw"]
    with torch.no_grad(), capture(MODEL, names) as seen:
        MODEL(TOKENS)
    assert stats.windows == (16, None, 16, None)
    for layer, window in enumerate(stats.windows):
        pattern, raw = (seen[name.replace("*", str(layer))][:, 3] for name in names)
        distance, far, bos, scores = [], [], [], []
        for row in range(2):
            for t in range(1, 30):
                weights = pattern[row, t].tolist()
                distance.append(sum(weight * (t - s) for s, weight in enumerate(weights)))
                bos.append(weights[0])
                if t > 5:
                    far.append(sum(weights[: t - 5]))
                first = 0 if window is None else max(0, t - window + 1)
                scores += raw[row, t, first : t + 1].tolist()
        found = (stats.distance, stats.far, stats.bos)
        for tensor, expected in zip(found, (distance, far, bos), strict=True):
            assert abs(float(tensor[layer, 3]) - sum(expected) / len(expected)) < 1e-9
        assert abs(float(stats.largest[layer, 3]) - max(map(abs, scores))) < 1e-9
        assert abs(float(stats.near[layer, 3]) - sum(abs(x) > 25 for x in scores) / len(scores)) < 1e-6
        slopes = 1 - torch.tanh(torch.tensor(scores, dtype=torch.float64) / 50).square()
        assert abs(float(stats.slope[layer, 3] - slopes.mean())) < 1e-9
    assert float(stats.near.max()) > 0.01 and float(stats.slope.min()) < 0.95  # here the cap saturates


def test_a_local_layer_loses_sight_of_the_bos_and_of_what_is_behind_its_window() -> None:
    stats = attention_stats(MODEL, TOKENS, beyond=15)
    assert stats.far[[0, 2]].abs().max() == 0 and stats.far[[1, 3]].min() > 0
    assert attention_stats(MODEL, TOKENS).beyond == 8
    assert attention_stats(MODEL, TOKENS[:, :8]).far.isnan().all()


def test_a_padded_row_counts_like_the_row_alone() -> None:
    rows = [TOKENS[0].tolist(), TOKENS[1, :20].tolist()]
    tokens, positions = left_padded(rows)
    both = attention_stats(MODEL, tokens, positions=positions)
    alone = [attention_stats(MODEL, torch.tensor([row])) for row in rows]
    expected = (29 * alone[0].distance + 19 * alone[1].distance) / 48
    assert (both.distance - expected).abs().max() < 1e-9
    assert torch.equal(both.largest, torch.maximum(alone[0].largest, alone[1].largest)) or (
        (both.largest - torch.maximum(alone[0].largest, alone[1].largest)).abs().max() < 1e-9
    )


def test_the_table_for_people_has_a_row_a_layer() -> None:
    head, *rows = attention_stats(MODEL, TOKENS[:, :8]).rows()
    assert head[3] == "> 8 back" and [row[1] for row in rows] == ["local 16", "global"] * 2
    assert all(len(row) == len(head) and row[3] == "-" for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [4]}, "layers must be some of 0 to 3, not 4"),
        ({"layers": []}, "layers must be some of 0 to 3, not none"),
        ({"heads": [-1]}, "heads must be some of 0 to 7, not -1"),
        ({"heads": [True]}, "heads must be some of 0 to 7, not True"),
        ({"queries": "last"}, "positions are a number"),
        ({"queries": [0, 30]}, "position 30 is not in the text, which has 30 tokens"),
    ],
)
def test_heads_that_are_not_there_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_maps(MODEL, TOKENS, **options)


def test_a_text_of_one_token_is_refused_and_no_hook_stays() -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        attention_stats(MODEL, TOKENS[:, :1])
    with pytest.raises(ValueError, match="beyond must be a non-negative integer"):
        attention_stats(MODEL, TOKENS, beyond=-1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in MODEL.modules())
