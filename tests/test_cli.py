"""The command line prints what the library writes. Its errors are in tests/hostile."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import gemma2
from gemma2.cli import main


@pytest.fixture(scope="module")
def shipped() -> gemma2.Gemma:
    return gemma2.load(device="cpu")


def test_generate_prints_the_continuation_and_nothing_else(
    shipped: gemma2.Gemma, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "In the beginning", "-n", "20"]) == 0
    out, err = capsys.readouterr()
    assert out == shipped.generate("In the beginning", 20) + "\n" and err == ""


def test_echo_prints_the_prompt_first_and_options_reach_the_sampler(
    shipped: gemma2.Gemma, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--temperature", "0.9", "--top-k", "20", "--top-p", "0.9", "--min-p", "0.01", "--seed", "5"]
    assert main(["generate", "And the", "-n", "20", "--echo", "--repetition-penalty", "1.1", *options]) == 0
    expected = shipped.generate(
        "And the", 20, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=5, repetition_penalty=1.1
    )
    assert capsys.readouterr().out == f"And the{expected}\n"


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        (["--seed", "7", "--top-p", "0.9"], "--seed, --top-p"),
        (["--top-k", "5", "--min-p", "0.1", "--temperature", "0"], "--top-k, --min-p"),
        (["--seed", "7", "--top-p", "0.9", "--temperature", "0.5"], ""),
        (["--repetition-penalty", "1.2"], ""),
    ],
)
def test_options_that_do_nothing_in_greedy_decoding_are_said_to(
    options: list[str], idle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "In the beginning", "-n", "2", *options]) == 0
    note = f"note: {idle}: no effect in greedy decoding; give --temperature to sample\n" if idle else ""
    assert capsys.readouterr().err == note


COMMANDS = ("generate", "chat", "convert", "inspect", "parity", "trace", "verify")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_no_other(command: str) -> None:
    source = (Path(gemma2.__file__).parent / "cli" / f"{command}.py").read_text()
    found = [node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert not {f"gemma2.cli.{other}" for other in COMMANDS} & set(found) and "gemma2.cli" not in found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_says_what_it_does_and_the_command_has_an_example(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # no text is wrapped
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = capsys.readouterr().out
    entries = re.findall(r"^  ((?:-|[A-Z]+\b).*(?:\n {10,}\S.*)?)$", printed, re.MULTILINE)
    assert len(entries) > 5
    for entry in entries:
        assert re.search(r"\S\s\s+\S", entry), f"{entry!r} has no text"
    assert f"\n  gemma2 {command} " in printed.split("example")[1]
    assert "pocket (the model in this package), a hub name" in printed
    wide = [line for line in (printed.split("\n\n")[1]).splitlines() if len(line) > 82]
    assert not wide, "a description is not wrapped for us"


def test_a_dash_reads_the_prompt_from_standard_input(
    shipped: gemma2.Gemma, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"In the beginning")))
    assert main(["generate", "-", "-n", "8"]) == 0
    assert capsys.readouterr().out == shipped.generate("In the beginning", 8) + "\n"


def test_verbose_puts_timings_and_memory_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "In the beginning", "-n", "8", "--verbose"]) == 0
    err = capsys.readouterr().err
    for pattern in (
        r"load +[\d.]+ s, 5,773,568 parameters, bfloat16 on \w+",
        r"prefill +\d+ tokens in [\d.]+ s, [\d.]+ tokens/s",
        r"decode +7 tokens in [\d.]+ s, [\d.]+ tokens/s",
        r"memory +\d+ MB peak",
    ):
        assert re.search(pattern, err), pattern


def test_text_streams_as_it_is_made() -> None:
    """The first piece is there long before the last: read from a pipe while the child still writes."""
    command = [sys.executable, "-m", "gemma2", "generate", "In the beginning", "-n", "400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout
        first = child.stdout.read(1)
        started = time.perf_counter()
        rest = child.stdout.read()
    assert first and len(rest) > 100 and child.returncode == 0
    assert time.perf_counter() - started > 0.3, "400 tokens came all at once"


def test_no_progress_bar_in_a_pipe() -> None:
    command = [sys.executable, "-m", "gemma2", "generate", "the " * 600, "-n", "2"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stderr == b""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_bars_for_loading_and_for_a_long_prompt() -> None:
    import pty
    import termios

    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))  # a terminal of no width shows no bar
    command = [sys.executable, "-m", "gemma2", "generate", "the " * 600, "-n", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end) as child:
        os.close(end)
        seen = b""
        with contextlib.suppress(OSError):  # Linux: the terminal's other end is gone
            while part := os.read(terminal, 4096):
                seen += part
        assert child.stdout and child.stdout.read()
    os.close(terminal)
    assert child.returncode == 0 and b"loading:" in seen and b"prompt:" in seen


def talk(lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["chat", "-n", "6"]) == 0
    return capsys.readouterr()


def test_chat_keeps_the_history_until_reset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    original = gemma2.Talk.say

    def spy(self: gemma2.Talk, content: str, *rest: Any) -> object:
        seen.append(len(self.messages) + 1)
        return original(self, content, *rest)

    monkeypatch.setattr(gemma2.Talk, "say", spy)
    out, err = talk("hello\n\nagain\n/reset\nafresh\n/unknown\n/quit\nnever\n", monkeypatch, capsys)
    assert seen == [1, 3, 1]
    assert out.count("\n") >= 3
    assert "not say that it was tuned for chat" in err and "no command /unknown" in err


def test_chat_ends_with_its_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = talk("", monkeypatch, capsys)
    assert out == ""


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("--version", "--help"):
        with pytest.raises(SystemExit) as ended:
            main([argument])
        assert ended.value.code == 0
    assert f"gemma2 {version('gemma2')}" in capsys.readouterr().out
