"""The parts sum to the raw logit, the heads to their layer, and each part is what an edit of it takes away."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gemma2
from gemma2.research import attribute, capture, edit
from gemma2.research.heads import by_head
from gemma2.twins import replaced
from tests.conftest import ids, tiny

CAP = 30.0


@pytest.mark.parametrize("size", ["2b", "9b", "27b"])
def test_parts_sum_to_the_raw_logit_and_heads_to_their_layer(size: str) -> None:
    model, tokens = tiny(size).double(), ids(2, 24)
    found = attribute(model, tokens, [3, 77, 400], positions=[5, -1], heads=True)
    with torch.no_grad(), capture(model, ["logits_raw", "logits"]) as seen:
        model(tokens)
    raw = seen["logits_raw"][:, [5, 23]][..., [3, 77, 400]]
    assert ((found.parts.sum(0) - raw) / raw).abs().max() < 1e-12
    assert (found.raw - raw).abs().max() < 1e-11 and (found.rest / raw).abs().max() < 1e-12
    assert (found.logits - seen["logits"][:, [5, 23]][..., [3, 77, 400]]).abs().max() < 1e-11
    attention = found.parts[1::2]
    assert found.names[1::2] == [f"blocks.{i}.hook_attn_out" for i in range(4)]
    assert found.heads.shape == (4, 2, 2, 3, 8)
    assert ((found.heads.sum(-1) - attention) / attention.abs().amax()).abs().max() < 1e-12
    assert found.heads.std(-1).min() > 1e-3  # each head has a part of its own


def test_the_slope_is_the_caps_derivative() -> None:
    model, tokens = tiny("27b").double(), ids(1, 24)
    found = attribute(model, tokens)
    raw = found.raw.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model.softcap(raw).sum(), raw)
    assert (found.slope - slope).abs().max() < 1e-12 and float(slope.min()) < 0.5
    with torch.no_grad():
        assert found.targets.tolist() == model(tokens, last=1).argmax(-1, keepdim=True).tolist()
    assert found.positions.tolist() == [[23]]


def test_a_part_is_what_its_edit_takes_away_while_the_scales_are_held() -> None:
    """A head is silenced where it is read, with everything downstream held: only the sum at the end may change."""
    model, tokens = tiny("9b").double(), ids(1, 24)
    found = attribute(model, tokens, [9], heads=True)
    last = "blocks.3"
    held = [f"{last}.ln1_post.hook_inv_scale", f"{last}.hook_mlp_out", "ln_final.hook_inv_scale"]
    with torch.no_grad(), capture(model, held) as seen:
        model(tokens)
    keep: dict[str, Any] = {name: lambda value, hook: seen[hook.name] for name in held}

    def silence(value: torch.Tensor, hook: object) -> torch.Tensor:
        changed = value.clone()
        changed[:, :, 5] = 0
        return changed

    with torch.no_grad(), edit(model, {**keep, f"{last}.attn.hook_z": silence}), capture(model, "logits_raw") as edited:
        model(tokens)
    taken = found.raw[0, 0, 0] - edited["logits_raw"][0, -1, 9]
    assert abs(float(taken - found.heads[3, 0, 0, 0, 5])) < 1e-11 and abs(float(taken)) > 1e-3


def test_a_bfloat16_model_and_a_packed_one_say_what_rounding_leaves_over() -> None:
    options: dict[str, Any] = {"weights": "packed", "fast": True}
    packed = gemma2.load("pocket:pocket-q8_0.gguf", device="cpu", **options)
    plain = gemma2.load("pocket:pocket-q8_0.gguf", dtype="float64", device="cpu")
    tokens = torch.tensor([plain.tokenizer.encode("And God said, Let there be")])
    exact = attribute(plain, tokens, [500, 600], heads=True)
    found = attribute(packed, tokens, [500, 600], heads=True)
    assert packed.model.dtype == torch.bfloat16 and exact.rest.abs().max() < 1e-12
    assert (found.parts - exact.parts).abs().max() < 0.15 and (found.heads - exact.heads).abs().max() < 0.15
    assert 0 < float(found.rest.abs().max()) < 0.15


def test_a_twin_of_the_output_projection_counts_and_no_hook_stays() -> None:
    model, tokens = tiny("2b").double(), ids(1, 12)
    plain = attribute(model, tokens, [1], heads=True)
    with replaced(model, by_head(model.config)):
        twin = attribute(model, tokens, [1], heads=True)
    assert (plain.heads - twin.heads).abs().max() < 1e-11
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "targets are empty"),
        ([512], r"target 512 is outside the vocabulary \[0, 512\)"),
        ([-1], "a target must be a non-negative integer"),
        ([1.5], "a target must be a non-negative integer"),
        (
            torch.zeros(1, 3, 2, dtype=torch.int64),
            r"targets are \[1, 3, 2\]: give k ids, or ids \[b n k\]",
        ),
    ],
)
def test_targets_that_cannot_be_are_refused(targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute(tiny("2b"), ids(1, 8), targets)


def test_a_position_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="position 8 is not in the text, which has 8 tokens"):
        attribute(tiny("2b"), ids(1, 8), positions=8)
