"""Safetensors files and shard indexes that must not load, and the few odd ones that must."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

import gemma2
from gemma2.checkpoints.safetensors import INDEX, SINGLE
from tests.conftest import tensors_of, tiny
from tests.hostile.conftest import SMALL, shell

Refused = Callable[[Path, str], None]
Header = dict[str, Any]
EMBED, NORM, Q = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def good() -> dict[str, Tensor]:
    return tensors_of(tiny(vocab_size=4096, **SMALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, good: dict[str, Tensor]) -> Path:
    place = shell(tmp_path_factory.mktemp("files") / "model")
    save_file(good, place / SINGLE)
    return place


# The container. Each case makes a whole file from a good header, whose first tensor is A and second B, and good data.

A, B = "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"


def packed(header: Header | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", (len(text) if length is None else length) % 2**64) + text + data


def entry(name: str, data: bytes | None = None, **change: Any) -> Callable[[Header, bytes], bytes]:
    """The good file with one tensor's entry changed; None drops a key."""

    def make(header: Header, good_data: bytes) -> bytes:
        changed = {key: value for key, value in {**header[name], **change}.items() if value is not None}
        return packed({**header, name: changed}, good_data)

    return make


def offsets(move: Callable[[int, int], list[Any]]) -> Callable[[Header, bytes], bytes]:
    return lambda h, d: entry(B, data_offsets=move(*h[B]["data_offsets"]))(h, d)


