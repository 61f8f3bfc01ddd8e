"""The Jacobian lens passes its four identities; the tuned lens learns; both are saved and opened, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gemma2
from gemma2.errors import BadModelFile
from gemma2.research import (
    FittedLens,
    ablate,
    capture,
    edit,
    fit_jacobian,
    fit_tuned,
    lens_table,
    logit_lens,
    open_lens,
)
from gemma2.research.jacobian import last_site
from gemma2.research.marks import difference, marks_of
from tests.conftest import ids, tiny

MODEL = tiny("9b", num_hidden_layers=3).double()
TEXTS = [ids(2, 12), ids(1, 9, seed=1)]
SKIP = 3
STREAMS = [f"blocks.{i}.hook_resid_post" for i in range(3)]


@pytest.fixture(scope="module")
def jacobian() -> FittedLens:
    return fit_jacobian(MODEL, TEXTS, skip=SKIP)


def test_the_lens_of_the_last_layers_own_output_is_the_models_logits(jacobian: FittedLens) -> None:
    for model in (MODEL, tiny("9b", num_hidden_layers=3), tiny("9b", num_hidden_layers=3).bfloat16()):
        with torch.no_grad():
            plain = model(TEXTS[0])
        found = dict(logit_lens(model, TEXTS[0], fitted=jacobian))
        assert torch.equal(found[STREAMS[-1]], plain)
        assert (found[STREAMS[0]] - plain).abs().max() > 1


def test_with_the_identity_it_is_the_logit_lens() -> None:
    eye = FittedLens("jacobian", {name: torch.eye(112) for name in STREAMS})
    for model in (MODEL, tiny("9b", num_hidden_layers=3).bfloat16()):
        plain = dict(logit_lens(model, TEXTS[0]))
        for name, logits in logit_lens(model, TEXTS[0], fitted=eye):
            assert torch.equal(logits, plain[name])


def test_the_last_layers_jacobian_is_the_identity(jacobian: FittedLens) -> None:
    """The closed form: the last layer's output depends on nothing but itself, at the same position."""
    assert torch.equal(jacobian.weights[STREAMS[-1]], torch.eye(112, dtype=torch.float64))
    assert (jacobian.weights[STREAMS[0]] - torch.eye(112)).norm() > 0.1


