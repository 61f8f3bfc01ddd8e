"""What is free is counted as the kernel counts it, and a model that does not fit is refused before a weight is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

import gemma2
from gemma2.checkpoints.hf_config import PUBLISHED, config_dict, published_config
from gemma2.checkpoints.safetensors import header_bytes
from gemma2.checkpoints.weights import shapes_of
from gemma2.cli import main
from gemma2.config import Gemma2Config
from gemma2.load import POCKET
from gemma2.memory import check_memory, free_host_memory, free_memory

GB = 10**9
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits as Linux counts them")
sparse = pytest.mark.skipif(sys.platform == "win32", reason="files without sparse zeros")


def model_of_zeros(folder: Path, config: Gemma2Config, dtype: str = "BF16") -> int:
    """A folder with a whole model, whose file is all hole: it takes no disk. Gives the bytes of its weights."""
    width = {"BF16": 2, "F32": 4}[dtype]
    sizes = {name: (shape, torch.Size(shape).numel() * width) for name, shape in shapes_of(config).items()}
    header = header_bytes(((name, dtype, shape, size) for name, (shape, size) in sizes.items()), {})
    total = sum(size for _, size in sizes.values())
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + total)
    (folder / "config.json").write_text(json.dumps(config_dict(config)), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes((POCKET / "tokenizer.model").read_bytes())
    return total


def shaped(size: str, layers: int) -> Gemma2Config:
    """A published size with the pocket tokenizer's vocabulary and so many layers."""
    raw = config_dict(published_config(next(name for name in PUBLISHED if size in name)))
    types = (raw["layer_types"][:2] * layers)[:layers]
    return Gemma2Config(
        **{name: value for name, value in raw.items() if name in Gemma2Config.__dataclass_fields__}
        | {"vocab_size": 4096, "num_hidden_layers": layers, "layer_types": tuple(types)}
    )