def twice(name: str, dtype: str, begin: int, end: int) -> Callable[[Header, bytes], bytes]:
    """The good file whose header has `name` a second time, as no JSON writer would."""
    again = json.dumps({"dtype": dtype, "shape": [(end - begin) // 4], "data_offsets": [begin, end]})
    return lambda h, d: packed(json.dumps(h).encode()[:-1] + f', "{name}": {again}}}'.encode(), d)


CONTAINERS: dict[str, Callable[[Header, bytes], bytes]] = {
    "four bytes": lambda h, d: b"\x10\0\0\0",
    "eight zeros": lambda h, d: bytes(8),
    "a thousand zeros": lambda h, d: bytes(1000),
    "length 2^64-1": lambda h, d: packed(h, d, -1),
    "length 2^63": lambda h, d: packed(h, d, 2**63),
    "length over the limit": lambda h, d: packed(h, d, 10**8 + 1),
    "length of the file": lambda h, d: packed(h, d, len(packed(h, d))),
    "length one more": lambda h, d: packed(h, d, len(json.dumps(h)) + 1),
    "length one less": lambda h, d: packed(h, d, len(json.dumps(h)) - 1),
    "length big-endian": lambda h, d: struct.pack(">Q", len(json.dumps(h))) + packed(h, d)[8:],
    "header not UTF-8": lambda h, d: packed(json.dumps(h).encode().replace(b"norm", b"n\xffrm"), d),
    "header not JSON": lambda h, d: packed(b"{model}", d),
    "header a list": lambda h, d: packed(b"[]", d),
    "header a string": lambda h, d: packed(b'"weights"', d),
    "header null": lambda h, d: packed(b"null", d),
    "header with trailing NULs": lambda h, d: packed(json.dumps(h).encode() + bytes(8), d),
    "header with NaN": lambda h, d: packed(json.dumps({**h, B: float("nan")}).encode(), d),
    "header cut": lambda h, d: packed(h, d)[:300],
    "header alone": lambda h, d: packed(h, b""),
    "data a byte short": lambda h, d: packed(h, d[:-1]),
    "data cut in half": lambda h, d: packed(h, d[: len(d) // 2]),
    "a byte after the end": lambda h, d: packed(h, d + b"\0"),
    "a zip after the end": lambda h, d: packed(h, d + b"PK\3\4" + bytes(64)),
    "nested 1,000 deep": lambda h, d: packed(b'{"a":' * 1000 + b"{}" + b"}" * 1000, d),
    "nested 100,000 deep": lambda h, d: packed(b"[" * 100_000 + b"]" * 100_000, d),
    "overlap": offsets(lambda b, e: [b - 4, e - 4]),
    "same range twice": lambda h, d: entry(B, data_offsets=[0, 32])(h, d),
    "gap": offsets(lambda b, e: [b + 4, e + 4]),
    "end before begin": offsets(lambda b, e: [e, b]),
    "beyond the end": offsets(lambda b, e: [b + 10**6, e + 10**6]),
    "offset 2^63": offsets(lambda b, e: [2**63, 2**63 + 32]),
    "offset 2^64": offsets(lambda b, e: [b + 2**64, e + 2**64]),
    "negative offset": offsets(lambda b, e: [-32, 0]),
    "float offset": offsets(lambda b, e: [float(b), float(e)]),
    "string offset": offsets(lambda b, e: [str(b), str(e)]),
    "one offset": offsets(lambda b, e: [b]),
    "three offsets": offsets(lambda b, e: [b, e, e]),
    "no offsets": entry(B, data_offsets=None),
    "shape too large": entry(B, shape=[9]),
    "shape too small": entry(B, shape=[7]),
    "shape overflows": entry(B, shape=[2**32, 2**32]),
    "shape wraps around to its size": entry(B, shape=[2**62 + 2, 2**2]),
    "negative dimension": entry(B, shape=[-8]),
    "float dimension": entry(B, shape=[8.0]),
    "string dimension": entry(B, shape=["8"]),
    "shape a number": entry(B, shape=8),
    "no shape": entry(B, shape=None),
    "unknown dtype": entry(B, dtype="F33"),
    "lower-case dtype": entry(B, dtype="f32"),
    "dtype a number": entry(B, dtype=32),
    "no dtype": entry(B, dtype=None),
    "entry a string": lambda h, d: packed({**h, B: "F32"}, d),
    "entry null": lambda h, d: packed({**h, B: None}, d),
    "a tensor called __metadata__": lambda h, d: packed({**h, "__metadata__": h[B]}, d),
    "metadata of numbers": lambda h, d: packed({**h, "__metadata__": {"step": 1}}, d),
    "metadata a list": lambda h, d: packed({**h, "__metadata__": ["pt"]}, d),
    "tensor twice, other range": twice(B, "F32", 0, 32),
}
FOREIGN = {
    "an empty file": b"",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "an HTML page": b"\n <!DOCTYPE html><html><body>404</body></html>",
    "byte 32: 40 bytes after the last tensor": b"GGUF\3\0\0\0" + bytes(64),
    "not a PyTorch checkpoint (": b"PK\3\4" + bytes(200),
    "not a PyTorch checkpoint ( ": b"\x80\x02}q\x00." + bytes(200),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_a_damaged_container_is_refused(case: str, folder: Path, good: dict[str, Tensor], refused: Refused) -> None:
    raw = save(good)
    n = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + n]), raw[8 + n :]
    assert {A, B} < set(header) and header[A]["data_offsets"][0] == 0
    path = folder / "damaged.safetensors"
    path.write_bytes(CONTAINERS[case](header, data))
    refused(path, "damaged.safetensors: not a whole safetensors file (")


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_safetensors_at_all_is_named(what: str, folder: Path, refused: Refused) -> None:
    path = folder / "foreign.safetensors"
    path.write_bytes(FOREIGN[what])
    refused(path, f"foreign.safetensors: {what.strip()}")


# The content. Each case changes a good set of tensors.


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda t: {name: tensor for name, tensor in t.items() if name not in names}


def plus(**more: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda t: {**t, **{name.replace("__", "."): tensor for name, tensor in more.items()}}


def other(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda t: {**t, name: change(t[name]).contiguous()}


def with_values(*values: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[-len(values) :] = torch.tensor(values)
        return changed

    return change


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda t: {name.replace(old, new): tensor for name, tensor in t.items()}


nan, inf = float("nan"), float("inf")
CONTENTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "one missing": (without(NORM), f"1 missing: {NORM}"),
    "a layer missing": (lambda t: {k: v for k, v in t.items() if ".1." not in k}, "11 missing: model.layers.1.input"),
    "the embedding missing": (without(EMBED), f"1 missing: {EMBED}"),
    "only the head": (lambda t: {"lm_head.weight": t[EMBED]}, "23 missing: model.layers.0."),
    "no tensors": (lambda t: {}, f"24 missing: {EMBED}, "),
    "one extra": (plus(stray=torch.ones(1)), "1 unknown: stray"),
    "seven extra": (lambda t: {**t, **{f"x{i}": torch.ones(1) for i in range(7)}}, "7 unknown: x0, x1, x2, x3, x4 ..."),
    "a layer too many": (rename(".1.", ".2."), "11 unknown: model.layers.2.input"),
    "an adapter's": (
        plus(model__norm__lora_A__weight=torch.ones(1, 8)),
        "a model with a PEFT adapter that is not merged (model.norm.lora_A",
    ),
    "of two prefixes": (rename("model.layers.", "one.model.layers."), "22 missing: model.layers.0.input_layernorm."),
    "a tensor under two names": (
        lambda t: {**t, f"_orig_mod.{NORM}": t[NORM].clone()},
        f"_orig_mod.{NORM} and {NORM} are the same tensor",
    ),
    "a bias": (plus(model__layers__0__mlp__up_proj__bias=torch.ones(12)), "unknown: model.layers.0.mlp.up_proj.bias"),
    "like inv_freq": (plus(my_rotary_emb__inv_freq=torch.ones(2)), "1 unknown: my_rotary_emb.inv_freq"),
    "named nothing": (lambda t: {**t, "": torch.ones(1)}, "1 unknown: "),
    "named a path": (lambda t: {**t, "../x": torch.ones(1)}, "1 unknown: ../x"),
    "head of other values": (plus(lm_head__weight=torch.ones(4096, 8)), "lm_head.weight differs from the embedding"),
    "head off by one value": (
        lambda t: {**t, "lm_head.weight": with_values(0.0)(t[EMBED])},
        "lm_head.weight differs from the embedding",
    ),
    "head of other shape": (plus(lm_head__weight=torch.ones(4095, 8)), "lm_head.weight [4095, 8] instead of [4096, 8]"),
    "head a bias": (plus(lm_head__bias=torch.ones(4096)), "1 unknown: lm_head.bias"),
    "transposed": (other(Q, lambda t: t[:, :4].T), f"1 misshapen: {Q} [4, 16] instead of [16, 8]"),
    "a row too few": (other(EMBED, lambda t: t[:-1]), f"{EMBED} [4095, 8] instead of [4096, 8]"),
    "a row too many": (other(EMBED, lambda t: torch.cat((t, t[:1]))), f"{EMBED} [4097, 8] instead of [4096, 8]"),
    "broadcastable row": (other(Q, lambda t: t[:1]), f"{Q} [1, 8] instead of [16, 8]"),
    "broadcastable vector": (other(Q, lambda t: t[0]), f"{Q} [8] instead of [16, 8]"),
    "broadcastable scalar": (other(NORM, lambda t: t[0]), f"{NORM} [] instead of [8]"),
    "flattened": (other(Q, lambda t: t.view(-1)), f"{Q} [128] instead of [16, 8]"),
    "an axis too many": (other(NORM, lambda t: t[None]), f"{NORM} [1, 8] instead of [8]"),
    "empty": (other(NORM, lambda t: t[:0]), f"{NORM} [0] instead of [8]"),
    "all misshapen": (lambda t: {k: v[:0] for k, v in t.items()}, "24 misshapen: "),
    "int8": (other(Q, Tensor.char), f"1 not floating-point: {Q} (int8)"),
    "uint8": (other(Q, Tensor.byte), f"{Q} (uint8)"),
    "int16": (other(Q, Tensor.short), f"{Q} (int16)"),
    "int64": (other(Q, Tensor.long), f"{Q} (int64)"),
    "bool": (other(Q, Tensor.bool), f"{Q} (bool)"),
    "complex": (other(Q, lambda t: t.to(torch.complex64)), f"{Q} (complex64)"),
    "integers throughout": (lambda t: {k: v.int() for k, v in t.items()}, "24 not floating-point: "),
    "a NaN": (other(Q, with_values(nan)), f"1 tensors hold NaN or infinity in float32: {Q} (1)"),
    "an infinity": (other(NORM, with_values(inf)), f"{NORM} (1)"),
    "a negative infinity": (other(EMBED, with_values(-inf)), f"{EMBED} (1)"),
    "infinities that cancel": (other(EMBED, with_values(-inf, inf, nan)), f"{EMBED} (3)"),
    "NaN everywhere": (
        lambda t: {k: v * nan for k, v in t.items()},
        f"24 tensors hold NaN or infinity in float32: {EMBED} (32,768), ",
    ),
    "two kinds of trouble": (lambda t: {**without(NORM)(t), "x": t[NORM]}, f"1 missing: {NORM}; 1 unknown: x"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_tensors_that_do_not_fit_are_refused_by_name(
    case: str, folder: Path, good: dict[str, Tensor], refused: Refused
) -> None:
    change, words = CONTENTS[case]
    path = folder / "content.safetensors"
    save_file(change(good), path)
    refused(path, words)


def test_only_the_first_five_names_of_many_are_said(
    folder: Path, good: dict[str, Tensor], complaint: Callable[..., str]
) -> None:
    save_file({}, folder / "none.safetensors")
    line = complaint("generate", "x", "--model", folder / "none.safetensors", code=1)
    assert [name in line for name in list(good)[:6]] == [True] * 5 + [False]
    assert line.endswith(" ...\n")


def test_escape_sequences_in_a_tensor_name_do_not_reach_the_terminal(
    folder: Path, good: dict[str, Tensor], complaint: Callable[..., str]
) -> None:
    save_file({**good, "a\x1b[31m\nb": torch.ones(1)}, folder / "escape.safetensors")
    assert "a\\x1b[31m b" in complaint("generate", "x", "--model", folder / "escape.safetensors", code=1)


def test_values_that_only_overflow_in_the_dtype_asked_for_are_refused_there(
    folder: Path, good: dict[str, Tensor]
) -> None:
    save_file(other(NORM, with_values(3.4e38))(good), folder / "large.safetensors")
    gemma2.load(folder / "large.safetensors", dtype="float32")
    with pytest.raises(
        gemma2.BadModelFile, match=r"1 tensors hold NaN or infinity in bfloat16: model.norm.weight \(1\)"
    ):
        gemma2.load(folder / "large.safetensors", dtype="bfloat16")
    gemma2.load(folder / "large.safetensors", dtype="bfloat16", allow_nonfinite=True)


def test_a_sum_beyond_float32_of_finite_values_is_no_fault(folder: Path, good: dict[str, Tensor]) -> None:
    save_file(other(NORM, with_values(3e38, 3e38))(good), folder / "sum.safetensors")
    gemma2.load(folder / "sum.safetensors")


ALLOWED: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "as written": lambda t: t,
    "the tied head": lambda t: {**t, "lm_head.weight": t[EMBED].clone()},
    "rotary tables": lambda t: {
        **t,
        "model.rotary_emb.inv_freq": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((2,), nan),
    },
    "in another order": lambda t: dict(reversed(t.items())),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_only_redundant_tensors_may_be_extra(case: str, folder: Path, good: dict[str, Tensor]) -> None:
    save_file(ALLOWED[case](good), folder / "allowed.safetensors")
    loaded = gemma2.load(folder / "allowed.safetensors").model.state_dict()
    assert list(loaded) == list(good)
    assert all(torch.equal(loaded[name], good[name]) for name in good)


# Indexes. The folder holds two good shards, a.safetensors with layer 0 and b.safetensors with the rest.


@pytest.fixture
def shards(tmp_path: Path, good: dict[str, Tensor]) -> tuple[Path, dict[str, str]]:
    place = shell(tmp_path / "shards")
    mapping = {name: f"{'a' if '.0.' in name else 'b'}.safetensors" for name in good}
    for file in set(mapping.values()):
        save_file({name: good[name] for name in good if mapping[name] == file}, place / file)
        save_file({name: good[name] for name in good if mapping[name] == file}, tmp_path / file)  # and outside
    return place, mapping


def test_shards_with_a_good_index_load(shards: tuple[Path, dict[str, str]], good: dict[str, Tensor]) -> None:
    place, mapping = shards
    (place / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapping}), encoding="utf-8")
    loaded = gemma2.load(place).model.state_dict()
    assert all(torch.equal(loaded[name], good[name]) for name in good)


def moved(file: str) -> Callable[[dict[str, str]], Any]:
    """The tensors of b.safetensors said to be in `file`."""
    return lambda m: {"weight_map": {k: file if v == "b.safetensors" else v for k, v in m.items()}}


PLAIN, MAP = "is not a plain .safetensors file name", "no weight_map from tensor names to file names"
INDEXES: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "parent": (moved("../b.safetensors"), PLAIN),
    "through a child": (moved("x/../../b.safetensors"), PLAIN),
    "subfolder": (moved("sub/b.safetensors"), "1 of 2 shards missing: sub/b.safetensors"),
    "a step without a name": (moved("sub//b.safetensors"), PLAIN),
    "this folder": (moved("./b.safetensors"), PLAIN),
    "trailing slash": (moved("b.safetensors/"), PLAIN),
    "absolute": (moved("/etc/b.safetensors"), PLAIN),
    "backslashes": (moved("..\\b.safetensors"), PLAIN),
    "drive": (moved("C:b.safetensors"), PLAIN),
    "address": (moved("https://example.org/b.safetensors"), PLAIN),
    "NUL": (moved("b.safetensors\0.safetensors"), PLAIN),
    "empty name": (moved(""), PLAIN),
    "dots": (moved(".."), PLAIN),
    "the index itself": (moved(INDEX), PLAIN),
    "the config": (moved("config.json"), PLAIN),
    "a pickle": (moved("pytorch_model.bin"), PLAIN),
    "lone surrogate": (moved("\ud800.safetensors"), "1 of 2 shards missing"),
    "missing shard": (moved("c.safetensors"), "1 of 2 shards missing: c.safetensors"),
    "upper case": (moved("B.SAFETENSORS"), PLAIN),
    "all missing": (lambda m: {"weight_map": {k: f"{i}.safetensors" for i, k in enumerate(m)}}, "24 of 24 shards"),
    "all in one shard": (
        lambda m: {"weight_map": dict.fromkeys(m, "a.safetensors")},
        "a.safetensors: index and shard disagree on model.embed_tokens.weight, ",
    ),
    "tensor that is not there": (
        lambda m: {"weight_map": {**m, "ghost": "a.safetensors"}},
        "a.safetensors: index and shard disagree on ghost",
    ),
    "list": (lambda m: list(m), MAP),
    "null": (lambda m: None, MAP),
    "number": (lambda m: 1, MAP),
    "no map": (lambda m: {"metadata": {}}, MAP),
    "map empty": (lambda m: {"weight_map": {}}, MAP),
    "map null": (lambda m: {"weight_map": None}, MAP),
    "map a list": (lambda m: {"weight_map": list(m.items())}, MAP),
    "map a string": (lambda m: {"weight_map": "a.safetensors"}, MAP),
    "file a number": (lambda m: {"weight_map": {**m, NORM: 2}}, MAP),
    "file null": (lambda m: {"weight_map": {**m, NORM: None}}, MAP),
    "files a list": (lambda m: {"weight_map": {**m, NORM: ["a.safetensors", "b.safetensors"]}}, MAP),
    "file an object": (lambda m: {"weight_map": {**m, NORM: {"file": "a.safetensors"}}}, MAP),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_lies_or_reaches_elsewhere_is_refused(
    case: str, shards: tuple[Path, dict[str, str]], refused: Refused
) -> None:
    (place, mapping), (change, words) = shards, INDEXES[case]
    (place / INDEX).write_text(json.dumps(change(mapping)), encoding="utf-8")
    refused(place, words)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe{}", b"<html>", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"weight_map": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "UTF-16", "HTML", "BOM", "deep", "long number"],
)
def test_an_index_that_is_not_json_is_refused(
    raw: bytes, shards: tuple[Path, dict[str, str]], refused: Refused
) -> None:
    place, _ = shards
    (place / INDEX).write_bytes(raw)
    refused(place, f"{INDEX}: not valid JSON (")


def test_a_tensor_in_two_shards_is_refused(
    shards: tuple[Path, dict[str, str]], good: dict[str, Tensor], refused: Refused
) -> None:
    place, mapping = shards
    tensors = {name: good[name] for name in good if "b" in mapping[name]}
    save_file({**tensors, Q: good[Q] + 1}, place / "b.safetensors")
    (place / INDEX).write_text(json.dumps({"weight_map": mapping}), encoding="utf-8")
    refused(place, f"b.safetensors: tensor {Q} is also in a.safetensors, with other values")


def test_a_damaged_shard_is_named(shards: tuple[Path, dict[str, str]], refused: Refused) -> None:
    place, mapping = shards
    (place / INDEX).write_text(json.dumps({"weight_map": mapping}), encoding="utf-8")
    whole = (place / "b.safetensors").read_bytes()
    (place / "b.safetensors").write_bytes(whole[:-1])
    refused(place, "b.safetensors: not a whole safetensors file (")


# What else stands where weights are expected.


@pytest.mark.posix
def test_folders_and_files_of_other_kinds_are_refused(
    tmp_path: Path, folder: Path, good: dict[str, Tensor], refused: Refused
) -> None:
    bare = shell(tmp_path / "bare")
    refused(bare, "neither model.safetensors nor model.safetensors.index.json")
    (bare / "x.gguf").write_bytes(b"x")
    refused(bare, "it holds x.gguf: give that file itself")
    (bare / "pytorch_model.bin").write_bytes(b"")
    refused(bare, "pytorch_model.bin: an empty file")
    (bare / "pytorch_model.bin").unlink()
    refused(bare / "x.gguf", "x.gguf: byte 0: 1 bytes are not a GGUF file")
    for name, words in {
        **dict.fromkeys(("x.bin", "x.pt", "x.pth"), "not a PyTorch checkpoint (neither a zip nor a pickle)"),
        "x.npz": "NumPy arrays: export it",
        "x.h5": "Keras weights: export it",
        "x": "give a folder, a .gguf, a .safetensors file or Google's .ckpt",
    }.items():
        (bare / name).write_bytes(b"x")
        refused(bare / name, words)
        (bare / name).unlink()
    (bare / SINGLE).mkdir()
    refused(bare, "neither model.safetensors nor model.safetensors.index.json")
    refused(bare / SINGLE, "no config.json, and the shapes and scales of a model are never guessed")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(good, adapter / "adapter_model.safetensors")
    for source in (adapter, adapter / "adapter_model.safetensors"):
        refused(source, "a PEFT adapter, not a model: load its base with it, as gemma2.load(BASE, adapter=")
    refused(tmp_path / "no" / "such.safetensors", "no such file or folder")
    refused(Path("/dev/null"), "neither a file nor a folder")
    (folder / "dangling.safetensors").symlink_to(tmp_path / "gone")
    refused(folder / "dangling.safetensors", "a link to ")


def test_a_tokenizer_that_is_absent_or_of_another_size_is_refused(
    tmp_path: Path, good: dict[str, Tensor], refused: Refused
) -> None:
    place = shell(tmp_path / "words", vocab_size=5120)
    save_file(good, place / SINGLE)
    refused(place, "tokenizer.model: 4096 pieces, but the embedding has 5120 rows")
    (place / "tokenizer.model").unlink()
    refused(place, "neither tokenizer.json nor tokenizer.model")
