"""A chat template is Gemma's or not by what it writes, and it is read, never run."""

from __future__ import annotations

import random
import re
import time

import pytest

from gemma2 import Gemma
from gemma2.chat import chat_ids
from gemma2.templates import LONGEST, is_gemmas
from tests.chat_templates import GEMMA, GEMMAS, OTHERS, PARTS, UNTRIMMED

TALK = [
    {"role": "user", "content": "HI"},
    {"role": "assistant", "content": " Hello.\n"},
    {"role": "user", "content": "And\nnow?"},
]


@pytest.mark.parametrize("case", GEMMAS)
def test_gemmas_template_and_what_people_made_of_it_is_gemmas(case: str) -> None:
    assert is_gemmas(GEMMAS[case])


@pytest.mark.parametrize("case", GEMMAS)
def test_what_is_taken_for_gemmas_writes_the_ids_of_chat(case: str, pocket: Gemma) -> None:
    """Run here, by transformers, which the package does not."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    pytest.importorskip("jinja2")
    (text,), _ = utils.render_jinja_template([TALK], None, None, GEMMAS[case], False, False, True, bos_token="")
    assert pocket.tokenizer.encode(text, special=True) == chat_ids(TALK, pocket.tokenizer)


def test_a_template_that_does_not_trim_is_gemmas_too() -> None:
    assert is_gemmas(UNTRIMMED)


def test_white_space_around_tags_goes_as_transformers_sets_jinja() -> None:
    """Each of the changed templates that is taken for Gemma's is run, by transformers, and writes Gemma's turns."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    jinja2 = pytest.importorskip("jinja2")

    def parses(template: str) -> bool:
        try:
            utils._compile_jinja_template(template)
        except jinja2.TemplateSyntaxError:  # in what is not reached
            return False
        return True

    expected, yes = utils.render_jinja_template([TALK], None, None, GEMMA, False, False, True)[0], 0
    for seed in range(1000):
        source = random.Random(seed)
        pieces = re.split(r"(?<=[}])|(?=[{])", source.choice([GEMMA, PARTS, *GEMMAS.values()]))
        for _ in range(source.randrange(1, 4)):
            spaces = source.choice(
                ["\n", " ", "\n  ", " \n", "{#- x -#}", "{# x #}", "{#+ x +#}\n", "-", "+", "{{ '' }}"]
            )
            pieces.insert(source.randrange(len(pieces)), spaces)
        template = "".join(pieces)
        if is_gemmas(template) and parses(template):
            yes += 1
            assert utils.render_jinja_template([TALK], None, None, template, False, False, True)[0] == expected, (
                template
            )
    assert yes > 100


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
    "brackets": GEMMA + "{{ " + "(" * (LONGEST // 2),
    "choices": GEMMA + "{{ " + "'' if x else " * (LONGEST // 20) + "'' }}",
    "choices in brackets": GEMMA + "{{ " + "('' if " * 1000 + "x" + " else '')" * 1000 + " }}",
    "negations": GEMMA + "{{ " + "not " * (LONGEST // 5) + "x }}",
    "tags in each other": GEMMA + "{% if x %}" * 10000 + "{% endif %}" * 10000,
    "loops in each other": GEMMA + "{% for a in messages %}" * 25 + "{% endfor %}" * 25,
    "a text that doubles": "{% set x = 'x' %}" + "{% set x = x + x %}" * 1000 + GEMMA,
    "many tags": GEMMA + "{{ '' }}" * (LONGEST // 10),
    "long": GEMMA + " " * 10**7,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_template_made_to_take_long_is_answered_at_once(case: str) -> None:
    started = time.perf_counter()
    assert not is_gemmas(HOSTILE[case])
    assert time.perf_counter() - started < 2
