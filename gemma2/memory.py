"""How much memory is free for weights, and whether a model fits into it, before any weight is read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
UNLIMITED = 2**60  # what the kernel writes for "no limit" is above this
NARROW = torch.bfloat16  # the narrowest dtype that a model runs in unasked


@dataclass(frozen=True)
class Free:
    """So many bytes can be had, and what sets the limit."""

    bytes: int
    limit: str


Others = Callable[[], Mapping[str, int]]  # forms that weights can be held in -> bytes of all of them


def check_memory(
    where: str,
    dtype: torch.dtype,
    device: torch.device,
    needed: Callable[[torch.dtype], int],
    others: Others | None = None,
) -> None:
    """Raises MemoryError unless `device` has room for weights of `needed(dtype)` bytes.

    The line has both numbers, and what would fit. What is computed later (the cache, activations) is not counted, and
    no margin is kept: nothing that would fit is refused.

    Args:
        where: the checkpoint, for the message.
        needed: bytes of the weights of a model in some dtype.
        others: bytes of the weights in other forms; called where there is too little memory.
    """
    free, bytes_ = free_memory(device), needed(dtype)
    if free is None or bytes_ <= free.bytes:
        return
    fits = []
    if NARROW.itemsize < dtype.itemsize and needed(NARROW) <= free.bytes:
        fits.append(f'dtype="bfloat16" (--dtype bfloat16), which needs {needed(NARROW) / 1e9:.3g} GB')
    for form, size in (others() if others else {}).items():
        if size <= free.bytes and size < bytes_:
            fits.append(f'weights="{form}" (--weights {form}), which needs {size / 1e9:.3g} GB')
    fits.append('device_map="auto" (--device-map auto), which leaves on the disk what does not fit into memory')
    raise MemoryError(
        f"{where}: the weights need {bytes_ / 1e9:.3g} GB in {str(dtype).removeprefix('torch.')}, and "
        f"{free.bytes / 1e9:.3g} GB are free on {device} ({free.limit}). What fits: {'; or '.join(fits)}. A quantized "
        "GGUF needs as much in the same dtype, because its values are dequantised"
    )


def no_mapping(path: Path) -> MemoryError:
    """The error for a file that PyTorch opens by mapping all of it, where the system has refused that."""
    free = free_host_memory()
    left = f"{free.bytes / 1e9:.3g} GB are free ({free.limit})" if free else "the system has less"
    return MemoryError(
        f"{path}: PyTorch maps such a file as a whole, {path.stat().st_size / 1e9:.3g} GB, and {left}. Convert it to "
        "safetensors where there is more memory (gemma2 convert FILE FOLDER): that is read piece by piece"
    )


def free_memory(device: torch.device) -> Free | None:
    """What can still be allocated on a device, or None where that cannot be known.

    CUDA: what the driver has free and what PyTorch's own cache holds unused. MPS: the working set that Metal
    recommends, less PyTorch's tensors. Devices that share the memory of the processor have what the processor has.
    """
    if device.type == "cuda":
        if torch.cuda.get_device_properties(device).is_integrated:
            return free_host_memory()
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Free(torch.cuda.mem_get_info(device)[0] + unused, "the memory of the GPU")
    if device.type == "mps":
        room = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
        return Free(room, "the working set that Metal recommends")
    return free_host_memory() if device.type == "cpu" else None


def free_host_memory(proc: Path = PROC, cgroups: Path = CGROUPS, swap: int | None = None) -> Free | None:
    """The least of what the system, the control groups and the process's own limits leave; None if none can be read.

    Swap counts as free, because weights in it still load, if slowly; so does the page cache, which the kernel gives up.
    macOS compresses memory and makes swap as it needs it, so nobody knows there what is free: it is held to all the
    memory that there is.

    Args:
        proc, cgroups: where the kernel's files are.
        swap: bytes of swap that are free; default what the system says.
    """
    if swap is None:
        with suppress(psutil.Error, OSError, RuntimeError):
            swap = psutil.swap_memory().free
    found = [*_system(proc, swap or 0), *_control_groups(proc, cgroups, swap or 0), *_own_limits()]
    return min(found, key=lambda free: free.bytes, default=None)


def _system(proc: Path, swap: int) -> Iterator[Free]:
    with suppress(psutil.Error, OSError, RuntimeError):
        memory = psutil.virtual_memory()
        if sys.platform == "darwin":
            yield Free(memory.total, "all the memory of this machine")
            return
        # ZFS keeps its cache apart from the kernel's, which does not count it as available.
        zfs = _numbers(proc / "spl/kstat/zfs/arcstats")
        cache = max(0, zfs.get("size", 0) - zfs.get("c_min", 0))
        limit = "the memory and swap of this machine" if swap else "the memory of this machine"
        yield Free(memory.available + cache + swap, limit)


def _control_groups(proc: Path, cgroups: Path, swap: int) -> Iterator[Free]:
    """What each group that this process is in leaves, and each group around it, for both versions of control groups."""
    with suppress(OSError, ValueError):
        for line in (proc / "self/cgroup").read_text(encoding="utf-8").splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                # "unified" is its place where both versions are mounted.
                for top in (cgroups, cgroups / "unified"):
                    for group in _upwards(top, path):
                        yield from _second_version(group, swap)
            elif "memory" in controllers.split(","):
                for group in _upwards(cgroups / "memory", path):
                    yield from _first_version(group, swap)


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """A group's folder and those around it. In a container `path` may be one outside, which is not mounted there."""
    names = [name for name in path.split("/") if name not in ("", "..")]
    for count in range(len(names), -1, -1):
        yield top.joinpath(*names[:count])


