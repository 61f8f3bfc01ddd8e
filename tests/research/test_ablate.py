"""Each switch is held against a model that is built that way; the model is afterwards as it was, whatever happened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gemma2
from gemma2 import HybridCache
from gemma2.config import GLOBAL
from gemma2.generate import generate_ids
from gemma2.research import ablate, capture, edit, zero
from gemma2.twins import sharing
from tests.research.ablated import BUILT, CONFIG, EVERYTHING, MODEL, STEPS, SWAPPED, TOKENS, state, under


@pytest.fixture(scope="module")
def plain() -> Tensor:
    with torch.no_grad():
        return MODEL(TOKENS)


@pytest.mark.parametrize("name", BUILT)
def test_a_switch_computes_what_a_model_built_that_way_computes_and_leaves_the_model_as_it_was(
    name: str, plain: Tensor
) -> None:
    switches, built = BUILT[name]
    before = state(MODEL)
    found = under(switches)
    assert state(MODEL) == before
    with torch.no_grad():
        assert torch.equal(MODEL(TOKENS), plain)
        expected = built()
    assert torch.equal(found, expected) and not torch.equal(found, plain)


@pytest.mark.parametrize("name", BUILT)
def test_generation_with_a_cache_made_inside_computes_the_changed_model(name: str) -> None:
    """Token by token past every window, beside one pass."""
    switches, _ = BUILT[name]
    expected = under(switches)
    with torch.no_grad(), ablate(MODEL, **switches) as config:
        assert config is MODEL.config is MODEL.model.config
        cache = HybridCache(config, 2, 40)
        found = [MODEL(TOKENS[:, start:end], cache=cache) for start, end in STEPS]
        new = [one for (one,) in generate_ids(MODEL, [TOKENS[0, :24].tolist()], 6)]
        told = MODEL(torch.cat((TOKENS[:1, :24], torch.tensor([new])), dim=1))[0, 23:-1].argmax(-1).tolist()
    assert (torch.cat(found, dim=1) - expected).abs().max() <= 1e-9
    assert new == told


def test_a_cache_that_forgets_what_the_changed_layers_see_is_refused_and_one_that_keeps_more_is_taken() -> None:
    small = HybridCache(CONFIG, 2, 40)
    wrong: list[dict[str, Any]] = [{"window": 17}, {"window": None}, {"layer_types": SWAPPED}]
    for switches in wrong:
        with pytest.raises(ValueError, match=r"sees \d+ positions in this block and the cache keeps 16: make"):
            under(switches, cache=small)
    assert small.length == 0
    taken = under({"window": 5}, cache=small)
    assert torch.equal(taken, under({"window": 5}))
    short = HybridCache(CONFIG, 2, 12)  # every ring holds all that fits
    first = TOKENS[:, :12]
    assert torch.equal(under({"window": None}, tokens=first, cache=short), under({"window": None}, tokens=first))


def test_a_cache_of_transformers_that_forgets_is_refused_and_one_that_keeps_all_is_taken() -> None:
    cache_utils = pytest.importorskip("transformers.cache_utils")
    face = gemma2.as_transformers(MODEL)
    prompt, before = TOKENS[:1, :10], state(MODEL)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with ablate(face, window=None):
        with pytest.raises(ValueError, match=r"layer 0 sees \d+ positions .* the cache has kept \d+: give one"):
            face.generate(prompt, **options)
        found = face.generate(prompt, past_key_values=cache_utils.DynamicCache(), **options)
        own = [one for (one,) in generate_ids(MODEL, [prompt[0].tolist()], 12)]
    assert found[0, 10:].tolist() == own and state(MODEL) == before
    rows, mask = torch.cat((prompt, prompt), dim=0), torch.ones(2, 10, dtype=torch.int64)
    rows[1, :6], mask[1, :6] = 0, 0  # padding on the left
    with ablate(face, window=None):
        padded = face.generate(rows, attention_mask=mask, past_key_values=cache_utils.DynamicCache(), **options)
        alone = [one for (one,) in generate_ids(MODEL, [prompt[0, 6:].tolist()], 12)]
    assert padded[:, 10:].tolist() == [own, alone]
    with ablate(face, window=4):
        found = face.generate(prompt, **options)
        own = [one for (one,) in generate_ids(MODEL, [prompt[0].tolist()], 12)]
    assert found[0, 10:].tolist() == own


def test_nested_blocks_change_together_and_the_inner_one_wins(plain: Tensor) -> None:
    before = state(MODEL)
    with torch.no_grad(), ablate(MODEL, final_softcap=None, window=8):
        outer = MODEL(TOKENS)
        with ablate(MODEL, final_softcap=None), ablate(MODEL, final_softcap=3, layers=[1]):
            both = MODEL(TOKENS)
            with ablate(MODEL, window=None):
                MODEL(TOKENS, cache=HybridCache(MODEL.config, 2, 40))
        assert torch.equal(MODEL(TOKENS), outer)
    assert torch.equal(outer, under({"final_softcap": None, "window": 8}))
    assert torch.equal(both, under({"final_softcap": 3.0, "window": 8, "layers": [1]}))
    with torch.no_grad(), ablate(MODEL, heads=[(1, 2)], layers=[3]), ablate(MODEL, heads=[(1, 5)], layers=[0]):
        assert torch.equal(MODEL(TOKENS), under({"heads": [(1, 5), (1, 2)], "layers": [0, 3]}))
    assert state(MODEL) == before


def test_an_exception_inside_leaves_nothing_behind(plain: Tensor) -> None:
    before = state(MODEL)
    everything = EVERYTHING | {"layers": [2]}
    with pytest.raises(KeyError), ablate(MODEL, **everything):
        raise KeyError
    with pytest.raises(IndexError), ablate(MODEL, **everything), edit(MODEL, {"ln_final": lambda x, hook: x[99]}):
        MODEL(TOKENS)
    assert state(MODEL) == before
    with torch.no_grad():
        assert torch.equal(MODEL(TOKENS), plain)


@torch.no_grad()
def test_sites_show_the_changed_model_whichever_block_was_entered_first() -> None:
    names = ["blocks.*.hook_attn_out", "blocks.1.attn.hook_z", "blocks.2.hook_resid_*", "logits_raw", "logits"]
    switches: dict[str, Any] = {"final_softcap": None, "post_norms": False, "heads": [(1, 3)], "layers": [2]}
    with capture(MODEL, names) as first, ablate(MODEL, **switches), capture(MODEL, names) as second:
        MODEL(TOKENS)
    for seen in (first, second):
        assert torch.equal(seen["logits"], seen["logits_raw"]) and not seen["blocks.1.attn.hook_z"][:, :, 3].any()
        assert torch.equal(seen["blocks.2.hook_resid_post"], seen["blocks.2.hook_resid_pre"])
    assert all(torch.equal(first[name], second[name]) for name in first)
    with capture(MODEL, names) as usual:
        MODEL(TOKENS)
    assert not torch.equal(usual["blocks.0.hook_attn_out"], first["blocks.0.hook_attn_out"])
    inside = "blocks.0.ln1_post.hook_inv_scale"
    with pytest.raises(ValueError, match="hidden by the twin NoNorm"), ablate(MODEL, post_norms=False):
        capture(MODEL, inside).__enter__()


@torch.no_grad()
def test_an_edit_of_what_enters_a_layer_that_is_left_out_goes_on() -> None:
    edits, after = {"blocks.1.hook_resid_pre": zero()}, "blocks.1.hook_resid_post"
    with ablate(MODEL, layers=[1]), edit(MODEL, edits), capture(MODEL, after) as seen:
        MODEL(TOKENS)
    assert not seen["blocks.1.hook_resid_post"].any()


def test_gradients_flow_through_a_changed_model() -> None:
    for switches, _ in BUILT.values():
        with ablate(MODEL, **switches):
            loss = MODEL(TOKENS[:1, :20])[0, -1].square().sum()
        (gradient,) = torch.autograd.grad(loss, MODEL.model.embed_tokens.weight)
        assert gradient.isfinite().all() and gradient.abs().max() > 0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "there is nothing to ablate"),
    ({"post_norms": True}, "there is nothing to ablate"),
    ({"attn_softcap": 0}, "attn_softcap must be a number above 0, or None"),
    ({"final_softcap": True}, "final_softcap must be a number above 0"),
    ({"final_softcap": float("nan")}, "final_softcap must be a number above 0"),
    ({"window": 0}, "window must be a positive integer"),
    ({"window": 2.5}, "window must be a positive integer"),
    ({"window": 8, "layer_types": (GLOBAL,) * 4}, "no layer is local, so a window changes nothing"),
    ({"window": None, "layer_types": SWAPPED}, "window=None makes every layer global"),
    ({"layer_types": SWAPPED[:3]}, "layer_types must name 4 layers"),
    ({"layer_types": ("local",) * 4}, "layer_types must name 4 layers"),
    ({"post_norms": None}, "post_norms must be True or False"),
    ({"embed_scale": 1}, "embed_scale must be True or False"),
    ({"heads": [(0, 8)]}, "heads 0 to 7, not 8"),
    ({"heads": [(4, 0)]}, "layers 0 to 3, not 4"),
    ({"heads": [3]}, r"pairs \(layer, head\)"),
    ({"layers": [-1]}, "layers 0 to 3, not -1"),
    ({"layers": [True]}, "layers 0 to 3, not True"),
]


@pytest.mark.parametrize(("switches", "message"), WRONG)
def test_a_switch_that_cannot_be_is_refused(switches: dict[str, Any], message: str) -> None:
    before = state(MODEL)
    with pytest.raises(ValueError, match=message), ablate(MODEL, **switches):
        pass
    assert state(MODEL) == before
    with pytest.raises(ValueError, match="expected a Gemma2 or a Gemma, not Linear"), ablate(nn.Linear(2, 2), window=3):
        pass


def test_a_part_that_a_twin_does_without_is_named() -> None:
    model = sharing(MODEL)
    model.set_submodule("model.layers.2.self_attn.attend.softcap", nn.Tanh())
    before = state(model)
    for switches in ({"attn_softcap": None}, {"final_softcap": 2.0, "attn_softcap": 5.0}):
        with pytest.raises(ValueError, match=r"layers.2.self_attn.attend.softcap cannot be ablated: Tanh"):
            under(switches, model)
        assert state(model) == before
