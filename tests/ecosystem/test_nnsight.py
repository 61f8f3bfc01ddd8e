"""nnsight: a trace reads and edits what a hook would, by the paths of modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gemma2
from gemma2.research import capture, edit
from gemma2.research.sites import chosen
from tests.conftest import ids, tiny
from tests.ecosystem.conftest import needs

nnsight = needs("nnsight")

PROMPT = "In the beginning"


@torch.no_grad()
def test_a_trace_reads_what_capture_sees_at_every_site() -> None:
    model = tiny()
    tokens = ids(2, 20)
    with capture(model) as seen:
        model(tokens)
    sites = chosen(model.config)
    wrapped = nnsight.NNsight(model)
    with wrapped.trace(tokens):
        found = nnsight.save({name: wrapped.get(site.module).output for name, site in sites.items()})
    assert found.keys() == seen.keys()
    for name, value in found.items():
        assert torch.equal(value, seen[name]), name


@torch.no_grad()
def test_an_edit_in_a_trace_is_that_of_a_hook() -> None:
    model = tiny()
    tokens = ids(1, 20)
    plain = model(tokens)
    hook = model.model.layers[1].hook_resid_mid.register_forward_hook(lambda module, inputs, output: output * 0.5)
    hooked = model(tokens)
    hook.remove()
    wrapped = nnsight.NNsight(model)
    with wrapped.trace(tokens):
        wrapped.model.layers[1].hook_resid_mid.output = wrapped.model.layers[1].hook_resid_mid.output * 0.5
        logits = wrapped.output.save()
    assert torch.equal(logits, hooked) and not torch.equal(logits, plain)
    assert torch.equal(model(tokens), plain)


def test_the_root_is_seen_at_every_step_of_generation(pocket: gemma2.Gemma) -> None:
    expected: list[Tensor] = []
    hook = pocket.model.register_forward_hook(lambda module, inputs, output: expected.append(output))
    text = pocket.generate(PROMPT, 6)
    hook.remove()
    assert len(expected) == 6
    wrapped = nnsight.NNsight(pocket.model)
    with wrapped.trace(PROMPT, fn=pocket.generate, max_new_tokens=6) as tracer:
        found = nnsight.save([])
        for _ in tracer.iter[:6]:
            found.append(wrapped.output)
    assert len(found) == 6 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert pocket.generate(PROMPT, 6) == text


def test_layers_are_read_and_edited_at_every_step_of_generation(pocket: gemma2.Gemma) -> None:
    """What a trace reads is what `capture` sees, and what it writes does what `edit` does."""
    with capture(pocket, "blocks.3.hook_mlp_out") as seen:
        text = pocket.generate(PROMPT, 5)
    with edit(pocket, {"blocks.3.hook_mlp_out": lambda value, hook: value * -2}):
        edited = pocket.generate(PROMPT, 5)
    wrapped = nnsight.NNsight(pocket.model)
    with wrapped.trace(PROMPT, fn=pocket.generate, max_new_tokens=5) as tracer:
        found = nnsight.save([])
        for _ in tracer.iter[:5]:
            found.append(wrapped.model.layers[3].post_feedforward_layernorm.output)
    assert len(found) == len(seen.passes) == 5
    for value, one in zip(found, seen.passes, strict=True):
        assert torch.equal(value, one.values["blocks.3.hook_mlp_out"])
    with wrapped.trace(PROMPT, fn=pocket.generate, max_new_tokens=5) as tracer:
        for _ in tracer.iter[:5]:
            place = wrapped.model.layers[3].post_feedforward_layernorm
            place.output = place.output * -2
        written = nnsight.save(tracer.result)
    assert written == edited != text


def test_an_edit_of_the_root_during_generation_decides_the_ids(pocket: gemma2.Gemma) -> None:
    token = pocket.tokenizer.encode(" king", bos=False)[0]
    wrapped = nnsight.NNsight(pocket.model)
    with wrapped.trace(PROMPT, fn=pocket.generate, max_new_tokens=6) as tracer:
        for _ in tracer.iter[:6]:
            wrapped.output[..., token] = 1000.0
        text = nnsight.save(tracer.result)
    assert text == pocket.tokenizer.decode([token] * 6)


def test_the_face_takes_several_texts_in_one_trace_and_reads_what_transformers_model_reads(
    face: Any, theirs: Any, their_tokenizer: Any
) -> None:
    found = []
    for model in (face, theirs):
        wrapped = nnsight.TransformersModel(model, tokenizer=their_tokenizer)
        with wrapped.trace() as tracer:
            with tracer.invoke(PROMPT):
                first = wrapped.model.layers[2].output.save()
            with tracer.invoke("And God said, Let there be light"):
                second = wrapped.model.layers[2].output.save()
        found.append([x[0] if isinstance(x, tuple) else x for x in (first, second)])
    for ours, others in zip(*found, strict=True):
        assert torch.equal(ours[:, -3:], others[:, -3:])  # what stands before is padding
    assert not torch.equal(found[0][0][:, -3:], found[0][1][:, -3:])
