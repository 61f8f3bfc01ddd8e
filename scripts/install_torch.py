"""Install PyTorch into this Python's environment: the build that fits the machine, without gigabytes of no use to it.

    python scripts/install_torch.py auto|cpu|cuda|default

On Linux, PyPI's PyTorch brings gigabytes of CUDA packages. So `auto` means `cpu` on Linux x86_64 without an NVIDIA GPU,
and `default`, what pip's index gives, everywhere else. `cpu` takes a wheel that pip finds locally, else the one from
PyTorch's own index, else, where that index cannot be reached, what pip's index gives. `cuda` fails where it gets a
build without CUDA. One line says what is done. The version is that of constraints.txt.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CHOOSE = "make TORCH=cpu|cuda|default chooses otherwise"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", choices=["auto", "cpu", "cuda", "default"])
    build, asked = parser.parse_args().build, ""
    if build == "auto":
        cpu_only = sys.platform == "linux" and platform.machine() == "x86_64" and not has_nvidia()
        build = "cpu" if cpu_only else "default"
        asked = "no NVIDIA GPU on this machine: " if cpu_only else ""
    wanted = pinned()
    present = installed()
    if present and build in ("cuda", "default") and present.endswith("+cpu"):
        pip("uninstall", "-y", "torch")
    if build == "cpu":
        return cpu_build(f"{wanted}+cpu", asked)
    say(f"{asked}{wanted} as pip's index gives it")
    code = pip("install", "-c", str(CONSTRAINTS), "torch")
    if code == 0 and build == "cuda" and not has_cuda():
        say(f"asked for CUDA, but pip found {installed()}, which has none; https://pytorch.org names the index to use")
        return 1
    return code


def cpu_build(wanted: str, asked: str) -> int:
    if installed() == wanted.removeprefix("torch=="):
        say(f"{asked}{wanted} is installed already")
        return 0
    if pip("install", "--no-index", "--no-deps", wanted, quiet=True) == 0:
        say(f"{asked}{wanted} from a local folder ({CHOOSE})")
        return 0
    if reachable(CPU_INDEX):
        say(f"{asked}{wanted} from {CPU_INDEX} ({CHOOSE})")
        return pip("install", "--no-deps", "--index-url", CPU_INDEX, wanted)
    say(f"{asked}{CPU_INDEX} cannot be reached, so PyTorch comes as pip's index gives it, perhaps with CUDA packages")
    return pip("install", "-c", str(CONSTRAINTS), "torch")


def has_nvidia() -> bool:
    return bool(shutil.which("nvidia-smi") or list(Path("/dev").glob("nvidia*")))


def has_cuda() -> bool:
    code = "import sys, torch; sys.exit(torch.version.cuda is None)"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def pinned() -> str:
    found = re.search(r"^torch==\S+", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    return found[0]


def installed() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=10):
            return True
    except (OSError, ValueError):
        return False


def pip(*arguments: str, quiet: bool = False) -> int:
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, stderr=subprocess.DEVNULL if quiet else None).returncode


def say(line: str) -> None:
    print(f"PyTorch: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
