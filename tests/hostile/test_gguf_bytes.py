"""GGUF files cut at every byte, with every byte of the header changed, and damaged at random in fields and bytes."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gemma2
from gemma2.checkpoints.gguf import GGUF, read_header
from tests.conftest import some_of
from tests.gguf_files import small, tiny_model
from tests.hostile.child import ROOT, attempts, complaints, in_a_child
from tests.hostile.gguf_mutations import mutated, read
from tests.hostile.test_gguf_sound import unlike_gguf_py

EVERY_BYTE = "GEMMA2_EVERY_BYTE"  # set in the environment: all values of all bytes of a header, not a sample
SAMPLED = 20_000
TENSORS, VOCABULARY = small().write(), replace(small(), tensors=()).write()
HEADER = len(small().header()) + -len(small().header()) % 32  # with the padding before the data


def cuts(folder: str) -> Iterator[tuple[int, int]]:
    """Each size to which a file is cut and that is read all the same, and the whole size."""
    for whole in (TENSORS, VOCABULARY):
        for size in range(len(whole)):
            if read(Path(folder, "cut.gguf"), whole[:size]) is not None:
                yield size, len(whole)
        assert read(Path(folder, "whole.gguf"), whole) is not None
    yield 0, 0  # the end is reached


@pytest.mark.long
def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    assert len(TENSORS) > 1000 and len(VOCABULARY) > 500
    assert in_a_child(cuts, str(tmp_path), seconds=60) == [[0, 0]]


def test_a_model_cut_anywhere_is_refused_at_once(tmp_path: Path) -> None:
    whole = tiny_model("Q4_0").write()
    rng = random.Random(0)
    sizes = sorted({*rng.sample(range(1, len(whole)), 100), len(whole) - 1, len(whole) - 32})
    paths = [tmp_path / f"{size}.gguf" for size in sizes]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(whole[:size])
    found = in_a_child(attempts, [str(path) for path in paths])
    short = {path.name: complaints(attempt, path, "") for path, attempt in zip(paths, found, strict=True)}
    assert {name: said for name, said in short.items() if said} == {}


def lie(header: GGUF) -> list[tuple[int, int, str]]:
    """Where the data of each tensor lies, padding included, and as what; F16 and BF16 cannot be told apart."""
    to = header.alignment
    return [
        (info.offset, info.bytes + -info.bytes % to, info.type.name.removeprefix("B"))
        for info in header.tensors.values()
    ]


def changes(folder: str, every: bool) -> Iterator[dict[str, int]]:
    """Bytes of the header changed one at a time: how many files were refused, how many accepted, and why.

    Raises:
        AssertionError: a file was accepted whose tensors are elsewhere, or are other tensors.
    """
    path = Path(folder, "changed.gguf")
    good = read(path, TENSORS)
    assert good is not None
    places = [(place, byte) for place in range(HEADER) for byte in range(256) if byte != TENSORS[place]]
    counts: Counter[str] = Counter()
    for place, byte in places if every else random.Random(0).sample(places, some_of(SAMPLED)):
        found = read(path, b"".join((TENSORS[:place], bytes([byte]), TENSORS[place + 1 :])))
        if found is None:
            counts["refused"] += 1
            continue
        assert lie(found) == lie(good), f"byte {place} is {byte}, and the tensors have moved: {lie(found)}"
        counts["accepted"] += 1
        counts["names"] += list(found.tensors) != list(good.tensors)
        counts["shapes"] += [t.shape for t in found.tensors.values()] != [t.shape for t in good.tensors.values()]
        counts["types"] += [t.type for t in found.tensors.values()] != [t.type for t in good.tensors.values()]
        counts["keys"] += list(found.metadata) != list(good.metadata)
        counts["values"] += repr(found.metadata.values()) != repr(good.metadata.values())
        counts["version"] += found.version != good.version
    yield dict(counts)


@pytest.mark.long
def test_a_changed_byte_of_a_header_is_refused_or_moves_no_tensor(tmp_path: Path) -> None:
    """What is accepted are other names, shapes, keys and values, which are judged against the model's."""
    [counts] = in_a_child(changes, str(tmp_path), EVERY_BYTE in os.environ, seconds=600)
    count = some_of(SAMPLED)
    assert counts["refused"] + counts["accepted"] >= count
    assert counts["refused"] > counts["accepted"] > count // 20
    said = sum(counts[what] for what in ("names", "shapes", "types", "keys", "values", "version"))
    assert said >= counts["accepted"], "a change of the header that changed nothing that is read from it"
    assert counts["types"] <= 100 and counts["version"] <= 1


