"""The certificate passes what is sound, fails what is not, each check at its own fault, and says what did not run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import gemma2
from gemma2 import cache, ops
from gemma2.cli import main
from gemma2.cli import verify as command
from gemma2.parity import verify as module
from gemma2.parity.tolerances import TOLERANCES
from gemma2.parity.verify import Check, Saved, narrowed, verify
from tests.conftest import tiny
from tests.hostile.conftest import SMALL

LENGTH = 40
FEEDING = {"cached = uncached", "chunked = whole", "decode = prefill"}


def certificate(model: gemma2.Gemma2, saved: Saved | None = None, compiled: bool = False) -> dict[str, Check]:
    return {check.name: check for check in verify(model, saved, compiled=compiled, length=LENGTH)}


def failures(model: gemma2.Gemma2, saved: Saved | None = None, compiled: bool = False) -> set[str]:
    return {name for name, check in certificate(model, saved, compiled).items() if check.passed is False}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", ["2b", "9b", "27b"])
def test_a_sound_model_passes_everything_that_can_run(size: str, dtype: torch.dtype) -> None:
    model = tiny(size).to(dtype)
    found = certificate(model, {"as it is": lambda: model})
    exact = {"slot 7 = alone", "decode = prefill"}
    assert all(check.passed for name, check in found.items() if not name.startswith(("compiled", "device", *exact)))
    for name in exact:  # in bfloat16 some shapes are equal without the mode too, and float64 has none
        assert found[name].passed or (found[name].why_not and (dtype != torch.float32 or "slot" in name)), found[name]
    assert found["save = load"].bitwise and found["save = load"].distance == 0
    assert not found["cached = uncached"].bitwise or dtype == torch.bfloat16


def test_the_order_of_checks_is_told_and_none_is_left_out() -> None:
    names = ["batch = solo", "cached = uncached", "chunked = whole", "compiled = eager", "compiled decoding"]
    names += ["device = CPU", "save = load", "slot 7 = alone", "decode = prefill"]
    model = tiny()
    assert list(certificate(model, {"so": lambda: model})) == names


def test_padding_that_is_seen_fails_the_batch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
        back = queries[:, :, None] - keys[:, None, :]
        return ((back >= 0) & (back < (window or 10**6)))[:, None]

    monkeypatch.setattr(ops, "visible", careless)
    assert failures(tiny()) == {"batch = solo"}


@pytest.mark.parametrize("missing, found", [(1, set()), (2, FEEDING)])
def test_a_ring_that_is_too_short_fails_what_is_fed_to_a_cache(
    missing: int, found: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """New keys are joined to a full ring, so one slot fewer than the window is still enough, and two fewer are not."""
    original = cache.LayerCache.__init__

    def short(self: cache.LayerCache, slots: int, *rest: Any) -> None:
        original(self, slots - missing * (slots == 16), *rest)

    monkeypatch.setattr(cache.LayerCache, "__init__", short)
    assert failures(tiny()) == found


def test_a_chunk_that_evicts_what_it_still_sees_fails_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written before it is read, as a ring may be fed with one token and not with more."""

    def update(self: cache.LayerCache, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        if not len(self.keys):  # as the original, at the first update
            shape = (len(keys), self.slots)
            self.keys, self.values = (x.new_zeros(*shape, *x.shape[2:]) for x in (keys, values))
            self.positions = torch.full(shape, cache.EMPTY, dtype=torch.int32)
        where = torch.arange(self.length, self.length + positions.shape[1])[-self.slots :] % self.slots
        for slot, new in ((self.keys, keys), (self.values, values), (self.positions, positions.int())):
            slot[:, where] = new[:, -self.slots :]
        self.length += positions.shape[1]
        return self.keys, self.values, self.positions

    monkeypatch.setattr(cache.LayerCache, "update", update)
    assert failures(tiny()) == FEEDING


@torch.no_grad()
def test_a_bit_lost_in_saving_fails_even_where_no_logit_shows_it() -> None:
    model, changed = tiny(), tiny()
    weight = dict(changed.named_parameters())["model.layers.0.mlp.down_proj.weight"]
    weight[0, 0] = weight[0, 0].nextafter(torch.tensor(9.0))
    found = certificate(model, {"badly": lambda: changed})["save = load"]
    assert found.passed is False and found.distance is not None and 0 < found.distance < 1e-6


def test_a_compiler_that_miscompiles_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda run, **options: lambda *given: run(*given) * 1.001)
    assert failures(tiny(), compiled=True) == {"compiled = eager", "compiled decoding"}


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_torch_compile_itself_is_run_and_is_within_rounding() -> None:
    before = counters["stats"]["unique_graphs"]
    found = certificate(tiny(**{**SMALL, "num_hidden_layers": 1}), compiled=True)
    assert counters["stats"]["unique_graphs"] >= before + 2
    for name in ("compiled = eager", "compiled decoding"):
        assert found[name].passed, found[name]


