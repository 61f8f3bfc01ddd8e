"""Conversions that cannot be: one line, before the long work where that is possible, and nothing is left or lost."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma2.checkpoints.safetensors import SINGLE
from gemma2.convert import convert
from gemma2.load import POCKET
from tests.conftest import tensors_of, tiny
from tests.gguf_files import split, tiny_model
from tests.hostile.conftest import SMALL, Complaint, shell

TARGETS = ("out", "out.gguf", "out.ckpt")
PLAIN = {**SMALL, "query_pre_attn_scalar": SMALL["head_dim"]}  # what a GGUF can state
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def good() -> dict[str, Tensor]:
    return tensors_of(tiny(vocab_size=4096, **PLAIN))


@pytest.fixture
def model(tmp_path: Path, good: dict[str, Tensor]) -> Path:
    place = shell(tmp_path / "model", **PLAIN)
    save_file(good, place / SINGLE)
    return place


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Arguments.

ARGUMENTS = [
    ([], "the following arguments are required: MODEL, TARGET"),
    (["x"], "the following arguments are required: TARGET"),
    (["x", "y", "z"], "unrecognized arguments: z"),
    (["x", "y", "--type"], "--type: expected one argument"),
    (["x", "y.gguf", "--type", ""], "type '': a .gguf takes f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, mxfp4, "),
    (["x", "y.gguf", "--type", "q4_k"], "type 'q4_k': a .gguf takes f32, "),
    (["x", "y.gguf", "--type", "float32"], "type 'float32': a .gguf takes f32, "),
    (["x", "y.ckpt", "--type", "q8_0"], "type 'q8_0': a .ckpt takes f32, bf16, f16"),
    (["x", "y", "--type", "q8_0"], "type 'q8_0': safetensors takes f32, bf16, f16"),
    (
        ["x", "y.safetensors"],
        "y.safetensors: no .safetensors file is written; end the name in .gguf or .ckpt, or name a folder",
    ),
    (
        ["x", "y.bin"],
        "y.bin: no .bin file is written; end the name in .gguf or .ckpt, or name a folder for safetensors",
    ),
    (["x", "y.GGUF"], "y.GGUF: no such format is written; end the name in .gguf or .ckpt, or name a folder"),
    (["x", "y.onnx"], "y.onnx: no such format is written"),
    (["x", ""], ".: give the target a name of its own"),
    (["x", "."], ".: give the target a name of its own"),
    (["x", "a/.."], "a/..: give the target a name of its own"),
    (["x", "/"], "/: give the target a name of its own"),
]


@pytest.mark.parametrize(("argv", "words"), ARGUMENTS, ids=[" ".join(argv) for argv, _ in ARGUMENTS])
def test_bad_arguments_exit_with_2_before_the_source_is_looked_at(
    argv: list[str], words: str, complaint: Complaint
) -> None:
    assert words in complaint("convert", *argv, code=2)


# Targets. The source is absent, so whatever complains about anything else has come first.


THERE, FOREIGN = "is there already; --force (force=True) replaces it", "also holds notes.txt, so it is not replaced"
NOT_THERE: dict[str, tuple[str, list[str], str]] = {
    "a file there": ("there.gguf", [], f"there.gguf: {THERE}"),
    "a ckpt there": ("there.ckpt", [], f"there.ckpt: {THERE}"),
    "a folder there": ("plain", [], f"plain: {THERE}"),
    "a link to nowhere": ("gone.gguf", [], f"gone.gguf: {THERE}"),
    "a folder for a file": ("folder.gguf", ["--force"], "folder.gguf: is a folder, and not replaced by a file"),
    "a file for a folder": ("file", ["--force"], "file: is a file, and not replaced by a folder"),
    "foreign files": ("foreign", [], f"foreign: {FOREIGN}"),
    "foreign files all the same": ("foreign", ["--force"], f"foreign: {FOREIGN}"),
    "no parent": ("no/out.gguf", ["--force"], "no: no such folder to write to"),
    "a file for a parent": ("file/out", [], "file: no such folder to write to"),
}


@pytest.mark.posix
@pytest.mark.parametrize("case", NOT_THERE)
def test_a_target_that_cannot_be_is_refused_before_the_source_is_looked_at(
    case: str, tmp_path: Path, complaint: Complaint
) -> None:
    target, options, words = NOT_THERE[case]
    for name in ("there.gguf", "there.ckpt", "file"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    (tmp_path / "gone.gguf").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.gguf").mkdir()
    (shell(tmp_path / "foreign") / "notes.txt").write_text("x", encoding="utf-8")
    shell(tmp_path / "plain")
    before = tree(tmp_path)
    assert words in complaint("convert", "absent/model.ckpt", tmp_path / target, *options, code=1)
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(
    tmp_path: Path, complaint: Complaint, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: mode != os.W_OK and real(path, mode)
    )  # root may write anywhere
    assert f"{tmp_path}: cannot be written to" in complaint("convert", "absent/x.ckpt", tmp_path / "out", code=1)


def test_a_source_that_is_none_is_refused_and_nothing_is_made(tmp_path: Path, complaint: Complaint) -> None:
    for target in TARGETS:
        assert "no such file or folder" in complaint("convert", "absent/x.ckpt", tmp_path / target, code=1)
        assert "no config.json" in complaint("convert", tmp_path, tmp_path / target, code=1)
        absent = ("--tokenizer", tmp_path / "absent.model")
        assert "absent.model: no such file" in complaint("convert", POCKET, tmp_path / target, *absent, code=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.posix
def test_a_source_is_never_replaced_by_what_was_made_of_it(model: Path, tmp_path: Path, complaint: Complaint) -> None:
    words = "is the source itself, or holds it; choose another name"
    file = convert(model, tmp_path / "model.gguf", progress=False).path
    (tmp_path / "link.gguf").symlink_to(file)
    (tmp_path / "link").symlink_to(model)
    before = tree(tmp_path)
    for source, target in (
        (file, file),
        (file, tmp_path / "link.gguf"),
        (tmp_path / "link.gguf", file),
        (model, model),
        (model, tmp_path / "link"),
        (tmp_path / "link", model),
        (model / SINGLE, model),
    ):
        assert words in complaint("convert", source, target, "--force", code=1)
    assert tree(tmp_path) == before


def test_no_part_of_a_split_source_is_replaced(tmp_path: Path, complaint: Complaint) -> None:
    file = tiny_model()
    for number, part in enumerate(split(file, [10, len(file.tensors) - 10])):
        (tmp_path / f"x-0000{number + 1}-of-00002.gguf").write_bytes(part.write())
    before = tree(tmp_path)
    for source in (1, 2):
        for target in (1, 2):
            paths = [tmp_path / f"x-0000{number}-of-00002.gguf" for number in (source, target)]
            assert "is the source itself" in complaint("convert", *paths, "--force", code=1)
    assert tree(tmp_path) == before


def test_too_little_space_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, complaint: Complaint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for target in TARGETS:
        made = convert(model, tmp_path / target, progress=False)
        free = shutil.disk_usage(tmp_path)._replace(free=made.bytes - 1)
        before = tree(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path, free=free: free)
            line = complaint("convert", model, tmp_path / target, "--force", code=1)
        needed, there = re.findall(r": ([\d.]+) GB are needed there, and ([\d.]+) GB are free", line)[0]
        assert f"gemma2: error: {tmp_path}: " in line and 1e9 * float(there) == pytest.approx(free.free, rel=0.01)
        assert made.bytes < 1e9 * float(needed) < made.bytes + 200_000
        assert tree(tmp_path) == before


# Sources.


def changed(good: dict[str, Tensor], name: str, place: Any, value: float) -> dict[str, Tensor]:
    tensors = {key: tensor.clone() for key, tensor in good.items()}
    tensors[name][place] = value
    return tensors


VALUES: dict[str, tuple[str, float, list[str], str]] = {
    "NaN": (UP, float("nan"), [], "holds NaN or infinity, and is not passed on"),
    "infinity": (UP, float("-inf"), [], "holds NaN or infinity, and is not passed on"),
    "NaN in a norm": (NORM, float("nan"), [], "holds NaN or infinity, and is not passed on"),
    "infinity in a norm": (NORM, float("inf"), ["--type", "bf16"], "holds NaN or infinity, and is not passed on"),
    "beyond float16": (UP, -7e4, ["--type", "f16"], "holds 70000, and F16 goes up to 65504: choose bf16"),
    "beyond bfloat16": (UP, 3.4e38, ["--type", "bf16"], "holds 3.4e+38, and BF16 goes up to 3.39e+38: choose f32"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", VALUES)
def test_a_value_that_would_be_lost_is_refused_by_name_and_nothing_is_left(
    case: str, target: str, good: dict[str, Tensor], tmp_path: Path, complaint: Complaint
) -> None:
    name, value, options, words = VALUES[case]
    place = shell(tmp_path / "model", **PLAIN)
    save_file(changed(good, name, -1, value), place / SINGLE)
    before = tree(tmp_path)
    assert f"{SINGLE}: {name} {words}" in complaint("convert", place, tmp_path / target, *options, code=1)
    assert tree(tmp_path) == before


def test_values_beyond_float16_are_refused_in_blocks_with_float16_scales(tmp_path: Path, complaint: Complaint) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    wide |= {"num_hidden_layers": 2, "head_dim": 64, "query_pre_attn_scalar": 64}
    place = shell(tmp_path / "model", **wide)
    save_file(changed(tensors_of(tiny("2b", vocab_size=4096, **wide)), UP, 0, 7e4), place / SINGLE)
    before = tree(tmp_path)
    for kind in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "tq1_0", "tq2_0"):
        line = complaint("convert", place, tmp_path / "out.gguf", "--type", kind, code=1)
        assert f"holds 70000, and {kind.upper()} goes up to 65504: choose bf16" in line
    assert tree(tmp_path) == before


def test_rows_that_are_no_whole_blocks_are_refused_before_anything_is_written(
    model: Path, tmp_path: Path, complaint: Complaint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["gemma2.convert"], "replacing", None)
    for kind, blocks in (
        ("q8_0", "Q8_0 blocks of 32"),
        ("q4_0", "Q8_0 blocks of 32"),
        ("tq1_0", "TQ1_0 blocks of 256"),
    ):
        line = complaint("convert", model, tmp_path / "out.gguf", "--type", kind, code=1)
        assert f"has rows of 8, not a whole number of {blocks}; choose bf16, f16 or f32" in line


def test_a_model_that_does_not_load_is_not_converted(
    model: Path, good: dict[str, Tensor], tmp_path: Path, complaint: Complaint
) -> None:
    """Also where loading looks at values: a head of its own is not dropped without a word."""
    cases = {
        "1 missing: model.norm.weight": {name: t for name, t in good.items() if name != "model.norm.weight"},
        "1 unknown: stray": good | {"stray": torch.ones(2)},
        "lm_head.weight differs from the embedding": good | {"lm_head.weight": torch.ones(4096, 8)},
    }
    for words, tensors in cases.items():
        save_file(tensors, model / SINGLE)
        before = tree(tmp_path)
        for target in TARGETS:
            assert words in complaint("convert", model, tmp_path / target, code=1)
        assert tree(tmp_path) == before
    save_file(good | {"lm_head.weight": good["model.embed_tokens.weight"].clone()}, model / SINGLE)
    convert(model, tmp_path / "out", progress=False)
    assert load_file(tmp_path / "out" / SINGLE).keys() == good.keys()


# Beside a .ckpt.

BESIDE: dict[str, tuple[str, bytes]] = {
    "another config": ("config.json", b"{}"),
    "another tokenizer": ("tokenizer.model", b"x"),
    "other stops": ("generation_config.json", b'{"eos_token_id": [1, 107]}'),
    "other end ids": ("generation_config.json", b'{"eos_token_id": [1, 88]}'),
    "another template": ("tokenizer_config.json", b'{"chat_template": "x"}'),
    "a template": ("chat_template.jinja", b"x"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_another_models_files_beside_a_ckpt_are_neither_used_nor_replaced(
    case: str, model: Path, tmp_path: Path, complaint: Complaint
) -> None:
    name, content = BESIDE[case]
    place = tmp_path / "other"
    place.mkdir()
    (place / name).write_bytes(content)
    before = tree(tmp_path)
    assert str(place / name) in complaint("convert", model, place / "out.ckpt", "--force", code=1)
    assert tree(tmp_path) == before


def test_a_ckpt_beside_its_own_model_leaves_that_as_it_is(model: Path) -> None:
    before = tree(model)
    convert(model, model / "model.ckpt", progress=False)
    after = tree(model)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"model.ckpt", "tokenizer_config.json"}
