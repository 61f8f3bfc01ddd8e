"""The lens of the last layer is the model itself, to the bit; tables hold what the logits say, at chosen positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2 import HybridCache
from gemma2.research import capture, lens_table, logit_lens, replace, unembed
from gemma2.research.edits import edit
from gemma2.research.sites import sites
from gemma2.research.watch import model_of
from tests.conftest import ids, tiny

TEXT = "And God said, Let"
LAST = "blocks.3.hook_resid_post"


def loaded(kind: str) -> tuple[Any, Tensor, str]:
    """A model of a kind, tokens for it and the site of its last layer."""
    if kind.startswith("tiny"):
        return tiny("27b").to(getattr(torch, kind.split()[1])), ids(2, 24), LAST
    if kind.startswith("packed"):
        options: dict[str, Any] = {"weights": "packed", "fast": True, "dtype": kind.split()[1]}
        gemma = gemma2.load("pocket:pocket-q8_0.gguf", device="cpu", **options)
    else:
        gemma = gemma2.load("pocket", dtype=kind.split()[1], device="cpu", fast=kind.startswith("fast"))
    return gemma, torch.tensor([gemma.tokenizer.encode(TEXT)]), "blocks.5.hook_resid_post"


@pytest.mark.parametrize(
    "kind",
    [f"{kind} {dtype}" for kind in ("tiny", "plain", "fast", "packed") for dtype in ("float32", "bfloat16")],
)
@torch.no_grad()
def test_the_lens_of_the_last_layer_is_the_model_itself_to_the_bit(kind: str) -> None:
    model, tokens, last = loaded(kind)
    inner = model_of(model)
    plain = inner(tokens)
    found = dict(logit_lens(model, tokens, "blocks.*.hook_resid_post"))
    assert torch.equal(found[last], plain)
    assert all((found[name] - plain).abs().max() > 1 for name in list(found)[:-1])
    assert float(found[last].abs().max()) <= 30
    ((name, ends),) = logit_lens(model, tokens, last, positions=[-3, -2, -1])
    assert name == last and torch.equal(ends, inner(tokens, last=3))
    with capture(model, last) as seen:
        inner(tokens)
    assert torch.equal(unembed(model, seen[last]), plain)
    assert torch.equal(inner(tokens), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in inner.modules())


@torch.no_grad()
def test_without_its_cap_a_lens_would_say_something_else() -> None:
    """So the bit-equality above is a test of the cap."""
    model, tokens = tiny("27b").double(), ids(1, 24)
    ((_, logits),) = logit_lens(model, tokens, LAST)
    raw = model.lm_head(model.model(tokens), model.model.embed_tokens)
    assert (raw - logits).abs().max() > 1


@torch.no_grad()
def test_a_lens_at_any_site_is_the_model_with_that_value_in_the_last_ones_place() -> None:
    """For every site of the stream's width, held against an edit of the last layer's output."""
    model, tokens = tiny("9b", num_hidden_layers=2).double(), ids(2, 20)
    names = [name for name, site in sites(model.config).items() if site.shape == "b t d"]
    with capture(model, names) as seen:
        model(tokens)
    last = "blocks.1.hook_resid_post"
    for name, logits in logit_lens(model, tokens, names):
        with edit(model, {"ln_final" if name == "ln_final" else last: replace(seen[name])}):
            assert (model(tokens) - logits).abs().max() < 1e-9, name


def test_a_value_that_is_float32_in_every_model_is_read_in_the_models_dtype() -> None:
    model = tiny("2b").bfloat16()
    ((_, logits),) = logit_lens(model, ids(1, 8), "blocks.1.ln2.hook_normalized")
    assert logits.dtype == torch.bfloat16


@torch.no_grad()
def test_a_cached_generation_is_read_from_what_was_captured() -> None:
    model, tokens = tiny("2b").double(), ids(2, 40)
    whole = dict(logit_lens(model, tokens, positions=slice(30, 40)))
    cache = HybridCache(model.config, 2, 40)
    with capture(model, "blocks.*.hook_resid_post") as seen:
        for part in tokens.split([25, *[1] * 15], dim=1):
            model(part, cache=cache)
    for name, logits in logit_lens(model, seen, positions=slice(30, 40)):
        assert (logits - whole[name]).abs().max() < 1e-9


@torch.no_grad()
def test_a_table_holds_what_the_logits_say_also_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny("27b").double(), ids(2, 24)
    monkeypatch.setattr("gemma2.research.lens.VALUES", 5 * 512 * 2)  # five positions at once
    done: list[str] = []
    table = lens_table(model, tokens, ["hook_embed", "blocks.*.hook_resid_post"], top=3, progress=done.append)
    assert table.names == done and len(done) == 5 and table.ids.shape == (5, 2, 24, 3)
    assert table.targets.tolist() == [[*row[1:], -1] for row in tokens.tolist()]
    for i, (name, logits) in enumerate(logit_lens(model, tokens, table.names)):
        shares, order = logits.softmax(-1).sort(dim=-1, descending=True)
        assert name == table.names[i] and torch.equal(table.ids[i], order[..., :3])
        assert (table.probabilities[i] - shares[..., :3]).abs().max() < 1e-12
        next_ = tokens[:, 1:, None]
        own = logits.softmax(-1)[:, :-1].gather(-1, next_)[..., 0]
        assert (table.target_probabilities[i, :, :-1] - own).abs().max() < 1e-12
        assert torch.equal(table.target_ranks[i, :, :-1], (order[:, :-1] == next_).int().argmax(-1))
        assert bool(table.target_probabilities[i, :, -1].isnan().all()) and (table.target_ranks[i, :, -1] == -1).all()
    some = lens_table(model, tokens, positions=[2, -1], top=3)
    assert some.positions.tolist() == [[2, 23]] * 2
    assert torch.equal(some.ids, table.ids[1:, :, [2, 23]]) and torch.equal(some.targets, table.targets[:, [2, 23]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": "blocks.0.attn.hook_z"}, r"hook_z is \[b t h c\]: a lens reads values of the residual stream's"),
        ({"sites": "blocks.9.hook_resid_post"}, "layers 0 to 3"),
        ({"sites": "hook_embedding"}, "near are hook_embed"),
        ({"positions": [3, 40]}, "position 40 is not in the text, which has 8 tokens"),
        ({"positions": -9}, "position -9 is not in the text"),
        ({"positions": slice(8, 12)}, "is not in the text"),
        ({"positions": "all"}, "positions are a number"),
        ({"top": 0}, "top must be a positive integer"),
        ({"top": 513}, "top must be at most the vocabulary's 512"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    model, tokens = tiny("2b"), ids(1, 8)
    with pytest.raises(ValueError, match=message):
        lens_table(model, tokens, **arguments)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_site_that_was_not_captured_is_said() -> None:
    model = tiny("2b")
    with torch.no_grad(), capture(model, "blocks.1.hook_resid_post") as seen:
        model(ids(1, 8))
    with pytest.raises(KeyError, match=r"blocks.0.hook_resid_post was not captured"):
        logit_lens(model, seen)
