"""TransformerLens: its model from our weights has our values under the same names, and its cache takes ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gemma2
from gemma2.research import capture
from tests.conftest import ids
from tests.ecosystem.conftest import needs

transformer_lens = needs("transformer_lens")
conversions = needs("transformer_lens.pretrained.weight_conversions")

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


@pytest.fixture(scope="module")
def hooked(pocket: gemma2.Gemma) -> Any:
    config = pocket.config
    described = transformer_lens.HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=256,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        act_fn="gelu_pytorch_tanh",
        normalization_type="RMS",
        eps=config.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=config.head_dim,
        rotary_base=int(config.rope_theta),
        gated_mlp=True,
        final_rms=True,
        use_attn_scale=True,
        attn_scale=config.query_pre_attn_scalar**0.5,
        use_local_attn=True,
        window_size=config.sliding_window,
        attn_types=["local" if config.window(i) else "global" for i in range(config.num_hidden_layers)],
        attn_scores_soft_cap=config.attn_logit_softcapping,
        output_logits_soft_cap=config.final_logit_softcapping,
        use_normalization_before_and_after=True,
        original_architecture="Gemma2ForCausalLM",
        device="cpu",
    )
    model = transformer_lens.HookedTransformer(described)
    with torch.no_grad():
        weights = conversions.convert_gemma_weights(gemma2.as_transformers(pocket), described)
        model.load_and_process_state_dict(
            weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
    return model.eval()


@torch.no_grad()
def test_values_have_its_names_and_its_cache_takes_them(pocket: gemma2.Gemma, hooked: Any) -> None:
    tokens = ids(1, 160, vocab=4096)  # beyond the window of 128
    logits, cache = hooked.run_with_cache(tokens)
    with capture(pocket, SAME) as seen:
        assert (pocket.model(tokens) - logits).abs().max() < 1e-3
    assert len(seen) == 1 + 15 * pocket.config.num_hidden_layers
    for name, value in seen.items():
        assert (value - cache[name]).abs().max() <= 1e-4 * cache[name].abs().max(), name
    ours = transformer_lens.ActivationCache(dict(seen), hooked)
    assert torch.equal(ours["resid_post", 3], seen["blocks.3.hook_resid_post"])
    parts, theirs = (found.decompose_resid(layer=4, mode="all") for found in (ours, cache))
    assert (parts - theirs).abs().max() < 1e-3 * theirs.abs().max()


@torch.no_grad()
def test_an_edit_by_its_names_does_here_what_it_does_there(pocket: gemma2.Gemma, hooked: Any) -> None:
    tokens = ids(1, 40, vocab=4096)

    def zero_fifth(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value.index_fill(1, torch.tensor(5), 0.0)

    theirs = hooked.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_resid_mid", zero_fifth)])
    plain = pocket.model(tokens)
    place = pocket.model.get_submodule("model.layers.2.hook_resid_mid")
    hook = place.register_forward_hook(lambda module, inputs, output: zero_fifth(output, None))
    edited = pocket.model(tokens)
    hook.remove()
    assert (edited - theirs).abs().max() < 1e-3 < (edited - plain).abs().max()
