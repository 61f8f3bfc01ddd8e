"""Chat turns to ids. Turns are built from ids: no template of a file is run, and no text of a user can forge a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gemma2.errors import BadModelFile
from gemma2.tokenizer import TURNS, Tokenizer, check_text

ROLES = {"user": "user", "assistant": "model", "model": "model"}


def chat_ids(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[int]:
    """The prompt for the model's next turn: a BOS, the turns so far, and an open model turn.

    The same ids as Google's template: `<bos><start_of_turn>user\\nHI<end_of_turn>\\n<start_of_turn>model\\n`, with the
    content trimmed.

    Args:
        messages: {"role": "user" | "assistant", "content": text}, taking turns, the user first and last.
    Raises:
        ValueError: a system role, another unknown role, or turns out of order.
        BadModelFile: a vocabulary without turn tags.
    """
    if not set(TURNS) <= set(tokenizer.special):
        raise BadModelFile(
            f"{tokenizer.where}: the vocabulary has no <start_of_turn> and <end_of_turn>: chat needs them"
        )
    start, end = (tokenizer.special[name] for name in TURNS)
    newline = tokenizer.encode("\n", bos=False)
    ids = [tokenizer.special["bos"]]
    for number, message in enumerate(messages):
        role, content = _turn(message, number)
        ids += [start, *tokenizer.encode(f"{role}\n{content}", bos=False), end, *newline]
    if not messages or ROLES[messages[-1]["role"]] != "user":
        raise ValueError("chat: the last message must be the user's, for the model to answer")
    return [*ids, start, *tokenizer.encode("model\n", bos=False)]


def _turn(message: Mapping[str, str], number: int) -> tuple[str, str]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise ValueError(f"chat: message {number} must have exactly 'role' and 'content', not {message!r}")
    role, content = message["role"], message["content"]
    if role == "system":
        raise ValueError("chat: Gemma 2 has no system role; put the instructions into the first user message")
    if role not in ROLES:
        raise ValueError(f"chat: message {number} has role {role!r}; there are user and assistant")
    if ROLES[role] != ("user", "model")[number % 2]:
        raise ValueError(f"chat: message {number} is from {role!r}; user and assistant must alternate, user first")
    check_text(content)
    return ROLES[role], content.strip()
