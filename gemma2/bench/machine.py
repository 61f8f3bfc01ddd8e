"""What this machine can do at most, in PyTorch: memory read and copied, matrix products; and what machine it is."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

BYTES = 2**29  # of memory that is read at once, more than any cache holds
READ_DTYPES = (torch.bfloat16, torch.float32, torch.int32)
ROWS, INNER, OUTER = 512, 2304, 9216  # of the matrix product: a prompt of 512 through the 2B's largest matrix
REPEATS = 3


class Machine:
    """What is measured again and again: memory to read and to copy to, and matrices. They stay, since taking memory
    anew is slow.

    Args:
        size: bytes that are read or copied at once. Below 512 MiB the matrix product has fewer rows too, so that
            a quick look is quick.
    """

    def __init__(self, size: int, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self._memory = torch.ones(size // 4, dtype=torch.float32, device=self._device)
        self._target = torch.zeros_like(self._memory)
        threads = torch.get_num_threads()
        counts = thread_counts(threads) if self._device.type == "cpu" else [threads]
        self._ways = [(dtype, count) for dtype in READ_DTYPES for count in counts]
        self._rows = min(ROWS, max(8, size * ROWS // BYTES))
        self._matrices = {
            name: [torch.ones(n, INNER, dtype=dtype, device=self._device) for n in (self._rows, OUTER)]
            for name, dtype in (("gemm_bfloat16", torch.bfloat16), ("gemm_float32", torch.float32))
        }

    def look(self) -> dict[str, float]:
        """GB/s of memory and GFLOP/s of matrix products, each the median of 3, in about a second.

        `read` is one long float32 sum with PyTorch's threads, `read_best` the fastest of sums of bfloat16, float32 and
        int32 with 1 to that many threads; later looks take the way that was the fastest in the first. `copy` counts the
        bytes read and those written.
        """
        memory = self._memory
        found = {"read": self._read(torch.float32, torch.get_num_threads())}
        rates = {way: self._read(*way) for way in self._ways}
        found["read_best"] = max(found["read"], *rates.values())
        self._ways = [max(rates, key=lambda way: rates[way])]
        found["copy"] = 2 * memory.nbytes / self._seconds(partial(self._target.copy_, memory)) / 1e9
        for name, (a, b) in self._matrices.items():
            found[name] = 2 * self._rows * INNER * OUTER / self._seconds(partial(torch.matmul, a, b.T)) / 1e9
        return found

    def _read(self, dtype: torch.dtype, threads: int) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return self._memory.nbytes / self._seconds(self._memory.view(dtype).sum) / 1e9
        finally:
            torch.set_num_threads(before)

    def _seconds(self, function: Callable[[], object]) -> float:
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            function()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            times.append(time.perf_counter() - started)
        return statistics.median(times)


def thread_counts(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    counts = [2**n for n in range(most.bit_length()) if 2**n < most]
    return [*counts, most]


def describe(device: str = "cpu") -> dict[str, str]:
    """The machine and what runs on it, for people."""
    kind = torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "device": f"{device} ({kind})",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _processor() -> str:
    """Its name where Linux says it, with what matters to speed among its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    stated = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = stated.get("flags", "").split()
    told = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{stated.get('model name', platform.machine())} ({', '.join(told) or 'none of AVX2, AVX-512, AMX'})"