@pytest.mark.parametrize("layer", [0, 1])
def test_the_jacobian_is_what_a_small_step_does(jacobian: FittedLens, layer: int) -> None:
    """A step along v at every counted position, in both directions, against J v, at the counted positions."""
    v = torch.randn(112, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step, last = 1e-6, last_site(MODEL)

    def ends(size: float, tokens: Tensor) -> Tensor:
        moved: dict[str, Any] = {STREAMS[layer]: lambda value, hook: value + size * v}
        with (
            torch.no_grad(),
            edit(MODEL, moved, positions=slice(SKIP, None)),
            capture(MODEL, last) as seen,
        ):
            MODEL(tokens)
        return seen[last][:, SKIP:].sum(dim=(0, 1))

    sources = sum(len(text) * (text.shape[1] - SKIP) for text in TEXTS)
    summed = torch.stack([ends(step, text) - ends(-step, text) for text in TEXTS]).sum(0)
    difference = summed / (2 * step * sources)
    expected = jacobian.weights[STREAMS[layer]] @ v
    assert ((difference - expected).norm() / expected.norm()) < 1e-6


def test_the_model_is_as_it_was_and_chosen_layers_are_those_of_all(jacobian: FittedLens) -> None:
    rows: list[int] = []
    some = fit_jacobian(MODEL, TEXTS, layers=[1], skip=SKIP, progress=rows.append)
    assert list(some.weights) == [STREAMS[1]] and rows == list(range(1, 225))
    assert (some.weights[STREAMS[1]] - jacobian.weights[STREAMS[1]]).abs().max() < 1e-12
    assert some.about == {"texts": "3", "positions": "24", "skipped": "3"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in MODEL.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in MODEL.parameters())


@pytest.mark.long
def test_a_packed_fast_model_has_the_jacobian_of_its_values() -> None:
    path = "pocket:pocket-q8_0.gguf"
    options: dict[str, Any] = {"weights": "packed", "fast": True}
    packed = gemma2.load(path, device="cpu", **options)
    plain = gemma2.load(path, device="cpu", dtype="float32")
    tokens = torch.tensor([plain.tokenizer.encode("And God said, Let there")])
    name = "blocks.4.hook_resid_post"
    found, expected = (fit_jacobian(model, [tokens], layers=[4], skip=1).weights[name] for model in (packed, plain))
    assert (found - expected).norm() / expected.norm() < 0.05


def test_a_lens_is_saved_and_opened_and_nothing_is_replaced_unasked(jacobian: FittedLens, tmp_path: Path) -> None:
    tuned = FittedLens("tuned", {STREAMS[1]: torch.eye(112)}, {STREAMS[1]: torch.ones(112)}, {"texts": "3"})
    for lens in (jacobian, tuned):
        path = tmp_path / f"{lens.kind}.safetensors"
        lens.save(path)
        again = open_lens(path)
        assert (again.kind, again.about, list(again.weights)) == (lens.kind, lens.about, list(lens.weights))
        assert all(torch.equal(again.weights[name], lens.weights[name].float()) for name in lens.weights)
        assert again.biases.keys() == lens.biases.keys()
        with pytest.raises(FileExistsError, match="force=True"):
            lens.save(path)
        lens.save(path, force=True)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        tuned.save(tmp_path / "nowhere" / "lens.safetensors")
    value = torch.randn(1, 2, 112)
    assert torch.allclose(tuned.carry(STREAMS[1], value), value + 1)


def test_a_lens_for_another_model_or_site_is_refused(jacobian: FittedLens) -> None:
    with pytest.raises(ValueError, match="for a model of width 112, not 144"):
        logit_lens(tiny("2b"), TEXTS[0], fitted=jacobian)
    with pytest.raises(ValueError, match=r"has no map for hook_embed; it has blocks\.0\.hook_resid_post to"):
        lens_table(MODEL, TEXTS[0], "hook_embed", fitted=jacobian)


def test_a_lens_knows_its_model_in_every_dtype_and_form_and_refuses_another(
    jacobian: FittedLens, tmp_path: Path
) -> None:
    jacobian.save(tmp_path / "lens.safetensors")
    for lens in (jacobian, open_lens(tmp_path / "lens.safetensors")):
        for same in (MODEL, tiny("9b", num_hidden_layers=3).bfloat16(), tiny("9b", num_hidden_layers=3).half()):
            list(logit_lens(same, TEXTS[0], fitted=lens))
            lens_table(same, TEXTS[0], fitted=lens)
        other = tiny("9b", seed=1, num_hidden_layers=3)
        for read in (logit_lens, lens_table):
            with pytest.raises(ValueError, match=r"another model than this: the gains of its norms differ by up to \d"):
                read(other, TEXTS[0], fitted=lens)
            read(other, TEXTS[0], fitted=replace(lens, marks={}))
        fresh = [gemma2.Gemma2(MODEL.config) for _ in range(2)]  # whose norms are all zero
        own = replace(lens, marks=marks_of(fresh[0]))
        logit_lens(fresh[0], TEXTS[0], fitted=own)
        with pytest.raises(ValueError, match=r"another model than this: its embedding differs by 1\d\d%"):
            logit_lens(fresh[1], TEXTS[0], fitted=own)
        with pytest.raises(ValueError, match="it has another number of layers"):
            logit_lens(tiny("9b"), TEXTS[0], STREAMS[0], fitted=lens)


def test_packed_and_narrow_forms_of_a_model_have_its_marks(pocket: gemma2.Gemma) -> None:
    own, path = marks_of(pocket.model), "pocket:pocket-q8_0.gguf"
    forms: list[Any] = [{"dtype": "bfloat16"}, {"weights": "int4"}]
    models = [gemma2.load("pocket", device="cpu", **form) for form in forms]
    for gemma in (*models, gemma2.load(path, device="cpu", weights="packed", fast=True)):
        assert difference(marks_of(gemma.model), own) is None
        with ablate(gemma, post_norms=False, embed_scale=False, window=None):
            assert difference(marks_of(gemma.model), own) is None
    nudged = {name: value * 1.02 for name, value in own.items()}
    assert "norms differ" in (difference(nudged, own) or "")
    assert marks_of(tiny("2b").to("meta")) == {}


KIND = {"gemma2_lens": "jacobian"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a": torch.ones(2)}, {}, "not a lens: its metadata has no gemma2_lens"),
        ({"a.weight": torch.ones(2, 2)}, KIND, "a.weight is neither .weight nor .bias of a site"),
        ({f"{STREAMS[0]}.weight": torch.ones(2, 3)}, KIND, "not all"),
        ({f"{STREAMS[0]}.weight": torch.ones(4)}, KIND, "not all"),
        ({f"{STREAMS[0]}.weight": torch.full((2, 2), torch.nan)}, KIND, "holds NaN"),
        ({f"{STREAMS[0]}.bias": torch.ones(2)}, KIND, "not all"),
        ({"logits.weight": torch.ones(2, 2)}, KIND, "logits.weight is neither"),
        ({}, KIND, "not all"),
        ({f"{STREAMS[0]}.weight": torch.eye(2), "marks.norms": torch.ones(2)}, KIND, "one is missing"),
    ],
)
def test_a_file_with_something_else_is_refused(
    tensors: dict[str, Tensor], metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "lens.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(BadModelFile, match=message):
        open_lens(path)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="no such file"):
        open_lens(tmp_path / "lens.safetensors")
    (tmp_path / "lens.safetensors").write_bytes(b"a lens")
    with pytest.raises(BadModelFile, match="not a whole safetensors file"):
        open_lens(tmp_path / "lens.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": []}, "there is no text"),
        ({"texts": TEXTS[0]}, "texts are several: give a list of them"),
        ({"texts": "And God said"}, "texts are several"),
        ({"texts": ["And God said"]}, "text 0 must be token ids, as a tensor"),
        ({"texts": [TEXTS[0], TEXTS[0][0]]}, r"text 1 must be token ids \[b t\], not of shape \[12\]"),
        ({"texts": [[]]}, "text 0 must be token ids"),
        ({"texts": [3, 4]}, "text 0 must be token ids"),
        ({"skip": 9}, "text 1 has 9 tokens, and its first 9 are skipped"),
        ({"layers": [4]}, "layers must be some of 0 to 2, not 4"),
        ({"layers": []}, "layers must be some of 0 to 2, not none"),
        ({"skip": -1}, "skip must be a non-negative integer"),
    ],
)
def test_texts_and_layers_that_cannot_be_fitted_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_jacobian(MODEL, **{"texts": TEXTS, **options})


