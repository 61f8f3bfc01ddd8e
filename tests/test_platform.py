"""What Windows does not have is not needed: commands run with the names taken away that only POSIX systems have.

This is not Windows. It shows that nothing asks for these modules and signals, and that text is UTF-8 whatever the
locale says.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = """
import os, signal, sys
import psutil  # whose part for this system needs them
for name in ("fcntl", "resource", "termios", "tty", "pty", "grp", "pwd"):
    sys.modules[name] = None
for name in ("SIGPIPE", "SIGALRM", "SIGKILL", "SIGHUP", "SIGUSR1", "pthread_sigmask", "setitimer", "alarm"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("fork", "mkfifo", "posix_fallocate", "getuid", "geteuid", "chown", "killpg", "getpgid"):
    if hasattr(os, name):
        delattr(os, name)
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a child without these names, in a locale that is not UTF-8."""
    place = tmp_path_factory.mktemp("site")
    (place / "sitecustomize.py").write_text(WITHOUT, encoding="utf-8")
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join((str(place), root))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"} | {
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "cp1252",
    }


def run(bare: dict[str, str], script: str, *argv: object, given: str = "") -> bytes:
    command = [sys.executable, "-c", script, *map(str, argv)]
    done = subprocess.run(command, input=given.encode(), capture_output=True, env=bare, timeout=120)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    return done.stdout


COMMANDS = """
import sys
from pathlib import Path
import signal
assert not hasattr(signal, "SIGPIPE") and sys.modules["fcntl"] is None
from gemma2.cli import main
place = Path(sys.argv[1])
def call(*argv):
    code = main([str(word) for word in argv])
    assert code == 0, (argv, code)
call("generate", "caf\\u00e9", "-n", 4, "--echo", "--verbose")
call("chat", "-n", 4)
call("convert", "pocket", place / "m.gguf", "--type", "q8_0")
call("convert", "pocket", place / "folder")
call("convert", "pocket", place / "folder", "--force")
call("convert", "pocket", place / "m.ckpt")
call("inspect", place / "m.gguf")
call("trace", "pocket", "--prompt", "In", "-o", place / "t.safetensors")
call("parity", "pocket", "--against", place / "t.safetensors")
call("generate", "x", "-n", 1, "--model", place / "m.ckpt")

class Closed:  # a reader that has left
    def write(self, text): raise BrokenPipeError
    def flush(self): pass
    def fileno(self): return 1

sys.stdout = Closed()
code = main(["generate", "x", "-n", "2"])
sys.stdout = None
assert code == 128 + 13, code
"""


@pytest.mark.long
def test_commands_run_without_what_only_posix_has_and_end_quietly_when_their_reader_leaves(
    bare: dict[str, str], tmp_path: Path
) -> None:
    out = run(bare, COMMANDS, tmp_path, given="caf\u00e9?\n/quit\n")
    assert out.decode("utf-8").startswith("caf\u00e9")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".json")) == [
        "folder",
        "m.ckpt",
        "m.gguf",
        "t.safetensors",
        "tokenizer.model",
    ]
