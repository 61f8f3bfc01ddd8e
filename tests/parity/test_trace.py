"""Traces: what is written is what was computed, whole or not at all; what others write is read."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gemma2
from gemma2.checkpoints.hf_config import read_config
from gemma2.cli import main
from gemma2.cli import trace as command
from gemma2.load import POCKET
from gemma2.parity.trace import About, Trace, TraceWriter, dtypes
from gemma2.research import capture, watching
from gemma2.research.sites import chosen, sites
from tests.conftest import ids, raw_config, tiny
from tests.test_cache import resident

PAGE = Path(__file__).resolve().parents[2] / "docs" / "traces.md"
IDS = ids(1, 30)[0].tolist()


def written(path: Path, model: gemma2.Gemma2, patterns: Any = "*", **options: Any) -> dict[str, torch.Tensor]:
    about = About("ourselves", str(model.model.norm.weight.dtype).removeprefix("torch."), model.config, {"x": "1"})
    writer = TraceWriter(path, about, IDS, patterns, dtypes(model, patterns), **options)
    with torch.no_grad(), writer as trace, watching(model, trace.add, trace.sites), capture(model) as seen:
        model(torch.tensor([IDS]))
    return dict(seen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_site_is_read_back_to_the_bit_in_the_dtype_it_was_computed_in(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny("9b").to(dtype)
    seen = written(tmp_path / "t.safetensors", model)
    trace = Trace(tmp_path / "t.safetensors")
    assert trace.names == list(sites(model.config)) and trace.ids == IDS
    assert trace.about == About("ourselves", str(dtype).removeprefix("torch."), model.config, {"x": "1"})
    for name in trace.names:
        assert trace[name].dtype == seen[name].dtype and torch.equal(trace[name], seen[name][0]), name
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert trace["ln_final.hook_normalized"].dtype == wide and trace["ln_final"].dtype == dtype
    assert os.listdir(tmp_path) == ["t.safetensors"]
    assert "logits" in trace and "ids" not in trace and "blocks.4.ln1" not in trace


def test_safetensors_own_reader_takes_it_and_finds_nothing_but_ids_and_sites(tmp_path: Path) -> None:
    written(tmp_path / "t.safetensors", tiny(), ["logits*", "blocks.2.ln1"])
    assert set(load_file(tmp_path / "t.safetensors")) == {"ids", "blocks.2.ln1", "logits_raw", "logits"}


def test_sites_may_be_added_in_any_order_with_or_without_the_batch_axis(tmp_path: Path) -> None:
    config, values = tiny().config, {"ln_final": torch.randn(30, 288), "hook_embed": torch.randn(1, 30, 288)}
    with TraceWriter(tmp_path / "t", About("x", "float32", config), IDS, values, torch.float32) as trace:
        for name, value in values.items():
            trace.add(name, value)
    for name, value in values.items():
        assert torch.equal(Trace(tmp_path / "t")[name], value.view(30, 288))


def test_a_trace_that_was_not_finished_leaves_nothing_and_the_old_one_as_it_was(tmp_path: Path) -> None:
    path, model = tmp_path / "t", tiny()
    about = About("x", "float32", model.config)
    path.write_bytes(b"old")
    for fault in (KeyboardInterrupt, ValueError):
        with pytest.raises(fault), TraceWriter(path, about, IDS, "ln_final", torch.float32, force=True) as trace:
            trace.add("ln_final", torch.zeros(30, 288))
            raise fault
    with (
        pytest.raises(RuntimeError, match=r"nothing was added for hook_embed$"),
        TraceWriter(path, about, IDS, ["hook_embed", "ln_final"], torch.float32, force=True) as trace,
    ):
        trace.add("ln_final", torch.zeros(30, 288))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["t"]


def test_a_file_that_is_there_or_comes_meanwhile_is_not_replaced_unless_forced(tmp_path: Path) -> None:
    path, model = tmp_path / "t", tiny()
    written(path, model, "ln_final")
    with pytest.raises(FileExistsError, match="is there already"):
        written(path, model, "logits")
    assert Trace(path).names == ["ln_final"]
    written(path, model, "logits", force=True)
    assert Trace(path).names == ["logits"]
    late = TraceWriter(tmp_path / "late", About("x", "float32", model.config), IDS, "ln_final", torch.float32)
    with pytest.raises(FileExistsError), late as trace:
        trace.add("ln_final", torch.zeros(30, 288))
        (tmp_path / "late").write_bytes(b"another's")
    assert (tmp_path / "late").read_bytes() == b"another's" and len(os.listdir(tmp_path)) == 2


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    model = tiny()
    about = About("x", "float32", model.config)
    with pytest.raises(ValueError, match="id 512 is outside"):
        TraceWriter(tmp_path / "t", about, [1, 512], "logits", torch.float32)
    with pytest.raises(ValueError, match="at least one token id"):
        TraceWriter(tmp_path / "t", about, [], "logits", torch.float32)
    with pytest.raises(ValueError, match="no site is called 'logit'"):
        TraceWriter(tmp_path / "t", about, IDS, "logit", torch.float32)
    with (
        pytest.raises(ValueError, match="not int8"),
        TraceWriter(tmp_path / "t", about, IDS, "logits", torch.int8),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"logits is \[30, 511\], and must be \[30, 512\]"),
        TraceWriter(tmp_path / "t", about, IDS, "logits", torch.float32) as trace,
    ):
        trace.add("logits", torch.zeros(30, 511))
    with (
        pytest.raises(gemma2.NonFiniteError, match="logits was computed as NaN"),
        TraceWriter(tmp_path / "t", about, IDS, "logits", torch.float32) as trace,
    ):
        trace.add("logits", torch.full((30, 512), torch.nan))
    assert not os.listdir(tmp_path)


def test_sites_go_to_the_disk_as_they_come_and_none_stays_in_memory(tmp_path: Path) -> None:
    config = read_config(raw_config(num_hidden_layers=25, max_position_embeddings=4096))
    about, row = About("x", "float32", config), [1] * 3641
    with TraceWriter(tmp_path / "t", about, row, "blocks.*.hook_resid_post", torch.float32) as trace:
        before = resident()
        for name in trace.sites:
            trace.add(name, torch.ones(3641, 288))
        assert trace.bytes > 100e6
        assert resident() - before < 30e6


# The command.


def traced(path: Path, *options: str) -> Trace:
    assert main(["trace", "pocket", "-o", str(path), "--device", "cpu", *options]) == 0
    return Trace(path)


def test_the_command_writes_what_the_model_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    globs = ["--sites", "blocks.*.hook_resid_post", "--sites", "logits"]
    trace = traced(tmp_path / "t.safetensors", "--prompt", "In the beginning", *globs)
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 't.safetensors'}: 7 sites of 4 tokens, 45.1 kB\n" and err == ""
    gemma = gemma2.load(device="cpu")
    assert trace.ids == gemma.tokenizer.encode("In the beginning")
    assert trace.names == list(chosen(gemma.config, ["blocks.*.hook_resid_post", "logits"]))
    with torch.no_grad():
        assert torch.equal(trace["logits"], gemma.model(torch.tensor([trace.ids]))[0])
    assert trace.about.config == gemma.config and trace.about.dtype == "bfloat16"
    assert trace.about.system.startswith("gemma2 ") and trace.about.versions["torch"] == torch.__version__


def test_without_sites_every_site_is_written_and_dtype_is_taken(tmp_path: Path) -> None:
    trace = traced(tmp_path / "t", "--ids", "2,17,5", "--dtype", "float64")
    assert trace.names == list(sites(trace.about.config)) and trace.ids == [2, 17, 5]
    assert trace.about.dtype == "float64" and trace["logits"].dtype == torch.float64


def test_ids_come_from_the_line_or_a_json_file_and_text_from_a_file_or_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ids.json").write_text("[2, 17, 5]", encoding="utf-8")
    (tmp_path / "text").write_bytes("Ægypt\r\n".encode())
    options = ["--sites", "ln_final", "--force"]
    encode = gemma2.load(device="cpu").tokenizer.encode
    assert traced(tmp_path / "t", "--ids", " 2, 17 ,5", *options).ids == [2, 17, 5]
    assert traced(tmp_path / "t", "--ids", str(tmp_path / "ids.json"), *options).ids == [2, 17, 5]
    assert traced(tmp_path / "t", "--file", str(tmp_path / "text"), *options).ids == encode("Ægypt\r\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"And God")))
    assert traced(tmp_path / "t", "--prompt", "-", *options).ids == encode("And God")


def test_the_size_is_known_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1,024 tokens, every site: 2 GB, for which there is no room here."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    monkeypatch.setattr(command, "watching", lambda *args: pytest.fail("it computed"))
    row = ",".join(["5"] * 1024)
    assert main(["trace", "pocket", "--ids", row, "-o", str(tmp_path / "t"), "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert "180 sites of 1024 tokens, " in out and "GB are needed there, and 0.001 GB are free" in err
    assert not os.listdir(tmp_path)


# Another system's.


def test_the_pages_example_is_a_trace_of_transformers_and_equals_ours_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="the page's example is one with transformers")
    code = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 22 and "gemma-2-2b" in code and "import gemma2" not in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("gemma-2-2b", str(POCKET)), str(PAGE), "exec"), {})
    theirs = Trace("theirs.safetensors")
    gemma = gemma2.load(dtype="float32", device="cpu")
    assert theirs.about.config == gemma.config
    assert theirs.about.system.startswith("transformers ") and len(theirs.names) == 9
    ours = traced(tmp_path / "ours", "--ids", json.dumps(theirs.ids)[1:-1], "--dtype", "float32")
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs.names)