@sparse
def test_a_model_larger_than_the_memory_is_refused_at_once_with_both_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = psutil.virtual_memory().total + psutil.swap_memory().total
    layers = max(46, there // GB)  # a layer of the 27B takes 1.13 GB in bfloat16
    if layers > 1024:
        pytest.skip("a model larger than this memory would have more layers than are taken")
    needed = model_of_zeros(tmp_path / "27b", shaped("27b", layers))
    started = time.perf_counter()
    with pytest.raises(MemoryError) as caught:
        gemma2.load(tmp_path / "27b", device="cpu", progress=False)
    assert time.perf_counter() - started < 2.0  # 0.4 seconds for 46 layers, most of it for the forms that would fit
    said = str(caught.value)
    free = free_host_memory()
    assert free is not None and said.startswith(f"{tmp_path / '27b' / 'model.safetensors'}: the weights need ")
    assert f"need {needed / 1e9:.3g} GB in bfloat16, and " in said and f"GB are free on cpu ({free.limit})" in said
    assert (
        "What fits: " in said
        and 'device_map="auto" (--device-map auto)' in said
        and "dtype=" not in said
        and "\n" not in said
    )
    assert main(["generate", "x", "--device", "cpu", "--model", str(tmp_path / "27b")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"gemma2: error: {tmp_path}") and err.count("\n") == 1
    assert "What fits" in err and "--debug" not in err


LIMITED = """
import resource, sys
import psutil
import gemma2
gemma2.load(progress=False).generate("In", 1)  # what takes memory once
name, room, folder = getattr(resource, sys.argv[1]), int(sys.argv[2]), sys.argv[3]
used = psutil.Process().memory_info()
most = room + (used.vms if name == resource.RLIMIT_AS else used.data)
resource.setrlimit(name, (most, most))
for dtype in (None, "bfloat16"):
    try:
        model = gemma2.load(folder, device="cpu", dtype=dtype, progress=False).model
        print("loaded", sum(parameter.nbytes for parameter in model.parameters()))
    except MemoryError as error:
        print(error)
"""


def limited(name: str, room: int, folder: Path) -> list[str]:
    """What is said of two loads, the second in bfloat16, where so many bytes more are allowed."""
    command = [sys.executable, "-c", LIMITED, name, str(room), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@linux
@pytest.mark.long
@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_under_a_limit_of_the_process_what_is_said_to_fit_does_fit(name: str, tmp_path: Path) -> None:
    """The file is larger than the limit, too: it is not mapped."""
    needed = model_of_zeros(tmp_path / "2b", shaped("2b", 1), "F32")
    refused, loaded = limited(name, int(needed * 0.8), tmp_path / "2b")
    assert f"the weights need {needed / 1e9:.3g} GB in float32, and " in refused
    assert f"GB are free on cpu (the limit {name} of this process)" in refused
    assert f'What fits: dtype="bfloat16" (--dtype bfloat16), which needs {needed / 2e9:.3g} GB; or ' in refused
    assert loaded == f"loaded {needed // 2}"


@linux
def test_a_ckpt_that_cannot_be_mapped_is_not_called_damaged(tmp_path: Path) -> None:
    made = gemma2.convert(POCKET, tmp_path / "pocket.ckpt", type="f32", progress=False)
    refused, _ = limited("RLIMIT_AS", 15 * 10**6, made.path)
    assert "PyTorch maps such a file as a whole, 0.0" in refused and "are free (the limit RLIMIT_AS" in refused


# Control groups. A tree of the kernel's files is written into a folder; the real machine has more memory than they say.


def written(top: Path, **files: str | int) -> None:
    for name, content in files.items():
        path = top.joinpath(*name.split("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="utf-8")


def tree(place: Path, own: str, files: dict[str, str | int]) -> int:
    """What is free by a /proc/self/cgroup of `own` and the files under /sys/fs/cgroup."""
    written(place / "proc", **{"self/cgroup": own})
    written(place / "groups", **files)
    found = free_host_memory(place / "proc", place / "groups", SWAP)
    assert found is not None
    return found.bytes if str(place) in found.limit else -1


MB = 10**6
SWAP = 30 * MB
V2 = "0::/a/b"
LARGE = 9223372036854771712
GROUPS: dict[str, tuple[str, dict[str, str | int], int]] = {
    "version 2": (V2, {"a/b/memory.max": 500 * MB, "a/b/memory.current": 100 * MB}, 400 * MB + SWAP),
    "a group around it has less": (
        V2,
        {
            "a/b/memory.max": "max",
            "a/b/memory.current": 7,
            "a/memory.max": 300 * MB,
            "a/memory.current": 100 * MB,
            "memory.max": 900 * MB,
            "memory.current": 0,
        },
        200 * MB + SWAP,
    ),
    "files in memory are given up": (
        V2,
        {
            "a/b/memory.max": 500 * MB,
            "a/b/memory.current": 450 * MB,
            "a/b/memory.stat": f"anon 1\nfile {390 * MB}\ninactive_file {300 * MB}\nactive_file {50 * MB}",
        },
        400 * MB + SWAP,
    ),
    "no swap for the group": (
        V2,
        {
            "a/b/memory.max": 500 * MB,
            "a/b/memory.current": 100 * MB,
            "a/b/memory.swap.max": 0,
            "a/b/memory.swap.current": 0,
        },
        400 * MB,
    ),
    "more used than the limit": (V2, {"a/b/memory.max": 5 * MB, "a/b/memory.current": 6 * MB}, SWAP),
    "a container that sees itself as the top": ("0::/", {"memory.max": 500 * MB, "memory.current": 0}, 500 * MB + SWAP),
    "a container that sees its path outside": (
        "0::/docker/f00",
        {"memory.max": 500 * MB, "memory.current": 0},
        500 * MB + SWAP,
    ),
    "a path above the top": ("0::/../..", {"memory.max": 500 * MB, "memory.current": 0}, 500 * MB + SWAP),
    "version 1": (
        "5:cpu,cpuacct:/x\n4:memory:/a\n1:name=systemd:/y",
        {
            "memory/a/memory.limit_in_bytes": 500 * MB,
            "memory/a/memory.usage_in_bytes": 480 * MB,
            "memory/a/memory.stat": f"inactive_file 5\ntotal_inactive_file {80 * MB}\ntotal_active_file 0",
            "memory/memory.limit_in_bytes": LARGE,
            "memory/memory.usage_in_bytes": 0,
        },
        100 * MB + SWAP,
    ),
    "version 1 with swap counted": (
        "4:memory:/a",
        {
            "memory/a/memory.limit_in_bytes": 500 * MB,
            "memory/a/memory.usage_in_bytes": 400 * MB,
            "memory/a/memory.memsw.limit_in_bytes": 500 * MB,
            "memory/a/memory.memsw.usage_in_bytes": 450 * MB,
        },
        50 * MB,
    ),
    "both versions mounted": (
        "4:memory:/\n0::/a",
        {"unified/a/memory.max": 500 * MB, "unified/a/memory.current": 0},
        500 * MB + SWAP,
    ),
    "no limit": (V2, {"a/b/memory.max": "max", "a/b/memory.current": 1}, -1),
    "no limit in version 1": (
        "4:memory:/",
        {"memory/memory.limit_in_bytes": LARGE, "memory/memory.usage_in_bytes": 1},
        -1,
    ),
    "no files": (V2, {}, -1),
    "another process's group": (V2, {"c/memory.max": 5, "c/memory.current": 0}, -1),
    "files of something else": (V2, {"a/b/memory.max": "what?", "a/b/memory.current": "\n"}, -1),
    "no lines of groups": ("what?", {"memory.max": 5, "memory.current": 0}, -1),
}


@pytest.mark.skipif(sys.platform == "darwin", reason="held to all its memory")
@pytest.mark.parametrize("case", GROUPS)
def test_what_a_control_group_leaves_is_read_from_the_kernels_files(case: str, tmp_path: Path) -> None:
    own, files, free = GROUPS[case]
    assert tree(tmp_path, own, files) == free


def test_without_control_groups_the_machine_has_what_the_system_calls_available_and_its_swap(tmp_path: Path) -> None:
    found, available = free_host_memory(tmp_path, tmp_path, 10**15), psutil.virtual_memory().available
    assert found is not None and "machine" in found.limit
    assert sys.platform == "darwin" or abs(found.bytes - available - 10**15) < 500 * MB


def test_the_cache_of_zfs_is_free(tmp_path: Path) -> None:
    before = free_host_memory(tmp_path, tmp_path)
    lines = f"13 1 0x01 147 39984\nname type data\nc_min 4 {10**12}\nsize 4 {10**15}"
    written(tmp_path, **{"spl/kstat/zfs/arcstats": lines})
    after = free_host_memory(tmp_path, tmp_path)
    assert before and after and (sys.platform == "darwin" or after.bytes - before.bytes > 9 * 10**14)


def test_what_just_fits_is_not_refused_and_a_byte_more_is() -> None:
    cpu = torch.device("cpu")
    before = free_host_memory()
    assert before is not None
    check_memory("m", torch.float32, cpu, lambda dtype: 0)
    check_memory("m", torch.float32, cpu, lambda dtype: int(before.bytes * 0.95))
    with pytest.raises(MemoryError, match=r"m: the weights need .* GB in float32"):
        check_memory("m", torch.float32, cpu, lambda dtype: int(before.bytes * 1.2))


def test_a_device_of_which_nothing_is_known_refuses_nothing() -> None:
    assert free_memory(torch.device("meta")) is None
    check_memory("m", torch.float32, torch.device("meta"), lambda dtype: 10**18)


needed_by: Callable[[torch.dtype], int] = lambda dtype: dtype.itemsize * 10**15  # noqa: E731


def test_a_narrower_dtype_is_named_only_where_it_fits() -> None:
    with pytest.raises(MemoryError) as caught:
        check_memory("m", torch.float64, torch.device("cpu"), needed_by)
    assert "bfloat16" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_what_pytorchs_cache_holds_unused_is_free_on_a_gpu() -> None:
    device = torch.device("cuda", 0)
    before = free_memory(device)
    held = torch.empty(10**8, dtype=torch.uint8, device=device)
    during = free_memory(device)
    del held
    after = free_memory(device)
    assert before and during and after
    assert before.bytes - during.bytes >= 10**8 and after.bytes - during.bytes >= 10**8
