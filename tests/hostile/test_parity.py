"""`gemma2 parity` with what it cannot work on: one line that says what, where and the cure, and the right exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gemma2.cli import main, parity
from tests.conftest import tensors_of, tiny
from tests.hostile.conftest import SMALL, Complaint, shell

IDS = "2,17,5,99,1024,7"


def filled(place: Path, **changes: int) -> Path:
    """A whole folder of the smallest model."""
    model = tiny("2b", **{"vocab_size": 4096, **SMALL, **changes})
    save_file(tensors_of(model), shell(place, **changes) / "model.safetensors")
    return place


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("model"))


@pytest.fixture
def trace(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    file = tmp_path / "trace.safetensors"
    assert main(["trace", str(path), "--ids", IDS, "-o", str(file), "--device", "cpu"]) == 0
    return file


def rewritten(trace: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    with safe_open(trace, framework="pt") as opened:
        stated = opened.metadata()
    tensors = load_file(trace)
    change(tensors)
    save_file(tensors, trace, metadata=stated)


ARGUMENTS: list[tuple[list[str], str]] = [
    ([], "the following arguments are required: --against"),
    (["--against", "vllm"], "no reference 'vllm'; there are transformers, llama.cpp, gemma_pytorch:FOLDER, trace:FILE"),
    (["--against", "gemma_pytorch"], "no reference 'gemma_pytorch'; there are"),
    (["--against", "trace:"], "no reference 'trace:'; there are"),
    (["--against", "self:colour=red"], "self:colour=red: give model=..., dtype=..., device=..., numerics=..."),
    (["--against", "self:dtype=int4"], "self:dtype=int4: dtype is not one of"),
    (["--against", "self:device=tpu"], "device 'tpu' is not available here"),
    (["--against", "self:numerics=abacus"], "numerics 'abacus' is not one of transformers, gemma_pytorch"),
    (["--against", "self", "--numerics", "abacus"], "argument --numerics: invalid choice: 'abacus'"),
    (["--against", "self", "--explain", "abacus"], "argument --explain: invalid choice: 'abacus'"),
    (["--against", "self", "--from", "jax"], "--from says where --explain begins: give --explain PROFILE too"),
    (["--against", "self", "--explain", "jax", "--html", "x", "--all"], "leave out --html, --all"),
    (["--against", "self", "--dtype", "int4"], "int4"),
    (["--against", "self", "--sites", "blocks.9.*"], "no site is called 'blocks.9.*': this model has layers 0 to "),
    (["--against", "self", "--ids", "2,4096"], "token id 4096 at 1 is outside the vocabulary [0, 4096)"),
    (["--against", "self", "--ids", "2,-1"], "token id -1 at 1 is outside the vocabulary [0, 4096)"),
    (["--against", "self", "--ids", "9" * 20], f"token id {'9' * 20} at 0 is outside the vocabulary [0, 4096)"),
    (
        ["--against", "self", "--ids", "two"],
        "--ids 'two': neither token ids as 2,17,5 nor a file with a JSON list of them",
    ),
    (["--against", "self", "--ids", "2", "--prompt", "x"], "not allowed with argument"),
]


@pytest.mark.parametrize(("argv", "words"), ARGUMENTS, ids=[" ".join(argv) for argv, _ in ARGUMENTS])
def test_arguments_that_cannot_be_exit_with_two(argv: list[str], words: str, path: Path, complaint: Complaint) -> None:
    assert words in complaint("parity", path, *argv, code=2)


def test_ids_that_are_none_are_refused(path: Path, tmp_path: Path, complaint: Complaint) -> None:
    file = tmp_path / "ids.json"
    file.write_text("[]", encoding="utf-8")
    line = complaint("parity", path, "--against", "self", "--ids", file, code=2)
    assert f"{file}: an empty list; give at least one token id" in line


def test_a_text_that_is_not_there_is_said_to_be_the_text(path: Path, tmp_path: Path, complaint: Complaint) -> None:
    line = complaint("parity", path, "--against", "self", "--file", tmp_path / "nope", code=2)
    assert line == f"gemma2: error: --file {tmp_path / 'nope'}: No such file or directory\n"


@pytest.mark.parametrize(
    ("reference", "package", "named"),
    [("transformers", "transformers", "transformers"), ("llama.cpp", "llama_cpp", "llama-cpp-python")],
)
def test_a_reference_that_is_not_installed_names_its_package(
    reference: str, package: str, named: str, path: Path, complaint: Complaint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"gemma2.parity.references.{package}", raising=False)
    line = complaint("parity", path, "--against", reference, code=2)
    assert f"{package.replace('_cpp', '.cpp')} is not installed: " in line.replace("llama-cpp-python", "llama.cpp")
    assert f"pip install {named} (" in line


@pytest.mark.posix
def test_a_page_that_cannot_be_is_refused_before_anything_is_computed(
    path: Path, tmp_path: Path, complaint: Complaint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(page: Path) -> str:
        return complaint("parity", tmp_path / "no model", "--against", "self", "--html", page, code=2)

    assert f"{tmp_path / 'nowhere'}: no such folder to write to" in ask(tmp_path / "nowhere" / "x.html")
    assert f"{tmp_path}: is a folder, and not replaced by a file; choose another name" in ask(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert f"{tmp_path / 'pipe'}: is not a regular file" in ask(tmp_path / "pipe")
    (tmp_path / "pipe").unlink()
    real = os.access
    with monkeypatch.context() as patched:  # root may write anywhere
        patched.setattr(os, "access", lambda path, mode: mode != os.W_OK and real(path, mode))
        assert f"{tmp_path}: cannot be written to" in ask(tmp_path / "x.html")
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "the chart needs matplotlib: pip install matplotlib" in ask(tmp_path / "x.html")
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_in_the_end_does_not_take_the_verdict_along(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(parity, "check_page", lambda page: None)
    monkeypatch.setattr(parity, "write_report", full)
    argv = ["parity", str(path), "--against", "self", "--ids", IDS, "--no-cases", "--html", str(tmp_path / "x.html")]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert "verdict: equal to the bit" in out and err == "gemma2: error: no space left\n"
    assert main([*argv, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["verdict"] == "equal to the bit"


def test_a_checkpoint_given_as_a_reference_is_told_how_to_be_one(path: Path, complaint: Complaint) -> None:
    line = complaint("parity", path, "--against", path, code=2)
    assert f"no reference '{path}'; there are " in line
    assert line.endswith(f"; to compare with this checkpoint give self:model={path}\n")


def test_what_is_no_model_is_refused_on_both_sides(path: Path, tmp_path: Path, complaint: Complaint) -> None:
    assert str(tmp_path / "none") in complaint("parity", tmp_path / "none", "--against", "self", code=2)
    line = complaint("parity", path, "--against", f"self:model={tmp_path / 'none'}", code=2)
    assert f"{tmp_path / 'none'}: no such file or folder" in line
    line = complaint("parity", path, "--against", f"gemma_pytorch:{tmp_path}", code=2)
    assert "no gemma/model.py in it; give the folder of a checkout" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "its num_hidden_layers is 3, not 2"),
        ({"intermediate_size": 20}, "its intermediate_size is 20, not 12"),
    ],
)
def test_another_depth_or_width_is_refused_and_named(
    changes: dict[str, int], words: str, path: Path, tmp_path: Path, complaint: Complaint
) -> None:
    other = filled(tmp_path / "other", **changes)
    assert f"another model than {path}: {words}" in complaint(
        "parity", path, "--against", f"self:model={other}", code=2
    )
    file = tmp_path / "trace.safetensors"
    assert main(["trace", str(other), "--ids", IDS, "-o", str(file), "--device", "cpu"]) == 0
    assert f"another model than {path}: {words}" in complaint("parity", path, "--against", file, code=2)


def test_another_vocabulary_is_refused_and_named(path: Path, trace: Path, complaint: Complaint) -> None:
    whole = trace.read_bytes()
    trace.write_bytes(whole.replace(rb"\"vocab_size\": 4096", rb"\"vocab_size\": 4095"))
    line = complaint("parity", path, "--against", trace, "--sites", "hook_embed", code=2)
    assert "4095" in line and str(trace) in line


def test_ids_beyond_a_context_are_refused(path: Path, trace: Path, complaint: Complaint) -> None:
    long = ",".join(["2"] * 257)
    line = complaint("parity", path, "--against", "self", "--ids", long, code=2)
    assert "257 token ids exceed the model's context of 256" in line
    line = complaint("parity", path, "--against", "self", "--ids", long, "--explain", "jax", code=2)
    assert "257 token ids exceed the model's context of 256" in line


def test_the_references_context_counts_too_and_the_text_without_options_fits_in_both(
    path: Path, tmp_path: Path, complaint: Complaint, capsys: pytest.CaptureFixture[str]
) -> None:
    short = filled(tmp_path / "short", max_position_embeddings=20)
    line = complaint("parity", path, "--against", f"self:model={short}", "--ids", ",".join(["2"] * 21), code=2)
    assert "takes at most 20 token ids, not 21" in line
    for model, reference in ((path, f"self:model={short}"), (short, "self")):
        assert main(["parity", str(model), "--against", reference, "--no-cases", "--sites", "hook_embed"]) == 0
        assert "\ntext   20 token ids of Genesis 1 (default text)\n" in capsys.readouterr().out


def test_a_trace_answers_no_other_ids_and_says_so_in_one_line(path: Path, trace: Path, complaint: Complaint) -> None:
    given = "it holds values for its own 6 token ids, not for these 2; leave out --prompt, --ids and --file"
    for more in ([], ["--explain", "jax"]):
        line = complaint("parity", path, "--against", trace, "--ids", "2,17", *more, code=2)
        assert line == f"gemma2: error: {trace}: a trace is a record: {given}\n"


def test_a_trace_that_is_cut_or_none_is_refused(path: Path, trace: Path, complaint: Complaint) -> None:
    whole = trace.read_bytes()
    for kept in (0, 7, 100, len(whole) - 1):
        trace.write_bytes(whole[:kept])
        words = "not a whole safetensors file" if kept else "an empty file"
        assert f"{trace}: {words}" in complaint("parity", path, "--against", trace, code=2)
    trace.unlink()
    assert f"{trace}: no such file" in complaint("parity", path, "--against", trace, code=2)
    weights = path / "model.safetensors"
    assert "no trace: its metadata do not say format" in complaint("parity", path, "--against", weights, code=2)


def test_nan_in_a_trace_names_the_first_site_and_the_system(path: Path, trace: Path, complaint: Complaint) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for site in ("logits", "blocks.1.hook_resid_mid", "blocks.1.mlp.hook_pre"):
            tensors[site][3, 1] = torch.nan

    rewritten(trace, spoil)
    line = complaint("parity", path, "--against", trace, code=2)
    assert f"{trace}: blocks.1.hook_resid_mid is NaN at [3, 1]: gemma2 " in line and "failed to compute it" in line


def test_infinity_in_a_trace_is_a_difference_at_its_site(
    path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewritten(trace, lambda tensors: tensors["blocks.1.mlp.hook_pre"].__setitem__((3, 1), torch.inf))
    capsys.readouterr()
    assert main(["parity", str(path), "--against", str(trace), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["first"] == "blocks.1.mlp.hook_pre"
    assert "theirs not finite: inf at [3, 1]" in [row["why"] for row in found["rows"]]


def test_weights_that_are_not_finite_are_refused_on_both_sides(
    path: Path, tmp_path: Path, complaint: Complaint
) -> None:
    broken = filled(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, broken / "model.safetensors")
    for argv in ((broken, "--against", "self"), (path, "--against", f"self:model={broken}")):
        line = complaint("parity", *argv, code=2)
        assert str(broken) in line and "model.norm.weight" in line


def test_a_trace_with_none_of_the_sites_asked_for_says_how_many_it_has(
    path: Path, trace: Path, complaint: Complaint
) -> None:
    def keep(tensors: dict[str, torch.Tensor]) -> None:
        for name in set(tensors) - {"ids", "hook_embed"}:
            del tensors[name]

    rewritten(trace, keep)
    line = complaint("parity", path, "--against", trace, "--sites", "logits", code=2)
    assert "shows none of the sites asked for; it has 1" in line
    line = complaint("parity", path, "--against", trace, "--explain", "jax", code=2)
    assert "shows no logits, by which the gap is measured" in line
