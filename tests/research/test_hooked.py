"""TransformerLens's words mean here what they mean there; tests/ecosystem holds the numbers against its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2.research import capture, edit, hooked
from gemma2.research.activation_cache import ActivationCache
from gemma2.research.hooked_hooks import HookPoint
from tests.conftest import ids, tiny

MODEL = tiny("27b").double()
TOKENS = ids(2, 24)


@pytest.fixture(scope="module")
def cache() -> ActivationCache:
    with torch.no_grad():
        return hooked(MODEL).run_with_cache(TOKENS)[1]


def close(a: Tensor, b: Tensor, bound: float = 1e-12) -> None:
    assert a.shape == b.shape and float((a - b).abs().max()) <= bound * float(b.abs().max())


@torch.no_grad()
def test_a_run_with_a_cache_gives_the_models_logits_and_captures_values(cache: ActivationCache) -> None:
    logits, again = hooked(MODEL).run_with_cache(TOKENS)
    assert torch.equal(logits, MODEL(TOKENS)) and len(again) == len(cache)
    with capture(MODEL) as seen:
        MODEL(TOKENS)
    assert len(cache) == len(seen) and set(cache) == {name.replace("inv_scale", "scale") for name in seen}
    for name, value in seen.items():
        assert torch.equal(cache[name], value), name
    for key, name in {
        ("resid_post", 3): "blocks.3.hook_resid_post",
        ("resid_post", -1): "blocks.3.hook_resid_post",
        ("q", 2, "attn"): "blocks.2.attn.hook_q",
        ("attn", 1): "blocks.1.attn.hook_pattern",
        ("normalized", 2, "ln2"): "blocks.2.ln2.hook_normalized",
        ("embed",): "hook_embed",
        "embed": "hook_embed",
        "k2": "blocks.2.attn.hook_k",
        "blocks.0.hook_out": "blocks.0.hook_resid_post",
        "unembed.hook_out": "logits_raw",
    }.items():
        assert torch.equal(cache[key], seen[name]), key
    for key in ("blocks.1.ln1_post.hook_scale", ("scale", 1, "ln1_post"), "scale1ln1_post"):
        assert torch.equal(cache[key], 1 / seen["blocks.1.ln1_post.hook_inv_scale"])
    assert torch.equal(cache["scale"], 1 / seen["ln_final.hook_inv_scale"])
    inside: list[Any] = ["blocks.1.hook_resid_mid", ("scale", 1, "ln1"), "blocks.3.hook_out"]
    assert all(key in cache for key in inside) and "blocks.9.hook_resid_mid" not in cache


@torch.no_grad()
def test_a_filter_is_a_name_a_glob_a_list_or_a_function_of_transformer_lens_names() -> None:
    model = hooked(MODEL)
    given: list[tuple[Any, list[str]]] = [
        ("blocks.1.hook_resid_mid", ["blocks.1.hook_resid_mid"]),
        ("blocks.*.ln1.hook_scale", [f"blocks.{i}.ln1.hook_scale" for i in range(4)]),
        (["hook_embed", "blocks.2.hook_out"], ["hook_embed", "blocks.2.hook_resid_post"]),
        (lambda name: name.endswith("final.hook_scale"), ["ln_final.hook_scale"]),
        (lambda name: "resid_post" in name, [f"blocks.{i}.hook_resid_post" for i in range(4)]),
    ]
    for names, expected in given:
        _, cache = model.run_with_cache(TOKENS, names_filter=names)
        assert list(cache) == expected
    _, cache = model.run_with_cache(TOKENS[:1], names_filter="*resid_pre", remove_batch_dim=True, pos_slice=(2, 5))
    assert cache["resid_pre", 1].shape == (3, 288) and not cache.has_batch_dim
    _, cache = model.run_with_cache(TOKENS, names_filter="*.hook_pattern", pos_slice=-1)
    assert cache["pattern", 0].shape == (2, 8, 24)  # the last query, all keys
    with pytest.raises(ValueError, match=r"no site is called 'blocks.0.hook_resid_pst'; near are"):
        model.run_with_cache(TOKENS, names_filter="blocks.0.hook_resid_pst")
    with pytest.raises(ValueError, match="the filter chose no site"):
        model.run_with_cache(TOKENS, names_filter=lambda name: False)
    with pytest.raises(KeyError, match=r"not in this cache, which holds blocks\.0\.attn\.hook_pattern"):
        cache["resid_post", 0]
    with pytest.raises(ValueError, match="it has 2 rows"):
        cache.remove_batch_dim()


@torch.no_grad()
def test_the_stream_adds_up_and_so_do_the_logits_before_the_cap(cache: ActivationCache) -> None:
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels[:3] == ["embed", "0_attn_out", "0_mlp_out"] and len(labels) == len(parts) == 9
    close(parts.sum(dim=0), cache["resid_post", 3])
    close(cache.decompose_resid(layer=2, mlp_input=True).sum(dim=0), cache["resid_mid", 2])
    both = [cache.decompose_resid(mode=mode, incl_embeds=False) for mode in ("attn", "mlp")]
    assert torch.equal(torch.stack(both, dim=1).flatten(0, 1), parts[1:])
    raw = cache["logits_raw"]
    targets = TOKENS.roll(-1, dims=1)
    close(cache.logit_attrs(parts, targets).sum(dim=0), raw.gather(2, targets[..., None])[..., 0])
    close(cache.logit_attrs(parts, 7, 9).sum(dim=0), raw[..., 7] - raw[..., 9])
    last = cache.decompose_resid(pos_slice=-1)
    close(cache.logit_attrs(last, targets[:, -1], pos_slice=-1).sum(dim=0), raw[:, -1].gather(1, targets[:, -1:])[:, 0])
    one = cache.logit_attrs(last[:, 1:], 7, pos_slice=-1, has_batch_dim=False, batch_slice=slice(1, 2))
    close(one.sum(dim=0), raw[1:, -1, 7])


@torch.no_grad()
def test_streams_of_all_layers_through_the_final_norm_are_the_logit_lens(cache: ActivationCache) -> None:
    streams, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == [*(f"{i}_{at}" for i in range(4) for at in ("pre", "mid")), "final_post"]
    assert torch.equal(streams[3], cache["resid_mid", 1])
    lens = cache.accumulated_resid(apply_ln=True) @ hooked(MODEL).W_U
    close(lens[-1], cache["logits_raw"])
    close(lens[2], MODEL.lm_head(MODEL.model.norm(cache["resid_pre", 2]), MODEL.model.embed_tokens))
    scaled = cache.accumulated_resid(layer=2, apply_ln=True)
    close(scaled[-1], cache["normalized", 2, "ln1"])
    close(cache.accumulated_resid(layer=2, mlp_input=True, apply_ln=True)[-1], cache["normalized", 2, "ln2"])


@torch.no_grad()
def test_heads_sum_to_what_attention_computes_before_and_after_its_norm(cache: ActivationCache) -> None:
    heads, labels = cache.stack_head_results(return_labels=True, incl_remainder=True)
    assert labels[:2] == ["L0H0", "L0H1"] and labels[-1] == "remainder" and len(heads) == 4 * 8 + 1
    close(heads.sum(dim=0), cache["resid_post", 3])
    assert torch.equal(heads[8 * 2 + 5], cache["result", 2][:, :, 5])
    with capture(MODEL, "blocks.2.ln1_post.hook_*") as seen:
        MODEL(TOKENS)
    normed = cache.stack_head_results(post_norm=True)
    for layer in range(4):
        close(normed[8 * layer : 8 * layer + 8].sum(dim=0), cache["attn_out", layer])
    close(heads[16:24].sum(dim=0) * seen["blocks.2.ln1_post.hook_inv_scale"], seen["blocks.2.ln1_post.hook_normalized"])
    assert torch.equal(cache.stack_activation("z")[1], cache["z", 1]) and len(cache.stack_activation("z", 3)) == 3


def test_texts_and_ids_are_those_of_the_tokenizer(pocket: gemma2.Gemma) -> None:
    model = hooked(pocket)
    text = "And God said"
    assert model.to_tokens(text).tolist() == [pocket.tokenizer.encode(text)]
    both = model.to_tokens([text, "And"])
    assert both.shape == (2, 4) and both[1].tolist() == [*pocket.tokenizer.encode("And"), 0, 0]
    assert model.to_str_tokens(text) == ["<bos>", "And", " God", " said"] == model.to_str_tokens(both[:1])
    assert model.to_str_tokens(["And", "God"], prepend_bos=False) == [["And"], ["God"]]
    assert model.to_string(both) == [text, "And"] and model.to_string(both[0]) == text
    assert model.to_str_tokens(torch.tensor([model.to_single_token(" God")])) == [" God"]
    with pytest.raises(ValueError, match=r"' God said' is not one token but 2: \[' God', ' said'\]"):
        model.to_single_token(" God said")
    with torch.no_grad():
        assert torch.equal(model([text, "And"])[1, :2], model("And", return_type="both")[0][0]) or torch.allclose(
            model([text, "And"])[1, :2], model("And")[0], atol=1e-4
        )
        loss = model(text, return_type="loss")
        each = model(text, return_type="loss", loss_per_token=True)
    assert each.shape == (1, 3) and torch.allclose(each.mean(), loss)
    assert torch.equal(
        model.tokens_to_residual_directions(" God"), model.tokens_to_residual_directions(model.to_tokens(text)[0])[2]
    )
    with pytest.raises(ValueError, match="needs a tokenizer"):
        hooked(MODEL).to_tokens("And")
    assert model.cfg.n_layers == 6 and model.cfg.d_vocab == 4096 and hooked(MODEL).cfg.n_key_value_heads == 4


@torch.no_grad()
def test_a_pass_stops_at_a_layer_and_gives_the_stream_before_it() -> None:
    model, blocks = hooked(MODEL), list[str]()
    _, cache = model.run_with_cache(TOKENS)
    for layer in range(-4, 5):
        stream, some = model.run_with_cache(TOKENS, "loss", stop_at_layer=layer)
        before = layer % 4 if layer < 0 else layer
        expected = cache["resid_pre", before] if before < 4 else cache["resid_post", 3]
        assert torch.equal(stream, expected) and torch.equal(model(TOKENS, stop_at_layer=layer), expected)
        assert len(some) == 1 + 29 * before and f"blocks.{before}.hook_resid_pre" not in some
    hooks: Any = [("*hook_resid_*", lambda value, hook: blocks.append(hook.name) or value * 2)]  # type: ignore[func-returns-value]
    found = model.run_with_hooks(TOKENS, fwd_hooks=hooks, stop_at_layer=1)
    with edit(MODEL, {"*hook_resid_*": lambda value, hook: value * 2}), capture(MODEL, "*resid_post") as seen:
        MODEL(TOKENS)
    assert torch.equal(found, seen["resid_post", 0]) and blocks == [
        f"blocks.0.hook_resid_{at}" for at in ("pre", "mid", "post")
    ]
    for wrong in (5, -5, True, 1.0):
        with pytest.raises(ValueError, match="stop_at_layer must be from -4 to 4, not"):
            model(TOKENS, stop_at_layer=wrong)  # type: ignore[arg-type]
    assert not any(module._forward_hooks for module in MODEL.modules())


def test_gradients_are_cached_beside_values_and_parameters_get_none() -> None:
    model = hooked(MODEL)
    names = ["blocks.*.hook_resid_*", "blocks.1.ln2.hook_scale", "blocks.2.attn.hook_pattern", "hook_embed", "logits"]
    loss, cache = model.run_with_cache(TOKENS, return_type="loss", names_filter=names, incl_bwd=True)
    assert torch.equal(loss, model(TOKENS, return_type="loss"))
    assert all(parameter.grad is None for parameter in MODEL.parameters())
    ours = [name for name in cache if not name.endswith("_grad")]
    assert len(ours) == 16 and all(f"{name}_grad" in cache for name in ours) and len(cache) == 32
    for name in ours:
        zero = torch.zeros_like(cache[name]).requires_grad_()
        with model.hooks([(name, lambda value, hook, zero=zero: value + zero)]):
            (expected,) = torch.autograd.grad(model(TOKENS, return_type="loss"), zero)
        close(cache[f"{name}_grad"], expected, 1e-10)
    assert torch.equal(cache["resid_post_grad", 2], cache["blocks.2.hook_resid_post_grad"])
    _, one = model.run_with_cache(
        TOKENS[:1], "loss", names_filter=names, incl_bwd=True, pos_slice=-1, remove_batch_dim=True
    )
    assert one["blocks.2.attn.hook_pattern_grad"].shape == (8, 24) and one["hook_embed_grad"].shape == (288,)
    for options in ({}, {"return_type": "both"}, {"return_type": "loss", "loss_per_token": True}):
        with pytest.raises(ValueError, match='incl_bwd takes gradients of the mean loss: give return_type="loss"'):
            model.run_with_cache(TOKENS, incl_bwd=True, **options)
    with torch.no_grad(), pytest.raises(ValueError, match="takes no gradient: call with gradients enabled"):
        model.run_with_cache(TOKENS, "loss", incl_bwd=True)


def test_generation_returns_what_it_was_given_in_front_and_hooks_act_in_it(pocket: gemma2.Gemma) -> None:
    model, text = hooked(pocket), "And God said"
    expected = text + pocket.generate(text, 6)
    assert model.generate(text, 6, do_sample=False) == expected
    found = model.generate(model.to_tokens(text), 6, do_sample=False)
    assert found.shape == (1, 10) and model.to_string(found[0]) == expected
    steps = list[int]()
    with model.hooks([("blocks.0.hook_mlp_out", lambda value, hook: steps.append(hook.step) or value * 0)]):  # type: ignore[func-returns-value]
        changed = model.generate([text, "In"], 6, do_sample=False)
    assert steps == list(range(6)) and changed[0] != expected and len(changed) == 2
    torch.manual_seed(3)
    first = model.generate(text, 8, top_k=20, return_type="tokens")
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(text, 8, top_k=20, return_type="tokens"))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        hooked(MODEL).generate(TOKENS)
    assert hooked(MODEL).generate(TOKENS, 3, stop_at_eos=False, do_sample=False).shape == (2, 27)


def test_rows_that_have_ended_are_filled_with_eos(pocket: gemma2.Gemma) -> None:
    eos = pocket.tokenizer.special["eos"]

    def end_first_row(value: Tensor, hook: HookPoint) -> Tensor:
        value[0, -1, eos] = 100.0 if hook.step < 3 else -100.0
        return value

    with hooked(pocket).hooks([("logits", end_first_row)]) as model:
        found = model.generate(["And", "And"], 5, do_sample=False, return_type="tokens")
    assert found[0, 2:].tolist() == [eos] * 5 and eos not in found[1].tolist()


@torch.no_grad()
def test_a_packed_and_compiled_model_from_a_gguf_has_the_same_words() -> None:
    gemma = gemma2.load("pocket:pocket-q8_0.gguf", device="cpu", weights="packed", fast=True)
    model, text = hooked(gemma), "And God said, Let there be light"
    logits, cache = model.run_with_cache(text)
    heads = cache.stack_head_results(post_norm=True).float()
    close(heads[:8].sum(dim=0), cache["attn_out", 0].float(), 3e-2)  # bfloat16
    parts, raw = cache.decompose_resid().double(), cache["logits_raw"][0, -1]
    best = int(raw.argmax())
    assert abs(float(cache.logit_attrs(parts, best).sum(dim=0)[0, -1]) - float(raw[best])) < 0.02 * abs(
        float(raw[best])
    )
    written = []
    for change in (lambda value, hook: None, lambda value, hook: value * 0):  # hooked, it runs eagerly
        with model.hooks([("blocks.*.hook_attn_out", change)]):
            written.append(model.generate(text, 4, do_sample=False))
    assert written[0].startswith(text) and written[0] != written[1] and not torch.isnan(logits).any()


def test_what_cannot_be_is_named_before_anything_is_computed(pocket: gemma2.Gemma) -> None:
    model: Any = hooked(pocket)
    wrong = list[tuple[Any, str]]()
    wrong += [(lambda: model([]), "give a text, a list of texts or a tensor of ids, not")]
    wrong += [(lambda: model([1, 2]), r"not \[1, 2\]"), (lambda: model.generate([]), "give a text")]
    wrong += [
        (lambda: model("And", return_type="logit"), "return_type is"),
        (lambda: model.generate("And", -1), "max_new"),
    ]
    wrong += [(lambda: model.generate("And", return_type="ids"), "return_type is")]
    wrong += [(lambda: model.run_with_cache("And", names_filter=3), "names are text, a list of it or a function")]
    wrong += [(lambda: model.run_with_hooks("And", fwd_hooks=[("hook_embed",)]), "a hook is")]
    wrong += [(lambda: model.run_with_hooks("And", fwd_hooks="hook_embed"), "hooks are a list")]
    wrong += [(lambda: model.run_with_hooks("And", fwd_hooks=[("nope", print)]), "no site is called 'nope'")]
    wrong += [
        (
            lambda: model.run_with_hooks("And", fwd_hooks=[("hook_embed", lambda value, hook: value[:, :1])]),
            "returned shape",
        )
    ]
    wrong += [(lambda: model.to_str_tokens(torch.zeros(2, 3, dtype=torch.long)), r"ids must be \[t\] or \[1 t\]")]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="expected a Gemma2 or a Gemma, not str"):
        hooked("pocket")
