"""Text to ids and back: SentencePiece on Gemma's `tokenizer.model`, with the traps of special tokens closed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import sentencepiece

from gemma2.errors import BadModelFile, first_line

NAMES = ("pad", "eos", "bos", "unk")  # must be there, each at the id the model declares
TURNS = ("start_of_turn", "end_of_turn")
# Pieces that steer a model rather than say something. SentencePiece finds them in any text.
CONTROL = re.compile(r"<mask>|<2mass>|\[@BOS@\]|<unused\d+>|<start_of_turn>|<end_of_turn>|\[toxicity=0\]")
SPACE = "▁"  # U+2581, how SentencePiece writes a space
# A NormalizerSpec (field 3) with add_dummy_prefix (field 3) off. Of a field that a protobuf has twice, the last holds.
NO_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer:
    """Gemma's tokenizer.

    Attributes:
        special: ids by name: pad, eos, bos, unk and, where the vocabulary has them, start_of_turn and end_of_turn.
        space_prefix: whether the file asks for a space before every text (add_dummy_prefix). Gemma 2's own do not.
        where: the file it came from, for error messages.
    Raises:
        BadModelFile: not a SentencePiece model, or one without Gemma's special and byte pieces.
    """

    def __init__(self, proto: bytes, where: str = "tokenizer.model") -> None:
        self.where, self._proto = where, proto
        if not proto:
            raise BadModelFile(f"{where}: empty file, expected a SentencePiece model")
        if proto.startswith(b"version https://git-lfs"):
            raise BadModelFile(f"{where}: a Git LFS pointer, not the file itself: run `git lfs pull`")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
            names = [self._pieces.id_to_piece(i) for i in range(len(self))]
            scores = self._pieces.get_score(list(range(len(self))))
            self.space_prefix = str(self._pieces.normalize("a")).startswith(SPACE)
            if self.space_prefix:
                # SentencePiece puts the space before everything it is given, and `encode` may give it a text in runs.
                self._pieces = sentencepiece.SentencePieceProcessor(model_proto=proto + NO_PREFIX)
        except (RuntimeError, UnicodeDecodeError, ValueError) as error:
            raise BadModelFile(f"{where}: not a SentencePiece model ({first_line(error)})") from None
        ids = {name: i for i, name in enumerate(names)}
        if len(ids) != len(names):
            raise BadModelFile(f"{where}: {len(names) - len(ids)} pieces appear twice")
        if not all(map(math.isfinite, scores)):
            raise BadModelFile(f"{where}: scores that are NaN or infinite, so which pieces a text has is undefined")
        declared = {name: getattr(self._pieces, f"{name}_id")() for name in NAMES}
        for name, declared_id in declared.items():
            if ids.get(f"<{name}>") != declared_id:
                stated = "none" if declared_id < 0 else declared_id  # -1 also for a piece that is no control piece
                found = ids.get(f"<{name}>", "none")
                raise BadModelFile(
                    f"{where}: <{name}> is piece {found}, but the model declares piece {stated} as {name}"
                )
        missing = [byte for byte in range(256) if not self._is_byte(ids.get(f"<0x{byte:02X}>"))]
        if missing:
            raise BadModelFile(f"{where}: no byte piece for {len(missing)} of 256 bytes, first <0x{missing[0]:02X}>")
        self._full_stop = ids[f"<0x{ord('.'):02X}>"]
        turns = {name: ids[f"<{name}>"] for name in TURNS if f"<{name}>" in ids}
        self.special: Mapping[str, int] = MappingProxyType(declared | turns)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.model`."""
        return cls(Path(path).read_bytes(), where=str(path))

    def to_proto(self) -> bytes:
        """The SentencePiece model, as `tokenizer.model` holds it."""
        return self._proto

    def __len__(self) -> int:
        """Pieces in the vocabulary."""
        return int(self._pieces.vocab_size())

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """The ids of `text`, with a space before it where the file asks for one (`space_prefix`).

        Args:
            text: any Unicode text; the empty one gives the BOS alone.
            bos: put the BOS in front, without which Gemma 2's predictions are worthless.
            special: let `<start_of_turn>` and the like in the text become control tokens, as bare SentencePiece does.
                By default they are spelled out as ordinary characters, so that user text cannot steer the model.
        Raises:
            ValueError: not a string, or one with a lone surrogate (text that was not UTF-8), with its place.
        """
        check_text(text)
        if self.space_prefix and text:
            text = f" {text}"
        runs = [text] if special else _break_control(text)
        ids = [token for run in runs for token in self._pieces.encode(run)]
        return [self.special["bos"], *ids] if bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; pad, bos and eos have none, and bytes that are not UTF-8 become U+FFFD.

        Text decoded in pieces is the text decoded at once: no space is removed, not even that of a `space_prefix`.

        Raises:
            ValueError: an id that is not an integer of the vocabulary.
        """
        # With some settings SentencePiece drops a space where a text begins, so the text begins with a full stop here.
        return str(self._pieces.decode([self._full_stop, *parse_ids(ids, len(self))]))[1:]

    def pending_bytes(self, ids: list[int]) -> int:
        """How many ids at the end spell an unfinished UTF-8 character (0 to 3): text to hold back while streaming."""
        tail = b""
        for i in reversed(ids[-3:]):
            if not self._is_byte(i):
                break
            tail = bytes([int(self._pieces.id_to_piece(i)[3:5], 16)]) + tail
        for n in range(1, len(tail) + 1):
            first = tail[-n]
            if first >= 0xC0:  # a lead byte: is what follows it too short?
                return n if n < (2 if first < 0xE0 else 3 if first < 0xF0 else 4) else 0
            if first < 0x80:
                break
        return 0

    def _is_byte(self, i: int | None) -> bool:
        return i is not None and bool(self._pieces.is_byte(i))


def check_text(text: str) -> None:
    """Raises ValueError unless `text` is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise ValueError(f"text must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text is not valid UTF-8: lone surrogate at character {error.start}") from None


def parse_ids(ids: Iterable[int], size: int) -> list[int]:
    """`ids` as a list. Raises ValueError for anything but integers in [0, size)."""
    given = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(given, str | bytes | bytearray) or not isinstance(given, Iterable):  # bytes are integers, not ids
        raise ValueError(f"token ids must be a sequence of integers, not {ids!r}")
    given = list(given)
    for i, token in enumerate(given):
        if type(token) is not int or not 0 <= token < size:
            raise ValueError(f"token id {token!r} at {i} is not an integer in [0, {size})")
    return given


def _break_control(text: str) -> list[str]:
    """Cut `text` after the first character of every control spelling, so that none is ever seen whole."""
    cuts = [0, *(match.start() + 1 for match in CONTROL.finditer(text)), len(text)]
    return [text[a:b] for a, b in pairwise(cuts) if b > a]
