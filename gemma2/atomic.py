"""Files and folders that appear whole under their name, or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

# .NAME.PROCESS-RANDOM.partial, beside the target so that renaming is one step of the file system.
PARTIAL, OLD = "partial", "old"


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or a folder at. It takes the target's name when the block ends well, and
    is removed when it does not. Leftovers of processes that were killed go with the next success.

    Raises:
        OSError: the path cannot be written, or renamed.
    """
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    partial = target.with_name(f".{target.name}.{mark}.{PARTIAL}")
    try:
        yield partial
        _synchronise(partial)
        if partial.is_dir() and target.exists():  # a folder cannot be replaced in one step
            old = target.with_name(f".{target.name}.{mark}.{OLD}")
            target.rename(old)
            partial.rename(target)
            _remove(old)
        else:
            partial.replace(target)
    except BaseException:
        _remove(partial)
        raise
    _sweep(target)


def _synchronise(path: Path) -> None:
    """To the disk, so that after a power cut the name does not lead to an empty file."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())


def _sweep(target: Path) -> None:
    left = re.compile(rf"\.{re.escape(target.name)}\.(\d+)-[0-9a-f]{{8}}\.({PARTIAL}|{OLD})")
    for path in target.parent.iterdir():
        found = left.fullmatch(path.name)
        if found and not _runs(int(found[1])):
            _remove(path)


def _runs(process: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere asking may end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
