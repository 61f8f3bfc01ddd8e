"""One file of a repository, verified, through huggingface_hub: its cache, its resume, its progress bars.

The hub client does not hash what it downloads, so this module does: the cache names every blob by its hash (sha256
for large files, git's sha1 for small ones), and a blob whose bytes do not give its name is deleted and fetched anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors
from tqdm import tqdm

from gemma2.errors import BadModelFile, first_line

LIST = "list of files"  # as messages call it
MOST_PATH = 1000  # characters
SHA256, SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
SECRET = re.compile(r"Bearer [^'\"]*|hf_\w+")
NO_FILE = huggingface_hub._CACHED_NO_EXIST  # noted in the cache: the commit does not have the file
HTTPError = errors.HTTPError  # type: ignore[attr-defined]  # of httpx, httpx2 or requests, whichever the client uses


class Absent(BadModelFile):
    """A file that the repository does not have or, when the hub cannot be reached, the cache."""


class Unreached(Absent):
    """A file that is not in the cache while the hub cannot be reached, so nobody knows whether it exists."""

    def __init__(self, name: str, missing: str, why: str, cure: str = "connect, or give a folder or a file") -> None:
        super().__init__(f"{name}: {missing} in the cache and the hub cannot be reached ({why}); {cure}")
        self.why = why


class Unfit(Absent):
    """A file that is there, and is not a Gemma 2's."""


class NoRepository(BadModelFile):
    """The hub has no model of that name, or does not show it."""


