"""TransformerLens's `HookedTransformer` with the weights of a Gemma 2: to compare with, in tests and measurements.

`transformer_lens` 3 is needed; 4 has no such class.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

import gemma2


def hooked_transformer(gemma: gemma2.Gemma, fold_ln: bool = False, n_ctx: int = 256) -> Any:
    """The same model there, in the same dtype, without any processing of the weights but `fold_ln`."""
    lens = importlib.import_module("transformer_lens")
    conversions = importlib.import_module("transformer_lens.pretrained.weight_conversions")
    config = gemma.config
    described = lens.HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=n_ctx,
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
        dtype=gemma.model.dtype,
        device="cpu",
    )
    model = lens.HookedTransformer(described)
    with torch.no_grad():
        weights = conversions.convert_gemma_weights(gemma2.as_transformers(gemma), described)
        model.load_and_process_state_dict(
            weights, fold_ln=fold_ln, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
    return model.eval()
