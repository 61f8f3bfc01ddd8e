"""`gemma2 bench`: what it refuses, what it measures, and what a record says."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from gemma2.bench import measure as bench_measure
from gemma2.bench import systems as bench_systems
from gemma2.bench.agreement import Disagreement, compare
from gemma2.bench.machine import thread_counts
from gemma2.bench.measure import MACHINE, Plan
from gemma2.bench.peers import check_installed
from gemma2.bench.process import Process
from gemma2.bench.summary import Spread, added, decode_rows, prefill_flops, prefill_rows, step_bytes
from gemma2.bench.systems import PEERS, distinct, file_type, our_system, peers
from gemma2.checkpoints.checkpoint import Checkpoint, open_checkpoint
from gemma2.cli import main
from gemma2.cli.bench import command_line
from gemma2.errors import BadModelFile, ContextOverflow
from gemma2.load import POCKET
from gemma2.memory import Free

QUICK = ["--prompt", "6", "--contexts", "5,8", "--batch", "1,2", "--rounds", "2", "--tokens", "2"]
QUICK += ["--prefill-rounds", "2", "--read", "1000000", "--threads", "1", "--load-rounds", "1"]
GGUF = POCKET / "pocket-q8_0.gguf"


@pytest.fixture(scope="module")
def opened() -> Checkpoint:
    return open_checkpoint(POCKET)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The record of a run against transformers, in float32."""
    pytest.importorskip("transformers")
    file = tmp_path_factory.mktemp("bench") / "run.json"
    options = ["--against", "transformers", "--dtype", "float32", "--json", str(file)]
    assert main(["bench", "pocket", *options, *QUICK]) == 0
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_run_measures_every_system_in_every_case(ran: Mapping[str, Any]) -> None:
    names = ["gemma2 float32", "transformers eager"]
    assert [row["name"] for row in ran["systems"]] == names
    assert [(case["tokens"], list(case["seconds"])) for case in ran["prefill"]] == [(6, names)]
    assert [(case["context"], case["batch"]) for case in ran["decode"]] == [(5, 1), (8, 1), (5, 2)]
    for case in ran["prefill"]:
        assert all(len(times) == 2 and min(times) > 0 for times in case["seconds"].values())
    for case in ran["decode"]:
        assert list(case["filling"]) == list(case["seconds"]) == names
        assert all([len(turn) for turn in rounds] == [2, 2] for rounds in case["seconds"].values())
    # Before every round: one prompt and three cases of decoding, two rounds each.
    assert {len(found) for found in ran["limits"].values()} == {8}
    assert all(rate > 0 for found in ran["limits"].values() for rate in found)


def test_a_record_says_what_ran_where(ran: Mapping[str, Any]) -> None:
    assert ran["gemma2 bench"] == 1 and ran["name"] == "pocket" and ran["plan"]["threads"] == 1
    assert ran["machine"]["threads"] == "1" and ran["machine"]["torch"] == str(torch.__version__)
    assert ran["systems"][1]["versions"].keys() == {"transformers", "torch"}
    for row in ran["systems"]:
        assert len(row["seconds"]) == len(row["first_token"]) == 1 and row["first_step"] > 0
        assert all(0 < load < first for load, first in zip(row["seconds"], row["first_token"], strict=True))
        assert row["weights"] == pytest.approx(4 * ran["model"]["parameters"], rel=0.01)
        held = row["memory"]
        assert sys.platform != "linux" or 0 < held["before"] <= held["loaded"] <= held["loading"] <= held["peak"]


def test_transformers_agrees_with_us_before_it_is_timed(ran: Mapping[str, Any]) -> None:
    (found,) = ran["agreement"]
    assert found["system"] == "transformers eager" and found["top"] == found["steps"] == 5
    assert found["distance"] < 1e-4 < found["allowed"]


def test_the_tables_are_printed_from_the_record(ran: Mapping[str, Any]) -> None:
    for rows in ([prefill_rows(ran, ran["prefill"][0])], [decode_rows(ran, case) for case in ran["decode"]]):
        for first, other in rows:
            assert first.ratio == Spread(1.0, 1.0, 1.0) and other.ratio.least <= other.ratio.median <= other.ratio.most
            assert first.share and other.share and first.rate.median > 0


