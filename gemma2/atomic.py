"""Files and folders that appear whole under their name, or not at all; and whether they can be written there."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

# .NAME.RANDOM.partial, beside the target so that renaming is one step of the file system.
PARTIAL, OLD = "partial", "old"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(path: Path, *, force: bool = False, folder: bool = False, own: Collection[str] = ()) -> None:
    """Raises OSError, with the reason, if `path` cannot be written as a file or, with `folder`, as a folder.

    Args:
        force: it may take the place of what is there.
        own: names of the files that such a folder holds. One with anything else in it is never replaced.
    """
    parent = path.parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent}: no such folder to write to")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"{parent}: cannot be written to")
    inside = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    if not os.path.lexists(path) or (folder and path.is_dir() and not inside):
        return
    if path.exists() and path.is_dir() != folder:
        there, other = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise FileExistsError(f"{path}: is a {there}, and not replaced by a {other}; choose another name")
    if path.exists() and not path.is_dir() and not path.is_file():
        raise FileExistsError(f"{path}: is not a regular file; choose another name")
    foreign = [name for name in inside if name not in own]
    if foreign:
        raise FileExistsError(
            f"{path}: also holds {', '.join(foreign[:3])}, so it is not replaced; choose another name"
        )
    if not force:
        raise FileExistsError(f"{path}: is there already; --force (force=True) replaces it")


def check_space(folder: Path, needed: int) -> None:
    """Raises OSError where fewer bytes are free than are needed."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder}: {needed / 1e9:.3g} GB are needed there, and {free / 1e9:.3g} GB are free")


@contextlib.contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """An OSError of a full disk, or of a file that may not be so large, gets one line that names the target."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(f"{path}: {error.strerror} while writing; make room or choose another place") from None


def reserve(file: BinaryIO, size: int, path: Path) -> None:
    """Make an open file `size` bytes long, with room on the disk for all of them where the system can do that.

    Raises:
        OSError: there is no room. The message calls the file `path`.
    """
    file.truncate(size)
    if not hasattr(os, "posix_fallocate"):
        return
    file.flush()
    with naming_a_full_disk(path):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in FULL:  # any other error: a file system that cannot do it
                raise


@contextlib.contextmanager
def replacing(*targets: Path, folder: bool = False, last: Callable[[], object] = lambda: None) -> Iterator[list[Path]]:
    """Give an empty file, or with `folder` an empty folder, beside each target, for the block to write.

    When the block ends without an error, they take the targets' names, in order; otherwise they are removed. A success
    also removes what earlier processes left when they were killed.

    Args:
        last: called when everything is on the disk, before names are taken; may raise, as the block may.
    Raises:
        OSError: a path cannot be written, or renamed.
    """
    mark = secrets.token_hex(8)
    partials = [_beside(target, mark, PARTIAL) for target in targets]
    try:
        with contextlib.ExitStack() as claims:
            for partial in partials:
                if folder:
                    partial.mkdir()
                else:
                    partial.touch(exist_ok=False)
                claims.enter_context(_claimed(partial))
            yield partials
            for partial in partials:
                _synchronise(partial)
            last()
            for partial, target in zip(partials, targets, strict=True):
                if folder:
                    _put_folder(partial, target, _beside(target, mark, OLD))
                else:
                    partial.replace(target)
    except BaseException:
        for partial in partials:
            _remove(partial)
        raise
    for target in targets:
        _sweep(target)


def _beside(target: Path, mark: str, kind: str) -> Path:
    return target.with_name(f".{target.name}.{mark}.{kind}")


def _synchronise(path: Path) -> None:
    """To the disk, so that after a power cut the name does not lead to an empty file."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())


def _put_folder(partial: Path, target: Path, old: Path) -> None:
    """Give a folder the target's name in two steps, since no system call replaces a folder that is not empty.

    The old folder is renamed to `old` first. It is removed when the new one has its name, and gets its own name back
    when that failed. If the process is killed between the two steps, the old folder is left under the name `old`.
    """
    try:
        while True:
            with contextlib.suppress(FileNotFoundError):
                target.rename(old)
            try:
                partial.rename(target)
                break
            except OSError:
                if not target.exists():
                    raise
                _remove(old)  # another process was quicker, and the folder there now is its
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    _remove(old)


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Hold a lock on a path. It ends with the process, however that ends, so a path without a lock is a leftover."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _sweep(target: Path) -> None:
    """Remove what earlier attempts at this target have left. The target is whole by now, so nothing here may fail."""
    left = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.({PARTIAL}|{OLD})")
    with contextlib.suppress(OSError):
        for path in list(target.parent.iterdir()):
            if left.fullmatch(path.name) and not _in_use(path):
                _remove(path)


def _in_use(path: Path) -> bool:
    if fcntl is None:
        return True
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return True  # gone meanwhile, or another user's
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