STREAM = "blocks.3.hook_resid_post"  # of the pocket model


def test_inference_mode_is_refused_and_no_grad_is_not() -> None:
    for fit in (fit_jacobian, fit_tuned):
        with torch.inference_mode(), pytest.raises(ValueError, match=r"torch.inference_mode\(\) leaves out"):
            fit(MODEL, TEXTS)
    with torch.no_grad():
        lens = fit_tuned(MODEL, TEXTS, layers=[0], steps=1)
    assert not torch.equal(lens.weights[STREAMS[0]], torch.eye(112))


def divergence(model: Any, tokens: Tensor, name: str, fitted: FittedLens | None) -> float:
    """Of the lens's prediction from the model's, in nats."""
    with torch.no_grad():
        own = model(tokens).float().log_softmax(-1)
    ((_, logits),) = logit_lens(model, tokens, name, fitted=fitted)
    return float((own.exp() * (own - logits.float().log_softmax(-1))).sum(-1).mean())


def test_a_tuned_lens_comes_nearer_to_the_model_than_the_logit_lens(pocket: gemma2.Gemma) -> None:
    texts = ["And God said, Let there be light: and there was light.", "And he went up into the mountain, and prayed."]
    batches = [torch.tensor([pocket.tokenizer.encode(text)]) for text in texts]
    losses: list[float] = []
    lens = fit_tuned(pocket, batches, layers=[3, 5], steps=12, progress=lambda step, loss: losses.append(loss))
    again = fit_tuned(pocket, batches, layers=[3, 5], steps=12)
    assert all(torch.equal(lens.weights[name], again.weights[name]) for name in lens.weights)
    before, after = (divergence(pocket.model, batches[0], STREAM, fitted) for fitted in (None, lens))
    assert after < before / 2 and losses[-1] < losses[0] / 2 and len(losses) == 12
    assert divergence(pocket.model, batches[0], "blocks.5.hook_resid_post", lens) == 0
    assert lens.weights[STREAM].dtype == torch.float32 and lens.kind == "tuned"
    assert all(parameter.grad is None for parameter in pocket.model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": []}, "there is no text"),
        ({"layers": [2]}, "the last layer alone has nothing to learn"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"rate": 0}, "rate must be a number above 0"),
        ({"positions": 0}, "positions must be a positive integer"),
    ],
)
def test_a_tuned_lens_that_cannot_be_trained_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_tuned(MODEL, **{"texts": TEXTS, **options})
