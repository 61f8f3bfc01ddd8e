"""A worker process seen from the process that measures."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma2.errors import BadModelFile
from gemma2.parity.references import CannotDo

RAISED: dict[str, type[Exception]] = {"BadModelFile": BadModelFile, "CannotDo": CannotDo}


class Process:
    """One system in a process of its own, with its weights in memory until `close`.

    Args:
        name: what error messages call it.
        command: what starts it; default: `gemma2.bench.worker`, by this Python.
    """

    def __init__(self, name: str, command: Sequence[str] = ()) -> None:
        self.name = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # what it prints, for the case that it ends
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        try:
            self._child = subprocess.Popen(
                command or worker_of(sys.executable),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env={**os.environ, "PYTHONPATH": path},
                encoding="utf-8",
            )
        except OSError as error:
            raise ValueError(f"{name}: {command[0]} cannot be run ({error.strerror})") from None

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises:
            Exception: what the command raised there, of the same class where it is one of Python's or this package's.
            RuntimeError: any other error there, or the process has ended.
        """
        assert self._child.stdin and self._child.stdout
        try:
            self._child.stdin.write(json.dumps({"do": do, **options}) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.name}: its process has ended{self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _raised(answer["error"])(f"{self.name}: {answer['message'] or answer['error']}")
        return answer

    def close(self) -> None:
        assert self._child.stdin and self._child.stdout
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
        self._said.close()

    def _last_words(self) -> str:
        code = self._child.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        killed = ", killed by the system, as for lack of memory" if code == -9 else f" with code {code}"
        return killed + (f": {lines[-1]}" if lines else "")


def worker_of(python: str) -> list[str]:
    """The command of a worker, by an interpreter that has the system's package."""
    return [python, "-m", "gemma2.bench.worker"]


def _raised(name: str) -> type[Exception]:
    """The class of an error by its name: one of this package or of Python, else RuntimeError."""
    found = RAISED.get(name) or getattr(builtins, name, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else RuntimeError