def test_a_compiler_that_is_missing_is_said_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(model: object, **options: bool) -> Callable[[Tensor], Tensor]:
        raise RuntimeError("no C++ compiler was found\nand much more")

    monkeypatch.setattr(torch, "compile", compile)
    found, left_out = certificate(tiny(), compiled=True), certificate(tiny())
    for name in ("compiled = eager", "compiled decoding"):
        why = "torch.compile failed (RuntimeError: no C++ compiler was found)"
        assert found[name].passed is None and found[name].why_not == why
        assert left_out[name].why_not == "left out, as asked"


def test_a_device_is_held_against_the_cpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert certificate(tiny())["device = CPU"].why_not == "no accelerator here"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    assert certificate(tiny())["device = CPU"].bitwise
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert certificate(tiny())["device = CPU"].why_not.startswith("meta cannot (")


def test_nan_is_never_passed() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    found = certificate(model)
    assert {name for name, check in found.items() if check.passed is False} >= {"batch = solo", *FEEDING}
    assert "NaN" not in json.dumps([check.to_dict() for check in found.values()])


def test_a_model_that_cannot_be_saved_says_why() -> None:
    def full() -> gemma2.Gemma2:
        raise OSError("9 GB are needed there, and 1 GB are free")

    found = certificate(tiny(), {"GGUF": full})["save = load"]
    assert found.passed is None and found.why_not == "9 GB are needed there, and 1 GB are free"


def test_the_window_is_narrowed_to_leave_some_of_the_prompt_outside_and_the_model_is_left_alone() -> None:
    model = tiny(sliding_window=200)
    twin = narrowed(model, 60)
    assert twin.config.sliding_window == 40 and model.config.sliding_window == 200
    assert all(mine is theirs for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True))
    assert narrowed(tiny(), 60).config.sliding_window == 16
    assert certificate(model)["cached = uncached"].passed


@pytest.mark.parametrize("length", [16, 17, 33])
@pytest.mark.parametrize("window", [1, 2, 9, 200])
def test_every_prompt_and_window_can_be_certified(length: int, window: int) -> None:
    model = tiny("2b", sliding_window=window).double()
    assert all(check.passed is not False for check in verify(model, compiled=False, length=length))


def test_prompts_that_are_too_short_or_exceed_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        list(verify(tiny(), length=15))
    with pytest.raises(gemma2.ContextOverflow, match="257 token ids exceed the context of 256"):
        list(verify(tiny(), length=257))


def test_the_command_refuses_a_length_before_it_prints_anything(capsys: pytest.CaptureFixture[str]) -> None:
    for length, words in (("15", "give at least 16"), ("1025", "1,025 token ids exceed the context of 1,024")):
        assert main(["verify", "pocket", "--device", "cpu", "--length", length]) == 2
        out, err = capsys.readouterr()
        assert out == "" and words in err


def test_the_command_certifies_the_pocket_model_and_saves_it_in_two_formats(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--no-compile", "--length", "150", "--dtype", "float32", "--device", "cpu"]
    assert main(["verify", "pocket", *options]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "dtype     float32" in out and "150 random token ids, window 100, narrowed from 128" in out
    assert out.count("passed   every bit equal (safetensors") == out.count("passed   every bit equal (GGUF") == 1
    assert out.endswith("7 of 7 passed, 3 not run\n") or torch.accelerator.is_available()


def test_what_is_saved_has_every_bit_of_a_float32_model_or_says_that_no_gguf_can_state_it(
    folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--no-compile", "--length", "40", "--device", "cpu"]
    assert main(["verify", str(folder(query_pre_attn_scalar=16)), *options]) == 0
    out = capsys.readouterr().out
    assert "dtype     float32" in out and out.count("save = load        passed   every bit equal") == 2
    assert main(["verify", str(folder("no-gguf")), *options]) == 0
    out = capsys.readouterr().out
    assert "every bit equal (safetensors" in out and "which a GGUF cannot state" in out


def test_the_command_fails_with_1_and_says_where_also_for_machines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = [Check("a = b", "so", 2.0, 1.0, False, 0.1), Check("c = d", "so", None, 1.0, False, 0.1, "no time")]
    monkeypatch.setattr(command, "verify", lambda *args, **options: iter(checks))
    assert main(["verify", "pocket", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "a = b              FAILED   off by 2, allowed 1 (so; 0.1 s)" in out
    assert "c = d              not run  no time (so)" in out and out.endswith("0 of 1 passed, 1 not run\n")
    assert main(["verify", "pocket", "--device", "cpu", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False and [check["passed"] for check in found["checks"]] == [False, None]
    assert found["dtype"] == "bfloat16" and module.LENGTH == 192


def test_what_keeps_the_command_from_a_verdict_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert "none: no such file or folder" in capsys.readouterr().err
    for error in (RuntimeError, MemoryError):
        monkeypatch.setattr(command, "verify", Mock(side_effect=error("no memory")))
        assert main(["verify", "pocket", "--device", "cpu"]) == 2
        assert "no memory" in capsys.readouterr().err


def test_contributing_has_the_table_of_tolerances() -> None:
    page = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for dtype, tolerance in TOLERANCES.items():
        assert f"| {str(dtype).removeprefix('torch.')} | {tolerance} | {tolerance.why} |" in page
