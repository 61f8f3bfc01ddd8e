"""The tokenizer, the chat template and the end ids that training programs save beside an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma2.checkpoints.adapter_tokenizer import with_tokenizer_of
from gemma2.checkpoints.checkpoint import Checkpoint, open_checkpoint
from gemma2.load import POCKET
from gemma2.templates import NOT_GEMMAS
from tests.chat_templates import GEMMA

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
START, END = "<|im_start|>", "<|im_end|>"
Folder = Callable[..., Path]


def beside(place: Path, first: int | None = None, eos: str = "<eos>", template: str | None = None) -> Path:
    """A folder as training programs leave it beside an adapter: `first` is the id of the first of two added tokens."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = (
        {} if first is None else {str(first): {"content": START, **flags}, str(first + 1): {"content": END, **flags}}
    )
    place.mkdir()
    (place / "tokenizer.model").write_bytes((POCKET / "tokenizer.model").read_bytes())
    stated = {"added_tokens_decoder": added, "bos_token": "<bos>", "eos_token": eos}
    (place / "tokenizer_config.json").write_text(json.dumps(stated), encoding="utf-8")
    if template is not None:
        (place / "chat_template.jinja").write_text(template, encoding="utf-8")
    return place


@pytest.fixture
def opened(folder: Folder) -> Checkpoint:
    return open_checkpoint(folder(size="2b", num_hidden_layers=1))


def test_the_same_tokenizer_beside_an_adapter_changes_nothing(opened: Checkpoint, tmp_path: Path) -> None:
    assert with_tokenizer_of(opened, tmp_path) is opened  # none there
    assert with_tokenizer_of(opened, beside(tmp_path / "a")) is opened


def test_a_tokenizer_of_its_own_beside_an_adapter_is_used_with_its_ends_and_template(
    opened: Checkpoint, tmp_path: Path
) -> None:
    place = beside(tmp_path / "a", 8, END, CHATML)
    found = with_tokenizer_of(opened, place)
    assert found.tokenizer.encode(START, bos=False, special=True) == [8]
    assert (found.end_ids, found.chat_template) == (opened.end_ids | {9}, CHATML)
    line, *others = found.notes[len(opened.notes) :]
    assert line == (
        f"the tokenizer, chat template and end ids beside the adapter {place} are used; tokenizer= takes another"
    )
    assert others[-1] == NOT_GEMMAS


def test_a_template_alone_that_differs_is_used_and_with_gemmas_the_model_is_tuned_for_chat(
    opened: Checkpoint, tmp_path: Path
) -> None:
    place = beside(tmp_path / "a", template=GEMMA)
    found = with_tokenizer_of(opened, place)
    assert found.tokenizer is opened.tokenizer and (found.chat_template, found.chat_tuned) == (GEMMA, True)
    assert found.notes == (
        *opened.notes,
        f"the chat template beside the adapter {place} is used; tokenizer= takes another",
    )
    other = with_tokenizer_of(found, beside(tmp_path / "b", 8, END, CHATML))
    again = with_tokenizer_of(other, place)
    assert NOT_GEMMAS in other.notes and NOT_GEMMAS not in again.notes


def test_a_tokenizer_beside_an_adapter_that_cannot_be_used_is_noted(opened: Checkpoint, tmp_path: Path) -> None:
    place = beside(tmp_path / "long", 4096)
    found = with_tokenizer_of(opened, place)
    assert found.tokenizer is opened.tokenizer and found.notes[-1] == (
        f"the tokenizer beside the adapter {place} is not used: it has 4098 pieces, and the embedding has 4096 rows; "
        f"tokenizer={str(place)!r} uses it all the same"
    )
    broken = beside(tmp_path / "broken")
    (broken / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    found = with_tokenizer_of(opened, broken)
    assert found.tokenizer is opened.tokenizer and "is not used: " in found.notes[-1] and "git lfs" in found.notes[-1]
