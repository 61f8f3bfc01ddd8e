"""The command as a process: bytes that are no text, pipes that close, signals."""

from __future__ import annotations

import codecs
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

import gemma2
import gemma2.cli
from gemma2.checkpoints.safetensors import SINGLE
from tests.children import signals_restored
from tests.conftest import some_of, tensors_of, tiny
from tests.hostile.conftest import SMALL, shell

pytestmark = pytest.mark.posix
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


@pytest.mark.long
def test_arguments_that_are_not_utf8_exit_with_2() -> None:
    assert b"lone surrogate at character 3" in complaint(run("generate", b"caf\xe9", "--model", "absent/x.ckpt"), 2)
    assert b"invalid choice: '\\udcff'" in complaint(run(b"\xff"), 2)


def test_standard_input_that_is_not_utf8_exits_with_2_and_names_the_byte() -> None:
    done = run("generate", "-", "--model", "absent/x.ckpt", given=b"caf\xe9 au lait")
    assert b"standard input is not valid UTF-8 at byte 3" in complaint(done, 2)


@pytest.mark.long
def test_a_traceback_comes_with_debug_and_only_then() -> None:
    assert b"absent/x.ckpt: no such file" in complaint(run("generate", "x", "--model", "absent/x.ckpt"), 1)
    done = run("generate", "x", "--model", "absent/x.ckpt", "--debug")
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.startswith(b"Traceback") and b"BadModelFile: absent/x.ckpt: no such file" in done.stderr


@pytest.mark.parametrize(("encoding", "mark"), [("ascii", b""), ("cp1252", codecs.BOM_UTF8)])
def test_a_pipe_carries_utf8_whatever_the_locale(encoding: str, mark: bytes) -> None:
    """And the mark that Windows puts before a text is no part of it."""
    text = "日本\0é naïve café €".encode()
    done = run("generate", "-", "--echo", "-n", "1", given=mark + text, PYTHONIOENCODING=encoding, LC_ALL="C")
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.startswith(text) and done.stdout.endswith(b"\n")


@pytest.mark.long
def test_an_error_in_a_pipe_is_utf8_too() -> None:
    done = run("generate", "x", "--model", "abwesend/größe.ckpt", PYTHONIOENCODING="cp1252")
    assert "abwesend/größe.ckpt: no such file".encode() in complaint(done, 1)


@pytest.mark.long
def test_a_terminal_without_unicode_shows_question_marks() -> None:
    import pty

    terminal, end = pty.openpty()
    command = [*COMMAND, "generate", "日é", "--echo", "-n", "1"]
    with subprocess.Popen(
        command, stdout=end, stderr=subprocess.PIPE, env=environment(PYTHONIOENCODING="ascii")
    ) as child:
        os.close(end)
        seen = os.read(terminal, 100)
        assert child.stderr and child.stderr.read() == b"" and seen.startswith(b"??")
    os.close(terminal)


@pytest.mark.parametrize("start", [b"", codecs.BOM_UTF8])
def test_a_line_of_a_conversation_that_is_not_utf8_ends_it_and_names_the_byte(start: bytes) -> None:
    done = run("chat", "-n", "3", given=start + b"hi\r\ncaf\xe9\nwho?\n")
    assert done.returncode == 2 and done.stdout.count(b"\n") == 1, done
    place = len(start) + 7
    assert done.stderr.endswith(b"error: standard input is not valid UTF-8 at byte %d\n" % place)


@pytest.mark.long
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "generate", "x", "-n", "2"], stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=120
        )
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1), done
    assert done.stderr.startswith(LINE) and b"No space left on device" in done.stderr


@pytest.mark.long
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


@contextlib.contextmanager
def started(command: list[str | bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is gone at the end, also where a test fails because it does not end."""
    with signals_restored():
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment(), bufsize=0)
    with child:
        try:
            yield child
        finally:
            child.kill()


@contextlib.contextmanager
def writing(model: Path) -> Iterator[subprocess.Popen[bytes]]:
    argv = ["generate", "x", "-n", "500000", "--model", str(model), "--device", "cpu"]
    with started([*COMMAND, *argv]) as process:
        yield process


def test_a_reader_that_leaves_ends_the_run_quietly(endless: Path) -> None:
    with writing(endless) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


@pytest.mark.parametrize("after", sorted(random.Random(0).sample(range(1, 3000), some_of(10))))
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


# Whatever the moment, also while PyTorch is imported, which takes the first seconds.
MOMENTS = [0.0, 0.02, 0.1, 0.4, 0.9, 2.0]
SCRIPT = "import sys; from gemma2_command import *; end_quietly(); print(end='.', flush=True); sys.exit(main())"


@pytest.mark.parametrize("seconds", MOMENTS)
def test_an_interrupt_in_the_first_two_seconds_ends_quietly_with_130(endless: Path, seconds: float) -> None:
    command = [sys.executable, "-c", SCRIPT, "generate", "x", "-n", "500000", "--model", str(endless)]
    with started([*command]) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."  # before that, it is Python that starts
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads from Linux's /proc what a process has imported")
@pytest.mark.parametrize("seconds", MOMENTS[::2])
def test_so_does_python_m_gemma2_which_reads_the_package_first(endless: Path, seconds: float) -> None:
    with writing(endless) as process:
        while b"libtorch" not in Path(f"/proc/{process.pid}/maps").read_bytes():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")


def test_a_child_meets_signals_that_these_tests_were_started_to_ignore() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with started([sys.executable, "-c", "import time; print(end='.', flush=True); time.sleep(600)"]) as process:
            assert process.stdout is not None and process.stdout.read(1) == b"."
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == -signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_command_ignores_an_interrupt_if_its_caller_does() -> None:
    script = 'trap "" INT; exec "$0" -c "$1"'
    code = "import gemma2_command, os, signal; gemma2_command.end_quietly(); os.kill(os.getpid(), signal.SIGINT)"
    assert subprocess.run(["sh", "-c", script, sys.executable, code], env=environment()).returncode == 0


@pytest.mark.parametrize("option", ["--version", "--help", "-h"])
def test_version_and_help_come_without_importing_pytorch(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from gemma2_command import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, env=environment(COLUMNS="80"))
    assert (done.returncode, done.stderr) == (0, b"")
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        gemma2.cli.main([option])
    assert done.stdout.decode() == capsys.readouterr().out  # COMMANDS says what the commands say
