"""The comparison by itself: errors made at a place, against hand-computed values and models that differ on purpose."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gemma2
from gemma2.numerics import with_numerics
from gemma2.parity.compare import Row, compare, compare_end, compare_logits, first_difference, observed, predicted
from gemma2.research import watching
from gemma2.research.sites import sites
from tests.conftest import SHAPES, ids, tiny

ROW = ids(1, 24)[0].tolist()
SHAPE = {"num_hidden_layers": 2}
Models = tuple[gemma2.Gemma2, dict[str, Tensor]]


@pytest.fixture(scope="module")
def sound() -> Models:
    """A float32 model and all that it computes."""
    model = tiny("2b", **SHAPE)
    return model, observed(model, ROW, sites(model.config))


def by_site(rows: list[Row]) -> dict[str, Row]:
    return {row.site: row for row in rows}


def test_a_system_with_our_bits_has_our_errors_at_every_site_in_the_order_of_computation(sound: Models) -> None:
    model, values = sound
    rows = compare(model, ROW, dict(reversed(values.items())))
    assert [row.site for row in rows] == list(sites(model.config))
    assert all(row.bitwise and not row.why and row.relative == row.own_relative for row in rows)
    assert first_difference(rows) is None and max(row.ratio for row in rows) <= 0.5


def test_the_numbers_of_a_row_are_those_of_their_definitions(sound: Models) -> None:
    model, values = sound
    site = "blocks.0.mlp.hook_pre"
    other = values[site] + 0.01 * torch.randn(values[site].shape, generator=torch.Generator().manual_seed(0))
    (row,) = compare(model, ROW, {site: other})
    truth, own, found = predicted(model, ROW)[site], values[site].double(), other.double()
    assert row.largest == (found - truth).abs().max().item()
    assert row.relative == pytest.approx((found - truth).norm().item() / truth.norm().item())
    assert row.own_relative == pytest.approx((own - truth).norm().item() / truth.norm().item())
    assert row.cosine == pytest.approx((found * truth).sum().item() / (found.norm() * truth.norm()).item())
    assert row.size == pytest.approx(row.relative) and row.differs and not row.bitwise


def test_an_error_counts_at_its_own_place_alone(sound: Models) -> None:
    """What follows from a value is predicted from that value, so it is right; the whole distance keeps growing."""
    model, _ = sound
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.get_parameter("model.layers.0.mlp.up_proj.weight")[:99].mul_(1.01)  # all of them, a norm would undo
    rows = compare(model, ROW, observed(wrong, ROW, sites(model.config)))
    assert [row.site for row in rows if row.differs] == ["blocks.0.mlp.hook_pre_linear"]
    after = by_site(rows)["blocks.1.hook_resid_post"]
    assert after.relative > 100 * after.own_relative and after.size < 2 * after.own_size


def test_sites_that_are_not_shown_are_judged_together_with_the_next_that_is(sound: Models) -> None:
    model, _ = sound
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.get_parameter("model.layers.0.mlp.up_proj.weight")[:99].mul_(1.01)  # all of them, a norm would undo
    shown = ["hook_embed", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "logits"]
    rows = compare(model, ROW, observed(wrong, ROW, shown))
    assert [row.site for row in rows if row.differs] == ["blocks.0.hook_resid_post"]


def test_a_small_gain_that_all_tokens_share_is_found_where_its_size_is_rounding(sound: Models) -> None:
    model, _ = sound
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    site = "blocks.0.ln1"
    values = observed(narrow, ROW, [site])[site]
    (row,) = compare(narrow, ROW, {site: (predicted(narrow, ROW)[site] * 1.0035).float()})
    assert row.size < 2 * row.own_size and row.gain > 3.5 * row.own_gain and row.differs
    assert not compare(narrow, ROW, {site: values})[0].differs


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min, -2.3819763e38])
def test_a_masked_score_is_masked_whatever_number_stands_there(fill: float, sound: Models) -> None:
    model, values = sound
    site = "blocks.1.attn.hook_attn_scores"
    scores = values[site].masked_fill(values[site] < -1e4, fill)
    rows = by_site(compare(model, ROW, {**values, site: scores}))
    assert not any(row.differs for row in rows.values()) and rows[site].largest < 1e-3


def test_a_key_that_one_system_alone_sees_differs_and_is_counted(sound: Models) -> None:
    model, values = sound
    site = "blocks.0.attn.hook_attn_scores"
    for seen in (0.0, -math.inf):  # a key too many, a key too few
        scores = values[site].clone()
        scores[0, 20, 2 if seen == 0.0 else 20] = seen
        (row,) = compare(model, ROW, {site: scores})
        assert row.differs and row.why == "1 keys seen by one system alone" and row.ratio == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named_first_and_whose_it_is(bad: float, sound: Models) -> None:
    model, values = sound
    for site in ("blocks.0.attn.hook_attn_scores", "blocks.1.hook_resid_post", "logits"):
        if site.endswith("scores") and bad == -math.inf:
            continue  # a masked key
        other = {name: value.clone() for name, value in values.items()}
        other[site][3, 5] = bad
        first = first_difference(compare(model, ROW, other))
        assert first is not None and first.site == site
        assert first.why.startswith(f"theirs not finite: {bad} at [3, 5")


def test_our_own_value_that_is_not_finite_is_named_where_it_arises(sound: Models) -> None:
    """float16 ends at 65504; the weights are finite, what they make of a token is not."""
    model, _ = sound
    large = copy.deepcopy(model)
    with torch.no_grad():
        large.get_parameter("model.layers.1.mlp.gate_proj.weight").mul_(1e4)
    other = observed(large, ROW, sites(model.config))
    assert all(value.isfinite().all() for value in other.values())
    first = first_difference(compare(large.to(torch.float16), ROW, other))
    assert first is not None and first.site == "blocks.1.mlp.hook_pre"
    assert first.why.startswith("ours not finite: ") and "theirs" not in first.why


def test_the_last_positions_may_stand_for_a_site(sound: Models) -> None:
    model, values = sound
    rows = by_site(
        compare(model, ROW, {**values, "logits": values["logits"][-3:], "ln_final": values["ln_final"][-1:]})
    )
    assert rows["logits"].bitwise and rows["ln_final"].bitwise and not any(row.differs for row in rows.values())
    (first,) = compare(model, ROW, {"logits": values["logits"][:3]})
    assert first.differs


@pytest.mark.parametrize(
    ("site", "change"),
    [
        ("logits", lambda x: x[:0]),
        ("logits", lambda x: x[:, :-1]),
        ("logits", lambda x: x[None]),
        ("ln_final", lambda x: torch.cat((x, x))),
        ("blocks.0.attn.hook_q", lambda x: x[-3:]),
        ("blocks.0.attn.hook_pattern", lambda x: x[:, :, :-1]),
    ],
)
def test_another_shape_is_refused_by_name(site: str, change: Callable[[Tensor], Tensor], sound: Models) -> None:
    model, values = sound
    with pytest.raises(ValueError, match=rf"^{site} is \[.*\], and this model's is \[24, |\[8, 24"):
        compare(model, ROW, {site: change(values[site])})


def test_a_site_of_another_model_is_refused(sound: Models) -> None:
    with pytest.raises(ValueError, match=r"blocks\.7\.hook_resid_post is no site of this model"):
        compare(sound[0], ROW, {"blocks.7.hook_resid_post": torch.zeros(24, 144)})


def test_the_truth_is_the_model_in_float64_and_leaves_it_as_it_was(sound: Models) -> None:
    model = copy.deepcopy(sound[0]).to(torch.bfloat16)
    before = {name: (id(p), p.dtype, p.detach().clone()) for name, p in model.named_parameters()}
    found = predicted(model, ROW)
    wide = copy.deepcopy(model).double()
    expected = observed(wide, ROW, sites(model.config))
    assert found.keys() == expected.keys()
    assert all(value.dtype == torch.float64 and torch.equal(value, expected[name]) for name, value in found.items())
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (identity, dtype, value) in before.items():
        assert (id(after[name]), after[name].dtype) == (identity, dtype) and torch.equal(after[name], value)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("place", ["model.layers.1.mlp.gate_proj", "model.embed_tokens", "model.norm", "lm_head"])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(place: str, sound: Models) -> None:
    model = copy.deepcopy(sound[0]).to(torch.bfloat16)

    def fail(module: nn.Module, inputs: object, output: object) -> None:
        raise RuntimeError("out of memory")  # while the module is wide

    expected = observed(model, ROW, ["logits"])["logits"]
    handle = model.get_submodule(place).register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        predicted(model, ROW)
    handle.remove()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(observed(model, ROW, ["logits"])["logits"], expected)


def test_no_more_than_one_module_is_wide_at_a_time(sound: Models) -> None:
    """So a model that fills memory in its own dtype can still be held against float64."""
    model = copy.deepcopy(sound[0])
    most = 0

    def count(module: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal most
        wide = [m for m in model.modules() if any(p.dtype == torch.float64 for p in m.parameters(recurse=False))]
        most = max(most, len(wide))
        assert len(wide) <= 1

    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(count)
    predicted(model, ROW)
    assert most == 1


def test_a_value_put_in_place_of_ours_is_what_follows_it(sound: Models) -> None:
    model, _ = sound
    zero = torch.zeros(24, 144)
    found = predicted(model, ROW, {"blocks.0.hook_resid_post": zero})
    assert found["blocks.0.hook_resid_post"].abs().sum() > 0, "itself it is predicted"
    assert found["blocks.1.ln1"].abs().sum() == 0 and found["blocks.1.attn.hook_pattern"][0, 5, 5] == 1 / 6
    everywhere: list[str] = []
    with torch.no_grad(), watching(model, lambda name, value: everywhere.append(name)):
        model(torch.tensor([ROW]))
    assert list(found) == everywhere


def test_logits_alone_are_judged_with_the_truth_that_is_at_hand(sound: Models) -> None:
    model, values = sound
    truth, own = predicted(model, ROW)["logits"], values["logits"]
    (expected,) = compare(model, ROW, {"logits": own})
    assert compare_end(truth, own, own) == expected
    assert compare_end(truth, own, own + 1e-3).differs


def test_predictions_are_measured_as_by_hand() -> None:
    # Two positions over two tokens: p = (3/4, 1/4) against q = (1/2, 1/2), and (9/10, 1/10) against (1/10, 9/10).
    truth = torch.tensor([[3 / 4, 1 / 4], [9 / 10, 1 / 10]]).log()
    other = torch.tensor([[1 / 2, 1 / 2], [1 / 10, 9 / 10]]).log() + 7.0
    row = compare_logits(truth, other)
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    second = 0.9 * math.log(0.9 / 0.1) + 0.1 * math.log(0.1 / 0.9)
    assert row.kl_mean == pytest.approx((first + second) / 2) and row.kl_largest == pytest.approx(second)
    assert (row.flips, row.positions) == (1, 2)
    assert row.margin == pytest.approx(math.log(9), rel=1e-6)
    assert row.largest == pytest.approx(7 - math.log(1 / 0.9), rel=1e-6)


def test_the_margin_is_the_widest_among_the_flips_alone() -> None:
    truth = torch.tensor([[0.0, 9.0, 1.0], [0.0, 2.0, 1.5], [3.0, 0.0, 2.0]])
    row = compare_logits(truth, torch.tensor([[0.0, 9.0, 1.0], [0.0, 1.0, 2.0], [2.0, 0.0, 3.0]]))
    assert (row.flips, row.positions, row.margin) == (2, 3, 1.0)


def test_predictions_of_the_last_positions_and_of_equal_logits() -> None:
    truth = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    row = compare_logits(truth, truth[-2:])
    assert (row.kl_mean, row.kl_largest, row.flips, row.positions, row.margin) == (0.0, 0.0, 0, 2, None)


@pytest.mark.long
@pytest.mark.parametrize("length", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_token_ids_computed_otherwise_are_rounding(length: int, dtype: torch.dtype) -> None:
    """A norm's scale has one value for each token: the baseline's error in so few is small by chance."""
    for size in SHAPES:
        for seed in range(3):
            model = tiny(size, seed=seed).to(dtype)
            other = with_numerics(model, "gemma_pytorch")
            values = observed(other, ROW[:length], sites(model.config))
            assert not first_difference(compare(model, ROW[:length], values)), (size, seed)


def test_what_is_shown_for_the_last_positions_alone_is_held_against_as_much_of_ours() -> None:
    model = tiny("2b").to(torch.bfloat16)
    values = observed(with_numerics(model, "gemma_pytorch"), ROW, sites(model.config))
    ends = [name for name in values if name.endswith(("resid_post", "ln_final", "logits"))]
    assert not first_difference(compare(model, ROW, {name: values[name][-3:] for name in ends}))


def test_one_rounding_of_a_value_that_is_wide_here_is_rounding() -> None:
    """As of a norm whose quotient is rounded before the gain."""
    model = tiny("2b").to(torch.bfloat16)
    values = observed(model, ROW, sites(model.config))
    name = "blocks.0.ln1.hook_normalized"
    assert values[name].dtype == torch.float32
    (row,) = (row for row in compare(model, ROW, values | {name: values[name].bfloat16().float()}) if row.site == name)
    assert 0.5 < row.ratio <= 1


def test_scores_masked_with_minus_ten_thousand_are_masked(sound: Models) -> None:
    model, values = sound
    scores = "blocks.0.attn.hook_attn_scores"
    filled = values[scores].masked_fill(values[scores] < -1e3, -1e4)
    assert not torch.equal(filled, values[scores])
    (row,) = (row for row in compare(model, ROW, values | {scores: filled}) if row.site == scores)
    assert not row.differs
