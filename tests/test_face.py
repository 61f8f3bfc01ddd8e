"""transformers' face: what transformers computes, generates, trains and saves around our modules, to the bit."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gemma2
from gemma2.model import SoftCap
from gemma2.research import capture
from gemma2.research.face import as_transformers
from gemma2.twins import on, replaced
from tests.conftest import ids, raw_config, tiny

transformers = pytest.importorskip("transformers", minversion="5", reason="needs the extra gemma2[transformers]")

from tests.parity.test_transformers import reference  # noqa: E402  # it skips where transformers is missing

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
TEXT = "And God said, Let there be"


def pair(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A face, and transformers' own model with the same weights; the window of 16 is shorter than what they are fed."""
    model = tiny().to(dtype)
    face, external = as_transformers(model), reference(model, raw_config(), dtype)
    external.generation_config = copy.deepcopy(face.generation_config)
    return face, external


def batch(pads: tuple[int, ...], length: int = 40) -> dict[str, Tensor]:
    """Rows with so much padding on the left or, where the number is negative, on the right."""
    tokens, mask = ids(len(pads), length).clamp(min=3), torch.ones(len(pads), length, dtype=torch.long)
    for row, pad in enumerate(pads):
        mask[row, slice(pad) if pad >= 0 else slice(pad, None)] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


@DTYPES
@pytest.mark.parametrize("pads", [(7, 1, 0), (-7, -20, 0)], ids=["left", "right"])
@torch.no_grad()
def test_logits_streams_and_patterns_are_those_of_transformers(pads: tuple[int, ...], dtype: torch.dtype) -> None:
    face, external = pair(dtype)
    inputs = batch(pads)
    real = inputs["attention_mask"].bool()
    plain, ours, theirs = (
        model(**given, output_hidden_states=True, output_attentions=True)
        for model, given in ((face, {"input_ids": inputs["input_ids"]}), (face, inputs), (external, inputs))
    )
    assert torch.equal(ours.logits[real], theirs.logits[real]) and not torch.equal(plain.logits, ours.logits)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 5
    for x, y in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(x[real], y[real])
    for x, y in zip(ours.attentions, theirs.attentions, strict=True):
        assert torch.equal(x.transpose(1, 2)[real], y.transpose(1, 2)[real])


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "several each": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beams, no repeats": {"num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 2},
    "prompt in chunks": {"prefill_chunk_size": 7},
    "cache of fixed shape": {"cache_implementation": "static"},
    "no cache": {"use_cache": False, "max_new_tokens": 8},
    "drafts from the prompt": {"prompt_lookup_num_tokens": 4},
}


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_generation_past_the_window_has_the_ids_and_the_logits_of_transformers(mode: str) -> None:
    face, external = pair()
    inputs = batch((0,) if "drafts" in mode else (7, 1, 0))
    options = {"max_new_tokens": 24, "return_dict_in_generate": True, "output_logits": True, **MODES[mode]}
    found = []
    for model in (face, external):
        transformers.set_seed(3)
        found.append(model.generate(**inputs, **options))
    ours, theirs = found
    assert ours.sequences.shape[1] > 40 and torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(x, y) for x, y in zip(ours.logits, theirs.logits, strict=True))


@pytest.mark.parametrize("pads", [(7, 1, 0), (-7, -20, 0)], ids=["left", "right"])
def test_generation_in_bfloat16_after_padding_has_the_ids_of_transformers(pads: tuple[int, ...]) -> None:
    face, external = pair(torch.bfloat16)
    assert torch.equal(*(model.generate(**batch(pads), max_new_tokens=24) for model in (face, external)))


@torch.no_grad()
def test_the_model_below_the_head_and_the_head_are_called_as_those_of_transformers() -> None:
    face, external = pair()
    inputs = batch((7, 1, 0))
    ours, theirs = (model.base_model(**inputs).last_hidden_state for model in (face, external))
    real = inputs["attention_mask"].bool()
    assert torch.equal(ours[real], theirs[real])
    assert torch.equal(*(model.get_output_embeddings()(theirs) for model in (face, external)))
    assert face.get_output_embeddings().weight is face.get_input_embeddings().weight
    assert isinstance(face(**inputs, return_dict=False), tuple)


@torch.no_grad()
def test_a_cache_goes_on_where_it_ended_and_position_ids_turn_the_keys() -> None:
    face, external = pair()
    tokens, steps = ids(2, 40), []
    for model in (face, external):
        first = model(tokens[:, :30], use_cache=True, position_ids=torch.arange(5, 35)[None])
        steps.append(model(tokens[:, 30:], past_key_values=first.past_key_values, logits_to_keep=3).logits)
    assert steps[0].shape == (2, 3, 512) and torch.equal(*steps)
    assert not torch.equal(steps[0], face(tokens, logits_to_keep=3).logits)  # positions jump from 34 to 30


