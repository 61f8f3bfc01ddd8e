"""SentencePiece models that must not load. The parser is C++, so they are read in a forked child: none may crash it."""

from __future__ import annotations

import math
import os
import random
import struct
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from gemma2 import BadModelFile, Tokenizer
from gemma2.load import POCKET
from gemma2.tokenizer import NAMES
from tests.conftest import some_of

GOOD = (POCKET / "tokenizer.model").read_bytes()
Field = tuple[int, int, Any]  # number, wire type, value

pytestmark = pytest.mark.posix  # a crash must not end the test run, so each file is tried in a fork


# Protocol buffers, as far as sentencepiece_model.proto needs them.


def varint(n: int) -> bytes:
    out = bytearray()
    while n >= 128:
        out.append(n % 128 + 128)
        n //= 128
    return bytes([*out, n])


def parse(raw: bytes) -> list[Field]:
    fields: list[Field] = []
    at = 0

    def number() -> int:
        nonlocal at
        n = shift = 0
        while True:
            byte, at = raw[at], at + 1
            n, shift = n | (byte & 127) << shift, shift + 7
            if byte < 128:
                return n

    while at < len(raw):
        key = number()
        if key % 8 == 0:
            fields.append((key // 8, 0, number()))
        else:
            size = {1: 8, 2: None, 5: 4}[key % 8]
            size = number() if size is None else size
            fields.append((key // 8, key % 8, raw[at : at + size]))
            at += size
    return fields


def write(fields: Iterable[Field]) -> bytes:
    out = b""
    for number, wire, value in fields:
        out += varint(number * 8 + wire)
        out += varint(value) if wire == 0 else varint(len(value)) + value if wire == 2 else value
    return out


def piece(text: bytes, score: float = -1.0, kind: int = 1) -> Field:
    return (1, 2, write([(1, 2, text), (2, 5, struct.pack("<f", score)), (3, 0, kind)]))


PIECES = [value for number, _, value in parse(GOOD) if number == 1]
REST = [field for field in parse(GOOD) if field[0] != 1]
BYTES = next(i for i, raw in enumerate(PIECES) if b"<0x00>" in raw)


def model(change: Callable[[list[Field]], list[Field]] = lambda pieces: pieces, rest: list[Field] = REST) -> bytes:
    return write([*change([(1, 2, raw) for raw in PIECES]), *rest])


def at(index: int, *new: Field) -> bytes:
    """The good model with one piece replaced, by any number of others."""
    return model(lambda pieces: [*pieces[:index], *new, *pieces[index + 1 :]])


def trainer(*changes: Field) -> bytes:
    numbers = {number for number, _, _ in changes}
    spec = [field for field in parse(REST[0][2]) if field[0] not in numbers]
    return model(rest=[(2, 2, write([*spec, *changes])), *REST[1:]])


def normalizer(*changes: Field) -> bytes:
    return model(rest=[REST[0], (3, 2, write([*parse(REST[1][2]), *changes]))])


# How the cases end: `reason` is part of the message.
NOT = "not a SentencePiece model ("
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty file, expected a SentencePiece model"),
    "LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "one byte": (lambda: b"\x0a", NOT),
    "a NUL": (lambda: b"\0", NOT),
    "zeros": (lambda: bytes(1000), NOT),
    "noise": (lambda: random.Random(0).randbytes(1000), NOT),
    "HTML": (lambda: b"<!DOCTYPE html><html>", NOT),
    "JSON": (lambda: b'{"version": "1.0", "model": {"type": "BPE"}}', NOT),
    "a zip": (lambda: b"PK\3\4" + bytes(100), NOT),
    "GGUF": (lambda: b"GGUF\3\0\0\0" + bytes(64), NOT),
    "a byte short": (lambda: GOOD[:-1], NOT),
    "cut in half": (lambda: GOOD[: len(GOOD) // 2], NOT),
    "cut to ten bytes": (lambda: GOOD[:10], NOT),
    "a byte in front": (lambda: b"\xff" + GOOD, NOT),
    "a byte after": (lambda: GOOD + b"\x0a", NOT),
    "length beyond the end": (lambda: b"\x0a" + varint(2**40) + GOOD[2:], NOT),
    "length of ten bytes": (lambda: b"\x0a" + b"\xff" * 9 + b"\x01" + GOOD[2:], NOT),
    "endless varint": (lambda: b"\xff" * 100, NOT),
    "nested groups": (lambda: b"\x0b" * 10_000, NOT),
    "only pieces": (lambda: model(rest=[]), "not a SentencePiece model (INTERNAL: byte piece <0x00> is found although"),
    "no pieces": (lambda: model(lambda pieces: []), NOT),
    "no <unk>": (lambda: at(3), "<unk> is piece none, but the model declares piece none as unk"),
    "no <pad>": (lambda: at(0), "<pad> is piece none, but"),
    "no <eos>": (lambda: at(1), "<eos> is piece none, but"),
    "no <bos>": (lambda: at(2), "<bos> is piece none, but"),
    "two unknowns": (lambda: at(4, piece(b"<unk2>", 0, 2)), NOT),
    "<bos> an ordinary piece": (
        lambda: at(2, piece(b"<bos>", 0, 1)),
        "<bos> is piece 2, but the model declares piece none as bos",
    ),
    "<eos> typed by anyone": (
        lambda: at(1, piece(b"<eos>", 0, 4)),
        "<eos> is piece 1, but the model declares piece none as eos",
    ),
    "<bos> called <s>": (lambda: at(2, piece(b"<s>", 0, 3)), NOT),
    "bos declared elsewhere": (
        lambda: trainer((46, 2, b"<eos>")),
        "<bos> is piece 2, but the model declares piece 1 as bos",
    ),
    "eos declared nowhere": (
        lambda: trainer((47, 2, b"</s>")),
        "<eos> is piece 1, but the model declares piece none as eos",
    ),
    "a piece twice": (lambda: at(4000, piece(b"<mask>")), NOT),
    "a piece empty": (lambda: at(4000, piece(b"")), NOT),
    "a piece with a NUL": (lambda: at(4000, piece(b"a\0b")), NOT),
    "a piece not UTF-8": (lambda: at(4000, piece(b"\xff\xfe")), NOT),
    "a piece of 100,000 bytes": (lambda: at(4000, piece(b"x" * 100_000)), NOT),
    "a surrogate in a piece": (lambda: at(4000, piece(b"\xed\xa0\x80")), NOT),
    "a score NaN": (lambda: at(4000, piece(b"odd", math.nan)), "scores that are NaN or infinite"),
    "a score infinite": (lambda: at(4000, piece(b"odd", math.inf)), "scores that are NaN or infinite"),
    "a score minus infinity": (lambda: at(4000, piece(b"odd", -math.inf)), "scores that are NaN or infinite"),
    "a byte piece missing": (lambda: at(BYTES + 65), NOT),
    "a byte piece ordinary": (lambda: at(BYTES + 65, piece(b"<0x41>")), NOT),
    "a byte piece twice": (lambda: at(BYTES + 65, piece(b"<0x42>", 0, 6)), NOT),
    "all byte pieces missing": (lambda: model(lambda p: [*p[:BYTES], *p[BYTES + 256 :]]), NOT),
    "no byte pieces, no fallback": (
        lambda: write([*[(1, 2, raw) for raw in PIECES if b"<0x" not in raw], *parse(trainer((35, 0, 0)))[-2:]]),
        "no byte piece for 256 of 256 bytes, first <0x00>",
    ),
    "a byte piece of no byte": (lambda: at(4000, piece(b"<0xZZ>", 0, 6)), NOT),
    "broken character map": (lambda: normalizer((2, 2, b"\x01\0\0\0")), NOT),
    "character map too long": (lambda: normalizer((2, 2, b"\xff\xff\xff\x7f" + bytes(64))), NOT),
    "character map of noise": (lambda: normalizer((2, 2, b"\0\1\0\0" + random.Random(1).randbytes(256))), NOT),
}


def attempt(raw: bytes) -> str:
    """What loading and then using a model gives: "loaded", the refusal, or how it broke its promise."""
    try:
        words = Tokenizer(raw, where="odd.model")
    except BadModelFile as error:
        return str(error)
    pieces = words._pieces
    for name in ("pad", "eos", "bos", "unk"):
        assert pieces.id_to_piece(words.special[name]) == f"<{name}>" or words.special[name] == NAMES.index(name)
        assert pieces.is_unknown(words.special[name]) if name == "unk" else pieces.is_control(words.special[name])
    names = [pieces.id_to_piece(i) for i in range(len(words))]
    assert len(set(names)) == len(names)
    assert all(pieces.is_byte(names.index(f"<0x{byte:02X}>")) for byte in range(256))
    assert all(math.isfinite(pieces.get_score(i)) for i in range(len(words)))
    ids = words.encode("In the beginning, 日本\n<eos> 🙂" * 3)
    assert ids[0] == words.special["bos"] and not {words.special["bos"], words.special["eos"]} & set(ids[1:])
    words.decode(range(len(words)))
    return "loaded"


def in_a_child(cases: list[bytes]) -> Iterator[str]:
    """`attempt` of each, made in one forked process; a signal shows as the result of the case that raised it."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        try:
            with os.fdopen(sink, "w", encoding="utf-8", errors="backslashreplace") as out:
                for raw in cases:
                    try:
                        result = attempt(raw)
                    except BaseException:
                        result = traceback.format_exc()
                    print(" ".join(result.split()), file=out, flush=True)
        finally:
            os._exit(0)
    os.close(sink)
    with os.fdopen(source, encoding="utf-8") as results:
        said = results.read().splitlines()
    _, status = os.waitpid(child, 0)
    yield from said
    if len(said) < len(cases):
        yield f"the child ended with status {status}"


def test_the_good_model_survives_being_taken_apart() -> None:
    assert model() == GOOD
    assert list(in_a_child([model()])) == ["loaded"]


def test_hand_made_bad_models_are_refused_with_the_reason() -> None:
    results = list(in_a_child([make() for make, _ in BAD.values()]))
    wrong = {
        case: (reason, result)
        for (case, (_, reason)), result in zip(BAD.items(), results, strict=False)
        if not result.startswith(f"odd.model: {reason}")
    }
    assert not wrong
    assert len(results) == len(BAD) >= 36


def mutated(seed: int) -> bytes:
    """The good model, damaged at random: by fields, so that most is still read, or anywhere in its bytes."""
    rng = random.Random(seed)
    if seed % 2:
        return model(lambda pieces: with_odd_pieces(pieces, rng))
    raw = bytearray(GOOD)
    settings = len(GOOD) - len(write(REST))
    for _ in range(rng.choice((1, 1, 2, 5))):
        start, stop = rng.choice(((0, len(raw)), (0, 100), (settings, len(raw)), (len(raw) - 60, len(raw))))
        place, size = rng.randrange(start, stop), rng.choice((1, 1, 4, 30))
        raw[place : place + rng.choice((0, size, size))] = rng.choice((b"", rng.randbytes(size), bytes(size)))
    return bytes(raw)


def with_odd_pieces(pieces: list[Field], rng: random.Random) -> list[Field]:
    pieces = list(pieces)
    for _ in range(rng.choice((1, 1, 3, 20))):
        place = rng.choice((rng.randrange(8), BYTES + rng.randrange(256), rng.randrange(len(pieces))))
        other = rng.randrange(len(pieces))
        match rng.randrange(6):
            case 0:
                fields = parse(pieces[place][2])
                fields[0] = (
                    1,
                    2,
                    rng.choice((rng.randbytes(3), "日本🙂".encode(), b"a" * 5000, b"<bos>", b" ", b"~~")),
                )
                pieces[place] = (1, 2, write(fields))
            case 1:
                pieces[place] = (1, 2, write([*parse(pieces[place][2])[:1], (2, 5, rng.randbytes(4))]))
            case 2:
                pieces[place] = (1, 2, pieces[place][2] + write([(3, 0, rng.randrange(1, 9))]))
            case 3:
                del pieces[place]
            case 4:
                pieces[place], pieces[other] = pieces[other], pieces[place]
            case _:
                pieces.insert(place, piece(rng.randbytes(2).hex().encode(), rng.uniform(-10, 10)))
    return pieces


@pytest.mark.long
def test_mutated_models_are_refused_or_keep_every_promise() -> None:
    count = some_of(3000)
    results = list(in_a_child([mutated(seed) for seed in range(count)]))
    refusals = [result for result in results if result.startswith("odd.model: ")]
    loaded = [result for result in results if result == "loaded"]
    assert [result for result in results if result not in (*refusals, *loaded)] == []
    assert len(results) == count
    assert len(refusals) > count // 30 and len(loaded) > count // 60  # both ends are reached
