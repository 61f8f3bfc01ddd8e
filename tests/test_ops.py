"""The mathematics, each function against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from gemma2 import ops
from gemma2.tokens import check_tokens


def test_visible_is_exactly_zero_to_window_positions_back() -> None:
    positions = torch.arange(12)[None]
    for window in (1, 4, 16, None):
        seen = ops.visible(positions, positions, window)[0, 0]
        for q in range(12):
            for k in range(12):
                assert seen[q, k] == (0 <= q - k < (window or 99)), (q, k, window)


def test_padding_and_empty_slots_are_never_seen() -> None:
    queries, keys = torch.tensor([[-2, -1, 0, 5]]), torch.tensor([[-1, -7, 0, 5, 4]])
    seen = ops.visible(queries, keys, 3)[0, 0]
    assert not seen[:, :2].any(), "negative positions are padding or empty"
    assert seen[3].tolist() == [False, False, False, True, True]
    assert not seen[:2].any(), "a query of padding sees nothing"


def test_softcap_is_nearly_the_identity_for_small_values_and_bounded_for_large_ones() -> None:
    x = torch.tensor([-1e6, -1e-3, 0.0, 1e-3, 100.0, 1e6], dtype=torch.float64)
    capped = ops.softcap(x, 50.0)
    assert torch.allclose(capped, torch.tensor([50 * math.tanh(v / 50) for v in x.tolist()], dtype=torch.float64))
    assert capped.abs().max() <= 50


def test_rotation_turns_pairs_half_a_head_apart_by_position_times_frequency() -> None:
    c, theta, p = 8, 10000.0, 5
    cos, sin = ops.cos_sin(torch.tensor([[p]]), ops.frequencies(c, theta, torch.float64), torch.float64)
    x = torch.randn(1, 1, 1, c, dtype=torch.float64)
    turned = ops.apply_rotary(x, cos, sin)[0, 0, 0]
    for i in range(c // 2):
        angle = p * theta ** (-2 * i / c)
        a, b = x[0, 0, 0, i], x[0, 0, 0, i + c // 2]
        assert torch.isclose(turned[i], a * math.cos(angle) - b * math.sin(angle))
        assert torch.isclose(turned[i + c // 2], b * math.cos(angle) + a * math.sin(angle))


def test_angles_are_float32_inside_and_rounded_once() -> None:
    far = torch.tensor([[8191]])
    frequency = ops.frequencies(256, 10000.0, torch.float32)
    low, _ = ops.cos_sin(far, frequency, torch.bfloat16)
    high, _ = ops.cos_sin(far, frequency, torch.float32)
    assert low.dtype == torch.bfloat16 and torch.equal(low, high.bfloat16())


def test_frequencies_are_made_on_the_cpu_inside_a_meta_device_context() -> None:
    with torch.device("meta"):
        assert ops.frequencies(8, 10000.0, torch.float32).device.type == "cpu"


def test_inverse_rms_is_that_of_the_last_axis() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    assert torch.allclose(ops.inverse_rms(x, 1e-6), (x.square().mean(-1, keepdim=True) + 1e-6) ** -0.5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[1.0]]), "int64"),
        (torch.tensor([[True]]), "int64"),
        (torch.tensor([1]), "matrix"),
        (torch.zeros(1, 0, dtype=torch.int64), "non-empty"),
        (torch.tensor([[0, 10]]), r"id 10 at \[0, 1\]"),
        (torch.tensor([[0], [-1]]), r"id -1 at \[1, 0\]"),
    ],
)
def test_ids_that_are_none_are_refused_by_name(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tokens(tokens, 10)