def test_embeddings_stand_in_for_ids() -> None:
    face, external = pair()
    embedded = face.get_input_embeddings()(ids(2, 20))
    ours, theirs = (model.generate(inputs_embeds=embedded, max_new_tokens=8) for model in (face, external))
    assert ours.shape == (2, 8) and torch.equal(ours, theirs)


@DTYPES
def test_loss_and_gradients_are_those_of_transformers(dtype: torch.dtype) -> None:
    face, external = pair(dtype)
    inputs = batch((-7, -20, 0))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    found = []
    for model in (face, external):
        for options in ({}, {"num_items_in_batch": torch.tensor(500)}):
            model.zero_grad()
            loss = model(**inputs, labels=labels, use_cache=False, **options).loss
            loss.backward()
            found.append((loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    for (loss, gradients), (expected, others) in zip(found[:2], found[2:], strict=True):
        assert loss == expected and gradients.keys() == others.keys()
        assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())
    assert found[0][0] != found[1][0]


def test_layers_that_are_computed_again_have_the_same_gradients() -> None:
    face, _ = pair()
    tokens, found = ids(2, 20), []
    calls = [0]  # of the second layer
    face.train()
    face.model.layers[1].register_forward_pre_hook(lambda *seen: calls.__setitem__(-1, calls[-1] + 1))
    for every in (0, 1, 2):  # none, all, each second one
        if every:
            face.activation_checkpointing_enable(every_n_layers=every)
        face.zero_grad()
        face(tokens, labels=tokens).loss.backward()
        found.append([parameter.grad.clone() for parameter in face.parameters()])
        calls.append(0)
    assert calls == [1, 2, 1, 0]
    with pytest.raises(ValueError, match="takes no cache"):
        face(tokens, past_key_values=transformers.DynamicCache())
    written = face.generate(tokens, max_new_tokens=4)  # without gradients nothing is computed again
    assert torch.equal(written, face.eval().generate(tokens, max_new_tokens=4))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def trained(model: Any, folder: Path) -> list[float]:
    """transformers' Trainer, four steps of two batches each, on rows of unequal length: its losses."""
    rows = [ids(1, length, seed=length)[0].clamp(min=3).tolist() for length in range(8, 40, 2)]
    losses: list[float] = []

    def collate(rows: list[list[int]]) -> dict[str, Tensor]:
        width = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}

    class Log(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_grad_norm=0.0,  # the norm of all gradients is summed in the order of modules, which is another
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
    )
    transformers.Trainer(model, args, train_dataset=rows, data_collator=collate, callbacks=[Log()]).train()
    return losses


