"""TransformerLens: its model from our weights has our values, and `research.hooked` has its words and its numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hooked_transformer import hooked_transformer
from torch import Tensor

import gemma2
from gemma2.research import capture, hooked
from tests.conftest import ids
from tests.ecosystem.conftest import needs

transformer_lens = needs("transformer_lens")
needs("transformer_lens.pretrained.weight_conversions")

SAME = (
    "hook_embed",
    "blocks.*.hook_resid_*",
    "blocks.*.attn.hook_[qkvz]",
    "blocks.*.attn.hook_rot_*",
    "blocks.*.attn.hook_pattern",
    "blocks.*.hook_attn_out",
    "blocks.*.hook_mlp_out",
    "blocks.*.mlp.hook_p*",
)
TOKENS = ids(2, 160, vocab=4096)  # beyond the window of 128
BOUND = 1e-6  # relative


@pytest.fixture(scope="module")
def theirs(pocket: gemma2.Gemma) -> Any:
    return hooked_transformer(pocket)


@pytest.fixture(scope="module")
def exact() -> gemma2.Gemma:
    return gemma2.load(dtype="float64", device="cpu")


@pytest.fixture(scope="module")
def folded(exact: gemma2.Gemma) -> Any:
    """As `from_pretrained` makes it, in float64: differences are then not those of rounding."""
    return hooked_transformer(exact, fold_ln=True)


def close(ours: Tensor, others: Tensor) -> bool:
    return ours.shape == others.shape and bool((ours - others).abs().max() <= BOUND * others.abs().max())


@torch.no_grad()
def test_values_have_its_names_and_its_cache_takes_them(pocket: gemma2.Gemma, theirs: Any) -> None:
    tokens = TOKENS[:1]
    logits, cache = theirs.run_with_cache(tokens)
    with capture(pocket, SAME) as seen:
        assert (pocket.model(tokens) - logits).abs().max() < 1e-3
    assert len(seen) == 1 + 15 * pocket.config.num_hidden_layers
    for name, value in seen.items():
        assert (value - cache[name]).abs().max() <= 1e-4 * cache[name].abs().max(), name
    ours = transformer_lens.ActivationCache(dict(seen), theirs)
    assert torch.equal(ours["resid_post", 3], seen["blocks.3.hook_resid_post"])
    parts, others = (found.decompose_resid(layer=4, mode="all") for found in (ours, cache))
    assert (parts - others).abs().max() < 1e-3 * others.abs().max()


@torch.no_grad()
def test_an_edit_by_its_names_does_here_what_it_does_there(pocket: gemma2.Gemma, theirs: Any) -> None:
    tokens = TOKENS[:1, :40]

    def zero_fifth(value: Tensor, hook: Any) -> Tensor:
        return value.index_fill(1, torch.tensor(5), 0.0)

    hooks = [("blocks.2.hook_resid_mid", zero_fifth)]
    edited = hooked(pocket).run_with_hooks(tokens, fwd_hooks=hooks)
    expected = theirs.run_with_hooks(tokens, fwd_hooks=hooks)
    assert (edited - expected).abs().max() < 1e-3 < (edited - pocket.model(tokens)).abs().max()


@torch.no_grad()
def test_every_name_of_its_cache_has_its_value_in_ours(exact: gemma2.Gemma, folded: Any) -> None:
    logits, cache = hooked(exact).run_with_cache(TOKENS)
    expected, others = folded.run_with_cache(TOKENS)
    assert close(logits, expected)
    for name, value in others.items():
        if name == "unembed.hook_in":  # the gain is part of W_U there
            assert close(cache["ln_final.hook_normalized"], value)
        elif name.endswith("hook_attn_scores"):
            value = value.masked_fill(value == -torch.inf, torch.finfo(value.dtype).min)
            assert torch.equal(value < -1e300, cache[name] < -1e300)
            value, ours = (x.masked_fill(value < -1e300, 0.0) for x in (value, cache[name]))
            assert close(ours, value), name
        else:
            assert close(cache[name], value), name
    assert len(others) == 5 + 24 * exact.config.num_hidden_layers
    for name in ("resid_post", "attn", "z", "mlp_pre", "k"):
        assert close(cache[name, -1], others[name, -1])
    assert close(cache["scale", 2, "ln1_post"], others["scale", 2, "ln1_post"])
    assert close(cache["scale"], others["scale"]) and close(cache["k3"], others["k3"])


@torch.no_grad()
def test_its_stacks_and_sums_have_its_numbers(exact: gemma2.Gemma, folded: Any) -> None:
    _, ours = hooked(exact).run_with_cache(TOKENS)
    _, others = folded.run_with_cache(TOKENS)
    targets = TOKENS.roll(-1, dims=1)

    def numbers(cache: Any) -> dict[str, Any]:
        parts = cache.decompose_resid()
        last = cache.decompose_resid(pos_slice=-1)
        return {
            "accumulated": cache.accumulated_resid(return_labels=True),
            "with the middle": cache.accumulated_resid(layer=3, incl_mid=True, return_labels=True),
            "for an MLP": cache.accumulated_resid(layer=3, mlp_input=True, apply_ln=True, return_labels=True),
            "through the final norm": cache.accumulated_resid(apply_ln=True, incl_mid=True),
            "of some tokens": cache.accumulated_resid(apply_ln=True, pos_slice=(3, 40)),
            "of one token": cache.accumulated_resid(layer=4, apply_ln=True, pos_slice=-1),
            "decomposed": cache.decompose_resid(return_labels=True),
            "by MLPs": cache.decompose_resid(layer=4, mode="mlp", apply_ln=True, return_labels=True),
            "by attention": cache.decompose_resid(layer=4, mode="attn", mlp_input=True, incl_embeds=False),
            "decomposed for an MLP": cache.decompose_resid(layer=2, mlp_input=True, apply_ln=True, pos_slice=[1, 5]),
            "heads": cache.stack_head_results(layer=3, return_labels=True),
            "heads and the rest": cache.stack_head_results(
                incl_remainder=True, apply_ln=True, pos_slice=-1, return_labels=True
            ),
            "activations": cache.stack_activation("z"),
            "some": cache.stack_activation("normalized", layer=3, sublayer_type="ln2"),
            "scaled": cache.apply_ln_to_stack(parts),
            "scaled for a layer": cache.apply_ln_to_stack(parts, layer=2, mlp_input=True),
            "scaled by its own": cache.apply_ln_to_stack(parts, recompute_ln=True),
            "logits": cache.logit_attrs(parts, targets),
            "of one token's logit": cache.logit_attrs(last, 17, pos_slice=-1),
            "differences": cache.logit_attrs(last, targets[:, -1], TOKENS[:, -1], pos_slice=-1),
        }

    found, expected = numbers(ours), numbers(others)
    for name, value in expected.items():
        if isinstance(value, tuple):
            assert found[name][1] == value[1], name
            found[name], value = found[name][0], value[0]
        assert close(found[name], value), name
    assert close(hooked(exact).W_U, folded.W_U)
    assert close(hooked(exact).tokens_to_residual_directions(TOKENS), folded.tokens_to_residual_directions(TOKENS))


@torch.no_grad()
def test_without_fold_ln_its_numbers_are_others_where_the_final_gain_is_used(exact: gemma2.Gemma) -> None:
    """What the docs say: values of sites are the same, its logit attributions then leave out the gain."""
    _, ours = hooked(exact).run_with_cache(TOKENS)
    _, others = hooked_transformer(exact, fold_ln=False).run_with_cache(TOKENS)
    parts = others.decompose_resid()
    assert close(ours["unembed.hook_in"], others["unembed.hook_in"])
    assert close(ours.decompose_resid(), parts) and close(ours.stack_head_results(), others.stack_head_results())
    assert close(ours.apply_ln_to_stack(parts, layer=3), others.apply_ln_to_stack(parts, layer=3))
    raw = ours["logits_raw"][..., 17]
    assert close(ours.logit_attrs(parts, 17).sum(dim=0), raw)
    assert not torch.allclose(others.logit_attrs(parts, 17).sum(dim=0), raw, rtol=0.1)
    gain = 1 + exact.model.model.norm.weight
    assert close(ours.accumulated_resid(apply_ln=True) * gain, others.accumulated_resid(apply_ln=True))


def test_gradients_and_added_hooks_are_its_own(exact: gemma2.Gemma, folded: Any) -> None:
    tokens = TOKENS[:, :40]
    caches = [m.run_with_cache(tokens, return_type="loss", incl_bwd=True) for m in (hooked(exact), folded)]
    (loss, ours), (expected, others) = caches
    assert close(loss, expected)
    names = [name for name in others if name.endswith("_grad")]
    assert len(names) == 5 + 24 * exact.config.num_hidden_layers
    for name in names:
        if ".ln1." in name:  # it calls this norm for queries, keys and values, and keeps the gradient of one of them
            assert not close(ours[name], others[name]), name
            continue
        # What the head reads has the gain in it here, and W_U has it there.
        ours_name = "ln_final.hook_normalized_grad" if name == "unembed.hook_in_grad" else name
        assert close(ours[ours_name], others[name]), name

    def told_by(model: Any) -> tuple[list[Any], Tensor]:
        """Two functions at one site and one at the next, which has the same tensor, and what comes to the embedding."""
        told: list[Any] = []

        def times(factor: float) -> Any:
            def hook_function(gradient: Tensor, hook: Any) -> tuple[Tensor]:
                told.append((hook.name, gradient.clone()))
                return (gradient * factor,)

            return hook_function

        model.add_hook("blocks.2.hook_resid_post", times(3.0), "bwd")
        model.add_hook("blocks.2.hook_resid_post", times(5.0), "bwd")
        model.add_hook("blocks.3.hook_resid_pre", times(2.0), dir="bwd")
        model.add_hook(lambda name: name == "blocks.1.hook_mlp_out", lambda value, hook: value * 2)
        model.add_hook("blocks.1.hook_mlp_out", lambda value, hook: value + 1)
        kept, forward, back = model.get_caching_hooks(["hook_embed"], incl_bwd=True)
        hooks = {"fwd_hooks": forward, "bwd_hooks": back, "reset_hooks_end": False}
        loss = model.run_with_hooks(tokens, return_type="loss", **hooks)
        loss.backward()
        model.reset_hooks()
        assert torch.equal(model(tokens, return_type="loss"), caches[model is folded][0])
        return [*told, (str(sorted(kept)), kept["hook_embed_grad"])], loss.detach()

    (found, loss), (theirs, their_loss) = told_by(hooked(exact)), told_by(folded)
    assert [name for name, _ in found] == [name for name, _ in theirs] and len(found) == 4 and close(loss, their_loss)
    assert all(close(one, other) for (_, one), (_, other) in zip(found, theirs, strict=True))
    for layer in (0, 2, -1, 6):
        assert close(hooked(exact)(tokens, stop_at_layer=layer), folded(tokens, stop_at_layer=layer))
    exact.model.zero_grad(set_to_none=True)


def test_its_words_for_texts_give_its_tokens(pocket: gemma2.Gemma, theirs: Any, their_tokenizer: Any) -> None:
    theirs.set_tokenizer(their_tokenizer)
    ours, text = hooked(pocket), "And God said, Let there be light"
    assert torch.equal(ours.to_tokens(text), theirs.to_tokens(text))
    assert torch.equal(ours.to_tokens(text, prepend_bos=False), theirs.to_tokens(text, prepend_bos=False))
    assert ours.to_str_tokens(text) == theirs.to_str_tokens(text)
    assert ours.to_single_token(" God") == theirs.to_single_token(" God")
    written = [model.generate(text, max_new_tokens=6, do_sample=False, verbose=False) for model in (ours, theirs)]
    assert written[0] == written[1].removeprefix("<bos>")
    losses = [model(text, return_type="loss") for model in (ours, theirs)]
    assert torch.allclose(losses[0], losses[1], rtol=1e-4)
