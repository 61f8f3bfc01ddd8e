"""What a checkpoint's small files say for other programs is in what is written, as it stood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma2
from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.convert import convert
from gemma2.load import POCKET
from tests.test_beside import chatml, without_tokenizer, written

SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 64, "max_length": 300, "cache": {"a": [1]}}
STATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ChatML": ({"eos_token": "<|im_end|>", "pad_token": "<unused0>"}, {**SAMPLING, "eos_token_id": 4097}),
    "padded with the end": (
        {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "padding_side": "left"},
        {"bos_token_id": 2, "eos_token_id": [4097, 1], "pad_token_id": 4097},
    ),
    "more symbols": (
        {"additional_special_tokens": ["<|im_start|>", "<unused7>"], "mask_token": "<unused8>"},
        {**SAMPLING, "eos_token_id": [107, 1], "pad_token_id": 0},
    ),
    "an end that the tokenizer alone names": ({"eos_token": "<|im_end|>"}, {"eos_token_id": 1}),
}


def named_source(place: Path, settings: dict[str, Any], generation: dict[str, Any] | None) -> Path:
    """A ChatML fine-tune as transformers 5 writes it, weights included."""
    without_tokenizer(place)
    chatml(place)
    stated = json.loads((place / "tokenizer_config.json").read_text(encoding="utf-8"))
    stated.pop("eos_token")
    written(place, {"tokenizer_config.json": {**stated, **settings}})
    (place / "generation_config.json").unlink()
    return place if generation is None else written(place, {"generation_config.json": generation})


@pytest.mark.parametrize("case", STATED)
def test_transformers_finds_the_same_special_tokens_and_settings_in_what_is_written(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings, generation = STATED[case]
    place = named_source(tmp_path / "source", settings, generation)
    gemma, opened = gemma2.load(place, device="cpu"), open_checkpoint(place)
    before = transformers.AutoTokenizer.from_pretrained(place)
    for made in (
        convert(place, tmp_path / "converted", progress=False).path,
        gemma2.save(gemma, tmp_path / "saved", progress=False).path,
        convert(tmp_path / "saved", tmp_path / "again", progress=False).path,
    ):
        after = transformers.AutoTokenizer.from_pretrained(made)
        for name in ("eos_token", "pad_token", "bos_token", "unk_token", "mask_token", "padding_side"):
            assert getattr(after, name) == getattr(before, name), name
        assert set(after.all_special_ids) == set(before.all_special_ids) and len(after) == len(before)
        assert json.loads((made / "generation_config.json").read_text(encoding="utf-8")) == generation
        again = open_checkpoint(made)
        assert again.end_ids | {1, 107} == opened.end_ids | {1, 107} and again.chat_tuned == opened.chat_tuned
        assert gemma2.load(made, device="cpu").stop_ids == gemma.stop_ids


def test_where_a_text_ends_is_said_anew_if_it_has_changed_and_the_other_settings_stay(tmp_path: Path) -> None:
    place = named_source(tmp_path / "source", {}, {**SAMPLING, "eos_token_id": 1})
    gemma = gemma2.load(place, device="cpu")
    for number, (change, expected) in enumerate(
        (
            (lambda: setattr(gemma, "stop_ids", frozenset({1, 88, 107})), [1, 88]),
            (lambda: setattr(gemma, "chat_tuned", True), [1, 107, 88]),
        )
    ):
        change()
        made = gemma2.save(gemma, tmp_path / str(number), progress=False).path
        generation = json.loads((made / "generation_config.json").read_text(encoding="utf-8"))
        assert generation == {**SAMPLING, "eos_token_id": expected}


def test_a_named_token_that_is_not_in_the_vocabulary_is_left_out_of_what_is_written(tmp_path: Path) -> None:
    place = named_source(
        tmp_path / "source", {"sep_token": "<none>", "extra_special_tokens": {"a": "<none>", "b": "<unused9>"}}, None
    )
    opened = open_checkpoint(place, POCKET / "tokenizer.model")  # which has no token of ChatML
    assert opened.companions["tokenizer_config.json"]["sep_token"] == "<none>"
    made = convert(place, tmp_path / "out", tokenizer=POCKET / "tokenizer.model", progress=False).path
    stated = json.loads((made / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "sep_token" not in stated and stated["extra_special_tokens"] == {"b": "<unused9>"}


def test_the_ids_of_special_tokens_in_the_config_are_passed_on(tmp_path: Path) -> None:
    place = named_source(tmp_path / "source", {}, None)
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    written(place, {"config.json": config | {"pad_token_id": 4097, "eos_token_id": [1, 4097]}})
    made = convert(place, tmp_path / "out", progress=False).path
    stated = json.loads((made / "config.json").read_text(encoding="utf-8"))
    assert (stated["bos_token_id"], stated["eos_token_id"], stated["pad_token_id"]) == (2, [1, 4097], 4097)


def test_what_is_given_brings_its_special_tokens_and_leaves_how_to_generate(tmp_path: Path) -> None:
    source, given = without_tokenizer(tmp_path / "source"), chatml(tmp_path / "chatml")
    written(source, {"generation_config.json": SAMPLING | {"eos_token_id": [1, 107]}})
    written(given, {"generation_config.json": {"temperature": 9.0}})
    made = convert(source, tmp_path / "out", tokenizer=given, progress=False).path
    stated = [
        json.loads((made / f"{name}_config.json").read_text(encoding="utf-8")) for name in ("tokenizer", "generation")
    ]
    assert stated[0]["eos_token"] == "<|im_end|>" and stated[1] == SAMPLING | {"eos_token_id": [1, 107]}


def test_transformers_face_generates_as_the_checkpoint_says(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    generation = {"do_sample": True, "temperature": 0.7, "top_k": 5, "max_length": 12, "eos_token_id": [1, 107]}
    place = named_source(tmp_path / "source", {}, generation | {"bos_token_id": 2, "pad_token_id": 0})
    face = gemma2.as_transformers(gemma2.load(place, device="cpu"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, attn_implementation="eager")
    assert face.generation_config.to_dict() == theirs.generation_config.to_dict()
    written: list[list[int]] = []
    for model in (face, theirs):
        torch.manual_seed(1)
        written.append(model.generate(torch.tensor([[2, 106, 1645, 108]]))[0].tolist())
    assert written[0] == written[1]