@pytest.mark.long
def test_the_trainer_has_the_losses_of_transformers_own_model_and_changes_ours(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    face, external = pair()
    before = face.whole.model.embed_tokens.weight.detach().clone()
    losses = trained(face, tmp_path)
    assert len(losses) == 4 and losses == trained(external, tmp_path)
    assert not torch.equal(before, face.whole.model.embed_tokens.weight)
    for name, parameter in external.named_parameters():
        assert torch.equal(parameter, face.get_parameter(name)), name


def test_parameters_are_the_same_objects_under_the_names_of_transformers(pocket: gemma2.Gemma) -> None:
    face = as_transformers(pocket)
    own = dict(pocket.model.named_parameters())
    assert dict(face.named_parameters()).keys() == own.keys() == face.state_dict().keys()
    assert all(parameter is own[name] for name, parameter in face.named_parameters())
    assert (face.device, face.dtype, face.training) == (pocket.model.device, torch.float32, False)
    assert face.num_parameters() == pocket.config.parameter_count
    with torch.no_grad(), capture(face, "logits") as seen:
        logits = face(ids(1, 5)).logits
    assert torch.equal(seen["logits"], logits)


@torch.no_grad()
def test_a_module_that_is_replaced_on_one_side_is_replaced_on_the_other() -> None:
    model = tiny()
    face, tokens = as_transformers(model), ids(1, 20)
    plain = model(tokens)
    face.model.norm = nn.Identity()  # as PEFT replaces modules that it trains as a whole
    assert torch.equal(model(tokens), face(tokens).logits) and not torch.equal(model(tokens), plain)
    with replaced(model, on(SoftCap, lambda cap: nn.Identity())):
        uncapped = model(tokens)
        assert torch.equal(face(tokens).logits, uncapped) and uncapped.abs().max() > 30


@pytest.mark.parametrize("beams", [1, 2])
def test_a_stop_string_ends_a_text_as_in_transformers(beams: int, pocket: gemma2.Gemma, tmp_path: Path) -> None:
    gemma2.save(pocket, tmp_path / "out", progress=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs, face = tokenizer(TEXT, return_tensors="pt"), as_transformers(pocket)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    word = tokenizer.decode(face.generate(**inputs, **options)[0, -3])
    stopped = [
        model.generate(**inputs, **options, stop_strings=[word], tokenizer=tokenizer)[0].tolist()
        for model in (face, theirs)
    ]
    assert stopped[0] == stopped[1] and len(stopped[0]) < inputs["input_ids"].shape[1] + 12


def test_the_config_and_the_end_ids_are_those_of_the_checkpoint(pocket: gemma2.Gemma) -> None:
    special = pocket.tokenizer.special
    face = as_transformers(gemma2.Gemma(pocket.model, pocket.tokenizer, end_ids=[77]))
    assert face.generation_config.eos_token_id == sorted({special["eos"], special["end_of_turn"], 77})
    ids_of = {name: getattr(face.config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    assert ids_of == {name: special[name] for name in ids_of}
    assert isinstance(face.config, transformers.Gemma2Config) and face.config.dtype == torch.float32
    assert gemma2.read_config(face.config.to_dict()) == pocket.config
    assert as_transformers(pocket.model).generation_config.eos_token_id == [1]


def test_what_is_saved_loads_in_transformers_and_here_bit_for_bit(
    pocket: gemma2.Gemma, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    face, tokens = as_transformers(pocket), ids(2, 20, vocab=4096)
    face.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32", attn_implementation="eager")
    assert {*face.state_dict(), "lm_head.weight"} == {*theirs.state_dict()}
    face.load_state_dict(theirs.state_dict())
    ours = gemma2.load(tmp_path, tokenizer=pocket.tokenizer, device="cpu")
    assert not caplog.records
    for name, weight in pocket.model.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]) and torch.equal(weight, ours.model.state_dict()[name])
    with torch.no_grad():
        assert torch.equal(face(tokens).logits, theirs(tokens).logits)
    assert theirs.generation_config.eos_token_id == sorted(pocket.stop_ids)
    assert theirs.config.architectures == ["Gemma2ForCausalLM"]


def test_the_pipeline_writes_what_it_writes_over_a_converted_folder(pocket: gemma2.Gemma, tmp_path: Path) -> None:
    gemma2.convert(pocket, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    written = [
        transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)(
            TEXT, max_new_tokens=12, do_sample=False
        )
        for model in (as_transformers(pocket), theirs)
    ]
    assert written[0] == written[1] == [{"generated_text": TEXT + pocket.generate(TEXT, 12)}]


@torch.no_grad()
def test_copies_have_weights_of_their_own_and_compute_the_same() -> None:
    face, _ = pair()
    tokens = ids(1, 20)
    expected = face(tokens).logits
    for other in (copy.deepcopy(face), pickle.loads(pickle.dumps(face))):
        assert torch.equal(other(tokens).logits, expected)
        assert other.whole.model._modules is other.model._modules is not face.model._modules
        other.to(torch.bfloat16)
        assert (other.dtype, other.whole.dtype, face.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    ours, _ = pair(torch.bfloat16)
    assert torch.equal(other(tokens).logits, ours(tokens).logits)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a mask of scores": ({"attention_mask": torch.ones(2, 1, 20, 20)}, r"\[batch, columns\].*\[2, 1, 20, 20\]"),
    "a short mask": ({"attention_mask": torch.ones(2, 19)}, r"attention_mask is \[2, 19\], and \[2, 20\] is needed"),
    "packed texts": (
        {"position_ids": torch.arange(20)[None] % 12, "use_cache": False},
        "do not rise by one at row 0, column 12: several texts packed",
    ),
    "too few positions": ({"position_ids": torch.arange(19)[None]}, r"position_ids are \[1, 19\]"),
    "our cache": ({"past_key_values": gemma2.HybridCache(tiny().config, 2, 40)}, "HybridCache: give a cache of trans"),
    "an unknown argument": ({"token_type_ids": torch.zeros(2, 20)}, "no argument 'token_type_ids'"),
    "ids twice": ({"inputs_embeds": torch.zeros(2, 20, 288)}, "one of the two"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_argument_that_cannot_be_honoured_is_refused_in_one_line(what: str) -> None:
    face, _ = pair()
    options, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as refusal:
        face(ids(2, 20), **options)
    assert "\n" not in str(refusal.value)


def test_the_vocabulary_keeps_its_size_and_the_class_loads_nothing() -> None:
    face, _ = pair()
    embedding = face.get_input_embeddings()
    assert face.resize_token_embeddings(512) is face.resize_token_embeddings(pad_to_multiple_of=64) is embedding
    with pytest.raises(ValueError, match=r"keeps its 512 rows, 576 are asked for: .* gemma2\.load"):
        face.resize_token_embeddings(513, pad_to_multiple_of=64)
    with pytest.raises(ValueError, match=r"gemma2\.load\(name\)"):
        type(face).from_pretrained("google/gemma-2-2b")
    with pytest.raises(ValueError, match="also the head"):
        face.set_input_embeddings(nn.Embedding(512, 288))
    with pytest.raises(ValueError, match="expected a Gemma2 or a Gemma, not int"):
        as_transformers(3)  # type: ignore[arg-type]


def test_without_transformers_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gemma2.research.pretrained", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers 5: pip install transformers"):
        as_transformers(tiny())
