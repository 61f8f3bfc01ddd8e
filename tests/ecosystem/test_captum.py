"""captum: attributions through the model's modules, the embedding included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gemma2
from tests.ecosystem.conftest import needs

captum = needs("captum.attr")

TEXT = "And the king said unto him, Behold, I"


def test_integrated_gradients_at_the_embedding_add_up_to_the_change_of_the_logit(pocket: gemma2.Gemma) -> None:
    tokens = torch.tensor([pocket.tokenizer.encode(TEXT)])
    baseline = torch.zeros_like(tokens)  # padding's id
    baseline[:, 0] = tokens[:, 0]
    with torch.no_grad():
        before, after = (pocket.model(ids, last=1)[0, -1] for ids in (baseline, tokens))
    target = int(after.argmax())
    method = captum.LayerIntegratedGradients(
        lambda ids: pocket.model(ids, last=1)[:, -1], pocket.model.model.embed_tokens
    )
    found = method.attribute(tokens, baseline, target=target, n_steps=100, internal_batch_size=25)
    assert found.shape == (*tokens.shape, pocket.config.hidden_size) and not found[:, 0].any()
    change = float(after[target] - before[target])
    assert abs(change) > 1 and abs(float(found.sum()) - change) < 0.02 * abs(change)


def test_gradient_times_activation_of_a_layer_is_that_of_a_hook(pocket: gemma2.Gemma) -> None:
    tokens = torch.tensor([pocket.tokenizer.encode(TEXT)])
    layer = pocket.model.model.layers[3]
    found = captum.LayerGradientXActivation(lambda ids: pocket.model(ids)[:, -1], layer).attribute(tokens, target=7)
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    (gradient,) = torch.autograd.grad(pocket.model(tokens)[0, -1, 7], kept)
    hook.remove()
    assert found.any() and torch.allclose(found, gradient * kept[0], rtol=1e-4, atol=1e-6)


def test_attributions_of_a_continuation_are_those_over_transformers_model(
    face: Any, theirs: Any, their_tokenizer: Any
) -> None:
    features = captum.TextTokenInput("And God said", their_tokenizer, skip_tokens=[2])
    found = []
    for model in (face, theirs):
        method = captum.LLMAttribution(captum.FeatureAblation(model), their_tokenizer)
        # Its cached form gives transformers 5 the whole text again at each step.
        found.append(method.attribute(features, target=" unto him", use_cached_outputs=False))
    assert found[0].token_attr.shape == (2, 3) and found[0].token_attr.any()
    assert torch.equal(found[0].token_attr, found[1].token_attr)
