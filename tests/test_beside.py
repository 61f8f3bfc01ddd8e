"""The small files of a folder: its ids at which a text ends, and its chat template, wherever programs put them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma2
from gemma2 import Gemma, Stats
from gemma2.checkpoints import gguf
from gemma2.checkpoints.beside import chat_template, chat_tuned, end_ids, template_notes, turns_of
from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.convert import convert
from gemma2.inspect import inspect
from gemma2.load import POCKET
from gemma2.templates import NOT_GEMMAS
from tests import tokenizer_files
from tests.chat_templates import CHATML, GEMMA
from tests.conftest import tensors_of, tiny
from tests.gguf_files import tiny_model
from tests.test_convert import PLAIN, model_folder

TOKENIZER = gemma2.Tokenizer.from_file(POCKET / "tokenizer.model")
HI = [{"role": "user", "content": "HI"}]


def written(place: Path, files: dict[str, Any]) -> Path:
    """The folder with small files in it; what is no text is written as JSON."""
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(
            content if isinstance(content, str) else json.dumps(content, indent=2), encoding="utf-8"
        )
    return place


def turn_notes(place: Path, tokenizer: gemma2.Tokenizer) -> list[str]:
    turns = turns_of(place, tokenizer)
    return [*turns.notes, *template_notes(turns.chat_template)]


# Where a text ends.

ADDED = {"content": "<end_of_turn>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
ENDS: dict[str, tuple[dict[str, Any], set[int]]] = {
    "nothing": ({}, set()),
    "one": ({"generation_config.json": {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 1}}, {1}),
    "several": (
        {"generation_config.json": {"bos_token_id": 2, "eos_token_id": [1, 107, 88], "pad_token_id": 0}},
        {1, 107, 88},
    ),
    "the config's, without a generation config": ({"config.json": {"eos_token_id": [1, 88]}}, {1, 88}),
    "not the config's, beside a generation config": (
        {"config.json": {"eos_token_id": 88}, "generation_config.json": {"temperature": 0.7}},
        set(),
    ),
    "a spelling": ({"tokenizer_config.json": {"eos_token": "<eos>"}}, {1}),
    "a spelling as an added token": (
        {"tokenizer_config.json": {"eos_token": {"__type": "AddedToken", **ADDED}}},
        {107},
    ),
    "a spelling in the map": ({"special_tokens_map.json": {"eos_token": ADDED}}, {107}),
    "a piece with another name": ({"special_tokens_map.json": {"eos_token": "<unused5>"}}, {12}),
    "all of them": (
        {
            "generation_config.json": {"eos_token_id": [1, 88]},
            "tokenizer_config.json": {"eos_token": "<unused5>"},
            "special_tokens_map.json": {"eos_token": "<end_of_turn>"},
        },
        {1, 88, 12, 107},
    ),
    "an added token's id": (
        {
            "config.json": {"vocab_size": 4098},
            "tokenizer_config.json": {
                "added_tokens_decoder": {"1": {"content": "<eos>"}, "4097": {"content": "<|im_end|>"}},
                "eos_token": "<|im_end|>",
            },
        },
        {4097},
    ),
    "a row of the embedding without a piece": (
        {"config.json": {"vocab_size": 4160}, "generation_config.json": {"eos_token_id": 4100}},
        {4100},
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_text_ends_where_any_file_says(case: str, tmp_path: Path) -> None:
    files, expected = ENDS[case]
    place = written(tmp_path, files)
    assert end_ids(place, TOKENIZER) == expected
    assert turn_notes(place, TOKENIZER) == []


NO_IDS: dict[str, tuple[dict[str, Any], str]] = {
    "a string": ({"generation_config.json": {"eos_token_id": "107"}}, "eos_token_id is '107'"),
    "a number with a point": ({"generation_config.json": {"eos_token_id": 1.0}}, "eos_token_id is 1.0"),
    "a truth value": ({"generation_config.json": {"eos_token_id": True}}, "eos_token_id is True"),
    "-1": ({"generation_config.json": {"eos_token_id": -1}}, "eos_token_id is -1"),
    "beyond the vocabulary": ({"generation_config.json": {"eos_token_id": 4096}}, "no token id below 4096"),
    "a mapping": ({"generation_config.json": {"eos_token_id": {"a": 1}}}, "eos_token_id is {'a': 1}"),
    "a million of them": ({"generation_config.json": {"eos_token_id": ["x"] * 10**6}}, "eos_token_id is ['x', 'x',"),
    "in the config": (
        {"config.json": {"eos_token_id": [[1]], "vocab_size": "x"}},
        "config.json: eos_token_id is [[1]]",
    ),
    "no piece": (
        {"tokenizer_config.json": {"eos_token": "<|im_end|>"}},
        "eos_token '<|im_end|>' is not in the vocabulary",
    ),
    "several pieces": (
        {"special_tokens_map.json": {"eos_token": "the end of it"}},
        "special_tokens_map.json: eos_token",
    ),
    "a spelling that is a number": ({"tokenizer_config.json": {"eos_token": 1}}, "eos_token 1 is not"),
    "an empty spelling": ({"tokenizer_config.json": {"eos_token": ""}}, "eos_token '' is not"),
    "no UTF-8": ({"tokenizer_config.json": '{"eos_token": "\\ud800"}'}, "is not in the vocabulary"),
    "no content": ({"tokenizer_config.json": {"eos_token": {"content": [1]}}}, "eos_token [1] is not"),
    "a table of added tokens that is none": (
        {
            "tokenizer_config.json": {
                "eos_token": "<x>",
                "added_tokens_decoder": {"a": {"content": "<x>"}, "9" * 99: {"content": "<x>"}},
            }
        },
        "eos_token '<x>' is not",
    ),
    "a damaged map": ({"special_tokens_map.json": "{"}, "special_tokens_map.json: not valid JSON"),
}


@pytest.mark.parametrize("case", NO_IDS)
def test_what_is_no_id_is_a_note_and_ends_nothing(case: str, tmp_path: Path) -> None:
    files, words = NO_IDS[case]
    place = written(tmp_path, files)
    (note,) = turn_notes(place, TOKENIZER)
    assert words in note and len(note) < 300 and "\n" not in note
    assert end_ids(place, TOKENIZER) == set() and chat_tuned(place, TOKENIZER) is None


@pytest.mark.parametrize("content", ["[1]", "null", "5", '"x"'])
def test_a_file_that_holds_no_object_says_nothing(content: str, tmp_path: Path) -> None:
    names = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json")
    place = written(tmp_path, dict.fromkeys(names, content))
    assert end_ids(place, TOKENIZER) == set() and chat_template(place) is None and turn_notes(place, TOKENIZER) == []


def test_generation_ends_at_an_id_of_the_folder_as_in_transformers_and_does_not_show_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    place = model_folder(tmp_path / "model")
    prompt = [2, 106, 1645, 108]
    free: list[int] = []

    def note(so_far: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        free.append(int(so_far[0, -1]))
        return logits

    gemma2.load(place, device="cpu").generate([prompt], 8, processors=[note])
    end = next(token for token in free[2:] if token not in free[1 : free.index(token)])
    written(place, {"generation_config.json": {"bos_token_id": 2, "eos_token_id": [1, 107, end], "pad_token_id": 0}})
    gemma, stats = gemma2.load(place, device="cpu"), Stats()
    assert gemma.stop_ids == {1, 107, end}
    (text,) = gemma.generate([prompt], 8, stats=stats)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    new = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
    assert stats.finish_reasons == ["stop"] and stats.new_tokens == len(new) < 8 and new[-1] == end
    assert text == gemma.tokenizer.decode(new[:-1])


def test_end_ids_survive_a_conversion(tmp_path: Path) -> None:
    for number, (stops, tuned) in enumerate((([1, 107, 88], True), ([1, 88], None), ([1, 107], True), (1, False))):
        place = model_folder(tmp_path / f"source{number}")
        written(place, {"generation_config.json": {"eos_token_id": stops}})
        ends = open_checkpoint(place).end_ids
        for name in ("folder", "model.ckpt"):
            (tmp_path / f"to{number}").mkdir(exist_ok=True)
            opened = open_checkpoint(convert(place, tmp_path / f"to{number}" / name, progress=False).path)
            assert opened.end_ids == ends and opened.chat_tuned is tuned, (name, stops)
        memory = convert(gemma2.load(place, device="cpu"), tmp_path / f"memory{number}", progress=False).path
        assert open_checkpoint(memory).end_ids == ends and open_checkpoint(memory).chat_tuned is tuned


@pytest.mark.parametrize(
    ("stops", "missed"),
    [([1, 107, 88, 99, 77], "99"), ([1, 603], "603"), ([1, 88], ""), (603, "603"), ([1, 107], ""), ([4096], "4096")],
)
def test_all_end_ids_survive_in_a_gguf_and_a_note_says_which_llama_cpp_does_not_see(
    stops: int | list[int], missed: str, tmp_path: Path
) -> None:
    """GGUF has two keys for them, which take control pieces alone. The last one here is a row without a piece."""
    place = model_folder(tmp_path / "source", tensors=tensors_of(tiny(vocab_size=4097, **PLAIN)), vocab_size=4097)
    written(place, {"generation_config.json": {"eos_token_id": stops}})
    gemma = gemma2.load(place, device="cpu")
    first = convert(place, tmp_path / "first.gguf", progress=False)
    second = gemma2.save(gemma, tmp_path / "second.gguf", progress=False)
    third = convert(first.path, tmp_path / "third.gguf", progress=False)
    for made in (first, second, third):
        note = f"llama.cpp will not end a text at {missed}: a GGUF names two at most, both control tokens"
        assert (note in made.notes) is bool(missed)
        assert gemma2.load(made.path, device="cpu").stop_ids == gemma.stop_ids
        key = gguf.read_parts(made.path).metadata.get("gemma2.end_token_ids")
        assert (key is not None) is bool(missed)
    assert open_checkpoint(convert(third.path, tmp_path / "back", progress=False).path).end_ids >= gemma.stop_ids - {
        107
    }


def test_inspect_shows_where_a_text_ends_and_what_is_no_id(tmp_path: Path) -> None:
    place = written(model_folder(tmp_path / "model"), {"generation_config.json": {"eos_token_id": [107, 1, "x"]}})
    found = inspect(place, progress=False)
    assert found.end_ids == [1, 107] and len(found.filled) == 1 and "'x'" in found.filled[0]
    assert found.problems == []


# The template.

PAIRS = [{"name": "default", "template": GEMMA}, {"name": "tool_use", "template": CHATML}]
PLACES: dict[str, dict[str, Any]] = {
    "a file of its own": {"chat_template.jinja": GEMMA},
    "the file, not the tokenizer's": {"chat_template.jinja": GEMMA, "tokenizer_config.json": {"chat_template": CHATML}},
    "the tokenizer's": {"tokenizer_config.json": {"chat_template": GEMMA}},
    "one of several": {"tokenizer_config.json": {"chat_template": PAIRS}},
    "one of several by name": {"tokenizer_config.json": {"chat_template": {"default": GEMMA, "rag": CHATML}}},
    "a processor's": {"chat_template.json": {"chat_template": GEMMA}},
    "a folder of templates": {"additional_chat_templates/default.jinja": GEMMA},
    "a folder of others beside it": {"chat_template.jinja": GEMMA, "additional_chat_templates/tool_use.jinja": CHATML},
}


@pytest.mark.parametrize("case", PLACES)
def test_the_template_is_found_where_transformers_puts_it(case: str, tmp_path: Path) -> None:
    place = written(tmp_path, PLACES[case])
    assert chat_template(place) == GEMMA and turn_notes(place, TOKENIZER) == []


@pytest.mark.parametrize(
    "stated", [None, 5, [], [5], [{"name": "rag", "template": GEMMA}], [{"name": "default"}], {"rag": GEMMA}]
)
def test_a_template_that_is_none_or_not_the_default_is_not_taken(stated: object, tmp_path: Path) -> None:
    assert chat_template(written(tmp_path, {"tokenizer_config.json": {"chat_template": stated}})) is None


@pytest.mark.parametrize(
    ("template", "stops", "tuned"),
    [
        (GEMMA, 1, True),
        (GEMMA, None, True),
        (CHATML, 1, False),
        (CHATML, None, None),
        (CHATML, [1, 107], True),
        (None, 1, False),
    ],
)
def test_a_folder_is_tuned_for_chat_if_its_template_is_gemmas_or_it_ends_with_a_turn(
    template: str | None, stops: object, tuned: bool | None, tmp_path: Path
) -> None:
    place = written(tmp_path, {"tokenizer_config.json": {"chat_template": template}})
    if stops is not None:
        written(place, {"generation_config.json": {"eos_token_id": stops}})
    assert chat_tuned(place, TOKENIZER) is tuned


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_a_template_of_another_model_is_a_note_and_chat_warns_of_it_once(form: str, tmp_path: Path) -> None:
    if form == "folder":
        place = written(model_folder(tmp_path / "model"), {"tokenizer_config.json": {"chat_template": CHATML}})
    else:
        place = tmp_path / "model.gguf"
        place.write_bytes(tiny_model("F32").with_pair("tokenizer.chat_template", "str", CHATML).write())
    gemma = gemma2.load(place, device="cpu")
    assert NOT_GEMMAS in gemma.notes and NOT_GEMMAS in inspect(place, progress=False).filled
    for call in (lambda: gemma.chat(HI, 2), lambda: list(gemma.stream_chat(HI, 2)), lambda: gemma2.Talk(gemma, 2)):
        with pytest.warns(UserWarning) as warned:
            call()
        assert [str(one.message) for one in warned] == [NOT_GEMMAS]


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_gemmas_template_needs_no_note_and_no_warning(
    form: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    if form == "folder":
        place = written(model_folder(tmp_path / "model"), {"tokenizer_config.json": {"chat_template": GEMMA}})
        written(place, {"generation_config.json": {"eos_token_id": 1}})
    else:
        place = tmp_path / "model.gguf"
        place.write_bytes(tiny_model("F32").with_pair("tokenizer.chat_template", "str", GEMMA).write())
    gemma: Gemma = gemma2.load(place, device="cpu")
    gemma.chat(HI, 2)
    assert gemma.chat_tuned is True and NOT_GEMMAS not in gemma.notes and not recwarn.list


def test_the_pocket_model_says_what_it_said(tmp_path: Path) -> None:
    opened = open_checkpoint(POCKET)
    assert (opened.chat_tuned, opened.chat_template, opened.notes, opened.end_ids) == (None, None, (), frozenset({1}))
    assert gemma2.load(POCKET, device="cpu").stop_ids == {1, 107}
    assert open_checkpoint(model_folder(tmp_path / "plain")).end_ids == frozenset()


# What comes with a tokenizer that is given.

SIZE = 4100


def chatml(place: Path) -> Path:
    """A folder with the tokenizer of a ChatML fine-tune, as transformers 5 writes it, and no weights."""
    content = tokenizer_files.chatml(tokenizer_files.pocket())
    tokenizer_files.write(place, content)
    added = {str(one["id"]): {key: one[key] for key in one if key != "id"} for one in content["added_tokens"]}
    said = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "added_tokens_decoder": added}
    return written(place, {"tokenizer_config.json": said, "chat_template.jinja": CHATML})


def without_tokenizer(place: Path) -> Path:
    """Weights for it, whose template and end ids are Gemma's."""
    model_folder(place, tensors=tensors_of(tiny(vocab_size=SIZE, **PLAIN)), vocab_size=SIZE)
    (place / "tokenizer.model").unlink()
    generation = {"bos_token_id": 2, "eos_token_id": [1, 107], "pad_token_id": 0}
    return written(place, {"generation_config.json": generation, "chat_template.jinja": GEMMA})


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_a_tokenizer_that_is_given_brings_its_end_ids_and_its_template(form: str, tmp_path: Path) -> None:
    source, given = without_tokenizer(tmp_path / "source"), chatml(tmp_path / "chatml")
    if form == "gguf":
        given = convert(source, tmp_path / "chatml.gguf", tokenizer=given, progress=False).path
    gemma = gemma2.load(source, tokenizer=given, device="cpu")
    assert gemma.stop_ids == {1, 107, 4097} and gemma.chat_template == CHATML
    expected = {
        f"a text also ends at '<|im_end|>', as {given} says",
        f"the chat template of {given} takes the place of the checkpoint's",
        NOT_GEMMAS,
    }
    assert expected <= set(gemma.notes) and expected <= set(inspect(source, tokenizer=given, progress=False).filled)
    with pytest.warns(UserWarning, match="not Gemma's"):
        gemma.chat(HI, 2)
    own = gemma2.load(source, tokenizer=gemma.tokenizer, device="cpu")  # a tokenizer alone says nothing
    assert own.stop_ids == {1, 107} and own.chat_template == GEMMA and not expected & set(own.notes)
    for name in ("out", "out.gguf"):
        for number, made in enumerate(
            (
                convert(source, tmp_path / f"converted-{name}", tokenizer=given, progress=False),
                gemma2.save(own, tmp_path / f"saved-{name}", tokenizer=given, progress=False),
                gemma2.save(own.model, tmp_path / f"model-{name}", tokenizer=given, progress=False),
            )
        ):
            again = gemma2.load(made.path, device="cpu")
            assert again.stop_ids == {1, 107, 4097} and again.chat_template == CHATML
            assert number == 2 or expected <= set(made.notes)


def test_a_file_that_is_named_as_the_tokenizer_brings_nothing_else_and_a_folder_without_a_template_no_template(
    tmp_path: Path,
) -> None:
    source, given = without_tokenizer(tmp_path / "source"), chatml(tmp_path / "chatml")
    alone = open_checkpoint(source, given / "tokenizer.json")
    assert alone.end_ids == {1, 107} and alone.chat_template == GEMMA and alone.notes == ()
    (given / "chat_template.jinja").unlink()
    opened = open_checkpoint(source, given)
    assert opened.end_ids == {1, 107, 4097} and opened.chat_template == GEMMA and opened.chat_tuned is True
    assert opened.notes == (f"a text also ends at '<|im_end|>', as {given} says",)


def test_an_end_id_of_a_given_tokenizer_that_the_model_has_no_row_for_is_left_out(tmp_path: Path) -> None:
    source, given = without_tokenizer(tmp_path / "source"), chatml(tmp_path / "chatml")
    written(given, {"generation_config.json": {"eos_token_id": [4097, 4200]}, "config.json": {"vocab_size": 4300}})
    assert open_checkpoint(source, given).end_ids == {1, 107, 4097}
