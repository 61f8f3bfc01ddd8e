"""Under `numerics="batch-invariant"` a row has the same bits alone and in a batch, in decoding and in prefill; without
it, it has not. Everything is compared in bits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gemma2
from gemma2 import ops
from gemma2.generate import generate_ids
from gemma2.numerics import PROFILES, with_numerics
from gemma2.numerics.parts import gelu as gelu_of_pytorch
from gemma2.numerics.profiles import batch_invariant, tiles
from gemma2.tokens import left_padded
from tests.conftest import SHAPES, ids, tiny

DTYPES = [torch.float32, torch.bfloat16]
LENGTH = 150  # past the window of 16 and past a block of keys
REAL: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}  # as 2B
ODD = [(0, 1), (0, 3), (1, 7), (3, 15), (5, 17), (7, 31), (2, 33), (0, 63), (11, 1001), (13, 40001), (1, 70003)]


def invariant(model: gemma2.Gemma2, without: str | None = None) -> gemma2.Gemma2:
    names = [change.name for change in PROFILES["batch-invariant"] if change.name != without]
    return with_numerics(model, "batch-invariant", names)


@torch.no_grad()
def fed(model: gemma2.Gemma2, tokens: Tensor, sizes: Sequence[int], positions: Tensor | None = None) -> Tensor:
    cache = gemma2.HybridCache(model.config, *tokens.shape)
    given = [None] * len(sizes) if positions is None else positions.split(list(sizes), dim=1)
    return torch.cat(
        [model(part, at, cache) for part, at in zip(tokens.split(list(sizes), dim=1), given, strict=True)], 1
    )


def small(size: str, dtype: torch.dtype = torch.float32) -> gemma2.Gemma2:
    """A local layer and a global one."""
    return tiny(size, num_hidden_layers=2).to(dtype)


@torch.no_grad()
def solo_is_slot_7(model: gemma2.Gemma2, t: int = 3) -> bool:
    rows = ids(32, t)
    return torch.equal(model(rows)[7], model(rows[7:8])[0])


@torch.no_grad()
def decode_is_prefill(model: gemma2.Gemma2) -> bool:
    tokens = ids(1, LENGTH)
    whole = model(tokens)
    ways = ([13, *[1] * 6, 131], [49, 49, 49, 3], [126, *[1] * 4, 20])
    return all(torch.equal(fed(model, tokens, sizes), whole) for sizes in ways)


@torch.no_grad()
def ragged_is_solo(model: gemma2.Gemma2) -> bool:
    rows = [ids(1, length, seed=length)[0].tolist() for length in (LENGTH, 133, 31, 1)]
    tokens, positions = left_padded(rows)
    found = fed(model, tokens, [40, 1, 1, 80, 1, LENGTH - 123], positions)
    solo = [model(torch.tensor([row]))[0] for row in rows]
    return all(torch.equal(logits[-len(one) :], one) for logits, one in zip(found, solo, strict=True))


def of_2bs_width(dtype: torch.dtype) -> gemma2.Gemma2:
    """One layer of 2B's widths, window 16. What it holds repeats, so that it is made in little time."""
    config = replace(tiny("2b", num_hidden_layers=1).config, **REAL)
    with torch.device("meta"):
        model = gemma2.Gemma2(config)
    some, state = torch.randn(1009 * 521, generator=torch.Generator().manual_seed(0)), {}
    for name, parameter in model.named_parameters():
        std = 0.3 if "norm" in name else 1.0 if "embed" in name else 3 * parameter.shape[-1] ** -0.5
        count = parameter.numel()
        state[name] = (some * std).to(dtype).repeat(-(-count // len(some)))[:count].view(parameter.shape)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb.to("cpu")
    return model.eval()


@pytest.mark.parametrize(
    "size, dtype", [("2b", torch.bfloat16), ("9b", torch.float32), ("27b", torch.bfloat16), ("27b", torch.float32)]
)
def test_a_row_has_the_same_bits_alone_in_a_batch_decoded_and_behind_padding(size: str, dtype: torch.dtype) -> None:
    model = invariant(small(size, dtype))
    assert solo_is_slot_7(model) and solo_is_slot_7(model, 1)
    assert decode_is_prefill(model)
    assert ragged_is_solo(model)


def test_without_the_mode_small_shapes_differ_too() -> None:
    model = small("27b")
    assert not decode_is_prefill(model) and not ragged_is_solo(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.long
def test_one_layer_of_2bs_width_holds_it_and_the_control_without_the_mode_does_not(
    dtype: torch.dtype,
) -> None:
    model = of_2bs_width(dtype)
    exact = invariant(model)
    assert solo_is_slot_7(exact, 1)
    tokens = ids(1, 50)
    with torch.no_grad():
        whole, plain = exact(tokens), model(tokens)
    assert torch.equal(fed(exact, tokens, [14, 1, 1, 34]), whole)
    assert not torch.equal(fed(model, tokens, [14, 1, 1, 34]), plain), "the control shows nothing"
    assert (whole - plain).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-4) * plain.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2048, 2304), (2304, 9216)], ids=str)
