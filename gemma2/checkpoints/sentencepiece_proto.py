"""The `tokenizer.model` file: of a serialised sentencepiece.ModelProto, what a Gemma 2 vocabulary fills in.

Field numbers are those of sentencepiece_model.proto. Everything but pieces, scores, kinds and the space prefix is a
constant of Gemma's tokenizers, written here as Google's file has it and held against it when another is read.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from gemma2.errors import BadModelFile
from gemma2.symbols import SPACE
from gemma2.tokenizer import CONTROL as STEERING
from gemma2.tokenizer import NAMES, RESPELLED

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ModelProto.SentencePiece.Type
SPECIAL = {"<pad>": CONTROL, "<eos>": CONTROL, "<bos>": CONTROL, "<unk>": UNKNOWN}
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# Gemma's own symbols: what steers, whitespace in runs, and HTML tags. `</s>` is one of those, and no end of anything.
TAGS = "table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code"
SYMBOL = re.compile(rf"{STEERING.pattern}|\n+|\t+|[ {SPACE}]{{2,}}|</?(?:{TAGS})>")
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE, SCORE, KIND = 1, 2, 3
BPE = 2
# Field -> what it is, Gemma's value, and what a file means that leaves it out.
TRAINER_FIELDS = {
    3: ("model_type", BPE, 1),
    24: ("treat_whitespace_as_suffix", 0, 0),
    35: ("byte_fallback", 1, 0),
}
NORMALIZER_FIELDS = {
    2: ("precompiled_charsmap", b"", b""),
    4: ("remove_extra_whitespaces", 0, 1),
    5: ("escape_whitespaces", 1, 1),
}
SPACE_PREFIX = 3  # of the normalizer: add_dummy_prefix, which a file means that leaves it out


@dataclass(frozen=True)
class Vocabulary:
    """A Gemma tokenizer without its constants. Scores are float32, kinds (types 1 to 6) integers."""

    pieces: Sequence[str]
    scores: NDArray[np.float32]
    kinds: NDArray[np.integer]
    space_prefix: bool = False


def write_proto(vocabulary: Vocabulary) -> bytes:
    """The bytes of a `tokenizer.model`."""
    pieces = vocabulary.pieces
    scores = vocabulary.scores.astype("<f4").tobytes()
    out = bytearray()
    for i, (piece, kind) in enumerate(zip(pieces, vocabulary.kinds.tolist(), strict=True)):
        text = piece.encode()
        out += _piece_head(len(text)) + text + b"\x15" + scores[4 * i : 4 * i + 4] + b"\x18" + kind.to_bytes()
    trainer = _integer(3, BPE) + _integer(4, len(pieces))
    trainer += _integer(24, 0) + _integer(25, 1) + _integer(26, 1)  # split_digits, allow_whitespace_only_pieces
    trainer += _integer(35, 1)
    special = [_special(vocabulary, name) for name in ("unk", "bos", "eos", "pad")]
    for number, (place, _) in enumerate(special, start=40):
        trainer += _integer(number, place)
    for number, (_, piece) in enumerate(special, start=45):
        trainer += _bytes(number, piece.encode())
    normalizer = _bytes(1, b"identity") + _integer(SPACE_PREFIX, int(vocabulary.space_prefix))
    normalizer += _integer(4, 0) + _integer(5, 1)
    return bytes(out + _bytes(TRAINER, trainer) + _bytes(NORMALIZER, normalizer))


def with_pieces(proto: bytes, changes: Iterable[tuple[str, str, float, int]]) -> bytes:
    """What `write_proto` gave, with another spelling, score and kind for some pieces, in the order of their ids."""
    out, at = bytearray(), 0
    for piece, spelling, score, kind in changes:
        old, new = piece.encode(), spelling.encode()
        entry = _piece_head(len(old)) + old + b"\x15"
        start = proto.index(entry, at)
        out += proto[at:start] + _piece_head(len(new)) + new + b"\x15" + struct.pack("<f", score)
        out += b"\x18" + kind.to_bytes()
        at = start + len(entry) + 6  # the score, and a kind
    return bytes(out + proto[at:])


def _special(vocabulary: Vocabulary, name: str) -> tuple[int, str]:
    """The id of a special piece, and how it is spelled: in fine-tunes not always as by Google."""
    piece, place = f"<{name}>", NAMES.index(name)
    if piece in vocabulary.pieces:
        return vocabulary.pieces.index(piece), piece
    if name in RESPELLED and place < len(vocabulary.pieces) and vocabulary.kinds[place] == CONTROL:
        return place, vocabulary.pieces[place]
    return -1, piece


def read_proto(proto: bytes, where: str) -> Vocabulary:
    """What a `tokenizer.model` says beyond Gemma's constants.

    Raises:
        BadModelFile: damaged, or with other settings than Gemma's.
    """
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(proto):
            if number == PIECES:
                fields = dict(_fields(_as_bytes(value)))
                pieces.append(_as_bytes(fields.get(PIECE, b"")).decode())
                scores.append(struct.unpack("<f", _as_bytes(fields.get(SCORE, bytes(4))))[0])
                kinds.append(_as_kind(fields.get(KIND, NORMAL)))
            elif number == TRAINER:
                trainer |= dict(_fields(_as_bytes(value)))
            elif number == NORMALIZER:
                normalizer |= dict(_fields(_as_bytes(value)))
    except (IndexError, ValueError, struct.error) as error:
        raise BadModelFile(f"{where}: damaged at or after piece {len(pieces)} ({error}); download it again") from None
    for found, expected in ((trainer, TRAINER_FIELDS), (normalizer, NORMALIZER_FIELDS)):
        for number, (name, gemmas, absent) in expected.items():
            stated = found.get(number, absent)
            if stated != gemmas:
                raise BadModelFile(f"{where}: {name} is {stated!r:.80}, and in Gemma's tokenizers {gemmas!r}")
    return Vocabulary(pieces, np.array(scores, "<f4"), np.array(kinds, np.int32), normalizer.get(SPACE_PREFIX, 1) != 0)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one protobuf message: an integer, or the bytes of anything else."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        wire = key & 7
        if wire == 0:
            integer, at = _read_varint(data, at)
            yield key >> 3, integer
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, at = _read_varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError(f"wire type {wire} at byte {at}" if size is None else f"cut short at byte {at}")
        yield key >> 3, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer, seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("an integer where bytes belong")
    return value


def _as_kind(value: int | bytes) -> int:
    if isinstance(value, bytes) or not NORMAL <= value <= BYTE:
        raise ValueError(f"type {value!r:.20}, and there are 1 to 6")
    return value


@cache
def _piece_head(size: int) -> bytes:
    """What stands before the text of a piece of `size` bytes: its own length, and that of the whole entry."""
    text = b"\x0a" + _varint(size)
    return b"\x0a" + _varint(len(text) + size + 7) + text  # 7: score and kind


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value % 2**64)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
