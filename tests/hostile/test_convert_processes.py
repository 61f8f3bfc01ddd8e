"""Conversions as processes: killed, interrupted, two at once, on a full disk, and in little memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gemma2
from gemma2.checkpoints.hf_config import read_config
from gemma2.checkpoints.safetensors import SINGLE
from gemma2.convert import convert
from tests.children import signals_restored
from tests.conftest import tiny
from tests.hostile.child import ROOT, STATUS
from tests.hostile.conftest import shell

pytestmark = pytest.mark.posix
CUT = {"out": ["--type", "f32"], "out.gguf": ["--type", "q8_0"], "out.ckpt": ["--type", "f32"]}
TARGETS = [target if target == "out" else pytest.param(target, marks=pytest.mark.long) for target in CUT]

# A child forks once for each conversion, after importing everything, so that it takes little more than its work.
DRIVER = """
import os, sys
from gemma2.cli import main
import gguf.quants
for line in sys.stdin:
    first, *words = line.rstrip("\\n").split("\\t")
    if first == "wait":
        status = os.waitpid(int(words[0]), 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    process = os.fork()
    if process == 0:
        os.dup2(os.open(first, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        code = main(words)
        sys.stdout.flush()
        os._exit(code)
    print(process, flush=True)
"""


class Driver:
    """Starts conversions as processes of their own, and waits for them."""

    def __init__(self, child: subprocess.Popen[str], said: Path) -> None:
        self.child, self.said = child, said

    def start(self, *argv: object, number: int = 0) -> int:
        return self._ask("\t".join(map(str, (self.said.with_suffix(f".{number}"), "convert", *argv))))

    def wait(self, process: int) -> int:
        return self._ask(f"wait\t{process}")

    def output(self, number: int = 0) -> str:
        return self.said.with_suffix(f".{number}").read_text(encoding="utf-8")

    def _ask(self, line: str) -> int:
        assert self.child.stdin and self.child.stdout
        print(line, file=self.child.stdin, flush=True)
        return int(self.child.stdout.readline())


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    command = [sys.executable, "-c", DRIVER]
    with signals_restored():
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    with child:
        yield Driver(child, tmp_path_factory.mktemp("said") / "output")
        assert child.stdin
        child.stdin.close()


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 20 MB, long enough to be met at its conversion."""
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
    size |= {"num_hidden_layers": 2, "head_dim": 64, "query_pre_attn_scalar": 64}
    place = shell(tmp_path_factory.mktemp("heavy") / "model", **size)
    shapes = {name: p.shape for name, p in tiny("2b", vocab_size=4096, **size).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: (torch.rand(shape, generator=generator) - 0.5).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, place / SINGLE)
    return place


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def digests(path: Path) -> dict[str, str]:
    """sha256 of the files of a target."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def weight(path: Path) -> int:
    """Bytes of a file, or of the files of a folder; of what goes meanwhile, none."""
    total = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


class Writing:
    """A conversion that is about to be started, seen from outside."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.earlier, self.stood = self._partials(), self._inode()

    def wait(self, size: int) -> None:
        """Until it has written so many bytes, or has ended."""
        met = False
        for _ in range(60_000):
            new = self._partials() - self.earlier
            met = met or bool(new)
            ended = not new and (met or self._inode() != self.stood)
            if ended or any(weight(path) >= size for path in new):
                return
            time.sleep(0.001)
        raise AssertionError(f"{self.target}: {size:,} bytes are not written within a minute")

    def _partials(self) -> set[Path]:
        return set(self.target.parent.glob(".*.partial"))

    def _inode(self) -> int | None:
        return self.target.stat().st_ino if self.target.exists() else None


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_killed_at_any_moment_a_target_is_absent_or_old_or_whole_and_leftovers_go_with_the_next_success(
    target: str, heavy: Path, driver: Driver, tmp_path: Path
) -> None:
    path, options = tmp_path / target, CUT[target]
    assert driver.wait(driver.start(heavy, path, *options, "--force")) == 0, driver.output()
    whole, size = digests(path), weight(path)
    convert(heavy, path, type="bf16", force=True, progress=False)
    old = digests(path)
    assert old != whole
    there = names(tmp_path)
    killed = 0
    for before in (old, None):  # it replaces what is there, or nothing
        for share in (0.0, 0.5, 1.0):
            if before is None and path.exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif before and digests(path) != before:
                convert(heavy, path, type="bf16", force=True, progress=False)
            writing = Writing(path)
            process = driver.start(heavy, path, *options, "--force")
            writing.wait(int(share * size))
            os.kill(process, signal.SIGKILL)
            killed += driver.wait(process) == -signal.SIGKILL
            after = digests(path) if path.exists() else None
            assert after in (before, whole)
    assert killed >= 4, "most conversions had ended already"
    assert list(tmp_path.glob(".*.partial")), "none was met at its work"
    assert driver.wait(driver.start(heavy, path, *options, "--force")) == 0, driver.output()
    assert digests(path) == whole and names(tmp_path) == there


@pytest.mark.parametrize("target", TARGETS)
def test_an_interrupt_exits_with_130_and_leaves_nothing(
    target: str, heavy: Path, driver: Driver, tmp_path: Path
) -> None:
    for old in (False, True):
        code = 0
        while code == 0:  # it may have ended before the signal came
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
            if old:
                convert(heavy, tmp_path / target, type="bf16", progress=False)
            before, there = old and digests(tmp_path / target), names(tmp_path)
            writing = Writing(tmp_path / target)
            process = driver.start(heavy, tmp_path / target, *CUT[target], "--force")
            writing.wait(1)
            os.kill(process, signal.SIGINT)
            code = driver.wait(process)
        assert code == 130 and driver.output().strip() == ""
        assert names(tmp_path) == there and (not old or digests(tmp_path / target) == before)


@pytest.mark.parametrize("target", TARGETS)
def test_two_at_once_to_one_target_both_succeed_with_force_and_one_without(
    target: str, heavy: Path, driver: Driver, tmp_path: Path
) -> None:
    for options in ([], ["--force"]):
        path = tmp_path / f"{options}" / target
        path.parent.mkdir()
        processes = [driver.start(heavy, path, *CUT[target], *options, number=number) for number in (1, 2)]
        codes = sorted(driver.wait(process) for process in processes)
        assert codes == ([0, 0] if options else [0, 1]), driver.output(1) + driver.output(2)
        assert options or "is there already" in driver.output(1) + driver.output(2)
        assert not list(path.parent.glob(".*"))
        assert gemma2.load(path, device="cpu", progress=False).config.hidden_size == 512


FULL = """
import contextlib, io, json, resource, sys
from pathlib import Path
from gemma2.cli import main

def run(*argv):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return main(["convert", *map(str, argv)]), said.getvalue()

model, target, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
for part in range(10):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * part // 10, resource.RLIM_INFINITY))
    result = run(model, target, "--force")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    files = target.parent.rglob("*")
    print(json.dumps([*result, {str(file): file.stat().st_mtime_ns for file in files if file.is_file()}]))
print(json.dumps([*run(model, target, "--force"), {}]))
"""


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_a_disk_that_is_full_at_any_byte_leaves_what_was_there_and_says_so(
    target: str, heavy: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for the disk, and fails in the same way."""
    size = convert(heavy, tmp_path / target, progress=False).bytes
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    before = {str(file): file.stat().st_mtime_ns for file in files}
    command = [sys.executable, "-c", FULL, str(heavy), str(tmp_path / target), str(size - 80_000)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    *full, last = map(json.loads, done.stdout.splitlines())
    for code, said, after in full:
        line = f"gemma2: error: {tmp_path / target}: File too large while writing; make room or choose another place\n"
        assert (code, said, after) == (1, line, before)
    assert len(full) == 10 and last[0] == 0


# VmHWM, because ru_maxrss of a child starts at what its parent held when it forked.
PEAK = """
import sys
import gemma2
from gemma2.convert import convert
from tests.hostile.child import memory
for source, target, kind in zip(*[iter(sys.argv[1:])] * 3):
    before = memory("VmHWM")
    convert(source, target, type=kind or None, progress=False)
    print(before, memory("VmHWM"))
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
"""


@pytest.mark.long
@pytest.mark.skipif(not STATUS.exists(), reason="reads peak memory from Linux's /proc")
def test_a_conversion_takes_less_memory_than_the_model(tmp_path: Path) -> None:
    """Over importing the package, mapped pages of the source included: at most 120 MB, and the model has 160."""
    size = {"hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4}
    size |= {"num_hidden_layers": 1, "head_dim": 128, "query_pre_attn_scalar": 128}
    place = shell(tmp_path / "model", **size)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in gemma2.Gemma2(read_config(place / "config.json")).named_parameters()}
    save_file({name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}, place / SINGLE)
    gguf, folder, ckpt = (str(tmp_path / name) for name in ("out.gguf", "out", "out.ckpt"))
    steps = [
        (str(place), gguf, ""),
        (gguf, folder, ""),
        (folder, ckpt, ""),
        (ckpt, str(tmp_path / "again.gguf"), "q8_0"),
    ]
    words = [word for step in steps for word in step]
    done = subprocess.run([sys.executable, "-c", PEAK, *words], capture_output=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for (source, target, _), line in zip(steps, done.stdout.splitlines(), strict=True):
        before, peak = map(int, line.split())
        print(f"{Path(source).name} -> {Path(target).name}: {(peak - before) / 1e6:.0f} MB over {before / 1e6:.0f} MB")
        assert peak - before <= 120e6
