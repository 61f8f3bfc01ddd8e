"""Products with weights in blocks that have minima or super-blocks, against loops that take the integers from the
blocks themselves."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma2.checkpoints import ggml
from gemma2.checkpoints.ggml import TYPES, Scales, dequantize, scales
from gemma2.numerics.profiles.ggml_products import rounded, summed
from tests.gguf_files import blocks
from tests.parity.test_llama_cpp_numerics import fused, nearest, randn

UNITS = {kind.name: kind for kind in TYPES.values() if kind.name in ggml._UNITS}
KINDS = {name: kind for name, kind in UNITS.items() if kind.values == 256}
OFFSETS = {"Q6_K": 32, "TQ1_0": 1, "TQ2_0": 1}
F = np.float32


def weight(name: str, rows: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Scales]:
    """[rows 512]: raw bytes, numbers and scales."""
    raw = torch.frombuffer(bytearray(blocks(name, rows * 512, seed)), dtype=torch.uint8).view(rows, -1)
    found = scales(raw, UNITS[name])
    assert found is not None
    return raw, dequantize(raw, UNITS[name]), found


def integers(name: str, raw: Tensor) -> tuple[list[list[int]], list[list[int]], list[F], list[F], list[list[int]]]:
    """Of one row: for each block q with its integer scale, the minima, unit and step, and the scales alone."""
    q, scale, minimum = ggml._UNPACK[name](raw.view(-1, KINDS[name].bytes))
    found = scales(raw, KINDS[name])
    assert found is not None and scale is not None
    whole = (scale / found.unit[:, None]).round().int()
    codes = q.reshape(len(q), whole.shape[1], -1).int() * whole[..., None]
    minima = torch.zeros_like(codes)
    if minimum is not None and found.step is not None:
        minima = (minimum / found.step[:, None]).round().int()[..., None].expand(-1, -1, 256 // minimum.shape[1])
    steps = [F(0)] * len(q) if found.step is None else [F(x) for x in found.step.tolist()]
    units = [F(x) for x in found.unit.tolist()]
    return codes.flatten(1).tolist(), minima.reshape(len(q), -1).tolist(), units, steps, whole.tolist()


def activations(x: Tensor) -> tuple[list[list[int]], list[F]]:
    """Of one row: the integers of each block, and its scale."""
    found = [block.double() for block in x.split(256)]
    scale = [(block.abs().max() / 127).clamp(min=2.0**-149) for block in found]
    return [(b / s).round().int().tolist() for b, s in zip(found, scale, strict=True)], [F(s.item()) for s in scale]


def dot(a: list[int], b: list[int]) -> F:
    """Summed as integers, rounded once."""
    return F(sum(x * y for x, y in zip(a, b, strict=True)))


def tiled(name: str, raw: Tensor, x: Tensor) -> F:
    (codes, minima, units, steps, _), (q, scale), y = integers(name, raw), activations(x), F(0)
    for i in range(len(q)):
        found = dot(q[i], codes[i]) * units[i]
        if any(minima[i]):
            found = fused(-steps[i], dot(q[i], minima[i]), found)
        y = fused(found, scale[i], y)
    return y


def repacked(name: str, raw: Tensor, x: Tensor, group: int) -> F:
    (codes, minima, units, steps, _), (q, scale), y, less = integers(name, raw), activations(x), F(0), F(0)
    for i in range(len(q)):
        for at in range(0, 256, group):
            some = slice(at, at + group)
            y = fused(dot(q[i][some], codes[i][some]), units[i] * scale[i], y)
            less = fused(dot(q[i][some], minima[i][some]), steps[i] * scale[i], less)
    return y - less


def in_lanes(name: str, raw: Tensor, x: Tensor) -> F:
    (codes, minima, units, steps, factors), (q, scale), less = integers(name, raw), activations(x), F(0)
    lanes, offset = [F(0)] * 8, OFFSETS.get(name, 0)
    for i in range(len(q)):
        for lane in range(8):
            total = 0
            for at in (32 * run + 4 * lane + k for run in range(8) for k in range(4)):
                total += q[i][at] * (codes[i][at] + offset * factors[i][at * len(factors[i]) // 256])
            for at in range(32 * lane, 32 * lane + 32):
                total -= offset * q[i][at] * factors[i][at * len(factors[i]) // 256]
            lanes[lane] = fused(F(total), units[i] * scale[i], lanes[lane])
        less = fused(dot(q[i], minima[i]), -scale[i] * steps[i], less)
    halves = [lanes[k] + lanes[k + 4] for k in range(4)]
    return (halves[0] + halves[2]) + (halves[1] + halves[3]) + less


def beside_minima(name: str, raw: Tensor, x: Tensor) -> F:
    """x as `rounded` leaves it for Q8_1."""
    q, scale, minimum = ggml._UNPACK[name](raw.view(-1, UNITS[name].bytes))
    assert scale is not None and minimum is not None
    values, sums = x[:512].unflatten(-1, (-1, 8, 4)).tolist(), x[512:].tolist()
    lanes, least = [F(0)] * 8, F(0)
    for i, codes in enumerate(q.reshape(len(q), 8, 4).tolist()):
        least = fused(F(sums[i]), F(-minimum[i].item()), least)
        for lane in range(8):
            exact = sum(Fraction(a) * b for a, b in zip(values[i][lane], codes[lane], strict=True))
            lanes[lane] = F(nearest(Fraction(float(lanes[lane])) + exact * Fraction(scale[i].item())))
    halves = [lanes[k] + lanes[k + 4] for k in range(4)]
    return (halves[0] + halves[2]) + (halves[1] + halves[3]) + least


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_minima_are_multiplied_with_the_sums_that_activations_keep(name: str) -> None:
    raw, w, found = weight(name)
    x = rounded(randn(5, 512) * 3, "Q8_1")
    got = summed(x[None], w, name, found)[0]
    for t in range(5):
        for m in range(8):
            assert got[t, m].item() == float(beside_minima(name, raw[m], x[t])), (t, m)
    assert (summed(x[None, :, :512], w, name, found)[0] - got).abs().max() < 0.1
    assert (summed(x[None], w, name)[0] - got).abs().max() < 0.1


def test_activations_keep_the_sums_of_their_integers_in_float16() -> None:
    x = randn(3, 64) * 10
    values, sums = rounded(x, "Q8_1").split((64, 2), dim=-1)
    assert torch.equal(values, rounded(x, "Q8_0"))
    largest = x.unflatten(-1, (2, 32)).abs().amax(-1)
    integers = (values.unflatten(-1, (2, 32)) / (largest / 127).half().float()[..., None]).round().sum(-1)
    assert torch.equal(sums, (torch.div(largest, torch.tensor(127.0)) * integers).half().float())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("count", [1, 7, 8, 10])
def test_a_product_is_a_loop_over_the_integers_in_the_blocks(name: str, count: int) -> None:
    raw, w, found = weight(name)
    x = rounded(randn(count, 512) * 3, "Q8_K")
    got = summed(x[None], w, name, found)[0]
    for t in {0, count - 1}:
        for m in range(8):
            if name in ("Q4_K", "Q2_K"):
                group = {"Q4_K": 64, "Q2_K": 128}[name] if t < count - count % 4 else 256
                expected = repacked(name, raw[m], x[t], group)
            else:
                expected = (in_lanes if count < 8 or name[0] == "T" else tiled)(name, raw[m], x[t])
            assert got[t, m].item() == float(expected), (t, m)


@pytest.mark.parametrize("name", KINDS)
def test_scales_and_integers_are_the_numbers(name: str) -> None:
    raw, w, found = weight(name)
    assert found.unit.shape == (8, 2) and found.scale.shape[-1] % 2 == 0
    codes, minima, units, steps, _ = integers(name, raw[3])
    q, least = (torch.tensor(part, dtype=torch.float64) for part in (codes, minima))
    unit, step = (torch.tensor([float(x) for x in part], dtype=torch.float64)[:, None] for part in (units, steps))
    again = q * unit - least * step
    assert torch.equal(again.flatten().float(), w[3])


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("count", [3, 9])
def test_a_weight_that_was_changed_since_counts_as_it_is(name: str, count: int) -> None:
    _, w, found = weight(name)
    x = rounded(randn(count, 512), "Q8_K")
    before = summed(x[None], w, name, found)[0].double()
    changed = w.clone()
    changed[2] *= 1.37
    changed[5] = 0
    after = summed(x[None], changed, name, found)[0].double()
    size = before.abs().max()
    assert torch.equal(after[:, [0, 1, 3, 4, 6, 7]], before[:, [0, 1, 3, 4, 6, 7]])
    assert (after[:, 2] - x @ changed[2].double()).abs().max() < 1e-5 * size and after[:, 5].abs().max() < 1e-5 * size


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("count", [3, 9])
def test_without_the_scales_of_the_file_a_product_is_the_same_up_to_rounding(name: str, count: int) -> None:
    _, w, found = weight(name)
    x = rounded(randn(count, 512), "Q8_K")
    exact = x @ w.double().T
    for known in (found, None):
        assert (summed(x[None], w, name, known)[0] - exact).abs().max() < 1e-5 * exact.abs().max()


def test_a_block_of_zeros_gives_nothing() -> None:
    raw = torch.zeros(8, 288, dtype=torch.uint8)
    found, x = scales(raw, KINDS["Q4_K"]), rounded(randn(5, 512), "Q8_K")
    assert torch.equal(summed(x[None], torch.zeros(8, 512), "Q4_K", found)[0], torch.zeros(5, 8))
