"""What reading a header costs: little for a real one, and never more than a second and 150 MB."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from gemma2.checkpoints.gguf import CHUNK, MOST_HEADER, read_header
from gemma2.errors import BadModelFile
from tests.conftest import SHARED
from tests.gguf_files import Entry, File, array, small, string, tiny_model
from tests.hostile.child import attempts, complaints, in_a_child, memory

OFFICIAL = SHARED / "data" / "gemma2-tokenizer" / "vocab-official.gguf"
PIECES = 256_000  # of Gemma 2's tokenizer


def costs(paths: list[str]) -> Iterator[tuple[float, int, int]]:
    """For each header the seconds of computing and the bytes over import at the peak so far, and its pieces."""
    start = memory("VmRSS")
    for path in paths:
        began = time.process_time()
        header = read_header(path)
        seconds = time.process_time() - began
        tokens = header.metadata.get("tokenizer.ggml.tokens")
        yield seconds, memory("VmHWM") - start, len(tokens.value) if tokens else 0
        del header, tokens


@cache
def vocabulary() -> File:
    """As much as the converter writes for Gemma 2: pieces of two to twenty bytes, not all of them Latin."""
    pieces = [f"▁{i:x}" if i % 2 else f"{i**3:x}" for i in range(PIECES)]
    return (
        replace(small(), tensors=())
        .with_pair("tokenizer.ggml.tokens", "str[]", pieces)
        .with_pair("tokenizer.ggml.scores", "f32[]", [float(-i) for i in range(PIECES)])
        .with_pair("tokenizer.ggml.token_type", "i32[]", [1] * PIECES)
    )


@pytest.mark.long
def test_256_000_pieces_are_read_in_a_second_and_64_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(vocabulary().write())
    assert 5e6 < path.stat().st_size < 8e6
    [(seconds, grown, pieces)] = in_a_child(costs, [str(path)])
    assert pieces == PIECES
    assert seconds <= 1.0 and grown <= 64e6, (seconds, grown)


def test_every_piece_is_read_where_the_file_is_read_in_chunks(tmp_path: Path) -> None:
    """A chunk is a megabyte; these pieces are up to 64 kB long, so that they lie across its end in every way."""
    rng = random.Random(0)
    pieces = ["é" * rng.choice((0, 1, 5, 3000, 32_768)) for _ in range(800)]
    file = small().with_pair("tokenizer.ggml.tokens", "str[]", pieces)
    path = tmp_path / "long.gguf"
    path.write_bytes(file.write())
    assert path.stat().st_size > 10 * CHUNK
    found = read_header(path)
    assert found.metadata["tokenizer.ggml.tokens"].value == pieces
    assert list(found.metadata) == [key for key, _, _ in file.pairs] and len(found.tensors) == 3
    path.write_bytes(vocabulary().write())
    found = read_header(path)
    assert found.metadata["tokenizer.ggml.tokens"].value == vocabulary().value("tokenizer.ggml.tokens")


@pytest.mark.long
def test_a_vocabulary_without_a_model_is_refused_before_its_tokenizer_is_built(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    model = tiny_model("Q4_0")
    many = {key: what for key, _, what in vocabulary().pairs}
    file = replace(model, tensors=()).with_pair("gemma2.block_count", "u32", 1024)
    for key, kind in (("tokens", "str[]"), ("scores", "f32[]"), ("token_type", "i32[]")):
        file = file.with_pair(f"tokenizer.ggml.{key}", kind, many[f"tokenizer.ggml.{key}"])
    path.write_bytes(file.write())
    [attempt] = in_a_child(attempts, [str(path)])
    assert complaints(attempt, path, "11266 missing: token_embd.weight, blk.0.attn_norm.weight, ") == []
    assert attempt["growth"] <= 64e6


@pytest.mark.long
@pytest.mark.needs("shared", "data/gemma2-tokenizer")
def test_the_header_of_the_real_vocabulary_is_read_in_a_second_and_64_megabytes() -> None:
    [(seconds, grown, pieces)] = in_a_child(costs, [str(OFFICIAL)])
    assert pieces == PIECES
    assert seconds <= 1.0 and grown <= 64e6, (seconds, grown)


def with_pairs(*pairs: tuple[str, str, Any]) -> Callable[[], File]:
    return lambda: File(pairs=pairs)


COSTLIEST: dict[str, Callable[[], File]] = {
    "strings of few characters, as many as are taken": with_pairs(("x", "", array(8, 2**20, string("🙂🙂🙂") * 2**20))),
    "strings that quadruple": with_pairs(
        ("x", "str", "a" * (2**24 - 4) + "🙂"), ("y", "str", "a" * (2**23 - 99) + "🙂")
    ),
    "keys that quadruple": lambda: File(pairs=tuple((f"🙂{i}" + "a" * 65_000, "u8", 0) for i in range(386))),
    "pairs, as many as are taken": lambda: File(pairs=tuple((f"key {i}", "f32[]", ()) for i in range(2**16))),
    "tensors, as many as are taken": lambda: File(
        pairs=(("general.alignment", "u32", 1),),
        tensors=tuple(Entry(f"{i:032}🙂", (1, 1, 1, 1), "F32", bytes(4)) for i in range(2**16)),
        alignment=1,
    ),
    "flags": lambda: File(pairs=tuple((f"x{i}", "", array(7, 2**22, bytes(2**22))) for i in range(5))),
    "numbers": with_pairs(("x", "", array(12, 3 * 2**20 - 50, bytes(8 * (3 * 2**20 - 50))))),
}


@pytest.mark.long
def test_the_costliest_headers_that_are_taken_need_a_second_and_150_megabytes(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.gguf" for number in range(len(COSTLIEST))]
    for path, make in zip(paths, COSTLIEST.values(), strict=True):
        path.write_bytes(make().write())
    found = dict(zip(COSTLIEST, in_a_child(costs, [str(path) for path in paths]), strict=True))
    assert all(seconds <= 1.0 and grown <= 150e6 for seconds, grown, _ in found.values()), found


def test_a_header_beyond_what_is_taken_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    size = 2**23
    path.write_bytes(File(pairs=tuple((f"x{i}", "str", "a" * size) for i in range(3))).write())
    with pytest.raises(BadModelFile, match=f"a header beyond {MOST_HEADER:,} bytes"):
        read_header(path)