def _second_version(group: Path, swap: int) -> Iterator[Free]:
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is None or used is None:
        return
    most, held = _number(group / "memory.swap.max"), _number(group / "memory.swap.current")
    if most is not None and held is not None:
        swap = min(swap, max(0, most - held))
    yield _left(group, limit, used, _cached(group, ""), swap)


def _first_version(group: Path, swap: int) -> Iterator[Free]:
    cached = _cached(group, "total_")
    # Memory alone, then memory and swap together, which is counted only where the kernel was told to.
    for name, more in (("memory", swap), ("memory.memsw", 0)):
        limit, used = _number(group / f"{name}.limit_in_bytes"), _number(group / f"{name}.usage_in_bytes")
        if limit is not None and used is not None:
            yield _left(group, limit, used, cached, more)


def _cached(group: Path, prefix: str) -> int:
    """Bytes of files in a group's usage. The kernel takes them back before it refuses memory, active ones too: a file
    that was read twice, as a download that was verified, is active."""
    stat = _numbers(group / "memory.stat")
    return stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)


def _left(group: Path, limit: int, used: int, cached: int, swap: int) -> Free:
    return Free(max(0, limit - max(0, used - cached)) + swap, f"the limit of the control group {group}")


def _own_limits() -> Iterator[Free]:
    """What `ulimit -v` and `ulimit -d` leave. Only Linux counts towards them as is done here."""
    if not sys.platform.startswith("linux"):
        return
    with suppress(ImportError, psutil.Error, OSError):
        import resource

        used = psutil.Process().memory_info()
        limits = ((resource.RLIMIT_AS, used.vms, "RLIMIT_AS"), (resource.RLIMIT_DATA, used.data, "RLIMIT_DATA"))
        for kind, held, name in limits:
            most = resource.getrlimit(kind)[0]
            if most != resource.RLIM_INFINITY:
                yield Free(max(0, most - held), f"the limit {name} of this process")


def _number(path: Path) -> int | None:
    """The number in a file of the kernel; None if there is none, or it says that there is no limit."""
    with suppress(OSError, ValueError):
        value = int(path.read_text(encoding="utf-8"))
        return value if value < UNLIMITED else None
    return None


def _numbers(path: Path) -> dict[str, int]:
    """Name -> last number of each line of a file of the kernel; empty if there is no such file."""
    found = {}
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if len(words) > 1 and words[-1].isdecimal():
                found[words[0]] = int(words[-1])
    return found
