"""GGUF files damaged at random, and what reading each may do: be refused with one line, or give a header that holds."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma2.checkpoints.gguf import GGUF, read_header
from gemma2.errors import BadModelFile
from tests.gguf_files import KINDS, SCALARS, Entry, File, Raw, array, dimensions, lengthy, small

MOST_SECONDS, MOST_MEMORY = 1.0, 150e6  # for one file; bytes over what the interpreter takes
SMALL = small()
BASES = (
    SMALL,
    SMALL,
    replace(SMALL, version=2),
    replace(SMALL.with_pair("general.alignment", "u32", 64), alignment=64),
    replace(SMALL, tensors=()),
    replace(SMALL, pairs=SMALL.pairs[:1]),
    File(pairs=()),
)
ODD = (0, 1, 2, 3, 7, 8, 13, 31, 32, 33, 63, 64, 255, 256, 4096, 65_535, 65_536, 2**20, 2**22 + 1, 2**31 - 1, 2**31)
WIDE = (2**32 - 1, 2**32, 2**40, 2**40 + 1, 2**61, 2**61 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 8, 2**64 - 1)
TEXTS = ("", "x", "general.alignment", "general.name", "é", "a\0b", "\n", "n" * 63, "n" * 64, "a.weight", "b.weight")
Random = random.Random


def number(rng: Random, bits: int = 64) -> int:
    """An unsigned number of so many bits, mostly one at the edge of something."""
    kind = rng.randrange(4)
    found = rng.randrange(300) if kind == 0 else rng.getrandbits(64) if kind == 1 else rng.choice(ODD + WIDE)
    return found % 2**bits


def text(rng: Random) -> str | bytes:
    return rng.choice((rng.choice(TEXTS), rng.randbytes(rng.randrange(8)), lengthy(number(rng), rng.randbytes(4))))


def some_value(rng: Random) -> tuple[str, Any]:
    """A value of any type, sound or not."""
    match rng.randrange(6):
        case 0:
            kind = rng.choice(list(SCALARS))
            return "", Raw(struct.pack("<I", SCALARS[kind][0]) + rng.randbytes(struct.calcsize(SCALARS[kind][1])))
        case 1:
            return "str", text(rng)
        case 2:
            return "str[]", [text(rng) for _ in range(rng.randrange(5))]
        case 3:
            kind = rng.choice(list(SCALARS))
            count = rng.randrange(9)
            return "", array(SCALARS[kind][0], count, rng.randbytes(count * struct.calcsize(SCALARS[kind][1])))
        case 4:
            return "", array(rng.randrange(15), number(rng), rng.randbytes(rng.randrange(20)))
        case _:
            return "", Raw(struct.pack("<I", number(rng, 32)) + rng.randbytes(rng.randrange(20)))


def another_count(file: File, rng: Random) -> File:
    """Another magic, version, count or byte order."""
    near, far = rng.choice((-1, 1)), number(rng)
    match rng.randrange(5):
        case 0:
            return replace(file, n_tensors=rng.choice((max(0, len(file.tensors) + near), far)))
        case 1:
            return replace(file, n_pairs=rng.choice((max(0, len(file.pairs) + near), far)))
        case 2:
            return replace(file, version=rng.choice((3 + near, number(rng, 32))))
        case 3:
            return replace(file, magic=rng.choice((b"FUGG", b"GGML", rng.randbytes(4))))
        case _:
            return replace(file, order=">")


def another_pair(file: File, rng: Random) -> File:
    pairs = list(file.pairs)
    place = rng.randrange(len(pairs) + 1)
    if place == len(pairs) or rng.randrange(4) == 0:
        pairs.insert(place, (text(rng), *some_value(rng)))
    else:
        key, kind, what = pairs[place]
        pairs[place] = (text(rng), kind, what) if rng.randrange(3) == 0 else (key, *some_value(rng))
    return replace(file, pairs=tuple(pairs))


def another_alignment(file: File, rng: Random) -> File:
    stated = rng.choice((1, 2, 8, 16, 32, 64, number(rng, 32)))
    layout = stated if 0 < stated < 1000 and rng.randrange(2) else file.alignment
    return replace(file.with_pair("general.alignment", "u32", stated), alignment=layout)


def another_order(file: File, rng: Random) -> File:
    """Pairs or tensors fewer, more, or in another order."""
    pairs = rng.randrange(2) == 0
    items: list[Any] = list(file.pairs if pairs else file.tensors)
    if not items:
        return file
    match rng.randrange(3):
        case 0:
            rng.shuffle(items)
        case 1:
            items.pop(rng.randrange(len(items)))
        case _:
            items.insert(rng.randrange(len(items)), rng.choice(items))
    return replace(file, pairs=tuple(items)) if pairs else replace(file, tensors=tuple(items))


def another_tensor(file: File, rng: Random) -> File:
    tensors = list(file.tensors)
    if not tensors or rng.randrange(6) == 0:
        kind = rng.choice(list(KINDS))
        _, values, size = KINDS[kind]
        rows = rng.randrange(1, 5)
        tensors.insert(
            rng.randrange(len(tensors) + 1), Entry(f"x{rows}", (rows, values), kind, rng.randbytes(rows * size))
        )
        return replace(file, tensors=tuple(tensors))
    place = rng.randrange(len(tensors))
    sizes = [rng.choice((number(rng), rng.randrange(70))) for _ in range(rng.randrange(6))]
    data = tensors[place].data
    changes: Sequence[dict[str, Any]] = (
        {"name": text(rng)},
        {"shape": dimensions(rng.choice((len(sizes), number(rng, 32))), *sizes)},
        {"shape": tuple(rng.choice(((96,), (32, 3), (1, 3, 32), (3, 1, 1, 32), (4, 8), (8, 4), (2, 2, 8), (31,))))},
        {"kind": rng.choice((rng.randrange(45), number(rng, 32)))},
        {"offset": rng.choice((number(rng), rng.randrange(10) * 32))},
        {"data": data[: rng.randrange(len(data) + 1)]},
        {"data": data + rng.randbytes(rng.randrange(100))},
    )
    tensors[place] = replace(tensors[place], **rng.choice(changes))
    return replace(file, tensors=tuple(tensors))


def other_bytes(raw: bytearray, rng: Random) -> None:
    """Damage at any place, most of it in the header."""
    place = rng.randrange(min(rng.choice((32, 800, len(raw))), len(raw)) + 1)
    match rng.randrange(8):
        case 0:
            raw[place : place + 1] = bytes([rng.randrange(256)])
        case 1:
            raw[place : place + 1] = bytes([raw[place] ^ 1 << rng.randrange(8)]) if place < len(raw) else b"\0"
        case 2:
            raw[place : place + 4] = struct.pack("<I", number(rng, 32))
        case 3:
            raw[place : place + 8] = struct.pack("<Q", number(rng))
        case 4:
            raw[place:place] = rng.randbytes(rng.randrange(1, 9))
        case 5:
            del raw[place : place + rng.randrange(1, 9)]
        case 6:
            start = rng.randrange(len(raw) + 1)
            raw[place:place] = raw[start : start + rng.randrange(60)]
        case _:
            del raw[place:]


STRUCTURED: tuple[Callable[[File, Random], File], ...] = (
    another_count,
    another_pair,
    another_pair,
    another_alignment,
    another_order,
    another_tensor,
    another_tensor,
    another_tensor,
)


def mutated(seed: int) -> bytes:
    """A file damaged in its fields, in its bytes, or both; the same for the same seed."""
    rng = Random(seed)
    file = rng.choice(BASES)
    fields = rng.choice((0, 1, 1, 1, 2, 3))
    for _ in range(fields):
        file = rng.choice(STRUCTURED)(file, rng)
    raw = bytearray(file.write())
    for _ in range(rng.choice((0, 0, 1, 2)) if fields else rng.choice((1, 1, 2, 4))):
        other_bytes(raw, rng)
    return bytes(raw)


def read(path: Path, raw: bytes) -> GGUF | None:
    """The header of a file of these bytes, or None for a refusal. Anything else that happens is a fault.

    Raises:
        AssertionError: a refusal of more than one line, a header that contradicts the file, or a second of computing.
    """
    path.unlink(missing_ok=True)  # to write over a file takes ten times as long
    path.write_bytes(raw)
    began = time.process_time()
    try:
        found = read_header(path)
    except BadModelFile as error:
        assert str(error).isprintable() and str(path) in str(error), repr(error)
        found = None
    seconds = time.process_time() - began
    assert seconds <= MOST_SECONDS, f"{seconds:.2f} s"
    if found is not None:
        check(found, len(raw))
    return found


def check(header: GGUF, size: int) -> None:
    """Raises AssertionError unless the tensors lie one behind the other up to the end of the file."""
    end = None
    for info in header.tensors.values():
        start = info.offset if end is None else end + -end % header.alignment
        assert info.offset == start and info.offset % header.alignment == 0
        assert info.bytes > 0 and info.bytes % info.type.bytes == 0
        end = info.offset + info.bytes
    assert end is None or end <= size < end + header.alignment
    assert header.bytes == size


@dataclass
class Tally:
    """What became of many files."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0  # seconds

    def __add__(self, other: Tally) -> Tally:
        slowest = max(self.slowest, other.slowest)
        return Tally(self.accepted + other.accepted, self.refused + other.refused, slowest)


def tally(seeds: Iterable[int], folder: Path) -> Tally:
    """Read the files of these seeds, one after another, in `folder`, where one that shows a fault stays.

    Raises:
        Exception: the first fault, with the seed in a note.
    """
    found = Tally()
    path = folder / "mutated.gguf"
    for seed in seeds:
        began = time.perf_counter()
        try:
            accepted = read(path, mutated(seed)) is not None
        except BaseException as error:
            error.add_note(f"seed {seed}, kept as {path}")
            raise
        found += Tally(accepted, not accepted, time.perf_counter() - began)
    return found
