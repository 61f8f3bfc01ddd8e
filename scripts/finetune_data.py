"""JSONL into token ids with the targets that count: {"text": ...} or {"messages": [...]}, one to a line.

Of a text every token after its BOS counts, and an <eos> at its end. Of a conversation the replies count, each with its
<end_of_turn>. Nothing of the turns' tags and of what the user says does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma2.chat import MODEL, ROLES, chat_ids, listed
from gemma2.losses import IGNORED
from gemma2.tokenizer import TURNS, Tokenizer
from gemma2.tokens import left_padded

LONG = ("refuse", "cut", "split")
KEYS = ("text", "messages")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Example:
    """One row: ids with their BOS, which of them are to be learned, and whether the end of the line is left out."""

    ids: tuple[int, ...]
    counts: tuple[bool, ...]
    cut: bool = False

    @property
    def targets(self) -> list[int]:
        """What is to follow each id but the last."""
        return [id if counts else IGNORED for id, counts in zip(self.ids[1:], self.counts[1:], strict=True)]


@dataclass(frozen=True)
class Record:
    """One line of a file, not yet token ids. `where` names the file and the line."""

    where: str
    kind: str
    value: Any


def read_records(path: Path) -> list[Record]:
    """The lines of a JSONL file. Lines of white space alone are left out; other keys of a line are not looked at.

    Raises:
        ValueError: a line that is not UTF-8, not JSON, no object with one of `text` and `messages`, or empty; names the
            line. A file without any.
        OSError: the file cannot be read.
    """
    found = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            data = line.removeprefix(BOM) if number == 1 else line
            if data.strip():
                found.append(_record(data, f"{path}, line {number}"))
    if not found:
        raise ValueError(f"{path}: there is no line with a text or a conversation in it")
    return found


def _record(data: bytes, where: str) -> Record:
    try:
        line = json.loads(data.decode().strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON that is nested too deeply") from None
    except ValueError:  # Python's limit on the digits of whole numbers
        raise ValueError(f"{where}: JSON with a number of too many digits") from None
    there = [key for key in KEYS if isinstance(line, dict) and key in line]
    if len(there) != 1:
        given = data.decode().strip()
        raise ValueError(f'{where}: must be {{"text": ...}} or {{"messages": [...]}}, not {given!r:.60}')
    (kind,) = there
    value = line[kind]
    if kind == "text" and not isinstance(value, str):
        raise ValueError(f"{where}: text must be a string, not {type(value).__name__}")
    if not value or (kind == "text" and not value.strip()):
        raise ValueError(f"{where}: an empty {'text' if kind == 'text' else 'conversation'}")
    return Record(where, kind, value)


def examples(
    records: Sequence[Record], tokenizer: Tokenizer, length: int, *, long: str = "refuse", system: str | None = None
) -> Iterator[list[Example]]:
    """The rows of each record; more than one only where a text is split.

    Args:
        length: most ids of a row that the model reads.
        long: what becomes of a longer one. "refuse"; "cut" leaves the end out; "split" makes rows of a text, each with
            a BOS of its own.
        system: as in `chat_ids`.
    Raises:
        ValueError: names the line.
    """
    for record in records:
        try:
            row = (
                text_row(record.value, tokenizer)
                if record.kind == "text"
                else chat_row(record.value, tokenizer, system)
            )
            yield _fitted(row, length, long, record.kind)
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from None


def text_row(text: str, tokenizer: Tokenizer) -> Example:
    """A whole text. Control tokens that are spelled in it are text."""
    ids = (*tokenizer.encode(text), tokenizer.special["eos"])
    return Example(ids, (False, *[True] * (len(ids) - 1)))


def chat_row(messages: Any, tokenizer: Tokenizer, system: str | None = None) -> Example:
    """A conversation that ends with the assistant's reply. Raises ValueError for any other."""
    turns: list[Mapping[str, Any]] = listed(messages)
    replies = [i for i, turn in enumerate(turns) if isinstance(turn, Mapping) and _is_reply(turn.get("role"))]
    if not replies:
        raise ValueError("there is no reply of the assistant, and the loss is on replies only")
    if replies[-1] != len(turns) - 1:
        raise ValueError("the last message must be the assistant's: the loss is on replies only")
    ids: list[int] = []
    counts: list[bool] = []
    for i in replies:
        before = chat_ids(turns[:i], tokenizer, system=system, continue_final_message=False)
        after = chat_ids(turns[: i + 1], tokenizer, system=system, continue_final_message=True)
        if len(after) <= len(before):
            raise ValueError(f"message {i} is an empty reply")
        if after[: len(before)] != before or before[: len(ids)] != ids:
            raise ValueError(f"message {i}: its ids depend on what follows it, so the reply cannot be told apart")
        counts += [False] * (len(before) - len(ids)) + [True] * (len(after) - len(before) + 1)
        ids = [*after, tokenizer.special[TURNS[1]]]
    return Example(tuple(ids), tuple(counts))


def _is_reply(role: Any) -> bool:
    return isinstance(role, str) and ROLES.get(role) == MODEL


def _fitted(row: Example, length: int, long: str, kind: str) -> list[Example]:
    read = len(row.ids) - 1
    if read <= length:
        return [row]
    if long == "cut":
        cut = Example(row.ids[: length + 1], row.counts[: length + 1], True)
        if not any(cut.counts):
            raise ValueError(f"no reply begins in the first {length:,} of {read:,} ids, to which it is cut")
        return [cut]
    if long == "split" and kind == "text":
        bos, body = row.ids[0], row.ids[1:]
        parts = [body[start : start + length] for start in range(0, read, length)]
        return [Example((bos, *part), (False, *[True] * len(part))) for part in parts]
    cures = "--length with more, or --long cut" + (" or split" if kind == "text" else "")
    raise ValueError(f"{read:,} ids are longer than a row of {length:,}: give {cures}")


def batch(rows: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and targets [b t], padded on the left."""
    tokens, positions = left_padded([row.ids[:-1] for row in rows], device)
    width = tokens.shape[1]
    targets = [[IGNORED] * (width - len(row.targets)) + row.targets for row in rows]
    return tokens, positions, torch.tensor(targets, device=device)
