"""Work on hostile files in a process of its own, whose memory and time are limited.

`in_a_child(work, *arguments)` gives all that the generator `work(*arguments)` yields. The child is a fresh interpreter,
so `work` must be a function of an importable module, and arguments and results go through JSON. A limit that is passed
ends the child, and shows here as the result that did not come.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

import gemma2
from gemma2.cli import main

ROOT = Path(__file__).resolve().parents[2]
STATUS = Path("/proc/self/status")  # Linux; elsewhere memory is measured less exactly and not limited
MOST_MEMORY = 2**30  # bytes of address space over what the interpreter takes once everything is imported


def in_a_child(work: Callable[..., Iterable[Any]], *arguments: Any, seconds: float = 10.0) -> list[Any]:
    """All that `work(*arguments)` yields, each within so many seconds."""
    command = [sys.executable, "-m", __name__, work.__module__, work.__name__, str(seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input=json.dumps(arguments), capture_output=True, encoding="utf-8", env=environment)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"ended with {done.returncode} after {len(results)} results: {done.stderr[-2000:]}"
    return results


def memory(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmSize, VmRSS now, or VmHWM at its peak."""
    if not STATUS.exists():
        if sys.platform == "win32":
            return psutil.Process().memory_info().peak_wset
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def attempts(paths: list[str]) -> Iterator[dict[str, Any]]:
    """Open each file as a model, from Python and from the command line, and say what happened.

    Yields:
        error and message: the exception of `gemma2.load`, or "" for none; code, out and err: the command's; seconds:
        of computing, for both; growth: the process's peak memory so far, over that after importing.
    """
    start = memory("VmRSS")
    for path in paths:
        began = time.process_time()
        error = message = ""
        try:
            gemma2.load(path, device="cpu", progress=False)
        except BaseException as raised:
            error, message = type(raised).__name__, str(raised)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["generate", "x", "-n", "1", "--device", "cpu", "--model", path])
        yield {
            "error": error,
            "message": message,
            "code": code,
            "out": out.getvalue(),
            "err": err.getvalue(),
            "seconds": time.process_time() - began,
            "growth": memory("VmHWM") - start,
        }


def complaints(attempt: dict[str, Any], path: Path, words: str) -> list[str]:
    """How an attempt falls short of a refusal that says `words`, in one line, at once and at little cost."""
    said = attempt["message"]
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(said.split()))
    checks = {
        f"raised {attempt['error'] or 'nothing'}": attempt["error"] == "BadModelFile",
        f"said {said}": words in said,
        f"does not name the file: {said}": str(path.parent) in said,
        f"not one printable line: {said!r}": said.isprintable() and len(said) < 1000,
        f"exit code {attempt['code']}": attempt["code"] == 1,
        f"wrote {attempt['out']!r}": attempt["out"] == "",
        f"complained {attempt['err']!r}": attempt["err"] == f"gemma2: error: {line}\n",
        f"took {attempt['seconds']:.2f} s": attempt["seconds"] <= 1.0,
        f"took {attempt['growth'] / 1e6:.0f} MB": attempt["growth"] <= 150e6,
    }
    return [fault for fault, holds in checks.items() if not holds]


def faults(cases: Mapping[str, tuple[Callable[[], bytes], str]], folder: Path) -> dict[str, list[str]]:
    """The cases, each a GGUF file and words, that are not refused with these words; all are tried in one child."""
    paths = [folder / f"{number}.gguf" for number in range(len(cases))]
    for path, (make, _) in zip(paths, cases.values(), strict=True):
        path.write_bytes(make())
    found = in_a_child(attempts, [str(path) for path in paths])
    short = {
        case: complaints(attempt, path, words)
        for (case, (_, words)), path, attempt in zip(cases.items(), paths, found, strict=True)
    }
    return {case: said for case, said in short.items() if said}


def merged(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """All cases of several tables. No name may stand in two of them."""
    everything = {case: entry for table in tables for case, entry in table.items()}
    assert len(everything) == sum(map(len, tables))
    return everything


def _serve(module: str, name: str, seconds: str) -> None:
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    work = getattr(importlib.import_module(module), name)
    if STATUS.exists():
        import resource

        most = memory("VmSize") + MOST_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    for result in work(*json.load(sys.stdin)):
        print(json.dumps(result), file=results, flush=True)
        faulthandler.dump_traceback_later(float(seconds), exit=True)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
