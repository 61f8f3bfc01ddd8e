"""The command line prints what the library writes. Its errors are in tests/hostile."""

from __future__ import annotations

import ast
import codecs
import contextlib
import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import gemma2
from gemma2.cli import main
from gemma2.cli.chat import trimmed
from gemma2.templates import NOT_GEMMAS
from tests.chat_templates import CHATML
from tests.children import signals_restored


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


COMMANDS = (
    "generate",
    "chat",
    "convert",
    "inspect",
    "parity",
    "bench",
    "trace",
    "explain",
    "lens",
    "attention",
    "ablate",
    "verify",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_no_other(command: str) -> None:
    source = (Path(gemma2.__file__).parent / "cli" / f"{command}.py").read_text(encoding="utf-8")
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
    command = [sys.executable, "-m", "gemma2", "generate", "In the beginning", "-n", "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout
        first = child.stdout.read(1)
        started = time.perf_counter()
        rest = child.stdout.read()
    assert first and len(rest) > 100 and child.returncode == 0
    assert time.perf_counter() - started > 0.2, "200 tokens came all at once"


def test_no_progress_bar_in_a_pipe() -> None:
    command = [sys.executable, "-m", "gemma2", "generate", "the " * 600, "-n", "2"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stderr == b""


@pytest.mark.posix
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


def test_a_piped_conversation_is_read_as_utf8_and_each_reply_has_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shipped: gemma2.Gemma
) -> None:
    """As Windows pipes it: a byte order mark, a code page, carriage returns, no newline at the end."""
    given = codecs.BOM_UTF8 + "naïve café\r\n\r\nWho made the heaven?".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="cp1252"))
    assert main(["chat", "-n", "8"]) == 0
    with pytest.warns(UserWarning):
        whole = gemma2.Talk(shipped, 8)
    replies = ["".join(whole.say(line)).strip() for line in ("naïve café", "Who made the heaven?")]
    assert capsys.readouterr().out == "".join(f"{reply}\n" for reply in replies)


def test_a_system_text_is_merged_into_the_first_message_and_outlives_reset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shipped: gemma2.Gemma
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n/reset\nWho?\n"))
    assert main(["chat", "-n", "8", "--system", "And God said, Let there be light."]) == 0
    with pytest.warns(UserWarning):
        answer = shipped.chat([{"role": "user", "content": "And God said, Let there be light.\n\nWho?"}], 8)
        plain = shipped.chat([{"role": "user", "content": "Who?"}], 8)
    assert capsys.readouterr().out == f"{answer}\n" * 2 and answer != plain


def test_a_turn_that_does_not_fit_is_said_and_the_exit_code_of_a_pipe_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 1100 + "\nhello\n"))
    assert main(["chat", "-n", "2"]) == 1
    out, err = capsys.readouterr()
    assert re.search(
        r"error: the conversation is 1\d+ tokens long, and 2 new ones exceed the context of 1024; /reset", err
    )
    assert out.endswith("\n") and out.count("\n") <= 2


def test_a_template_of_another_model_is_noted_once(
    folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder()
    (place / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    assert main(["chat", "-n", "2", "--model", str(place)]) == 0
    assert capsys.readouterr().err == f"note: {NOT_GEMMAS}\n"


def test_white_space_around_a_reply_is_not_shown_and_what_is_inside_is() -> None:
    assert list(trimmed(["\n", " ", "a ", "", "b", " \n", "\n", "c", "  ", "\n"])) == ["a", " b", " \n\nc"]
    assert list(trimmed([" ", "\n"])) == []


@pytest.mark.posix
def test_at_a_terminal_ctrl_c_ends_a_reply_and_at_the_prompt_the_program() -> None:
    import pty

    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "gemma2", "chat", "-n", "900", "--device", "cpu"]
    plain = {**os.environ, "TERM": "dumb"}  # the line editor writes no escape sequences
    with signals_restored():
        child = subprocess.Popen(command, stdin=end, stdout=end, stderr=subprocess.DEVNULL, env=plain)
    os.close(end)

    def until(pattern: bytes) -> None:
        seen = b""
        while not re.search(pattern, seen):
            assert select.select([terminal], [], [], 60)[0], seen
            seen += os.read(terminal, 4096)

    try:
        until(rb"> $")
        for question in (b"Who made the heaven?", b"Who?"):
            os.write(terminal, question + b"\n")
            until(re.escape(question) + rb"\r\n[^\r]")  # what was typed, and the beginning of the reply
            child.send_signal(signal.SIGINT)
            until(rb"\r\n> $")
        for _ in range(6):  # one that comes just before the line editor waits for keys is seen with the next
            time.sleep(0.3)
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=10)
                break
        assert child.returncode == 130
    finally:
        child.kill()
        child.wait()
        os.close(terminal)


def test_a_closed_pipe_ends_the_command_where_there_is_no_signal_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, say."""
    monkeypatch.delattr(signal, "SIGPIPE", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["generate", "x", "-n", "1"]) == 141


def test_chat_ends_with_its_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = talk("", monkeypatch, capsys)
    assert out == ""


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("--version", "--help"):
        with pytest.raises(SystemExit) as ended:
            main([argument])
        assert ended.value.code == 0
    assert f"gemma2 {version('gemma2')}" in capsys.readouterr().out
