"""One system in a process of its own: it reads commands as JSON lines, and answers each with one.

The process stays alive between commands, with its weights in memory, so that several systems can take turns.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gemma2.bench.machine import Machine, describe
from gemma2.bench.peers import Runner, check_installed, open_runner

STATUS = Path("/proc/self/status")


class Worker:
    """The commands: each takes the rest of its line as keyword arguments and returns what to answer."""

    def __init__(self) -> None:
        self._kind = ""
        self._runner: Runner
        self._machine: Machine | None = None

    def hello(self, kind: str, threads: int | None) -> dict[str, Any]:
        """Import what the system needs."""
        self._kind = kind
        if threads:
            torch.set_num_threads(threads)
        check_installed(kind)
        return {"threads": torch.get_num_threads()}

    def load(self, path: str, options: dict[str, Any]) -> dict[str, Any]:
        before, started = memory(), time.perf_counter()
        self._runner = open_runner(self._kind, Path(path), options)
        seconds, after = time.perf_counter() - started, memory()
        return {
            "seconds": seconds,
            "memory": {"before": before["resident"], "loading": after["peak"], "loaded": after["resident"]},
            "weights": self._runner.weights,
            "cache_bytes": self._runner.cache_bytes,
            "versions": dict(self._runner.versions),
            "notes": list(self._runner.notes),
        }

    def check(self, ids: list[int], prompt: int, file: str) -> dict[str, Any]:
        """Logits after a prompt and after each of the ids that follow, one at a time, into a file."""
        tokens = torch.tensor([ids], dtype=torch.int64, device="cpu")
        self._runner.start(1, len(ids))
        parts = [tokens[:, :prompt], *tokens[:, prompt:].split(1, dim=1)]
        logits, times = [], []
        for part in parts:
            started = time.perf_counter()
            logits.append(self._runner.feed(part)[0].float().cpu())
            times.append(time.perf_counter() - started)
        save_file({"logits": torch.stack(logits)}, file)
        return {"seconds": times}

    def fill(self, ids: list[list[int]], capacity: int) -> dict[str, Any]:
        """Feed a prompt to an empty cache."""
        tokens = torch.tensor(ids, dtype=torch.int64, device="cpu")
        self._runner.start(len(ids), capacity)
        return {"seconds": self._timed(tokens)}

    def decode(self, ids: list[list[int]]) -> dict[str, Any]:
        """Feed columns one at a time, as if each had just been chosen; an id is chosen at each, and not used."""
        tokens = torch.tensor(ids, dtype=torch.int64, device="cpu")
        return {"seconds": [self._timed(column) for column in tokens.split(1, dim=1)]}

    def limits(self, size: int, device: str) -> dict[str, Any]:
        self._machine = self._machine or Machine(size, device)
        return self._machine.look()

    def describe(self, device: str) -> dict[str, Any]:
        return describe(device)

    def memory(self) -> dict[str, Any]:
        return memory()

    def _timed(self, tokens: torch.Tensor) -> float:
        started = time.perf_counter()
        self._runner.feed(tokens).argmax(-1).tolist()
        return time.perf_counter() - started


def memory() -> dict[str, int | None]:
    """Bytes of memory that this process holds now, and held at most, files that it maps included; None where the system
    does not say (only Linux does)."""
    if not STATUS.exists():
        return {"resident": None, "peak": None}
    text = STATUS.read_text(encoding="utf-8")
    found = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", text))
    return {"resident": int(found["VmRSS"]) * 1024, "peak": int(found["VmHWM"]) * 1024}


def main() -> None:
    """Answers go to what was standard output. Whatever a package prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        try:
            answer = getattr(worker, name)(**command)
        except Exception as error:  # said by the process that asked
            answer = {"error": type(error).__name__, "message": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
