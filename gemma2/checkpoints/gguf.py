"""The GGUF container, read strictly: one pass over the header, and nothing believed before it is checked.

Layout (ggml's docs/gguf.md): magic, version, two counts; key/value pairs; tensor descriptions; padding; tensor data.
The rules are those of llama.cpp's own reader and a few more, because a header that is wrong and accepted gives wrong
weights without a word: every length is checked before it is read, and every tensor must lie exactly where the one
before it ends.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from gemma2.checkpoints.foreign import refuse_foreign
from gemma2.checkpoints.ggml import TYPES, GGMLType
from gemma2.errors import BadModelFile

VERSIONS = (2, 3)
# What a header may cost: the worst that these allow takes a second and 150 MB. Gemma's 256,000 pieces need 6 MB.
MOST_HEADER = 24 * 2**20  # bytes
MOST_ENTRIES, MOST_ELEMENTS = 2**16, 2**22  # key/value pairs or tensors; values of one array
MOST_STRINGS = 2**20  # in all arrays together
CHUNK = 2**20  # bytes, read at once of an array of strings
MOST_KEY, MOST_TEXT, MOST_PIECE, MOST_NAME = 2**16 - 1, 2**24, 2**16, 63  # bytes
MOST_DIMENSION, MOST_ALIGNMENT = 2**40, 2**20
ALIGNMENT = "general.alignment"

STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {  # GGUF's number of a value type -> its name here, and numpy's
    0: ("u8", "<u1"),
    1: ("i8", "<i1"),
    2: ("u16", "<u2"),
    3: ("i16", "<i2"),
    4: ("u32", "<u4"),
    5: ("i32", "<i4"),
    6: ("f32", "<f4"),
    BOOL: ("bool", "<u1"),
    10: ("u64", "<u8"),
    11: ("i64", "<i8"),
    12: ("f64", "<f8"),
}
INTEGER, FLOAT = ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"), ("f32", "f64")
# ggml types that hold no weights of a model, or that no file has any more: known only to be named in a refusal.
REFUSED = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    41: "Q1_0",
}
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class Value:
    """One metadata value. `type` is u8 ... f64, bool, str, or one of them with [] behind it: an array (numpy's for
    numbers, a list for strings)."""

    type: str
    value: Any

    def __str__(self) -> str:
        """For a message: short, and in one line."""
        shown = f"an array of {len(self.value):,}" if self.type.endswith("[]") else repr(self.value)[:80]
        return f"{shown} ({self.type})"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` is row-major, as in PyTorch (the file states it the other way round)."""

    shape: tuple[int, ...]
    type: GGMLType
    path: Path
    offset: int  # bytes from the start of the file

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, the last axis: always whole blocks."""
        return self.shape[-1] // self.type.values * self.type.bytes

    @property
    def bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes  # in Python's integers: no size wraps around


@dataclass(frozen=True)
class GGUF:
    """A file's header, or that of all parts of a split one."""

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    bytes: int  # of all parts, as on disk


def read_header(path: str | Path) -> GGUF:
    """Read and check the header of one `.gguf` file. Tensor data is neither read nor mapped.

    Raises:
        BadModelFile: not a GGUF, one of another byte order or version, damaged, truncated, or made to exhaust memory;
            names the byte and the field, what stands there and what may.
    """
    path = Path(path)
    if not path.is_file() and not path.is_dir():  # a pipe would never end
        raise BadModelFile(f"{path}: no such file")
    try:
        refuse_foreign(path)
        with path.open("rb") as file:
            return _Header(path, file, os.fstat(file.fileno()).st_size).read()
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read ({error.strerror})") from None


