"""GGUF files that are odd and sound: read as gguf-py reads them, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import gemma2
from gemma2.checkpoints.gguf import read_header
from gemma2.checkpoints.gguf_weights import GGUFWeights, llama_cpp_name
from tests.gguf_files import SCALARS, STRING, WEIGHTS, Entry, File, blocks, pocket_vocabulary, small, tiny_model, weight

GOOD = tiny_model("F32")
OWN = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")  # what gguf-py adds to the keys of a file
TYPE_NAMES = {number: name for name, (number, _) in SCALARS.items()} | {STRING: "str"}


def unlike_gguf_py(path: Path) -> list[str]:
    """What this project and gguf-py read differently in a file that both accept."""
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {key: field for key, field in theirs.fields.items() if key not in OWN}
    unlike = [] if list(ours.metadata) == list(fields) else [f"keys {list(ours.metadata)} and {list(fields)}"]
    for key, field in fields.items():
        found, kinds = ours.metadata[key], [int(kind) for kind in field.types]
        value = found.value.tolist() if isinstance(found.value, np.ndarray) else found.value
        # gguf-py does not keep the type of an empty array.
        kind = f"{TYPE_NAMES[kinds[1]]}[]" if len(kinds) > 1 else found.type if kinds == [9] else TYPE_NAMES[kinds[0]]
        if (found.type, repr(value)) != (kind, repr([] if kinds == [9] else field.contents())):
            unlike.append(f"{key} is {value!r:.80} of {found.type}, and {field.contents()!r:.80} of {kind}")
    if [tensor.name for tensor in theirs.tensors] != list(ours.tensors):
        return [*unlike, f"tensors {list(ours.tensors)}"]
    raw = path.read_bytes()
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        own = (info.type.name, info.shape, info.offset, info.bytes, raw[info.offset : info.offset + info.bytes])
        shape = tuple(reversed(tensor.shape.tolist()))
        data = np.ascontiguousarray(tensor.data).tobytes()
        if own != (tensor.tensor_type.name, shape, tensor.data_offset, tensor.n_bytes, data):
            unlike.append(f"{tensor.name} is {own[:4]}, and {(tensor.tensor_type.name, shape, tensor.data_offset)}")
    return unlike


EVERY = dict.fromkeys(SCALARS, (1, 0, 1)) | {
    "str": ("é", "", "日本🙂"),
    "f32": (1.5, -0.0, 3e38),
    "f64": (0.1, 5e-324),
}
EXTREMES = {
    "i8": -128,
    "i16": -(2**15),
    "i32": -(2**31),
    "i64": -(2**63),
    "u64": 2**64 - 1,
    "u8": 255,
    "f32": float("nan"),
}


def pairs(*more: tuple[str, str, Any]) -> Callable[[File], File]:
    return lambda file: replace(file, pairs=(*file.pairs, *more))


def aligned(to: int) -> Callable[[File], File]:
    return lambda file: replace(file.with_pair("general.alignment", "u32", to), alignment=to)


# What may be added to any file, a model or not.
ODD: dict[str, Callable[[File], File]] = {
    "as written": lambda file: file,
    "version 2": lambda file: replace(file, version=2),
    **{f"alignment {n}": aligned(n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 4096, 65_536)},
    "alignment stated first": lambda file: replace(file, pairs=(("general.alignment", "u32", 32), *file.pairs)),
    **{f"unknown keys of {kind}": pairs(*((f"odd.{i}", kind, x) for i, x in enumerate(EVERY[kind]))) for kind in EVERY},
    **{f"unknown array of {kind}": pairs(("odd.array", f"{kind}[]", EVERY[kind])) for kind in EVERY},
    "empty arrays": pairs(*((f"odd.{kind}", f"{kind}[]", ()) for kind in EVERY)),
    "extreme numbers": pairs(*((f"odd.{kind}", kind, x) for kind, x in EXTREMES.items())),
    "a long text": pairs(("odd.text", "str", "word " * 20_000)),
    "an array of many": pairs(("odd.many", "i16[]", range(-1000, 1000))),
    "odd keys": pairs((" ", "u8", 1), ("é.日本", "u8", 2), ("a" * 65_535, "u8", 3), (".", "u8", 4), ("\n", "u8", 5)),
    "metadata of other programs": pairs(
        ("general.author", "str", "\x1b[31mred\x1b[0m"),
        ("tokenizer.chat_template", "str", "{{ ''.__class__.__mro__ }}"),
        ("general.tags", "str[]", ["a", "b"]),
        ("llama.block_count", "u32", 80),
    ),
    "tensors in another order": lambda file: replace(file, tensors=tuple(reversed(file.tensors))),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_header_is_read_as_gguf_py_reads_it(case: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(ODD[case](small()).write())
    assert unlike_gguf_py(path) == []


TENSORS: dict[str, tuple[Entry, ...]] = {
    "none": (),
    "one number": (Entry("x", (1,), "F32", bytes(4)),),
    "four dimensions": (Entry("x", (2, 3, 4, 5), "F16", blocks("F16", 120)),),
    "dimensions of one": (Entry("x", (1, 1, 1, 7), "BF16", blocks("BF16", 7)), Entry("y", (5, 1), "F32", bytes(20))),
    "a name of 63 bytes": (Entry("n" * 63, (3,), "F32", bytes(12)),),
    "odd names": tuple(Entry(text, (3,), "F32", bytes(12)) for text in (" ", "é🙂", "../x", "\n", "model.x", ".")),
    "a thousand": tuple(Entry(f"x{i}", (i + 1,), "F16", bytes(2 * i + 2)) for i in range(1000)),
    **{
        kind: (weight("x", (3, 512), kind), weight("y", (256,), kind), weight("z", (2, 2, 256), kind))
        for kind in WEIGHTS
    },
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_are_found_where_gguf_py_finds_them(case: str, tmp_path: Path) -> None:
    path = tmp_path / "tensors.gguf"
    path.write_bytes(replace(small(), tensors=TENSORS[case]).write())
    assert unlike_gguf_py(path) == []


def test_what_lies_in_the_padding_between_tensors_is_of_no_account(tmp_path: Path) -> None:
    path = tmp_path / "padding.gguf"
    whole = bytearray(small().write())
    gap = read_header(_written(path, bytes(whole))).tensors["a.weight"]
    whole[gap.offset + gap.bytes] = 7
    _written(path, bytes(whole))
    assert unlike_gguf_py(path) == []


def test_a_file_may_end_with_its_last_tensor_or_with_less_than_the_padding_after_it(tmp_path: Path) -> None:
    path = tmp_path / "end.gguf"
    file = small().with_tensor("c.weight", shape=(27,), data=blocks("F32", 27))
    for size in range(20):
        _written(path, file.write()[: len(file.write()) - size])
        assert unlike_gguf_py(path) == []


def test_a_header_of_nothing_is_a_header(tmp_path: Path) -> None:
    found = read_header(_written(tmp_path / "nothing.gguf", File(pairs=()).write()))
    assert (found.metadata, found.tensors, found.bytes) == ({}, {}, 24)


def _written(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def changed(key: str, kind: str, what: Any) -> Callable[[File], File]:
    return lambda file: file.with_pair(key, kind, what)


def mixed(file: File) -> File:
    """Every matrix of another type."""
    kinds = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "F32", "F16", "BF16")
    return replace(
        file,
        tensors=tuple(
            weight(str(t.name), tuple(t.shape), kinds[i % len(kinds)]) if len(t.shape) > 1 else t
            for i, t in enumerate(file.tensors)
        ),
    )


def norms_as(kind: str) -> Callable[[File], File]:
    return lambda file: replace(
        file, tensors=tuple(weight(str(t.name), (32,), kind) if len(t.shape) == 1 else t for t in file.tensors)
    )


# What llama.cpp also takes in a model.
ODD_MODELS: dict[str, Callable[[File], File]] = {
    **{
        f"integers {kind}": changed("gemma2.block_count", kind, 2)
        for kind in ("u8", "i8", "u16", "i16", "i32", "u64", "i64")
    },
    "floats f64": changed("gemma2.attn_logit_softcapping", "f64", 50.0),
    "the rotary base": changed("gemma2.rope.freq_base", "f32", 10000.0),
    "the size of the vocabulary": changed("gemma2.vocab_size", "u32", 4096),
    "a pattern by layers": changed("gemma2.attention.sliding_window_pattern", "bool[]", (True, False)),
    "a pattern by period": changed("gemma2.attention.sliding_window_pattern", "u32", 2),
    "a rotary scaling that is none": changed("gemma2.rope.scaling.type", "str", "none"),
    "a rotary table": lambda file: file.plus(Entry("rope_freqs.weight", (4,), "F32", b"\xff" * 16)),
    "a head that is the embedding": lambda file: file.plus(replace(file.tensors[0], name="output.weight")),
    "types mixed": mixed,
    **{f"norms {kind}": norms_as(kind) for kind in ("F16", "BF16", "Q8_0", "Q4_1")},
}


def same_as_gguf_py(path: Path) -> None:
    """Every weight of the model is gguf-py's number, and 1 + w of a norm is."""
    loaded = gemma2.load(path, dtype="float32", device="cpu").model.state_dict()
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, parameter in loaded.items():
        tensor = found[llama_cpp_name(name)]
        shape = tuple(reversed(tensor.shape.tolist()))
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).view(shape)
        if parameter.ndim == 1:
            assert torch.equal(parameter.double() + 1.0, expected.double()), name
        else:
            assert torch.equal(parameter.view(torch.int32), expected.view(torch.int32)), name


