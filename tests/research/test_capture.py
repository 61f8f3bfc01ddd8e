"""Capture sees what is computed, in generation, past a ring's wrap and in a compiled model, or says what it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2 import HybridCache
from gemma2.generate import generate_ids
from gemma2.research import capture, watching
from gemma2.research.sites import sites
from gemma2.research.watch import model_of
from tests.conftest import ids, tiny
from tests.test_static import Counting

KEYED = ["blocks.*.attn.hook_scores_raw", "blocks.*.attn.hook_attn_scores", "blocks.*.attn.hook_pattern"]


@pytest.mark.parametrize("sizes", [[30, *[1] * 20], [10, 17, 3, 1, 1, 18], [16, 16, 18]], ids=str)
@torch.no_grad()
def test_keys_come_in_the_order_of_positions_whatever_the_ring_holds(sizes: list[int]) -> None:
    """The last query of every chunk, held against the same row of one pass; slots that it does not see are left out."""
    model, tokens = tiny("2b").double(), ids(1, 50)
    with capture(model, KEYED) as whole:
        model(tokens)
    cache, end = HybridCache(model.config, 1, 50), 0
    for part in tokens.split(sizes, dim=1):
        end += part.shape[1]
        with capture(model, KEYED) as seen:
            model(part, cache=cache)
        for name, value in seen.items():
            kept = min(value.shape[-1], end)
            expected = whole[name][..., end - 1, end - kept : end]
            assert (value[..., -1, -kept:] - expected).abs().max() <= 1e-9, (name, end)


@torch.no_grad()
def test_a_plain_hook_gets_the_slots_order_and_the_positions_that_explain_it() -> None:
    model, tokens = tiny("2b").double(), ids(1, 37)
    attend, seen = model.model.layers[0].self_attn.attend, dict[str, Tensor]()
    for name in ("hook_pattern", "hook_key_positions"):
        tap = getattr(attend, name)
        tap.register_forward_hook(lambda m, i, output, name=name: seen.__setitem__(name, output))
    cache = HybridCache(model.config, 1, 50)
    model(tokens[:, :36], cache=cache)
    model(tokens[:, 36:], cache=cache)
    positions, pattern = seen["hook_key_positions"][0], seen["hook_pattern"][0, :, 0]
    assert sorted(positions.tolist()) == list(range(21, 37)) and positions.tolist() != list(range(21, 37))
    with capture(model, "blocks.0.attn.hook_pattern") as whole:
        model(tokens)
    expected = whole["blocks.0.attn.hook_pattern"][0, :, -1, positions]
    assert (pattern - expected).abs().max() <= 1e-9


@torch.no_grad()
def test_rows_of_a_ragged_batch_are_put_in_order_each_by_its_own_positions() -> None:
    model = tiny("2b").double()
    rows = [ids(1, n, seed=n)[0].tolist() for n in (37, 25)]
    steps: list[Tensor] = []
    with watching(model, lambda name, value: steps.append(value), "blocks.0.attn.hook_pattern"):
        written = list(generate_ids(model, rows, 5))
    for row, prompt in enumerate(rows):
        with capture(model, "blocks.0.attn.hook_pattern") as whole:
            model(torch.tensor([prompt + [step[row] for step in written[:4]]]))
        expected = whole["blocks.0.attn.hook_pattern"][0, :, -1, -16:]
        assert (steps[-1][row, :, 0] - expected).abs().max() <= 1e-9


@torch.no_grad()
def test_a_compiled_model_is_seen_and_edited_inside_and_compiled_again_after() -> None:
    torch.compiler.reset()
    model, tokens, backend = tiny().double(), ids(1, 40), Counting()
    compiled = torch.compile(model, backend=backend)
    plain = compiled(tokens)
    graphs = backend.graphs
    assert graphs > 0
    with capture(compiled, "blocks.*.hook_resid_post") as seen:
        compiled(tokens)
    assert len(seen) == 4
    edit = model.model.layers[2].hook_resid_mid.register_forward_hook(lambda m, i, output: output * 0)
    with capture(compiled, "logits") as edited:
        compiled(tokens)
    edit.remove()
    assert (edited["logits"] - plain).abs().max() > 1
    assert torch.equal(compiled(tokens), plain) and backend.graphs == graphs


def test_a_gemma_is_taken_as_its_model_and_anything_else_is_refused(pocket: gemma2.Gemma) -> None:
    tokens = torch.tensor([pocket.tokenizer.encode("And God said")])
    with capture(pocket, "blocks.3.hook_resid_post") as seen, torch.no_grad():
        pocket.model(tokens)
    assert seen["blocks.3.hook_resid_post"].shape == (1, 4, 256)
    assert model_of(torch.compile(pocket.model)) is pocket.model
    other: list[Any] = [torch.nn.Linear(2, 2), "pocket"]
    for wrong in other:
        with pytest.raises(ValueError, match="expected a Gemma2 or a Gemma, not"), capture(wrong):
            pass


@pytest.fixture(scope="module")
def plain() -> tuple[gemma2.Gemma2, Tensor, Tensor]:
    model, tokens = tiny("27b", num_hidden_layers=2).double(), ids(1, 24)
    with torch.no_grad():
        return model, tokens, model(tokens)


# Where an edit cannot reach the logits whatever the model is, and why; none is at present.
SILENT: dict[str, str] = {}


@pytest.mark.parametrize("name", sites(tiny("27b", num_hidden_layers=2).config))
def test_every_site_is_live_and_its_own(name: str, plain: tuple[gemma2.Gemma2, Tensor, Tensor]) -> None:
    """An edit of it changes the logits, a gradient reaches it, and no other site's module is touched by it."""
    model, tokens, logits = plain
    known = sites(model.config)
    own = known[name].module
    assert [other for other, site in known.items() if site.module == own] == [name]
    generator = torch.Generator().manual_seed(0)
    reached: list[Tensor] = []

    def edit(module: object, inputs: object, output: Tensor) -> Tensor:
        noise = torch.rand(output.shape, generator=generator, dtype=output.dtype)
        moved = (output.detach() * (1 + 0.5 * noise)).requires_grad_()
        reached.append(moved)
        return moved

    hook = model.get_submodule(own).register_forward_hook(edit)
    try:
        edited = model(tokens)
    finally:
        hook.remove()
    assert ((edited - logits).abs().max() > 1e-6) != (name in SILENT), SILENT.get(name)
    (gradient,) = torch.autograd.grad(edited[0, -1].square().sum(), reached[0])
    assert gradient.isfinite().all() and (bool(gradient.any()) != (name in SILENT))


def test_an_edit_before_a_block_is_none_after_the_block_before(plain: tuple[gemma2.Gemma2, Tensor, Tensor]) -> None:
    model, tokens, _ = plain
    tap = model.model.layers[1].hook_resid_pre
    hook = tap.register_forward_hook(lambda m, i, output: output * 2)
    with capture(model) as seen, torch.no_grad():
        model(tokens)
    hook.remove()
    assert torch.equal(seen["blocks.1.hook_resid_pre"], 2 * seen["blocks.0.hook_resid_post"])