def read_parts(path: str | Path) -> GGUF:
    """Read and check the header of a `.gguf` file, or of all parts of a split one (`model-00001-of-00003.gguf`), by the
    path of any part.

    Raises:
        BadModelFile: as `read_header`; or a part that is missing, named so; or parts that do not belong together.
    """
    path = Path(path)
    named = PART.fullmatch(path.name)
    if named is None:
        whole = read_header(path)
        count = _stated(whole, "split.count", 1)
        if count > 1:
            raise BadModelFile(
                f"{path}: one of {count} parts, so its name must end in -00001-of-{count:05d}.gguf, as the others' do"
            )
        return whole
    count = int(named["count"])
    if not 1 <= int(named["number"]) <= count:
        raise BadModelFile(f"{path}: there is no part {int(named['number'])} of {count}")
    names = [f"{named['stem']}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    present = set(os.listdir(path.parent))
    absent = [name for name in names if name not in present]
    if absent:
        raise BadModelFile(f"{path}: {len(absent):,} of {count:,} parts missing: {', '.join(absent[:5])}")
    parts = [read_header(path.with_name(name)) for name in names]
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        for key, expected in (("split.count", count), ("split.no", number)):  # split.no counts from 0
            found = _stated(part, key, -1)
            if found != expected:
                shown = found if key in part.metadata else "missing"
                raise BadModelFile(
                    f"{part.path}: named part {number + 1} of {count}, but {key} is {shown} and not {expected}"
                )
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise BadModelFile(f"{part.path}: tensor {min(twice)!r} is also in an earlier part")
        tensors.update(part.tensors)
    total = _stated(parts[0], "split.tensors.count", len(tensors))
    if total != len(tensors):
        raise BadModelFile(f"{path}: its parts hold {len(tensors)} tensors, split.tensors.count states {total}")
    first = parts[0]
    return GGUF(first.path, first.version, first.alignment, first.metadata, tensors, sum(part.bytes for part in parts))


def _stated(header: GGUF, key: str, absent: int) -> int:
    found = header.metadata.get(key, Value("i32", absent))
    if found.type not in INTEGER:
        raise BadModelFile(f"{header.path}: {key} is {found}, and must be an integer")
    return int(found.value)


class _Header:
    """One pass over a header. `at` is the position in the file; `field` is where the last field began, for messages."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.at, self.field = path, file, size, 0, 0
        self.strings = 0  # in arrays, so far

    def read(self) -> GGUF:
        version = self._preamble()
        n_tensors = self._count("tensor count", MOST_ENTRIES, 24)
        n_pairs = self._count("key/value count", MOST_ENTRIES, 13)
        metadata: dict[str, Value] = {}
        for _ in range(n_pairs):
            key = self._text("key", 1, MOST_KEY)
            if "\0" in key:
                self._refuse(f"key {key[:80]!r} has a NUL in it")
            if key in metadata:
                self._refuse(f"key {key[:80]!r} appears twice")
            metadata[key] = self._value(f"value of {key[:80]!r}")
        alignment = self._alignment(metadata.get(ALIGNMENT))
        described = [self._tensor() for _ in range(n_tensors)]
        start = self._padding(alignment)
        tensors: dict[str, TensorInfo] = {}
        end = 0  # of the tensor before, from `start`
        for name, shape, type, offset, self.field in described:
            if name in tensors:
                self._refuse(f"tensor {name!r} appears twice")
            # The data must begin here: anywhere else would be an overlap, a gap or a misalignment.
            expected = -(-end // alignment) * alignment
            if offset != expected:
                self._refuse(f"tensor {name!r} has offset {offset:,}, and must have {expected:,}")
            tensors[name] = TensorInfo(shape, type, self.path, start + offset)
            end = offset + tensors[name].bytes
            if start + end > self.size:
                self._refuse(
                    f"tensor {name!r} ends at byte {start + end:,}, but the file ends at {self.size:,}: "
                    "cut short, so download or copy it again"
                )
        self.field = start + end
        if self.size - self.field >= alignment:
            self._refuse(f"{self.size - self.field:,} bytes after the last tensor, which no tensor accounts for")
        return GGUF(self.path, version, alignment, metadata, tensors, self.size)

    def _preamble(self) -> int:
        if self.size < 24:
            self._refuse(f"{self.size} bytes are not a GGUF file: the shortest header has 24")
        magic = self._take(4, "magic")
        if magic == b"FUGG":
            self._refuse("a big-endian GGUF file; convert it to little-endian with gguf-py's gguf-convert-endian")
        if magic != b"GGUF":
            self._refuse(f"not a GGUF file: it begins with {magic!r}")
        raw = self._take(4, "version")
        version: int = struct.unpack("<I", raw)[0]
        if version not in VERSIONS and struct.unpack(">I", raw)[0] in range(1, 256):
            self._refuse("a big-endian GGUF file; convert it to little-endian with gguf-py's gguf-convert-endian")
        if version not in VERSIONS:
            self._refuse(f"GGUF version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read")
        return version

    def _value(self, what: str) -> Value:
        number = self._u32(f"type of {what}")
        if number == STRING:
            return Value("str", self._text(what, 0, MOST_TEXT))
        if number != ARRAY:
            name, values = self._numbers(number, 1, what)
            return Value(name, values[0].item() if name != "bool" else bool(values[0]))
        element = self._u32(f"element type of {what}")
        if element == ARRAY:
            self._refuse(f"{what} is an array of arrays, which no model file has")
        if element == STRING:
            return Value("str[]", self._texts(self._count(f"length of {what}", MOST_STRINGS, 8), what))
        count = self._u64(f"length of {what}")
        name, array = self._numbers(element, count, what)
        return Value(f"{name}[]", array.astype(bool) if name == "bool" else array)

    def _numbers(self, number: int, count: int, what: str) -> tuple[str, Any]:
        if number not in NUMBERS:
            self._refuse(f"{what} has value type {number}, and there are only types 0 to 12")
        name, dtype = NUMBERS[number]
        if count > MOST_ELEMENTS:
            self._refuse(f"{what} has {count:,} elements, more than {MOST_ELEMENTS:,}")
        found = np.frombuffer(self._take(count * np.dtype(dtype).itemsize, what), dtype)
        if number == BOOL and count and found.max() > 1:
            self._refuse(f"{what} is a bool of value {found.max()}, neither 0 nor 1")
        return name, found

    def _alignment(self, stated: Value | None) -> int:
        if stated is None:
            return 32
        fits = stated.type == "u32" and 1 <= stated.value <= MOST_ALIGNMENT and stated.value & (stated.value - 1) == 0
        if not fits:
            self._refuse(f"{ALIGNMENT} is {stated}; it must be a u32 power of two up to {MOST_ALIGNMENT:,}")
        return int(stated.value)

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLType, int, int]:
        """Name, shape, type, offset and where the offset stands."""
        name = self._text("tensor name", 1, MOST_NAME)
        if "\0" in name:
            self._refuse(f"tensor name {name!r} has a NUL in it")
        n = self._u32("number of dimensions")
        if not 1 <= n <= 4:
            self._refuse(f"tensor {name!r} has {n} dimensions, and ggml has 1 to 4")
        described = self._take(8 * n + 12, f"shape, type and offset of {name!r}")
        *sizes, number, offset = struct.unpack(f"<{n}QIQ", described)
        if not all(1 <= size <= MOST_DIMENSION for size in sizes):
            self._refuse(f"tensor {name!r} has shape {sizes}; each size must be 1 to 2^40")
        self.field = self.at - 12
        if number not in TYPES:
            known = REFUSED.get(number)
            self._refuse(
                f"tensor {name!r} is of ggml type {number}"
                + (f" ({known}), a type that holds no weights" if known else ", a type that this program does not know")
            )
        type = TYPES[number]
        if sizes[0] % type.values:
            self._refuse(
                f"tensor {name!r} has rows of {sizes[0]}, not a whole number of {type.name} blocks of {type.values}"
            )
        return name, tuple(reversed(sizes)), type, offset, self.at - 8

    def _padding(self, alignment: int) -> int:
        """Where tensor data begins. The bytes up to there are zero, unless the header counts too few tensors."""
        start = -(-self.at // alignment) * alignment
        # A file without tensors may end with its header.
        found = self._take(min(start, self.size) - self.at, "padding before the data")
        if found.strip(b"\0"):
            self._refuse("the padding before the tensor data is not zero: the header describes less than it holds")
        return start

    def _text(self, what: str, least: int, most: int) -> str:
        size = self._u64(f"length of {what}")
        if not least <= size <= most:
            self._refuse(f"{what} is {size:,} bytes long, and {least} to {most:,} are allowed")
        raw = self._take(size, what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._refuse(f"{what} is not UTF-8: {raw[:40]!r}")

    def _texts(self, count: int, what: str) -> list[str]:
        """The strings of an array. A vocabulary has 256,000, so each is named only where it is refused."""
        self.strings += count
        if self.strings > MOST_STRINGS:
            self._refuse(f"{what} makes {self.strings:,} strings in arrays, and {MOST_STRINGS:,} are taken")
        texts: list[str] = []
        end, unpack = min(self.size, MOST_HEADER), struct.Struct("<Q").unpack_from
        chunk, position, near_end = b"", 0, -1
        for i in range(count):
            if position > near_end:  # the next string may go beyond this chunk
                self.at += position
                self.file.seek(self.at)
                chunk, position = self.file.read(min(CHUNK, end - self.at)), 0
                near_end = len(chunk) - (8 + MOST_PIECE if self.at + len(chunk) < end else 0)
            try:
                (size,) = unpack(chunk, position)
                stop = position + 8 + size
                if size > MOST_PIECE or stop > len(chunk):
                    raise ValueError
                texts.append(chunk[position + 8 : stop].decode())
                position = stop
            except (ValueError, struct.error):
                self.at += position
                self.file.seek(self.at)
                self._text(f"element {i} of {what}", 0, MOST_PIECE)  # says what is wrong with it
                self._refuse("the file has changed while it was read")
        self.at += position
        self.file.seek(self.at)
        return texts

    def _count(self, what: str, most: int, least_bytes: int) -> int:
        """A count of things that take at least so many bytes each, so the file's size bounds it."""
        found = self._u64(what)
        if found > most or found * least_bytes > self.size - self.at:
            self._refuse(f"{what} is {found:,}, and {self.size - self.at:,} bytes follow (at most {most:,} are taken)")
        return found

    def _u32(self, what: str) -> int:
        return int.from_bytes(self._take(4, what), "little")

    def _u64(self, what: str) -> int:
        return int.from_bytes(self._take(8, what), "little")

    def _take(self, size: int, what: str) -> bytes:
        self.field = self.at
        if size > self.size - self.at:
            self._refuse(f"{what} needs {size:,} bytes, and {self.size - self.at:,} are left: cut short or damaged")
        if self.at + size > MOST_HEADER:
            self._refuse(f"a header beyond {MOST_HEADER:,} bytes")
        raw = self.file.read(size)
        if len(raw) != size:
            self._refuse(f"{what} could not be read: the file has become shorter")
        self.at += size
        return raw

    def _refuse(self, why: str) -> NoReturn:
        raise BadModelFile(f"{self.path}: byte {self.field:,}: {why}")