def test_another_model_is_refused_and_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not llama.cpp here: any process that computes other logits will do, such as our own on changed weights."""
    changed = tmp_path / "changed"
    shutil.copytree(POCKET, changed)
    path = changed / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-200_000:] = raw[-400_000:-200_000]
    path.write_bytes(raw)
    other = bench_systems.System("changed", "gemma2", changed, {"device": "cpu"})
    real = bench_systems.peers
    from gemma2.cli import bench

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "peers", lambda *given: [*real(*given), other])
        assert main(["bench", "pocket", "--json", str(tmp_path / "run.json"), *QUICK]) == 1
    said = capsys.readouterr()
    assert "changed does not compute what gemma2 does, so it is not timed: at step" in said.err and not said.out
    assert not (tmp_path / "run.json").exists()


class Pretended:
    """A process that computes nothing, and notes what it was asked."""

    asked: ClassVar[list[str]] = []

    def __init__(self, name: str, command: object) -> None:
        self.name = name

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        self.asked.append(f"{self.name} {do}")
        if do == "check":
            save_file({"logits": torch.arange(20.0).view(2, 10)}, options["file"])
            return {"seconds": [0.25, 0.5]}
        answers: dict[str, dict[str, Any]] = {
            "hello": {"threads": 2},
            "load": {"seconds": float(len(self.asked)), "memory": {}},
            "fill": {"seconds": 1.0},
            "decode": {"seconds": [1.0] * len(options.get("ids", [[]])[0])},
        }
        return answers.get(do, {"read": 1.0})

    def close(self) -> None:
        self.asked.append(f"{self.name} close")


def test_systems_take_turns_and_are_loaded_in_new_processes(
    opened: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_measure, "Process", Pretended)
    monkeypatch.setattr(Pretended, "asked", [])
    systems = [bench_systems.System(name, "gemma2", POCKET) for name in "AB"]
    plan, told = Plan(prompts=(3,), contexts=(4,), rounds=2, tokens=2, prefill_rounds=2, load_rounds=3), list[str]()
    record = bench_measure.measure(systems, opened.config, plan, 0.1, told.append)
    asked = [what for what in Pretended.asked if what[0] in "AB" or what.endswith("limits")]
    again = [f"{name} {what}" for name in "AB" for what in ("hello", "load", "check", "close")]
    start = ["A hello", "B hello", *2 * again, "A load", "B load", "A check", "B check"]
    look = f"{MACHINE} limits"
    prefill = 2 * [look, "A fill", "B fill"]
    decode = ["A fill", "A decode", "B fill", "B decode", *2 * [look, "A decode", "B decode"]]
    assert asked == [*start, *prefill, *decode, "A memory", "B memory", "B close", "A close"]
    for row in record["systems"]:
        assert len(set(row["seconds"])) == 3 and row["first_token"] == [one + 0.25 for one in row["seconds"]]
        assert row["first_step"] == 0.5
    assert record["decode"][0]["seconds"] == {name: [[1.0, 1.0], [1.0, 1.0]] for name in "AB"}
    assert len(told) == plan.steps(2)


def test_agreement_allows_rounding_and_refuses_more() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = 2 * torch.randn(3, 1000, generator=generator)
    noise = torch.randn(3, 1000, generator=generator)
    found = compare("peer", ours, ours + 0.02 * noise, 0.06)
    assert 0.005 < found.distance < 0.015 and found.top == 3 and found.largest < 0.1
    with pytest.raises(
        Disagreement, match=r"peer does not compute what gemma2 does.*logits differ by 0\.1\d* of their"
    ):
        compare("peer", ours, ours + 0.2 * noise, 0.06)
    with pytest.raises(Disagreement, match="logits over 999 and 1000 ids"):
        compare("peer", ours, ours[:, 1:], 0.06)
    with pytest.raises(Disagreement, match="peer computes logits that are not finite"):
        compare("peer", ours, ours.log(), 0.06)


def test_another_likeliest_id_is_refused_unless_rounding_explains_it() -> None:
    ours = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    ours[:, 7], ours[:, 9] = 8.0, 7.9
    theirs = ours.clone()
    theirs[1, 9] = 8.05
    assert compare("peer", ours, theirs, 0.06).top == 1
    theirs[1, 11] = 9.0
    with pytest.raises(Disagreement, match=r"at step 1 its likeliest id is 11, and gemma2 has 7, which leads by"):
        compare("peer", ours, theirs, 0.3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--against", "vllm"], f"--against 'vllm' names no system; there are {PEERS}"),
        (["--against", "gemma_pytorch"], "--against 'gemma_pytorch' names no system"),
        (["--against", "self:quick"], "'quick' is not fast, compile, weights=W or dtype=T"),
        (["--against", "self"], "'gemma2' is named twice: name each system once"),
        (["--against", "llama.cpp"], "llama.cpp reads GGUF only, and"),
        (["--dtype", "int8"], "dtype 'int8' is not one of"),
        (["--rounds", "0"], "rounds must be a positive integer, not 0"),
        (["--batch", "0"], "batches must be a positive integer, not 0"),
        (["--tolerance", "0"], "tolerance must be"),
        (["--prompt", "x"], "'x' is not a list of numbers, such as 128,1024"),
        (["--python", "transformers=/usr/bin/false"], "give SYSTEM=PATH with one of the systems (none) and a Python"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_cannot_be_are_refused_in_one_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert main(["bench", "pocket", *options]) == 2
    except SystemExit as ended:
        assert ended.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("llama.cpp:none.gguf", "none.gguf: no such file, named by --against llama.cpp:none.gguf"),
        ("gemma_pytorch:nowhere", "nowhere: no gemma/model.py in it"),
    ],
)
def test_a_peers_missing_file_is_said_before_anything_loads(
    spec: str, said: str, opened: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadModelFile, match=said):
        peers([spec], opened, {})


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "gemma2.bench.peers.llama_cpp", raising=False)
    with pytest.raises(ImportError, match=r"llama.cpp is not installed: pip install 'gemma2\[llama-cpp\]'"):
        check_installed("llama.cpp")


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("ImportError", ImportError),
        ("BadModelFile", BadModelFile),
        ("ZlibError", RuntimeError),
        ("print", RuntimeError),
    ],
)
def test_an_error_in_a_systems_process_is_raised_here_with_the_systems_name(kind: str, raised: type[Exception]) -> None:
    answer = json.dumps({"error": kind, "message": "no ink"})
    process = Process("peer", [sys.executable, "-c", f"input(); print({answer!r})"])
    try:
        with pytest.raises(raised, match=r"^peer: no ink$"):
            process.ask("load")
    finally:
        process.close()


def test_a_process_that_dies_is_named_with_its_last_words() -> None:
    process = Process("peer", [sys.executable, "-c", "import sys; sys.exit('out of paper')"])
    try:
        with pytest.raises(RuntimeError, match="peer: its process has ended with code 1: out of paper"):
            process.ask("hello", kind=MACHINE, threads=1)
    finally:
        process.close()
    with pytest.raises(ValueError, match=r"peer: nowhere/python cannot be run \(No such file or directory\)"):
        Process("peer", ["nowhere/python"])


def test_more_weights_than_memory_are_refused_before_anything_loads(opened: Checkpoint) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_systems, "free_host_memory", lambda: Free(40_000_000, "a test"))
        ours = our_system(POCKET, {})
        bench_systems.check_room([ours, *peers([f"llama.cpp:{GGUF}"], opened, {})], opened)
        with pytest.raises(
            MemoryError, match=r"of 3 systems need 0\.0462 GB at once, and 0\.04 GB are free \(a test\)"
        ):
            bench_systems.check_room([ours, *peers(["transformers", "self:dtype=float32"], opened, {})], opened)


def test_a_system_is_named_by_what_it_is_loaded_with(opened: Checkpoint) -> None:
    options = {"fast": True, "weights": "packed", "device": "cpu", "dtype": "float32"}
    assert our_system(POCKET, options).name == "gemma2 fast packed float32"
    found = peers(["self", "self:compile+weights=int8", f"llama.cpp:{GGUF}", "transformers"], opened, options)
    assert [system.name for system in found] == [
        "gemma2",
        "gemma2 compile int8",
        "llama.cpp Q8_0",
        "transformers eager",
    ]
    assert found[1].options == {"device": "cpu", "compile": True, "weights": "int8"}
    assert found[3].options == {"device": "cpu", "dtype": "float32"} and distinct(found) == found
    assert file_type(GGUF) == "Q8_0"


def test_a_recorded_command_has_no_folders_of_this_machine() -> None:
    given = ["bench", "/a/b/model", "--against", "llama.cpp:/c/x.gguf,gemma_pytorch:/d/e", "--python", "llama.cpp=/f/g"]
    assert command_line([*given, "--json", "out/run.json"]) == (
        "gemma2 bench model --against llama.cpp:x.gguf,gemma_pytorch:e --python llama.cpp=g --json out/run.json"
    )


def test_the_context_must_hold_what_is_fed(opened: Checkpoint) -> None:
    Plan(contexts=(opened.config.max_position_embeddings,)).check(opened.config)
    for plan in (Plan(prompts=(4097,)), Plan(contexts=(4097,)), Plan(rounds=400)):
        with pytest.raises(ContextOverflow, match=r"columns are more than the model's context of"):
            plan.check(opened.config)
    assert Plan(contexts=(8, 16), batches=(1, 2)).cases == [(8, 1), (16, 1), (8, 2)]


def test_limits_count_what_must_be_read_and_multiplied() -> None:
    model = {
        "num_hidden_layers": 2,
        "local_layers": 1,
        "hidden_size": 6,
        "intermediate_size": 10,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "vocab_size": 50,
        "sliding_window": 3,
    }
    # At 5 columns the local layer reads 3 and the global one 5, a key and a value of 4 numbers of 2 bytes each.
    assert step_bytes({"model": model}, {"weights": 1000, "cache_bytes": 2}, 5, 2) == 1000 + 2 * 8 * 16
    matrices = 2 * (2 * 6 * 4 * 3 + 3 * 6 * 10)
    pairs = 15 + (1 + 2 + 3 + 3 + 3)  # of a query and a key, in the global layer and in the local one
    assert prefill_flops(model, 5) == 2 * (matrices * 5 + 2 * 2 * 4 * pairs + 6 * 50)
    assert thread_counts(1) == [1] and thread_counts(6) == [1, 2, 4, 6] and thread_counts(8) == [1, 2, 4, 8]
    assert added({"memory": {"before": 10, "peak": 25}}, "peak") == 15
    assert added({"memory": {"before": None, "peak": None}}, "peak") is None
