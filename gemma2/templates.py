"""Chat templates: whether one writes Gemma's turns. A template is read, and never run.

What it would write is worked out by `template_reading`, for conversations of which nothing is known but who speaks.
"""

from __future__ import annotations

from typing import Any

from gemma2.template_reading import Reading, Said
from gemma2.template_tags import Unknown, parse

NOT_GEMMAS = (
    "the chat template of this checkpoint is not Gemma's, as far as can be told without running it: chat sends Gemma's "
    "turns; to send the template's own, write them into a prompt for generate(special=True)"
)
LONGEST = 200_000  # characters; Gemma's template has 600
START, END = "<start_of_turn>", "<end_of_turn>"
NAMES = {"user": "user", "assistant": "model"}
LENGTHS = (1, 3, 5)  # of conversations: in these there is a first message, a last one, and any that is neither
PARTS = (1, 3)  # of a message
MARKS = [chr(0xE000 + i) for i in range(max(LENGTHS) * max(PARTS))]  # stand for what is said


def is_gemmas(template: str) -> bool:
    """Whether a Jinja template writes Gemma's turns, to the letter, for every conversation of user and assistant.

    True for the templates of Gemma and Gemma 2, and for variants of them: with a system message merged into the user's
    turn, minified, with comments, with marks for training, without trimming. False for anything else, and for a
    template that is written in a way that this file does not know.
    """
    if len(template) > LONGEST or START not in template or END not in template or any(m in template for m in MARKS):
        return False
    try:
        nodes, asked = parse(template), False
        for length in LENGTHS:
            reading = Reading(_conversation(length))
            if not _is_gemma(reading.write(nodes), reading.messages):
                return False
            asked |= reading.asked
        if not asked:
            return True
        # It asks whether a message is a text, so it also takes messages in parts.
        talks = [_conversation(length, parts) for length in LENGTHS for parts in PARTS]
        return all(_is_gemma(Reading(talk).write(nodes), talk) for talk in talks)
    except Unknown:
        return False


def _is_gemma(written: str, messages: list[dict[str, Any]]) -> bool:
    expected = ""
    for message in messages:
        content = message["content"]
        text = content.text if isinstance(content, Said) else "".join(part["text"].text for part in content)
        expected += f"{START}{NAMES[message['role']]}\n{text}{END}\n"
    return written.removeprefix("<bos>") == f"{expected}{START}model\n"


def _conversation(length: int, parts: int = 0) -> list[dict[str, Any]]:
    """Messages with a text each, or with so many parts."""
    texts = map(Said, MARKS)

    def content() -> Any:
        return [{"type": "text", "text": next(texts)} for _ in range(parts)] if parts else next(texts)

    return [{"role": ("user", "assistant")[i % 2], "content": content()} for i in range(length)]
