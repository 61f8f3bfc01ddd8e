"""The text or token ids that a command is given, read and checked."""

from __future__ import annotations

import argparse
import codecs
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from gemma2.checkpoints.hf_config import read_json
from gemma2.errors import BadModelFile
from gemma2.tokenizer import check_text

NUMBERS = re.compile(r"\s*-?\d+\s*(,\s*-?\d+\s*)*")


def add_text_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Three ways to give a text, of which one may be used. `default` says what happens without any."""
    group = parser.add_argument_group(f"text, one of these ({default})")
    text = group.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", help="a text; BOS is put before it; - reads it from standard input")
    text.add_argument("--file", metavar="FILE", type=Path, help="a text file in UTF-8; BOS is put before it")
    text.add_argument(
        "--ids", metavar="IDS", help="token ids as 2,17,5, or a JSON file with a list of them; nothing is put before"
    )


def read_text(args: argparse.Namespace) -> str | list[int] | None:
    """The text or the token ids that were given, not yet checked against a vocabulary; None if none was.

    Raises:
        ValueError: text that is not UTF-8; BadModelFile for a file of ids that holds something else; OSError for a file
            that cannot be read.
    """
    if args.ids is not None:
        return read_ids(args.ids)
    if args.file is not None:
        return read_file(args.file, "--file")
    return None if args.prompt is None else read_prompt(args.prompt)


def read_file(path: Path, option: str) -> str:
    """The text in a file that an option names. Raises ValueError where it is not UTF-8; OSError."""
    try:
        return _decoded(path.read_bytes(), f"{path}:")
    except OSError as error:
        raise type(error)(f"{option} {path}: {error.strerror}") from None


def read_prompt(given: str) -> str:
    """The prompt itself, or standard input for `-`. Raises ValueError where it is not UTF-8, naming the byte."""
    if given != "-":
        check_text(given)
        return given
    return _decoded(sys.stdin.buffer.read(), "standard input is")


def read_lines() -> Iterator[str]:
    """The lines of standard input that is no terminal, each as it comes. Raises ValueError where it is not UTF-8."""
    if not hasattr(sys.stdin, "buffer"):  # a program that runs the command inside itself may give it a StringIO
        yield from sys.stdin
        return
    place = 0
    for line in sys.stdin.buffer:
        yield _decoded(line, "standard input is", place)
        place += len(line)


def _decoded(data: bytes, where: str, place: int = 0) -> str:
    """Text of UTF-8, which begins at byte `place`. A byte order mark, which Windows puts before a text, is no part of
    it."""
    try:
        return data.decode("utf-8" if place else "utf-8-sig")
    except UnicodeDecodeError as error:
        mark = 3 if not place and data.startswith(codecs.BOM_UTF8) else 0  # it is not counted in error.start
        raise ValueError(f"{where} not valid UTF-8 at byte {place + mark + error.start}") from None


def read_ids(given: str) -> list[int]:
    if NUMBERS.fullmatch(given):
        return [int(number) for number in given.split(",")]
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"--ids {given!r}: neither token ids as 2,17,5 nor a file with a JSON list of them")
    found = read_json(path)
    if not isinstance(found, list) or not all(type(number) is int for number in found):
        raise BadModelFile(f"{path}: must be a JSON list of token ids")
    if not found:
        raise ValueError(f"{path}: an empty list; give at least one token id")
    return found