@pytest.mark.long
@pytest.mark.parametrize("case", [*ODD, *ODD_MODELS])
def test_an_odd_model_has_gguf_pys_numbers(case: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes((ODD | ODD_MODELS)[case](GOOD).write())
    same_as_gguf_py(path)


@pytest.mark.long
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_model_of_every_type_has_gguf_pys_numbers(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_model(kind).write())
    same_as_gguf_py(path)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_any_rows_of_a_tensor_are_those_of_the_whole(kind: str, tmp_path: Path) -> None:
    """A large matrix is read a few rows at a time, a tiny one never is."""
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_model(kind).write())
    weights = GGUFWeights(read_header(path))
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        shape, _ = weights.tensors[name]
        whole = torch.empty(shape)
        weights.read(name, 0, whole)
        for start, stop in ((0, 1), (1, 3), (5, 32), (shape[0] - 1, shape[0])):
            rows = torch.empty(stop - start, *shape[1:])
            weights.read(name, start, rows)
            assert torch.equal(rows, whole[start:stop]), (name, start, stop)


def test_the_tokenizer_is_that_of_the_file_it_was_written_from(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GOOD.write())
    words, pocket = gemma2.load(path, device="cpu").tokenizer, gemma2.load(device="cpu").tokenizer
    text = "In the beginning\n\n\t God <bos> created <start_of_turn>日本 the heaven 🙂  and <unused1> </s>"
    for special in (False, True):
        assert words.encode(text, special=special) == pocket.encode(text, special=special)
    assert len(words) == len(pocket_vocabulary()[0])
