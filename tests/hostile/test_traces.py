"""Traces that are none, and command lines that ask for none: refused in one line that says what and where."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from gemma2 import BadModelFile
from gemma2.checkpoints.hf_config import read_config
from gemma2.cli import main
from gemma2.parity.trace import Trace
from tests.conftest import raw_config, tensors_of, tiny
from tests.hostile.conftest import SMALL, Complaint, shell

CONFIG = raw_config(**SMALL)
IDS = [2, 17, 5]
LAST = "blocks.1.hook_resid_post"


def good() -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {"ids": torch.tensor(IDS), LAST: torch.randn(3, 8), "logits": torch.randn(3, 512).bfloat16()}
    about = {"format": "gemma2-trace 1", "system": "another", "dtype": "bfloat16", "config": json.dumps(CONFIG)}
    return tensors, about


def refusal(path: Path) -> str:
    with pytest.raises(BadModelFile) as caught:
        trace = Trace(path)
        for name in trace.names:
            trace[name]
    said = str(caught.value)
    assert said.startswith(str(path)) and "\n" not in said and len(said) < 600, said
    return said


def test_the_good_one_is_taken_without_what_is_optional(tmp_path: Path) -> None:
    tensors, about = good()
    (tmp_path / "t").write_bytes(save(tensors, about))
    trace = Trace(tmp_path / "t")
    assert trace.ids == IDS and trace.names == [LAST, "logits"] and trace.about.versions == {}
    assert trace.about.config == read_config(CONFIG) and torch.equal(trace[LAST], tensors[LAST])


def test_cut_anywhere_it_is_refused(tmp_path: Path) -> None:
    whole = save(*good())
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    cuts = {
        *range(24),
        *range(header - 8, header + 32),
        *range(0, len(whole), 97),
        len(whole) - 1,
        len(whole) - 4096,
    }
    for cut in sorted(cuts - {len(whole)}):
        (tmp_path / "t").write_bytes(whole[:cut])
        assert "not a whole safetensors file" in refusal(tmp_path / "t") or cut == 0, cut


def test_with_bytes_after_its_end_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(save(*good()) + b"\0")
    assert "not a whole safetensors file" in refusal(tmp_path / "t")


Change = Callable[[dict[str, Tensor], dict[str, str]], Any]


def tensor(name: str, value: Tensor) -> Change:
    return lambda tensors, about: tensors.__setitem__(name, value)


def stated(name: str, value: str) -> Change:
    return lambda tensors, about: about.__setitem__(name, value)


def config(**changes: Any) -> Change:
    return stated("config", json.dumps({**CONFIG, **changes}))


def spoiled(value: float) -> Tensor:
    return torch.ones(3, 8).index_put((torch.tensor(1), torch.tensor(4)), torch.tensor(value))


WRONG: dict[str, tuple[Change, str]] = {
    "no ids": (lambda t, a: t.pop("ids"), "no tensor 'ids'"),
    "ids of two rows": (tensor("ids", torch.tensor([IDS])), "ids are I64 [1, 3], and must be I64 [t], at least one"),
    "ids of none": (tensor("ids", torch.zeros(0, dtype=torch.int64)), "ids are I64 [0]"),
    "ids as floats": (tensor("ids", torch.ones(3)), "ids are F32 [3]"),
    "ids as int32": (tensor("ids", torch.ones(3, dtype=torch.int32)), "ids are I32 [3]"),
    "a scalar id": (tensor("ids", torch.tensor(3)), "ids are I64 []"),
    "a negative id": (tensor("ids", torch.tensor([2, -1, 5])), "id -1 is outside the vocabulary [0, 512)"),
    "an id too high": (tensor("ids", torch.tensor([2, 512, 5])), "id 512 is outside the vocabulary [0, 512)"),
    "fewer ids than positions": (tensor("ids", torch.tensor([2, 5])), f"{LAST} is [3, 8], and its ids and config make"),
    "a site of another width": (
        tensor(LAST, torch.ones(3, 9)),
        f"{LAST} is [3, 9], and its ids and config make it [3, 8]",
    ),
    "a site with the batch axis": (tensor(LAST, torch.ones(1, 3, 8)), f"{LAST} is [1, 3, 8], and its ids"),
    "a site as integers": (
        tensor(LAST, torch.ones(3, 8, dtype=torch.int64)),
        f"{LAST} is I64, and must be one of float32",
    ),
    "a site of no layer": (
        tensor("blocks.2.ln1", torch.ones(3, 8)),
        "'blocks.2.ln1' is not a site of a Gemma 2 of this",
    ),
    "a weight": (tensor("model.norm.weight", torch.ones(8)), "'model.norm.weight' is not a site"),
    "a name that steers a terminal": (tensor("\x1b[2J", torch.ones(1)), r"'\x1b[2J' is not a site"),
    "NaN": (tensor(LAST, spoiled(torch.nan)), f"{LAST} is NaN at [1, 4]: another failed to compute it"),
    "no metadata": (lambda t, a: a.clear(), "no trace: its metadata do not say format 'gemma2-trace 1'"),
    "a later format": (stated("format", "gemma2-trace 2"), "no trace: its metadata do not say format"),
    "a model file": (stated("format", "pt"), "no trace: its metadata do not say format"),
    "no system": (lambda t, a: a.pop("system"), "its metadata do not state system"),
    "no dtype nor config": (lambda t, a: (a.pop("dtype"), a.pop("config")), "its metadata do not state dtype, config"),
    "a dtype of its own": (stated("dtype", "Q4_K_M"), "dtype 'Q4_K_M' is not one of float32, bfloat16"),
    "a config that is no JSON": (stated("config", "{"), "its config is not valid JSON"),
    "a config without end": (stated("config", "[" * 100_000), "its config is not valid JSON"),
    "a config that is a list": (stated("config", "[]"), "config: expected a JSON object"),
    "a config of Llama": (config(model_type="llama"), "config: model_type is 'llama'"),
    "a config with a hole": (config(head_dim=None), "config: missing head_dim"),
    "a config with a billion layers": (config(num_hidden_layers=10**9), "too many"),
    "the config of another model": (
        config(hidden_size=16),
        f"{LAST} is [3, 8], and its ids and config make it [3, 16]",
    ),
    "versions that are no JSON": (stated("versions", "1.0"), "its versions must be a JSON object of strings"),
    "versions that are numbers": (stated("versions", '{"torch": 2}'), "its versions must be a JSON object of strings"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    (tensors, about), (change, words) = good(), WRONG[name]
    change(tensors, about)
    (tmp_path / "t").write_bytes(save(tensors, about))
    assert words in refusal(tmp_path / "t")


def test_infinity_is_read_since_a_masked_score_may_be_infinite(tmp_path: Path) -> None:
    tensors, about = good()
    tensors[LAST] = spoiled(-torch.inf)
    (tmp_path / "t").write_bytes(save(tensors, about))
    assert torch.equal(Trace(tmp_path / "t")[LAST], tensors[LAST])


def test_what_is_no_file_at_all_is_named(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none")
    assert "a folder where a file was expected" in refusal(tmp_path)
    for content, words in (
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
    ):
        (tmp_path / "t").write_bytes(content)
        assert words in refusal(tmp_path / "t")
    with pytest.raises(KeyError):
        (tmp_path / "t").write_bytes(save(*good()))
        Trace(tmp_path / "t")["ln_final"]


TO = ["-o", "{}/t", "--device", "cpu"]
ASKED: dict[str, tuple[list[str], int, str]] = {
    "no model": (["--prompt", "x", "-o", "{}/t"], 2, "MODEL and -o FILE are required"),
    "no output": (["pocket", "--prompt", "x"], 2, "MODEL and -o FILE are required"),
    "no text": (["pocket", *TO], 2, "say for which text: --prompt TEXT, --file FILE or --ids IDS"),
    "two texts": (["pocket", "--prompt", "x", "--ids", "2", *TO], 2, "not allowed with argument --prompt"),
    "no such model": (["{}/none", "--prompt", "x", *TO], 1, "no such file or folder"),
    "no such site": (["pocket", "--prompt", "x", "--sites", "hook_resid", *TO], 2, "no site is called 'hook_resid'"),
    "no such dtype": (["pocket", "--prompt", "x", "--dtype", "fp8", *TO], 2, "dtype 'fp8' is not one of"),
    "no such folder": (["pocket", "--prompt", "x", "-o", "{}/none/t"], 1, "/none: no such folder to write to"),
    "a folder": (["pocket", "--prompt", "x", "-o", "{}"], 1, "is a folder"),
    "a file that is there": (["pocket", "--prompt", "x", "-o", "{}/there"], 1, "is there already; --force"),
    "an id too high": (["pocket", "--ids", "2,4096", *TO], 2, "id 4096 is outside the vocabulary"),
    "a negative id": (["pocket", "--ids=-1", *TO], 2, "id -1 is outside the vocabulary"),
    "an id beyond int64": (["pocket", "--ids", f"2,{10**30}", *TO], 2, "is outside the vocabulary"),
    "an id of many digits": (["pocket", "--ids", "9" * 5000, *TO], 2, "digits"),
    "ids that are words": (["pocket", "--ids", "two", *TO], 2, "--ids 'two': neither token ids as 2,17,5 nor a file"),
    "ids with a hole": (["pocket", "--ids", "2,,5", *TO], 2, "neither token ids as 2,17,5 nor a file"),
    "no ids": (["pocket", "--ids", "{}/none.json", *TO], 2, "none.json: an empty list; give at least one token id"),
    "ids of text": (["pocket", "--ids", "{}/text.json", *TO], 1, "must be a JSON list of token ids"),
    "ids that are true": (["pocket", "--ids", "{}/true.json", *TO], 1, "must be a JSON list of token ids"),
    "ids that are no JSON": (["pocket", "--ids", "{}/there", *TO], 1, "not valid JSON"),
    "a text that is not UTF-8": (["pocket", "--file", "{}/latin", *TO], 2, "latin: not valid UTF-8 at byte 3"),
    "no such text": (["pocket", "--file", "{}/nowhere", *TO], 1, "nowhere"),
    "a text longer than the context": (["pocket", "--file", "{}/long", *TO], 1, "exceed the model's context of 1,024"),
    "more ids than the context": (["pocket", "--ids", ",".join(["5"] * 1025), *TO], 1, "1,025 tokens exceed"),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_command_line_that_asks_for_what_cannot_be_writes_nothing(
    name: str, tmp_path: Path, complaint: Complaint
) -> None:
    files = {"there": b"x", "none.json": b"[]", "text.json": b'["2"]', "true.json": b"[true]", "latin": b"caf\xe9"}
    for file, content in {**files, "long": b"the " * 2000}.items():
        (tmp_path / file).write_bytes(content)
    arguments, code, words = ASKED[name]
    assert words in complaint("trace", *(word.replace("{}", str(tmp_path)) for word in arguments), code=code)
    assert not (tmp_path / "t").exists() and len(list(tmp_path.iterdir())) == 6
    assert (tmp_path / "there").read_bytes() == b"x"


@pytest.mark.posix
def test_force_replaces_a_file_and_nothing_else(tmp_path: Path, complaint: Complaint) -> None:
    os.mkfifo(tmp_path / "pipe")
    line = complaint("trace", "pocket", "--prompt", "x", "-o", tmp_path / "pipe", "--force", code=1)
    assert f"{tmp_path / 'pipe'}: is not a regular file" in line
    assert (tmp_path / "pipe").is_fifo()


def test_a_model_that_computes_nan_writes_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, weights = shell(tmp_path / "model"), tensors_of(tiny(vocab_size=4096, **SMALL))
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, place / "model.safetensors")
    asked = ["--ids", "2,5", "-o", str(tmp_path / "t"), "--allow-nonfinite", "--device", "cpu"]
    assert main(["trace", str(place), *asked]) == 1
    said = f"gemma2: error: {tmp_path / 't'}: ln_final was computed as NaN, so no trace is written\n"
    assert capsys.readouterr().err == said and not (tmp_path / "t").exists()