def test_products_of_2bs_shapes_have_a_rows_bits_for_any_number_of_rows_and_plain_ones_have_not(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    some = torch.randn(1009 * 521, generator=generator)
    weight = some.repeat(-(-shape[0] * shape[1] // len(some)))[: shape[0] * shape[1]].view(shape).to(dtype)
    x = torch.randn(64, shape[1], generator=generator).to(dtype)
    whole = tiles.product(x, weight)
    parts = [x[:1], x[7:8], x[5:8], x[20:53], x[:, None][:33]]
    assert torch.equal(tiles.product(parts[0], weight), whole[:1])
    assert torch.equal(tiles.product(parts[1], weight), whole[7:8])
    assert torch.equal(tiles.product(parts[2], weight), whole[5:8])
    assert torch.equal(tiles.product(parts[3], weight), whole[20:53])
    assert torch.equal(tiles.product(parts[4], weight), whole[:33, None])
    one_by_one = torch.cat([F.linear(row, weight) for row in x[:16].split(1)])
    assert not torch.equal(one_by_one, F.linear(x, weight)[:16]), "the control shows nothing"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wider_shapes_are_used_only_where_every_bit_is_the_same(dtype: torch.dtype) -> None:
    weight = torch.randn(96, 2304, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = torch.randn(300, 2304, generator=torch.Generator().manual_seed(2)).to(dtype)
    whole = tiles.product(x, weight)
    assert torch.equal(torch.cat([tiles.product(row, weight) for row in x.split(1)]), whole)
    assert set(tiles.sizes(weight, 300)) <= set(tiles.WIDER) and tiles.sizes(weight, 100) == ()


def test_a_wider_shape_with_other_bits_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(rows: Tensor, weight: Tensor) -> Tensor:
        return F.linear(rows, weight) * (1 + 1e-6 * (len(rows) > 200))

    monkeypatch.setattr(tiles, "_tile", other)
    monkeypatch.setattr(tiles, "TRIED", {})
    assert tiles.sizes(torch.randn(48, 64), 300) == (128,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [torch.tanh, torch.exp, torch.cos, torch.sin, batch_invariant.gelu])
def test_functions_of_one_number_do_not_depend_on_its_place(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = (torch.randn(70_004, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    whole = function(x)
    for start, count in ODD:
        assert torch.equal(function(x[start : start + count]), whole[start : start + count])
        strided = torch.stack((x, x), dim=1)[start : start + count, 0]
        assert torch.equal(function(strided), whole[start : start + count])


def test_the_control_of_that_is_gelu_whose_last_elements_pytorch_computes_otherwise() -> None:
    x = torch.randn(70_004, generator=torch.Generator().manual_seed(0)) * 3
    whole = gelu_of_pytorch(x)
    assert not all(torch.equal(gelu_of_pytorch(x[a : a + n]), whole[a : a + n]) for a, n in ODD)
    assert (batch_invariant.gelu(x) - whole).abs().max() < 1e-6


@pytest.mark.parametrize("width", [1, 2, 9, 128, 144, 2304, 3584, 4608])
def test_a_sum_of_halves_is_a_sum_for_every_width_and_place(width: int) -> None:
    x = torch.randn(33, width, generator=torch.Generator().manual_seed(0))
    found = tiles.halved_sum(x)
    assert torch.allclose(found, x.sum(-1, keepdim=True), atol=1e-4) and found.shape == (33, 1)
    assert all(torch.equal(tiles.halved_sum(x[i : i + 3]), found[i : i + 3]) for i in range(30))


def test_keys_are_put_in_blocks_of_positions_whatever_slots_hold_them() -> None:
    block, wrapped = batch_invariant.BLOCK, torch.tensor([[131, 132, 126, 127, 128, 129, 130, -1]])
    slots = batch_invariant.places(wrapped)
    assert slots.shape == (1, 2 * block)
    assert slots[0, 126:133].tolist() == [2, 3, 4, 5, 6, 0, 1]
    assert (slots == 8).sum() == 2 * block - 7


def test_positions_that_leave_gaps_or_repeat_are_refused() -> None:
    model = invariant(tiny())
    for wrong in ([[0, 1, 2, 1000]], [[0, 1, 1, 2]]):
        with pytest.raises(ValueError, match=r"needs the positions of a row to (rise by one|differ)"):
            model(ids(1, 4), torch.tensor(wrong))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_text_is_the_same_alone_and_in_a_batch_of_8(dtype: torch.dtype) -> None:
    model = invariant(small("27b", dtype))
    prompts = [ids(1, 3 + 5 * i, seed=i)[0].tolist() for i in range(8)]

    def text(prompts: list[list[int]], chunk: int) -> list[list[int]]:
        greedy = gemma2.Sampling(temperature=0)
        return [list(row) for row in zip(*generate_ids(model, prompts, 8, greedy, chunk=chunk), strict=True)]

    together = text(prompts, 512)
    for row in (0, 7):
        assert text([prompts[row]], 9) == [together[row]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SHAPES)
def test_it_is_the_same_model_within_rounding_and_its_taps_have_their_shapes(size: str, dtype: torch.dtype) -> None:
    model, tokens = small(size, dtype), ids(2, 40)
    exact, seen = invariant(model), defaultdict[str, list[torch.Size]](list)
    for one in (model, exact):
        for name, module in one.named_modules():
            if name.endswith(("hook_pattern", "hook_scores_raw", "hook_z")):
                module.register_forward_hook(lambda m, i, output, name=name: seen[name].append(output.shape))
    with torch.no_grad():
        found, plain = exact(tokens), model(tokens)
    assert (found - plain).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-4) * plain.abs().max()
    assert len(seen) == 6 and all(mine == theirs for mine, theirs in seen.values())


@torch.no_grad()
def test_padding_costs_no_row_its_finiteness() -> None:
    tokens, positions = left_padded([[1, 2, 3, 4], [5]])
    assert invariant(tiny())(tokens, positions).isfinite().all()


@pytest.mark.parametrize(
    "without, fails",
    [("products=tiles", solo_is_slot_7), ("keys=positions", decode_is_prefill), ("keys=positions", ragged_is_solo)],
)
def test_each_of_these_ingredients_is_needed(without: str, fails: Callable[[Any], bool]) -> None:
    model = of_2bs_width(torch.float32) if without == "products=tiles" else small("27b")
    assert not fails(invariant(model, without))


def test_the_sum_over_keys_has_the_order_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots as they are, in blocks: what the ring holds then changes places as it wraps."""

    def as_held(key_positions: Tensor) -> Tensor:
        b, held = key_positions.shape
        slots = torch.arange(-(-held // batch_invariant.BLOCK) * batch_invariant.BLOCK).clamp(max=held)
        return slots.expand(b, -1)

    monkeypatch.setattr(batch_invariant, "places", as_held)
    assert not decode_is_prefill(invariant(small("27b")))


def test_a_norm_of_tiles_is_that_of_ops_within_rounding() -> None:
    x = torch.randn(5, 2304, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(batch_invariant.inverse_scale(x, 1e-6), ops.inverse_rms(x, 1e-6), rtol=1e-6)
