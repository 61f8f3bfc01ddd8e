"""GGUF files cut at every byte, with every byte of the header changed, and damaged at random in fields and bytes."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma2.checkpoints.gguf import GGUF
from tests.gguf_files import small, tiny_model
from tests.hostile.child import ROOT, attempts, complaints, in_a_child
from tests.hostile.gguf_mutations import mutated, read
from tests.hostile.test_gguf_sound import unlike_gguf_py

EVERY_BYTE = "GEMMA2_EVERY_BYTE"  # set in the environment: all values of all bytes of a header, not a sample of 20,000
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
        (info.offset, info.bytes + -info.bytes % to, info.kind.name.removeprefix("B"))
        for info in header.tensors.values()
    ]


def changes(folder: str, every: bool) -> Iterator[dict[str, int]]:
    """Bytes of the header changed one at a time: how many files were refused or accepted, and why the latter may be.

    Raises:
        AssertionError: a file was accepted whose tensors are elsewhere, or are other tensors.
    """
    path = Path(folder, "changed.gguf")
    good = read(path, TENSORS)
    assert good is not None
    places = [(place, byte) for place in range(HEADER) for byte in range(256) if byte != TENSORS[place]]
    counts: Counter[str] = Counter()
    for place, byte in places if every else random.Random(0).sample(places, 20_000):
        found = read(path, b"".join((TENSORS[:place], bytes([byte]), TENSORS[place + 1 :])))
        if found is None:
            counts["refused"] += 1
            continue
        assert lie(found) == lie(good), f"byte {place} is {byte}, and the tensors have moved: {lie(found)}"
        counts["accepted"] += 1
        counts["names"] += list(found.tensors) != list(good.tensors)
        counts["shapes"] += [t.shape for t in found.tensors.values()] != [t.shape for t in good.tensors.values()]
        counts["types"] += [t.kind for t in found.tensors.values()] != [t.kind for t in good.tensors.values()]
        counts["keys"] += list(found.metadata) != list(good.metadata)
        counts["values"] += repr(found.metadata.values()) != repr(good.metadata.values())
        counts["version"] += found.version != good.version
    yield dict(counts)


def test_a_changed_byte_of_a_header_is_refused_or_moves_no_tensor(tmp_path: Path) -> None:
    """What is accepted are other names, shapes, keys and values, which are judged against the model's."""
    [counts] = in_a_child(changes, str(tmp_path), EVERY_BYTE in os.environ, seconds=600)
    assert counts["refused"] + counts["accepted"] >= 20_000
    assert counts["refused"] > counts["accepted"] > 1000
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


def test_what_is_accepted_is_what_gguf_py_reads(tmp_path: Path) -> None:
    found: list[Any] = in_a_child(differences, str(tmp_path), 500, seconds=2)
    assert len(found) == 500
    assert [(seed, unlike) for seed, unlike in found if unlike] == []


def test_twenty_thousand_damaged_files_are_refused_or_sound() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "fuzz_gguf.py"), "--runs", "20000", "--seed", "1000000000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = re.fullmatch(r"20,000 files in .*: ([\d,]+) refused, ([\d,]+) accepted; .*\n", done.stdout)
    assert counts is not None, done.stdout
    assert all(int(count.replace(",", "")) > 1000 for count in counts.groups())
