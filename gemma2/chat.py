"""Chat turns to ids. Turns are built from ids: no template of a file is run, and no text of a user can forge a turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma2.errors import BadModelFile
from gemma2.tokenizer import TURNS, Tokenizer, check_text

Conversation = Sequence[Mapping[str, Any]]  # {"role": ..., "content": ...}, see `chat_ids`

USER, MODEL, SYSTEM = "user", "model", "system"
ROLES = {"user": USER, "assistant": MODEL, "model": MODEL, "system": SYSTEM}
NO_SYSTEM = (
    'chat: message {number} is from "system", and Gemma 2 has no system role; put the instructions into the first user '
    'message, or let system="merge" (gemma2 chat --system) put them there'
)


def chat_ids(
    messages: Conversation,
    tokenizer: Tokenizer,
    *,
    system: str | None = None,
    continue_final_message: bool | None = None,
) -> list[int]:
    """The prompt for the model's next turn: a BOS, the turns so far, and an open model turn.

    The same ids as Google's template: `<bos><start_of_turn>user\\nHI<end_of_turn>\\n<start_of_turn>model\\n`, with the
    content trimmed. A final message of the assistant is continued, with the ids of transformers'
    `apply_chat_template(messages, continue_final_message=True)`: white space at the end of what is continued is left
    out, and if nothing else is in it, so is the newline after `model`.

    Args:
        messages: {"role": "user" | "assistant", "content": text}, taking turns, the user first. Other keys are ignored.
            Content may also be a list of parts {"type": "text", "text": text}: each is trimmed, and they are joined
            with nothing between them, as Gemma 3's template does.
        system: "merge" takes messages of the role "system" too, and puts them before the next user message, with an
            empty line between, as llama.cpp does for Gemma (several are joined with nothing between them). None refuses
            them, as Google's template does.
        continue_final_message: whether the last message is the beginning of the model's turn. None: if it is the
            assistant's.
    Raises:
        ValueError: a role that there is not, turns out of order, or content that is no text; names the message.
        BadModelFile: a vocabulary without turn tags.
    """
    if not set(TURNS) <= set(tokenizer.special):
        raise BadModelFile(
            f"{tokenizer.where}: the vocabulary has no <start_of_turn> and <end_of_turn>, which chat needs: write the "
            "turns that the model was trained on into a prompt for generate(special=True)"
        )
    turns, open_turn = spoken(messages, system=system, continue_final_message=continue_final_message)
    start, end = (tokenizer.special[name] for name in TURNS)
    newline = tokenizer.encode("\n", bos=False)
    ids = [tokenizer.special["bos"]]
    for role, content in turns:
        ids += [start, *tokenizer.encode(f"{role}\n{content}", bos=False), end, *newline]
    return [*ids, start, *tokenizer.encode(open_turn, bos=False)]


def spoken(
    messages: Conversation, *, system: str | None = None, continue_final_message: bool | None = None
) -> tuple[list[tuple[str, str]], str]:
    """The turns of which `chat_ids` makes ids: each one's role and text, and the text of the model's open turn."""
    if system not in ("merge", None):
        raise ValueError(f'system must be "merge" or None, not {system!r}; its text is a message of the role "system"')
    turns = _turns(messages, merge=system is not None)
    return turns, _open_turn(turns, continue_final_message)


def listed(messages: Conversation) -> list[Mapping[str, Any]]:
    """The messages as a list. Raises ValueError for a text or a single message."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise ValueError(f"chat: messages must be a list of messages, not {type(messages).__name__}")
    return list(messages)


def continues(messages: Conversation, continue_final_message: bool | None) -> bool:
    """Whether the reply to `messages`, which are in order, continues the last one."""
    return bool(ROLES[messages[-1]["role"]] == MODEL if continue_final_message is None else continue_final_message)


def _turns(messages: Conversation, merge: bool) -> list[tuple[str, str]]:
    """Each turn's role, user and model in turn, and its text, trimmed; system messages are merged."""
    turns: list[tuple[str, str]] = []
    instructions = ""
    for number, message in enumerate(listed(messages)):
        role, content = _message(message, number)
        if role == SYSTEM:
            if not merge:
                raise ValueError(NO_SYSTEM.format(number=number))
            instructions += content
            continue
        if role != (USER, MODEL)[len(turns) % 2]:
            raise ValueError(
                f"chat: message {number} is from {message['role']!r}; user and assistant must alternate, user first"
            )
        if role == USER and instructions:
            content, instructions = f"{instructions}\n\n{content}", ""
        turns.append((role, content))
    if instructions:
        raise ValueError("chat: no user message follows the system message, which is merged into one")
    return turns


def _open_turn(turns: list[tuple[str, str]], continued: bool | None) -> str:
    """The text of the model's open turn; a last turn that it continues is taken out of `turns`."""
    last = turns[-1][0] if turns else None
    if continued is None:
        continued = last == MODEL
    if not isinstance(continued, bool):
        raise ValueError(f"continue_final_message must be True, False or None, not {continued!r}")
    if continued and last != MODEL:
        raise ValueError("chat: continue_final_message needs a last message of the assistant, to be continued")
    if not continued and last != USER:
        raise ValueError("chat: the last message must be the user's, for the model to answer")
    return f"{MODEL}\n{turns.pop()[1]}".rstrip() if continued else f"{MODEL}\n"


def _message(message: object, number: int) -> tuple[str, str]:
    """A message's role, by Gemma's name, and its text, trimmed."""
    if not isinstance(message, Mapping):
        raise ValueError(f"chat: message {number} must be a dict with 'role' and 'content', not {message!r:.80}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"chat: message {number} has role {role!r:.80}; there are user and assistant")
    if content is None:
        raise ValueError(f"chat: message {number} has no content; it must be a text")
    if isinstance(content, list | tuple):
        return ROLES[role], "".join(_part(part, f"message {number}, part {i}") for i, part in enumerate(content))
    return ROLES[role], _trimmed(content, f"message {number}")


def _part(part: object, where: str) -> str:
    if not isinstance(part, Mapping):
        raise ValueError(f'chat: {where} must be {{"type": "text", "text": ...}}, not {part!r:.80}')
    if part.get("type") != "text":
        raise ValueError(f"chat: {where} is of type {part.get('type')!r:.80}, and Gemma 2 reads text only")
    return _trimmed(part.get("text"), where)


def _trimmed(text: object, where: str) -> str:
    try:
        check_text(text)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"chat: {where}: {error}") from None
    return str(text).strip()
