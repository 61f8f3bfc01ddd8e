"""Bit for bit with transformers' eager Gemma 2, on shapes like each of the three sizes scaled down."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gemma2
from tests.conftest import SHAPES, ids, raw_config, tensors_of, tiny

transformers = pytest.importorskip("transformers", reason="the live comparison needs the extra gemma2[transformers]")


def reference(model: gemma2.Gemma2, raw: dict[str, Any], dtype: torch.dtype) -> Any:
    """transformers' model with the same weights, built in `dtype` so that its rotary table stays float32."""
    named = {key: value for key, value in raw.items() if key != "model_type"}
    config = transformers.Gemma2Config(**named, attn_implementation="eager", attention_dropout=0.0)
    external = transformers.Gemma2ForCausalLM._from_config(config, dtype=dtype).eval()
    external.load_state_dict({**tensors_of(model), "lm_head.weight": model.state_dict()["model.embed_tokens.weight"]})
    assert external.model.rotary_emb.inv_freq.dtype == torch.float32
    return external


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SHAPES)
@torch.no_grad()
def test_logits_are_bit_equal_to_transformers_on_prompts_longer_than_the_window(
    size: str, dtype: torch.dtype, threads: int
) -> None:
    model = tiny(size).to(dtype)
    external = reference(model, raw_config(size), dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for batch, length in ((1, 1), (1, 15), (1, 16), (1, 17), (2, 77), (1, 200)):
        tokens = ids(batch, length, seed=length)
        ours, theirs = model(tokens), external(tokens, use_cache=False).logits
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), f"{size} {dtype} {batch}x{length}: {(ours - theirs).abs().max()}"
    torch.set_num_threads(before)


@torch.no_grad()
def test_the_comparison_is_not_vacuous() -> None:
    """Caps saturate, the window hides keys, and the query scale is not the head width's."""
    model, tokens = tiny("27b"), ids(1, 77)
    raw: list[torch.Tensor] = []
    hook = model.model.layers[0].self_attn.attend.hook_scores_raw.register_forward_hook(
        lambda module, inputs, output: raw.append(output)
    )
    logits = model(tokens)
    hook.remove()
    assert raw[0].abs().max() > 50, "scores never reach the cap"
    assert logits.abs().max() > 29.5, "logits never reach the cap"
    assert model.config.query_pre_attn_scalar != model.config.head_dim
    wider = tiny("27b", sliding_window=100)
    assert not torch.equal(wider(tokens)[:, 20:], logits[:, 20:])
    assert torch.equal(wider(tokens)[:, :16], logits[:, :16])


@torch.no_grad()
def test_cached_decoding_agrees_with_transformers_past_the_window() -> None:
    model = tiny("9b")
    external = reference(model, raw_config("9b"), torch.float32)
    tokens = ids(1, 60)
    cache, past, worst = gemma2.HybridCache(model.config, 1, 60), None, 0.0
    for start, stop in [(0, 30), *((i, i + 1) for i in range(30, 60))]:
        ours = model(tokens[:, start:stop], cache=cache)
        out = external(tokens[:, start:stop], past_key_values=past, use_cache=True)
        past = out.past_key_values
        worst = max(worst, (ours - out.logits).abs().max().item())
    assert worst < 1e-5 * 30


@torch.no_grad()
def test_float64_runs_in_float64_where_transformers_drops_to_float32() -> None:
    """Against a float64 run, transformers' float64 carries float32 noise; ours must be its own truth: two orders of
    summation (cached and not) agree to 1e-10, which float32 norms or softmax could not."""
    model = tiny("27b").double()
    tokens = ids(1, 60)
    whole = model(tokens)
    cache = gemma2.HybridCache(model.config, 1, 60)
    parts = torch.cat([model(part, cache=cache) for part in tokens.split(7, dim=1)], dim=1)
    assert (whole - parts).abs().max() < 1e-10
    theirs = reference(model, raw_config("27b"), torch.float64)(tokens, use_cache=False).logits
    assert 1e-8 < (whole - theirs).abs().max() < 1e-2
