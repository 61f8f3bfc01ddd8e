"""The command as a process: bytes that are no text, pipes that close, signals."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

import gemma2
from gemma2.checkpoints.safetensors import SINGLE
from tests.conftest import tensors_of, tiny
from tests.hostile.conftest import SMALL, shell

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and descriptors as POSIX has them")
COMMAND: list[str | bytes] = [sys.executable, "-m", "gemma2"]
LINE = b"gemma2: error: "


def environment(**more: str) -> dict[str, str]:
    ours = ("PYTHONIO", "PYTHONUNBUFFERED", "LC_", "LANG")
    return {**{k: v for k, v in os.environ.items() if not k.startswith(ours)}, "LC_ALL": "C.UTF-8", **more}


def run(*argv: str | bytes, given: bytes = b"", **more: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *argv], input=given, capture_output=True, env=environment(**more), timeout=120, check=False
    )


def complaint(done: subprocess.CompletedProcess[bytes], code: int) -> bytes:
    assert (done.returncode, done.stdout) == (code, b""), done
    assert done.stderr.startswith(LINE) and done.stderr.count(b"\n") == 1, done
    return done.stderr


def test_arguments_that_are_not_utf8_exit_with_2() -> None:
    assert b"lone surrogate at character 3" in complaint(run("generate", b"caf\xe9", "--model", "absent/x.ckpt"), 2)
    assert b"invalid choice: '\\udcff'" in complaint(run(b"\xff"), 2)


def test_standard_input_that_is_not_utf8_exits_with_2_and_names_the_byte() -> None:
    done = run("generate", "-", "--model", "absent/x.ckpt", given=b"caf\xe9 au lait")
    assert b"standard input is not valid UTF-8 at byte 3" in complaint(done, 2)


def test_a_traceback_comes_with_debug_and_only_then() -> None:
    assert b"absent/x.ckpt: no such file" in complaint(run("generate", "x", "--model", "absent/x.ckpt"), 1)
    done = run("generate", "x", "--model", "absent/x.ckpt", "--debug")
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.startswith(b"Traceback") and b"BadModelFile: absent/x.ckpt: no such file" in done.stderr


def test_standard_input_is_the_prompt_and_a_terminal_without_unicode_shows_question_marks() -> None:
    done = run("generate", "-", "--echo", "-n", "1", given="日本\0é".encode(), PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.startswith(b"??\0?") and done.stdout.endswith(b"\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "generate", "x", "-n", "2"], stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=120
        )
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1), done
    assert done.stderr.startswith(LINE) and b"No space left on device" in done.stderr


@pytest.mark.parametrize("closed", ["<&- >&-", "<&- >&- 2>&-"])
def test_closed_descriptors_are_no_fault(closed: str) -> None:
    script = f'exec "$0" -m gemma2 generate - -n 1 {closed}'
    done = subprocess.run(["sh", "-c", script, sys.executable], stderr=subprocess.PIPE, env=environment(), timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A model that writes on and on, so that a signal or a closed pipe finds it writing."""
    place = shell(tmp_path / "endless", max_position_embeddings=2**20)
    tensors = tensors_of(tiny(vocab_size=4096, **SMALL))
    tensors["model.embed_tokens.weight"][[1, 107]] = 0  # <eos> and <end_of_turn> are never the likeliest
    save_file(tensors, place / SINGLE)
    return place


def writing(model: Path) -> subprocess.Popen[bytes]:
    argv = [*COMMAND, "generate", "x", "-n", "500000", "--model", str(model), "--device", "cpu"]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), bufsize=0)


def test_a_reader_that_leaves_ends_the_run_quietly(endless: Path) -> None:
    with writing(endless) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


@pytest.mark.parametrize("after", sorted(random.Random(0).sample(range(1, 3000), 10)))
def test_an_interrupt_keeps_what_was_written_and_exits_with_130(endless: Path, after: int) -> None:
    with writing(endless) as process:
        assert process.stdout is not None
        first = b""
        while len(first) < after:
            first += process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")
    said = (first + rest).decode()
    assert said.endswith("\n")
    whole = ""
    for piece in gemma2.load(endless, device="cpu").stream("x", 500_000):
        whole += piece
        if len(whole) >= len(said):
            break
    assert whole.startswith(said[:-1])
