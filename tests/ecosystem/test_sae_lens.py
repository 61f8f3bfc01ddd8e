"""SAELens: sparse autoencoders read and replace the residual stream by hooks on our places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2.research import capture
from tests.conftest import ids
from tests.ecosystem.conftest import needs

sae_lens = needs("sae_lens")
proxy = needs("sae_lens.load_model")

SITE, PATH = "blocks.2.hook_resid_post", "model.layers.2"


@pytest.fixture
def sae(pocket: gemma2.Gemma) -> Any:
    """An untrained autoencoder of the kind of Gemma Scope's, with a quarter of its features active."""
    torch.manual_seed(0)
    found = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(d_in=pocket.config.hidden_size, d_sae=64))
    with torch.no_grad():
        found.W_enc.normal_(std=0.1)
        found.threshold.fill_(3.0)
    return found.eval()


@torch.no_grad()
def test_with_the_error_added_the_model_is_as_it_was_and_an_ablated_feature_shows(
    pocket: gemma2.Gemma, sae: Any
) -> None:
    tokens = ids(1, 20, vocab=4096)
    with capture(pocket, SITE) as seen:
        plain = pocket.model(tokens)
    features = sae.encode(seen[SITE])
    assert 0.1 < (features > 0).float().mean() < 0.9
    best = int(features[0, -1].argmax())

    def logits(ablate: bool) -> Tensor:
        def splice(module: object, inputs: object, stream: Tensor) -> Tensor:
            active = sae.encode(stream)
            error = stream - sae.decode(active)
            return sae.decode(active.index_fill(-1, torch.tensor(best), 0.0) if ablate else active) + error

        hook = pocket.model.get_submodule(PATH).register_forward_hook(splice)
        try:
            return pocket.model(tokens)
        finally:
            hook.remove()

    assert (logits(ablate=False) - plain).abs().max() < 1e-3 < (logits(ablate=True) - plain).abs().max()


@torch.no_grad()
def test_a_saved_autoencoder_loads_and_encodes_what_capture_sees(
    pocket: gemma2.Gemma, sae: Any, tmp_path: Path
) -> None:
    sae.save_model(tmp_path)
    again = sae_lens.SAE.load_from_disk(tmp_path)
    with capture(pocket, SITE) as seen:
        pocket.model(ids(1, 20, vocab=4096))
    assert torch.equal(again.encode(seen[SITE]), sae.encode(seen[SITE]))


@torch.no_grad()
def test_its_proxy_reads_the_places_of_the_face_by_their_paths(face: Any, their_tokenizer: Any) -> None:
    tokens = ids(2, 20, vocab=4096)
    with capture(face, SITE) as seen:
        logits = face(tokens).logits
    hooked = proxy.HookedProxyLM(face, their_tokenizer, hook_names=[PATH])
    found, kept = hooked.run_with_cache(tokens, names_filter=[PATH])
    assert torch.equal(found, logits) and torch.equal(kept[PATH], seen[SITE])
