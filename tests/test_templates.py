"""A chat template is Gemma's or not by what it writes, and it is read, never run."""

from __future__ import annotations

import time

import pytest

from gemma2 import Gemma
from gemma2.chat import chat_ids
from gemma2.templates import LONGEST, is_gemmas
from tests.chat_templates import GEMMA, GEMMAS, INDENTED, OTHERS

TALK = [
    {"role": "user", "content": "HI"},
    {"role": "assistant", "content": " Hello.\n"},
    {"role": "user", "content": "And\nnow?"},
]


@pytest.mark.parametrize("case", GEMMAS)
def test_gemmas_template_and_what_people_made_of_it_is_gemmas(case: str) -> None:
    assert is_gemmas(GEMMAS[case])


def test_indented_over_several_lines_it_is_gemmas_too() -> None:
    assert is_gemmas(INDENTED)


@pytest.mark.parametrize("case", GEMMAS)
def test_what_is_taken_for_gemmas_writes_the_ids_of_chat(case: str, pocket: Gemma) -> None:
    """Run here, by transformers, which the package does not."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    pytest.importorskip("jinja2")
    (text,), _ = utils.render_jinja_template([TALK], None, None, GEMMAS[case], False, False, True, bos_token="")
    assert pocket.tokenizer.encode(text, special=True) == chat_ids(TALK, pocket.tokenizer)


@pytest.mark.parametrize("case", OTHERS)
def test_turns_of_another_model_are_not_gemmas(case: str) -> None:
    assert not is_gemmas(OTHERS[case])


HOSTILE = {
    "a comment without an end": "{#" * (LONGEST // 2),
    "a tag without an end": "{{" * (LONGEST // 2),
    "a quotation mark without its second": "{{ '" * (LONGEST // 4),
    "strings": "{{ '' + " + "'' + " * (LONGEST // 6),
    "backslashes": "\\" * LONGEST,
    "backslashes in a string": "{{ '" + "\\" * (LONGEST - 9),
    "beginnings of other turns": "<|im_" * (LONGEST // 5),
    "turns with nothing behind": "<start_of_turn>" * (LONGEST // 15),
    "white space behind a turn": "<end_of_turn><start_of_turn>" + " " * (LONGEST - 50),
    "hash marks": "### " * (LONGEST // 4),
    "long": GEMMA + " " * 10**7,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_template_made_to_take_long_is_answered_at_once(case: str) -> None:
    started = time.perf_counter()
    assert not is_gemmas(HOSTILE[case])
    assert time.perf_counter() - started < 2