def differences(folder: str, count: int) -> Iterator[tuple[int, list[str]]]:
    """Of so many damaged files that are accepted, with their seeds, what gguf-py reads differently."""
    path, seed = Path(folder, "accepted.gguf"), 0
    while count:
        if read(path, mutated(seed)) is not None:
            yield seed, unlike_gguf_py(path)
            count -= 1
        seed += 1


@pytest.mark.long
def test_what_is_accepted_is_what_gguf_py_reads(tmp_path: Path) -> None:
    found: list[Any] = in_a_child(differences, str(tmp_path), 500, seconds=2)
    assert len(found) == 500
    assert [(seed, unlike) for seed, unlike in found if unlike] == []


@pytest.mark.long
def test_damaged_files_are_refused_or_sound() -> None:
    runs = some_of(20_000)
    command = [sys.executable, str(ROOT / "scripts" / "fuzz_gguf.py"), "--runs", str(runs), "--seed", "1000000000"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    counts = re.fullmatch(rf"{runs:,} files in .*: ([\d,]+) refused, ([\d,]+) accepted; .*\n", done.stdout)
    assert counts is not None, done.stdout
    assert all(int(count.replace(",", "")) > runs // 20 for count in counts.groups())


FAR = struct.pack("<Q", 2**63)
KEY_AT, NAME_AT = TENSORS.index(b"general.name"), TENSORS.index(b"b.weight")
FIELDS = {  # field -> the byte where it begins, and what stands there in place of the right thing
    "magic": (0, b"GGML"),
    "version": (4, struct.pack("<I", 9)),
    "tensor count": (8, FAR),
    "key/value count": (16, FAR),
    "key length": (KEY_AT - 8, FAR),
    "key": (KEY_AT, b"general\xff"),
    "value type": (KEY_AT + 12, struct.pack("<I", 99)),
    "text length": (KEY_AT + 16, FAR),
    "text": (KEY_AT + 24, b"\xff"),
    "length of an array": (TENSORS.index(b"tokens") + 6 + 8, FAR),
    "length of its second element": (TENSORS.index(b"<eos>") - 8, FAR),
    "its second element": (TENSORS.index(b"<eos>"), b"\xff"),
    "flag": (TENSORS.index(b"add_bos_token") + 13 + 4, b"\7"),
    "name length": (NAME_AT - 8, FAR),
    "name": (NAME_AT, b"\xff"),
    "dimensions": (NAME_AT + 8, struct.pack("<I", 9)),
    "shape": (NAME_AT + 12, bytes(8)),
    "type": (NAME_AT + 28, struct.pack("<I", 99)),
    "offset": (NAME_AT + 32, FAR),
    "what lies behind the last tensor": (len(TENSORS), bytes(100)),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_refusal_names_the_byte_where_the_field_begins(field: str, tmp_path: Path) -> None:
    place, wrong = FIELDS[field]
    path = tmp_path / "wrong.gguf"
    path.write_bytes(TENSORS[:place] + wrong + TENSORS[place + len(wrong) :])
    with pytest.raises(gemma2.BadModelFile, match=rf"wrong\.gguf: byte {place:,}: "):
        read_header(path)


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="no file here that can be opened and not be read")
def test_a_file_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(gemma2.BadModelFile, match=r"/proc/self/mem: cannot be read \(Input/output error\)"):
        read_header("/proc/self/mem")
