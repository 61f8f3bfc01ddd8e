"""Gradients beside another system's: mistakes of a backward pass alone are found, at the weight they begin at."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2.checkpoints.checkpoint import Checkpoint
from gemma2.cli import main
from gemma2.model import GELUTanh, ScaledEmbedding, SoftCap, Tap, TiedHead
from gemma2.parity.cases import AGREES, DIFFERS, NOT_RUN
from gemma2.parity.compare import CHANCE
from gemma2.parity.gradients import NAME, backward_order, compare_gradients
from gemma2.parity.judge import judge
from gemma2.parity.references import Reference, open_local, open_reference
from gemma2.parity.references.ourselves import Ourselves
from gemma2.twins import Make, replaced
from tests.conftest import ids

IDS = ids(1, 40, vocab=4096)[0].tolist()  # past the window of 16


class StraightCap(SoftCap):
    """The cap's values with the slope of no cap."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (super().forward(x) - x).detach()


class Detached(Tap):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class ExactGELUBackward(GELUTanh):
    """The tanh form going forward, the derivative of the exact form going back."""

    def forward(self, x: Tensor) -> Tensor:
        exact = F.gelu(x)
        return exact + (super().forward(x) - exact).detach()


class HeadWithoutGradient(TiedHead):
    def forward(self, x: Tensor, embedding: ScaledEmbedding) -> Tensor:
        return F.linear(x, embedding.weight.detach())


def at(path: str, made: Callable[[Any], nn.Module]) -> Make:
    return lambda found, module: made(module) if found == path else None


PLANTED: dict[str, tuple[Make, str]] = {
    "final cap": (at("softcap", lambda old: StraightCap(old.cap)), "model.norm"),
    "attention cap": (
        at("model.layers.2.self_attn.attend.softcap", lambda old: StraightCap(old.cap)),
        "model.layers.2.self_attn.k_proj",
    ),
    "norm": (
        at("model.layers.1.post_attention_layernorm.hook_inv_scale", lambda old: Detached()),
        "model.layers.1.self_attn.o_proj",
    ),
    "activation": (at("model.layers.3.mlp.act_fn", lambda old: ExactGELUBackward()), "model.layers.3.mlp.gate_proj"),
    "values": (at("model.layers.0.self_attn.hook_v", lambda old: Detached()), "model.layers.0.self_attn.v_proj"),
    "head": (at("lm_head", lambda old: HeadWithoutGradient()), "model.embed_tokens"),
}


@pytest.fixture(params=["9b", *(pytest.param(size, marks=pytest.mark.long) for size in ("2b", "27b"))])
def opened(request: pytest.FixtureRequest, folder: Callable[..., Path]) -> Checkpoint:
    return open_local(folder(size=request.param))


def planted(reference: Reference, make: Make) -> Reference:
    """The reference with a mistake in its backward pass; what it computes forward stays the same."""
    assert isinstance(reference, Ourselves)
    before = reference.run(IDS, ["logits"])["logits"]
    replaced(reference.computing, make)
    after = reference.run(IDS, ["logits"])["logits"]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 if reference.dtype == torch.float32 else 0.25)
    return reference


def test_mistakes_of_a_backward_pass_are_found_where_they_begin(opened: Checkpoint) -> None:
    ours = Ourselves(opened, torch.float32)
    for name, (make, weight) in PLANTED.items():
        rows = compare_gradients(planted(Ourselves(opened, torch.float32), make), ours, IDS)
        first = next((row.name for row in rows if row.differs), None)
        assert first == f"{weight}.weight", (name, [(row.name, row.ratio) for row in rows][:12])


@pytest.mark.long
def test_in_bfloat16_a_mistake_is_found_at_its_place_or_later(folder: Callable[..., Path]) -> None:
    opened = open_local(folder(size="9b"))
    ours, order = Ourselves(opened, torch.bfloat16), backward_order(opened.config)
    for name, (make, weight) in PLANTED.items():
        if name == "activation":
            continue  # the two derivatives differ by less than bfloat16 rounds
        rows = compare_gradients(planted(Ourselves(opened, torch.bfloat16), make), ours, IDS)
        first = next(row.name for row in rows if row.differs)
        assert order.index(first) >= order.index(f"{weight}.weight"), name