class Repository:
    """A repository of the hub. All its files are of one commit, even if the branch moves meanwhile.

    Args:
        revision: branch, tag or commit. It becomes the commit with the first file.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name, self.revision = name, revision
        self._pinned = False  # whether `revision` is the commit of a file that was had
        self._why = ""  # the hub cannot be reached; nothing more is asked of it, since each request may wait long

    def fetch(self, file: str) -> Path:
        """One verified file of the cache, downloaded if it is not there yet.

        Raises:
            Absent: the repository does not have it; Unreached: the cache does not, and the hub cannot be reached.
            BadModelFile: no such repository, no access, or a damaged download.
        """
        if self._pinned and huggingface_hub.try_to_load_from_cache(self.name, file, revision=self.revision) is NO_FILE:
            raise Absent(f"{self.name}: the repository has no {file}")
        for _ in range(2):
            with self.explained(file):
                got = huggingface_hub.hf_hub_download(
                    self.name, file, revision=self.revision, local_files_only=bool(self._why)
                )
                path = Path(got)
                if _verified(path, self.name, file):
                    self.revision, self._pinned = _commit(path, file), True
                    return path
                _discard(path)  # hf_hub_download fetches it anew
        raise BadModelFile(f"{self.name}: {file} arrived damaged twice (its hash is not the hub's); nothing was kept")

    def find(self, file: str) -> Path | None:
        """`fetch`, and None where the file is absent."""
        try:
            return self.fetch(file)
        except Absent:
            return None

    def listed(self) -> dict[str, int]:
        """The repository's files whose names are plain paths, and how many bytes each has, 0 if it does not say."""
        with self.explained(LIST):
            try:
                info = huggingface_hub.HfApi().model_info(
                    self.name, revision=self.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
                )
                return {file.rfilename: file.size or 0 for file in info.siblings or [] if is_plain(file.rfilename)}
            except json.JSONDecodeError:  # which is an OSError too where the client uses requests
                raise
            except (HTTPError, OSError) as error:
                if _answered(error):
                    raise
                raise errors.LocalEntryNotFoundError(str(error)) from error  # as the client does for a file
            except (KeyError, TypeError, AttributeError):
                raise ValueError("the answer is not in the hub's format") from None

    def cached(self) -> dict[str, int]:
        """The repository's files that are in the cache already, and how many bytes each has."""
        try:
            got = huggingface_hub.snapshot_download(self.name, revision=self.revision, local_files_only=True)
        except (OSError, ValueError) as error:
            got = getattr(error, "snapshot_path", "")  # of a snapshot that is known to be incomplete
        files = [path for path in Path(got).rglob("*") if path.is_file()] if got else []
        return {path.relative_to(got).as_posix(): path.stat().st_size for path in files}

    def kind(self) -> str:
        """What else of this name is on the hub: "data set", "Space", or "" for neither."""
        api = huggingface_hub.HfApi()
        for kind, about in (("data set", api.dataset_info), ("Space", api.space_info)):
            with contextlib.suppress(HTTPError, OSError, ValueError, KeyError, TypeError, AttributeError):
                about(self.name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
                return kind
        return ""

    @contextlib.contextmanager
    def explained(self, file: str) -> Iterator[None]:
        """Turns what the client raises into one line that says what to do."""
        name = self.name
        try:
            yield
        except errors.LocalEntryNotFoundError as error:
            cause = error.__cause__ or error
            if _answered(cause):
                raise _failed(name, file, cause) from None
            why = self._why or _without_secrets(cause)
            self._why = why if file != LIST else self._why
            raise Unreached(name, f"{file} is not", why) from None
        except errors.EntryNotFoundError:
            raise Absent(f"{name}: the repository has no {file}") from None
        except errors.GatedRepoError:
            raise BadModelFile(
                f"{name}: gated; accept its terms at {constants.ENDPOINT}/{name} and log in with `hf auth login`"
            ) from None
        except errors.RevisionNotFoundError:
            raise BadModelFile(f"{name}: no revision {self.revision!r}") from None
        except errors.RepositoryNotFoundError:
            raise NoRepository(
                f"{name}: no such repository, or a private one: check the name, or log in with `hf auth login`"
            ) from None
        except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: Xet's
            raise _failed(name, file, error) from None


def is_plain(file: str) -> bool:
    """Whether this is a path down from a repository's root. It comes from outside."""
    steps = file.split("/")
    return (
        len(file) <= MOST_PATH
        and file.isprintable()
        and not {"\\", ":"} & {*file}
        and all(step.strip(". ") for step in steps)
    )


def _verified(path: Path, name: str, file: str) -> bool:
    """Whether a cached file's bytes give its hash. A good result is remembered by size and time of change."""
    state = path.stat()
    seen = f"{state.st_size} {state.st_mtime_ns}"
    # The first link alone: the blob it names may itself link to a store that names files by Xet's hash.
    blob = path.readlink().name if path.is_symlink() else ""
    commit = _commit(path, file)
    marker = Path(constants.HF_HUB_CACHE) / ".gemma2-verified" / (blob or f"{commit}-{file}")
    if marker.is_file() and marker.read_text(encoding="utf-8") == seen:
        return True
    stated = blob or _asked(name, file, commit)
    if SHA256.fullmatch(stated):
        digest = hashlib.sha256()
    elif SHA1.fullmatch(stated):
        digest = hashlib.sha1(b"blob %d\0" % state.st_size, usedforsecurity=False)
    else:
        return True  # a server that gives no hash: nothing to compare with
    with (
        path.open("rb") as data,
        tqdm(total=state.st_size, desc="verifying", unit="B", unit_scale=True, leave=False, disable=None) as bar,
    ):
        while part := data.read(2**22):
            digest.update(part)
            bar.update(len(part))
    if digest.hexdigest() != stated:
        return False
    with contextlib.suppress(OSError):  # a cache that is read-only is hashed every time
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(seen, encoding="utf-8")
    return True


def _commit(path: Path, file: str) -> str:
    """The commit that a file of the cache belongs to: the name of the folder that `file` is a path in."""
    return path.parents[file.count("/")].name


def _asked(name: str, file: str, commit: str) -> str:
    """The hash that the hub states, or "" offline. It is needed for a cache without symlinks, whose names hold none."""
    try:
        return huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, file, revision=commit)).etag or ""
    except (HTTPError, OSError):
        return ""


def _discard(path: Path) -> None:
    """Delete a file of the cache with all the links that lead to it."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _answered(error: BaseException) -> bool:
    """Whether the hub itself has answered so. It has not where it cannot be reached, or where it fails (5xx)."""
    return (_status(error) or 500) < 500


def _status(error: BaseException) -> int | None:
    """The status of the hub's answer; None where there was no answer."""
    response = error.response if isinstance(error, errors.HfHubHTTPError) else None
    return None if response is None else response.status_code


def _failed(name: str, file: str, error: BaseException) -> BadModelFile:
    cure = "; it takes a token with access: log in with `hf auth login`" if _status(error) in (401, 403) else ""
    return BadModelFile(f"{name}: {file} could not be downloaded ({_without_secrets(error)}){cure}")


def _without_secrets(error: BaseException) -> str:
    """The first line of an error, without the access tokens that one of the hub client may quote."""
    return SECRET.sub("***", first_line(error))
