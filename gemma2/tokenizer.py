"""Text to ids and back: SentencePiece on Gemma's `tokenizer.model`, with the traps of special tokens closed."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sentencepiece

from gemma2.errors import BadModelFile, first_line
from gemma2.symbols import SPACE, Finder, Symbol

NAMES = ("pad", "eos", "bos", "unk")  # in the order of their ids in Gemma's vocabularies
RESPELLED = ("pad", "eos")  # those that a fine-tune may spell otherwise, as <|im_end|>, if they stay control pieces
TURNS = ("start_of_turn", "end_of_turn")
# Pieces that steer a model rather than say something. SentencePiece finds them in any text.
CONTROL = re.compile(r"<mask>|<2mass>|\[@BOS@\]|<unused\d+>|<start_of_turn>|<end_of_turn>|\[toxicity=0\]")
# A NormalizerSpec (field 3) with add_dummy_prefix (field 3) off. Of a field that a protobuf has twice, the last holds.
NO_PREFIX = b"\x1a\x02\x18\x00"
PADDING = 1024  # fewer rows than this are taken for padding of an embedding; more are another model's


class Tokenizer:
    """Gemma's tokenizer.

    It can be pickled and copied, so it works in processes that are spawned.

    Args:
        proto: the bytes of a `tokenizer.model`.
        where: the file it came from, for error messages.
        rows: of the embedding it is used with; default: one for each piece.
        added: all added tokens, as the library `tokenizers` finds them, where SentencePiece would not find them so.
            None where SentencePiece finds its symbols by itself.
        engine: the SentencePiece model that cuts what is between the tokens in `added`; default `proto`. Pieces that it
            must not find have the spelling `hidden` there.
        notes: see below.

    Attributes:
        special: ids by name: pad, eos, bos, unk and, where the vocabulary has them, start_of_turn and end_of_turn.
        space_prefix: whether the file asks for a space before every text (add_dummy_prefix). Gemma 2's own do not.
        where, rows, added: as given.
        notes: a line for everything about the tokenizer's files that the reader should know.
    Raises:
        BadModelFile: not a SentencePiece model, or one without Gemma's special and byte pieces.
    """

    def __init__(
        self,
        proto: bytes,
        where: str = "tokenizer.model",
        rows: int | None = None,
        added: Sequence[Symbol] | None = None,
        engine: bytes | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.where, self.notes = where, tuple(notes)
        self.added = None if added is None else tuple(added)
        self._proto, self._engine = proto, engine
        if not proto:
            raise BadModelFile(f"{where}: empty file, expected a SentencePiece model")
        if proto.startswith(b"version https://git-lfs"):
            raise BadModelFile(f"{where}: a Git LFS pointer, not the file itself: run `git lfs pull`")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=engine or proto)
            every = list(range(self._pieces.vocab_size()))
            names = self._pieces.id_to_piece(every)
            scores = self._pieces.get_score(every)
            self.space_prefix = str(self._pieces.normalize("a")).startswith(SPACE)
            if self.space_prefix:
                # SentencePiece puts the space before everything it is given, and `encode` may give it a text in runs.
                self._pieces = sentencepiece.SentencePieceProcessor(model_proto=(engine or proto) + NO_PREFIX)
        except (RuntimeError, UnicodeDecodeError, ValueError) as error:
            raise BadModelFile(f"{where}: not a SentencePiece model ({first_line(error)})") from None
        ids = {name: i for i, name in enumerate(names)}
        if len(ids) != len(names):
            raise BadModelFile(f"{where}: {len(names) - len(ids)} pieces appear twice")
        if not all(map(math.isfinite, scores)):
            raise BadModelFile(f"{where}: scores that are NaN or infinite, so which pieces a text has is undefined")
        declared = {name: self._declared(name, ids, names) for name in NAMES}
        missing = [byte for byte in range(256) if not self._is_byte(ids.get(f"<0x{byte:02X}>"))]
        if missing:
            raise BadModelFile(f"{where}: no byte piece for {len(missing)} of 256 bytes, first <0x{missing[0]:02X}>")
        self._full_stop = ids[f"<0x{ord('.'):02X}>"]
        self._needed = max(*declared.values(), *(ids[f"<0x{byte:02X}>"] for byte in range(256)))
        turns = {name: ids[f"<{name}>"] for name in TURNS if f"<{name}>" in ids}
        self.special: Mapping[str, int] = MappingProxyType(declared | turns)
        self.rows = len(names) if rows is None else rows
        control = {names[i]: i for i, is_control in enumerate(self._pieces.is_control(every)) if is_control}
        self._spelled_bos = names[declared["bos"]]
        self._hidden = {token.id: token.text for token in added or () if names[token.id] == hidden(token.id)}
        given = {token.text: token for token in added or ()}
        steering = {
            text: given.pop(text, Symbol(text, i)) for text, i in (*control.items(), ("<unk>", declared["unk"]))
        }
        plain = {text: token for text, token in given.items() if not CONTROL.fullmatch(text)}
        try:
            self._with_control = _passes([*given.values(), *steering.values()])
            self._without_control = _passes(plain.values())
        except ValueError as error:
            raise BadModelFile(f"{where}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.model`."""
        return cls(Path(path).read_bytes(), where=str(path))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._proto, self.where, self.rows, self.added, self._engine, self.notes)

    def to_proto(self) -> bytes:
        """The SentencePiece model, as `tokenizer.model` holds it."""
        return self._proto

    def id_of(self, piece: str) -> int | None:
        """The id of the piece with exactly this spelling; None if there is none."""
        found = int(self._pieces.piece_to_id(piece))
        if self._pieces.id_to_piece(found) == piece:
            return found
        return next((i for i, text in self._hidden.items() if piece in (text, text.replace(" ", SPACE))), None)

    def piece(self, id: int) -> str:
        """The spelling of a piece, in which a space is `▁`."""
        return self._hidden[id].replace(" ", SPACE) if id in self._hidden else str(self._pieces.id_to_piece(id))

    def for_rows(self, rows: int) -> Tokenizer:
        """This tokenizer for an embedding of so many rows, which may be padded or cut.

        Rows without a piece are the text "". A text that needs a piece without a row cannot be encoded.

        Raises:
            BadModelFile: so many more or fewer rows than pieces that this is another model's tokenizer.
        """
        pieces = len(self)
        if rows == self.rows:
            return self
        if abs(rows - pieces) >= PADDING or rows <= self._needed:
            raise BadModelFile(
                f"{self.where}: {pieces} pieces, but the embedding has {rows} rows, so this is another model's "
                "tokenizer; name the right one with tokenizer="
            )
        more = f"the last {rows - pieces} have no piece, and no text"
        fewer = f"a text that needs one of the last {pieces - rows} pieces is refused"
        found = object.__new__(type(self))
        found.__dict__ |= self.__dict__
        found.rows = rows
        if rows != pieces:
            said = (
                f"the embedding has {rows} rows and the tokenizer {pieces} pieces: {more if rows > pieces else fewer}"
            )
            found.notes = (*self.notes, said)
        return found

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids at which Gemma ends a text: `<eos>` and, where the vocabulary has it, `<end_of_turn>`."""
        return frozenset(self.special[name] for name in ("eos", "end_of_turn") if name in self.special)

    def __len__(self) -> int:
        """Pieces in the vocabulary."""
        return int(self._pieces.vocab_size())

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """The ids of `text`, with a space before it where the file asks for one (`space_prefix`).

        Args:
            text: any Unicode text; the empty one gives the BOS alone.
            bos: put the BOS in front, without which Gemma 2's predictions are worthless. A text that begins with a BOS
                of its own gets no second one.
            special: let `<start_of_turn>`, `<bos>` and every other control token spelled in the text become that token.
                By default they are spelled out as ordinary characters, so that user text cannot steer the model.
        Raises:
            ValueError: not a string, or one with a lone surrogate (text that was not UTF-8), with its place; or one
                that needs a piece without a row.
        """
        check_text(text)
        ids: list[int] = []
        if text.startswith(self._spelled_bos):
            if special:
                ids, text = [self.special["bos"]], text[len(self._spelled_bos) :]
            else:
                warnings.warn(
                    f"the text begins with {self._spelled_bos}, which is read as ordinary characters: "
                    "special=True makes control tokens of such spellings",
                    stacklevel=2,
                )
        if bos and not ids:
            ids = [self.special["bos"]]
        if self.space_prefix and text:
            text = f" {text}"
        passes = self._with_control if special else self._without_control
        ids += self._scan(text, passes, special) if passes else self._cut(text, special)
        if self.rows < len(self):
            self._refuse_rowless(ids)
        return ids

    def _scan(self, text: str, passes: Sequence[Finder], special: bool) -> list[int]:
        """The ids of a text: the tokens that the first pass finds, and what the others make of the rest."""
        finder, later, ids, at = passes[0], passes[1:], list[int](), 0
        if finder.normalized:
            text = text.replace(" ", SPACE)
        for start, stop, id in finder.find(text):
            if at < start:
                between = text[at:start]
                ids += self._scan(between, later, special) if later else self._cut(between, special)
            ids.append(id)
            at = stop
        rest = text[at:] if at else text
        return ids + (self._scan(rest, later, special) if later else self._cut(rest, special))

    def _cut(self, text: str, special: bool) -> list[int]:
        """The ids of a text by SentencePiece alone."""
        runs = [text] if special else _break_control(text)
        return [token for run in runs for token in self._pieces.encode(run)]

    def _refuse_rowless(self, ids: list[int]) -> None:
        for token in ids:
            if token >= self.rows:
                raise ValueError(
                    f"the text needs piece {token} ({self.piece(token)!r}), and the embedding has only {self.rows} rows"
                )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; pad, bos, eos, control tokens of a file's own and rows without a piece have none, and
        bytes that are not UTF-8 become U+FFFD.

        Text decoded in pieces is the text decoded at once: no space is removed, not even that of a `space_prefix`.

        Raises:
            ValueError: an id that is not an integer of the vocabulary.
        """
        given, pieces = parse_ids(ids, self.rows), len(self)
        if self.rows > pieces:
            given = [token for token in given if token < pieces]
        if not self._hidden.keys().isdisjoint(given):
            runs = groupby(given, lambda token: self._hidden.get(token))
            return "".join(
                self._spell(run) if text is None else text.replace(SPACE, " ") * len(list(run)) for text, run in runs
            )
        return self._spell(given)

    def _spell(self, ids: Iterable[int]) -> str:
        """The text of ids by SentencePiece alone."""
        # With some settings SentencePiece drops a space where a text begins, so the text begins with a full stop here.
        return str(self._pieces.decode([self._full_stop, *ids]))[1:]

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

    def _declared(self, name: str, ids: Mapping[str, int], names: Sequence[str]) -> int:
        """The id of a special piece. A fine-tune may spell some otherwise, see `RESPELLED`."""
        stated, spelled, place = int(getattr(self._pieces, f"{name}_id")()), ids.get(f"<{name}>"), NAMES.index(name)
        in_place = place < len(names) and self._pieces.is_control(place) and stated in (-1, place)
        if spelled is None and in_place and name in RESPELLED and names[place] not in {f"<{n}>" for n in NAMES}:
            said = f"<{name}> is spelled {names[place]!r:.60}"
            self.notes = self.notes if said in self.notes else (*self.notes, said)
            return place
        if spelled != stated:
            shown = "none" if stated < 0 else stated  # -1 also for a piece that is no control piece
            raise BadModelFile(
                f"{self.where}: <{name}> is piece {'none' if spelled is None else spelled}, but the model declares "
                f"piece {shown} as {name}"
            )
        return stated

    def _is_byte(self, i: int | None) -> bool:
        return i is not None and i < len(self) and bool(self._pieces.is_byte(i))


def hidden(id: int) -> str:
    """A spelling that SentencePiece finds in no text, for it has a space, and what it is given has `▁` instead."""
    return f" {id}"


def _passes(symbols: Iterable[Symbol]) -> list[Finder]:
    """What finds symbols: first those that are not normalized, then the others."""
    every = list(symbols)
    found = [Finder((token for token in every if token.normalized == later), later) for later in (False, True)]
    return [finder for finder in found if finder]


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
