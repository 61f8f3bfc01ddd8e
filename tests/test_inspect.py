"""`inspect` says what a checkpoint is, what it leaves out and all that is wrong with it, and never what it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gemma2
from gemma2.checkpoints.hf_config import config_dict
from gemma2.cli import main
from gemma2.inspect import Inspection, inspect
from gemma2.load import POCKET
from tests.conftest import SHARED
from tests.gguf_files import File, spoilt, tiny_model
from tests.test_cache import cache_bytes

Folder = Callable[..., Path]


def written(tmp_path: Path, file: File) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(file.write())
    return path


def looked_at(tmp_path: Path, file: File, **options: Any) -> Inspection:
    return inspect(written(tmp_path, file), progress=False, **options)


def test_a_whole_gguf_has_no_problems_and_every_figure(tmp_path: Path) -> None:
    file = tiny_model("Q8_0")
    found = looked_at(tmp_path, file, values=True)
    model = gemma2.load(tmp_path / "model.gguf", device="cpu", progress=False)
    count = sum(parameter.numel() for parameter in model.model.parameters())
    assert found.problems == [] and found.values_checked
    assert (found.form, found.version, found.architecture, found.model) == ("gguf", 3, "gemma2", None)
    assert found.bytes == (tmp_path / "model.gguf").stat().st_size
    assert found.parameters == count == model.config.parameter_count
    assert found.config == config_dict(model.config) and found.filled == list(model.notes)
    assert found.types["Q8_0"]["bits_per_weight"] == 8.5 and found.types["F32"]["bits_per_weight"] == 32
    assert sum(line["bytes"] for line in found.types.values()) == sum(len(tensor.data) for tensor in file.tensors)
    assert [tensor.name for tensor in found.tensors] == [tensor.name for tensor in file.tensors]
    assert found.tokenizer == {"pieces": 4096, "special": dict(model.tokenizer.special)}


def test_the_memory_is_that_of_the_weights_and_a_full_cache() -> None:
    found = inspect(None)
    for name, need in found.memory.items():
        dtype = getattr(torch, name)
        gemma = gemma2.load(dtype=dtype, device="cpu")
        assert need["weights"] == sum(parameter.nbytes for parameter in gemma.model.parameters())
        full = gemma.config.max_position_embeddings
        assert need["cache"] == cache_bytes(gemma.config, full, dtype)
    assert set(found.memory) == {"float32", "bfloat16", "float64"}


def test_a_folder_a_file_and_a_ckpt_are_known_as_what_they_are(folder: Folder, tmp_path: Path) -> None:
    place = folder()
    whole = inspect(place)
    assert whole.problems == [] and whole.form == "safetensors" and set(whole.types) == {"F32"}
    assert inspect(place / "model.safetensors").problems == []
    assert inspect(POCKET).types["BF16"]["tensors"] == 68


def test_another_model_is_named_as_what_it_is_and_its_header_shown(tmp_path: Path) -> None:
    for name in ("llama", "gemma", "gemma3"):
        found = looked_at(tmp_path, tiny_model().with_pair("general.architecture", "str", name))
        assert found.problems == [f"architecture '{name}', this program runs 'gemma2'"]
        assert found.metadata["general.name"] == ("str", "Tiny") and found.types


def test_all_problems_are_found_not_the_first_alone(tmp_path: Path) -> None:
    file = tiny_model().without("gemma2.block_count", "tokenizer.ggml.scores")
    file = file.with_tensor("blk.0.attn_q.weight", name="blk.0.attn_qkv.weight")
    found = looked_at(tmp_path, file)
    assert len(found.problems) == 3
    assert found.problems[0].startswith("missing gemma2.block_count")
    assert "blk.0.attn_qkv.weight" in found.problems[1] and "tokenizer.ggml.scores" in found.problems[2]


def test_a_damaged_header_is_an_error_and_not_a_report(tmp_path: Path) -> None:
    path = written(tmp_path, replace(tiny_model(), version=7))
    with pytest.raises(gemma2.BadModelFile, match="GGUF version 7"):
        inspect(path)


def test_values_that_are_not_finite_are_found_only_when_they_are_read(tmp_path: Path) -> None:
    name = "blk.1.ffn_up.weight"
    file = tiny_model("Q8_0")
    file = file.with_tensor(name, data=spoilt("Q8_0", file.tensor(name).data, float("nan")))
    assert looked_at(tmp_path, file).problems == []
    assert looked_at(tmp_path, file, values=True).problems == [f"{name}: 32 values are NaN or infinite"]


def test_folders_with_parts_missing_list_each(folder: Folder) -> None:
    place = folder()
    tensors = load_file(place / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1" not in name}, place / "model.safetensors")
    raw = json.loads((place / "config.json").read_text(encoding="utf-8"))
    (place / "config.json").write_text(json.dumps(raw | {"vocab_size": 3000}), encoding="utf-8")
    problems = inspect(place).problems
    assert any("4096 pieces, but the embedding has 3000 rows" in problem for problem in problems)
    assert any("11 missing" in problem and "1 misshapen" in problem for problem in problems)


def test_each_part_of_a_folder_that_is_absent_or_damaged_is_a_problem_of_its_own(folder: Folder) -> None:
    place = folder()
    (place / "config.json").unlink()
    (place / "tokenizer.model").unlink()
    (place / "tokenizer_config.json").write_text("{", encoding="utf-8")
    absent, tokenizer, template = inspect(place).problems
    assert "no config.json" in absent and "neither tokenizer.json nor tokenizer.model" in tokenizer
    assert "tokenizer_config.json: not valid JSON" in template
    (place / "config.json").write_text("[]", encoding="utf-8")
    (place / "model.safetensors").write_bytes(b"")
    assert len(inspect(place).problems) == 4


def test_a_tokenizer_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    path = written(tmp_path, tiny_model())
    assert inspect(path, tokenizer=tmp_path / "none.model").problems == [
        f"{tmp_path}/none.model: no such file or folder"
    ]


# The command.


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    code = main(["inspect", *map(str, argv)])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


def test_the_command_prints_a_page_and_succeeds_when_nothing_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, tiny_model("Q8_0").without("gemma2.attention.sliding_window"))
    code, out = run(capsys, path)
    assert code == 0
    for line in (
        "GGUF version 3, architecture gemma2",
        "none: header, names, shapes and tokenizer are those of a Gemma 2 (values were not read; --values checks them)",
        "gemma2.attention.sliding_window is not stated: 4096, as llama.cpp takes it",
        "tokenizer.ggml.tokens                    str[] [4,096] '<pad>', '<eos>', '<bos>', ...",
        "layer_types              local and global in turn, 2 layers",
        "4,096 pieces; pad 0, eos 1, bos 2, unk 3, start_of_turn 106, end_of_turn 107",
    ):
        assert line in out, line
    assert "blk.0.attn_q.weight" not in out
    code, out = run(capsys, path, "--tensors", "--values")
    assert code == 0 and "blk.0.attn_q.weight" in out and "every value is finite" in out


def test_the_command_fails_when_something_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, written(tmp_path, tiny_model().without_tensors("output_norm.weight")))
    assert code == 1 and "1 missing: output_norm.weight" in out and "none: header" not in out


def test_json_holds_the_same_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, tiny_model("Q8_0"))
    for options in ((), ("--tensors",)):
        code, out = run(capsys, path, "--json", *options)
        read = json.loads(out)
        assert code == 0 and read == json.loads(json.dumps(inspect(path).to_dict(bool(options))))
        assert ("tensors" in read) is bool(options)


def test_text_from_the_file_cannot_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    red = "\x1b[31mred\x07\u202e"
    file = tiny_model().with_pair("general.name", "str", red).with_pair(f"key{red}", "str[]", [red])
    file = file.with_tensor("output_norm.weight", name=f"x{red}")
    file = file.with_pair("general.architecture", "str", red)
    for options in ((), ("--tensors",), ("--json", "--tensors")):
        _, out = run(capsys, written(tmp_path, file), *options)
        assert all(character.isprintable() or character == "\n" for character in out)


@pytest.mark.needs("shared", "data/gemma2-tokenizer")
def test_the_official_tokenizer_files_are_2b_without_weights() -> None:
    found = inspect(SHARED / "data" / "gemma2-tokenizer" / "vocab-official.gguf")
    assert found.model == "gemma-2-2b" and found.tokenizer and found.tokenizer["pieces"] == 256000
    assert len(found.problems) == 1 and "288 missing" in found.problems[0]
