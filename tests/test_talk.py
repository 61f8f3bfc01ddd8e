"""A talk gives the replies of whole conversations, computes only what is new, and outlives a broken reply."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma2 import ContextOverflow, Gemma, NonFiniteError, Talk
from tests.children import signals_restored

SAID = ["Who made the heaven and the earth?", "And what said he unto Moses in the wilderness?", "Why?"]


@pytest.fixture
def gemma(pocket: Gemma) -> Iterator[Gemma]:
    """The pocket model with its window of 128, taken for one that was tuned for chat."""
    before, pocket.chat_tuned = pocket.chat_tuned, True
    yield pocket
    pocket.chat_tuned = before


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}], ids=["greedy", "repetition penalty"])
def test_the_replies_are_those_of_the_whole_conversation_computed_anew(
    gemma: Gemma, settings: dict[str, float]
) -> None:
    """Past the window of 128."""
    talk = Talk(gemma, 60, **settings)  # type: ignore[arg-type]
    messages: list[dict[str, str]] = []
    for content in SAID:
        messages.append({"role": "user", "content": content})
        whole = "".join(gemma.stream_chat(messages, 60, **settings))  # type: ignore[arg-type]
        assert "".join(talk.say(content)) == whole
        messages.append({"role": "assistant", "content": whole})
    assert talk.messages == messages and talk.cache.length > gemma.config.sliding_window


def test_a_turn_computes_only_what_is_new(gemma: Gemma) -> None:
    talk, fed = Talk(gemma, 40), list[int]()
    hook = gemma.model.register_forward_pre_hook(lambda m, inputs: fed.append(inputs[0].shape[1]))
    counts = []
    for content in SAID:
        "".join(talk.say(content))
        counts.append(sum(fed))
        fed.clear()
    hook.remove()
    assert talk.cache.length > 150 and counts[2] < 70, counts


def test_a_turn_in_another_dtype_computes_the_conversation_anew(gemma: Gemma) -> None:
    whole = copy.deepcopy(gemma)
    talk = Talk(whole, 20)
    with torch.autocast("cpu", torch.bfloat16):
        "".join(talk.say(SAID[0]))
    messages = [*talk.messages, {"role": "user", "content": SAID[1]}]
    assert "".join(talk.say(SAID[1])).strip() == gemma.chat(messages, 20)
    held = talk.cache.length
    with torch.autocast("cpu", torch.bfloat16):
        "".join(talk.say(SAID[2]))
    assert talk.cache.length > held
    whole.model.to(torch.bfloat16)
    assert "".join(talk.say(SAID[1]))


def test_a_reply_that_is_closed_is_kept_as_far_as_it_went_and_the_talk_goes_on(gemma: Gemma) -> None:
    talk = Talk(gemma, 60)
    reply = talk.say(SAID[0])
    said = "".join(next(reply) for _ in range(6))
    reply.close()
    assert talk.messages[1] == {"role": "assistant", "content": said}
    messages = [*talk.messages, {"role": "user", "content": SAID[1]}]
    assert "".join(talk.say(SAID[1])) == "".join(gemma.stream_chat(messages, 60))


def test_a_pass_that_is_broken_off_in_the_middle_costs_the_cache_and_not_the_talk(gemma: Gemma) -> None:
    talk = Talk(gemma, 20)
    reply = talk.say(SAID[0])
    said = "".join(next(reply) for _ in range(4))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = gemma.model.model.layers[3].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(reply)
    hook.remove()
    messages = [*talk.messages, {"role": "user", "content": SAID[1]}]
    assert talk.messages[1]["content"] == said
    assert "".join(talk.say(SAID[1])) == "".join(gemma.stream_chat(messages, 20))


def test_a_turn_that_does_not_fit_or_fails_is_not_kept(gemma: Gemma) -> None:
    talk = Talk(gemma, 900)
    with pytest.raises(ContextOverflow, match=r"the conversation is \d+ tokens long, and 900 new ones exceed"):
        talk.say("word " * 300)
    assert talk.messages == []

    def poison(module: object, inputs: object, output: Tensor) -> Tensor:
        return output * torch.nan

    hook = gemma.model.softcap.register_forward_hook(poison)
    with pytest.raises(NonFiniteError):
        list(talk.say("Who?"))
    hook.remove()
    assert talk.messages == []
    assert next(talk.say("Who?"))


def test_reset_forgets_and_a_foreign_cache_is_refused(gemma: Gemma) -> None:
    talk = Talk(gemma, 10)
    first = "".join(talk.say(SAID[0]))
    "".join(talk.say(SAID[1]))
    talk.reset()
    assert "".join(talk.say(SAID[0])) == first and len(talk.messages) == 2
    with pytest.raises(ValueError, match="a talk has a cache of its own"):
        Talk(gemma, 10, cache=talk.cache)
    with pytest.raises(ValueError, match="repetition_penalty must be a number"):
        Talk(gemma, 10, repetition_penalty=-3)
    with pytest.raises(TypeError, match="generation has no option 'foo'"):
        Talk(gemma, 10, foo=3)  # type: ignore[call-arg]


def test_a_system_message_is_merged_once_and_stays_when_the_talk_is_reset(gemma: Gemma) -> None:
    instructions = {"role": "system", "content": "Answer in the words of the Bible."}
    talk, fed = Talk(gemma, 20, messages=[instructions], system="merge"), list[int]()
    hook = gemma.model.register_forward_pre_hook(lambda m, inputs: fed.append(inputs[0].shape[1]))
    for _ in range(2):
        messages: list[Mapping[str, object]] = [instructions]
        for content in SAID:
            fed.clear()
            reply = "".join(talk.say(content))
            kept, messages = sum(fed), [*messages, {"role": "user", "content": content}]
            assert reply == "".join(gemma.stream_chat(messages, 20, system="merge"))
            messages = [*messages, {"role": "assistant", "content": reply}]
        assert talk.messages == messages and kept < 45, "the last turn alone was computed"
        talk.reset()
        assert talk.messages == [instructions]
    hook.remove()


def test_a_talk_can_begin_with_earlier_turns_and_parts_of_text(gemma: Gemma) -> None:
    earlier = [{"role": "user", "content": SAID[0]}, {"role": "assistant", "content": "God made it."}]
    talk, parts = Talk(gemma, 12, messages=earlier), [{"type": "text", "text": SAID[1]}]
    whole = "".join(gemma.stream_chat([*earlier, {"role": "user", "content": SAID[1]}], 12))
    assert "".join(talk.say(parts)) == whole and len(talk.messages) == 4 and len(earlier) == 2


def test_what_a_talk_cannot_begin_with_is_refused_at_once(gemma: Gemma) -> None:
    system = {"role": "system", "content": "Be brief."}
    for messages, options, words in (
        ([system], {}, 'message 0 is from "system"'),
        ([system], {"system": "Be brief."}, 'system must be "merge" or None'),
        ([{"role": "user", "content": "Who?"}], {}, "message 1 is from 'user'; user and assistant must alternate"),
        ("Be brief.", {}, "messages must be a list of messages, not str"),
        (["Be brief."], {}, "message 0 must be a dict"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            Talk(gemma, 5, messages=messages, **options)  # type: ignore[arg-type]


def test_options_that_are_none_are_not_set(gemma: Gemma) -> None:
    plain = "".join(Talk(gemma, 12).say(SAID[0]))
    unset = {"repetition_penalty": None, "temperature": None, "top_k": -1, "processors": None, "stop": None, "seed": -1}
    assert "".join(Talk(gemma, np.int64(12), **unset).say(SAID[0])) == plain  # type: ignore[arg-type]


def test_ctrl_c_before_the_first_piece_ends_the_reply_and_keeps_the_talk(gemma: Gemma) -> None:
    """In the middle of the prompt, say."""
    talk = Talk(gemma, 20)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = gemma.model.model.layers[3].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(talk.say(SAID[0]))
    hook.remove()
    assert talk.messages == [{"role": "user", "content": SAID[0]}, {"role": "assistant", "content": ""}]
    messages = [*talk.messages, {"role": "user", "content": SAID[1]}]
    assert "".join(talk.say(SAID[1])) == "".join(gemma.stream_chat(messages, 20))


def test_without_chat_tuning_it_warns_once(pocket: Gemma) -> None:
    with pytest.warns(UserWarning, match="does not say that it was tuned for chat"):
        Talk(pocket, 5)


@pytest.mark.posix
def test_ctrl_c_in_a_reply_ends_the_reply_and_keeps_the_talk() -> None:
    command = [sys.executable, "-m", "gemma2", "chat", "-n", "400", "--device", "cpu", "--verbose"]
    with signals_restored():
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert child.stdin and child.stdout
        child.stdin.write((SAID[0] + "\n").encode())
        child.stdin.flush()
        first = os.read(child.stdout.fileno(), 1)  # the reply has begun
        child.send_signal(signal.SIGINT)
        time.sleep(0.5)
        child.stdin.write(b"And then?\n/quit\n")
        child.stdin.flush()
        out, err = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == 0 and first + out, err
    counts = [int(count) for count in re.findall(rb"decode +(\d+) tokens", err)]
    assert len(counts) == 2 and counts[0] < 399, err  # the first was broken off, the second is a reply of its own