def test_transformers_gradients_equal_ours_to_the_bit_and_sums_in_another_order_are_rounding(
    opened: Checkpoint,
) -> None:
    pytest.importorskip("transformers")
    ours = Ourselves(opened, torch.float32)
    rows = compare_gradients(open_reference("transformers", opened.path, torch.float32), ours, IDS)
    assert [row.name for row in rows] == backward_order(opened.config) and len(rows) == 2 + 11 * 4
    assert all(row.bitwise and row.ratio < 1 for row in rows)
    rows = compare_gradients(Ourselves(opened, torch.float32, numerics="gemma_pytorch"), ours, IDS)
    assert not any(row.bitwise for row in rows) and not any(row.differs for row in rows)


def test_what_rounding_explains_is_our_own_error_in_the_same_dtype(folder: Callable[..., Path]) -> None:
    opened = open_local(folder(size="9b"))
    ours = Ourselves(opened, torch.bfloat16)
    for row in compare_gradients(Ourselves(opened, torch.bfloat16), ours, IDS):
        by_chance = 1 + CHANCE / math.sqrt(ours.model.get_parameter(row.name).numel())
        assert row.bitwise and row.own_relative == pytest.approx(row.relative * by_chance, rel=1e-6), row.name


def test_a_weight_without_a_gradient_or_with_one_that_is_not_finite_differs(folder: Callable[..., Path]) -> None:
    opened = open_local(folder(size="9b"))
    ours, theirs = Ourselves(opened, torch.float32), Ourselves(opened, torch.float32)
    replaced(theirs.computing, at("model.layers.1.mlp.hook_post", lambda old: Detached()))
    rows = {row.name: row.why for row in compare_gradients(theirs, ours, IDS)}
    assert rows["model.layers.1.mlp.up_proj.weight"] == "no gradient"

    class Infinite(Ourselves):
        def gradients(self, ids: Any) -> Any:
            found: dict[str, Any] = dict(super().gradients(ids))
            return found | {"model.norm.weight": found["model.norm.weight"] * torch.inf}

    rows = {row.name: row.why for row in compare_gradients(Infinite(opened, torch.float32), ours, IDS)}
    assert rows["model.norm.weight"] == "its gradient is not finite"


def test_the_case_is_part_of_the_verdict_and_names_the_first_weight(folder: Callable[..., Path]) -> None:
    path = folder(size="9b")
    opened = open_local(path)
    make, weight = PLANTED["attention cap"]
    theirs = planted(open_reference("self", path, torch.float32), make)
    found = judge(theirs, opened, IDS, "logits", cases=False, gradients=True)
    (case,) = found.cases
    assert case.name == NAME and case.outcome == DIFFERS and case.detail.startswith(f"first at {weight}.weight: ")
    assert found.verdict == "difference" and found.first is None
    said = found.to_dict()["gradients"]
    assert len(said) == 46 and next(row["name"] for row in said if row["differs"]) == f"{weight}.weight"
    one = judge(open_reference("self", path, torch.float32), opened, IDS[:1], "logits", cases=False, gradients=True)
    assert one.cases[0].outcome == NOT_RUN and "no next one" in one.cases[0].detail
    held = open_reference("self:weights=int8", path, torch.float32)
    found = judge(held, opened, IDS, "logits", cases=False, gradients=True)
    assert found.cases[0].outcome == NOT_RUN and "holds model." in found.cases[0].detail


def test_the_command_compares_gradients_where_it_is_asked(
    folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(folder(size="9b", num_hidden_layers=2))
    common = ["parity", path, "--no-cases", "--ids", "2,7,9,4"]
    assert main([*common, "--against", "self", "--gradients", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [case["outcome"] for case in found["cases"]] == [AGREES] and len(found["gradients"]) == 24
    assert main([*common, "--against", "self", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gradients"] == []
    assert main([*common, "--against", "self", "--gradients", "--explain", "llama.cpp"]) == 2
    assert "leave out --gradients" in capsys.readouterr().err
