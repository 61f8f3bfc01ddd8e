"""Names to verified local files, through huggingface_hub: its cache, its resume, its progress bars.

The hub client does not hash what it downloads, so this module does: the cache names every blob by its hash (sha256
for large files, git's sha1 for small ones), and a blob whose bytes do not give its name is deleted and fetched anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors
from tqdm import tqdm

from gemma2.checkpoints.safetensors import INDEX, SINGLE, shard_names
from gemma2.config import read_json
from gemma2.errors import BadModelFile

NEEDED = ("config.json", "tokenizer.model")
OPTIONAL = ("generation_config.json",)
SHA256, SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
SECRET = re.compile(r"Bearer [^'\"]*|hf_\w+")
HTTPError = errors.HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2, whichever the client uses


class _Absent(BadModelFile):
    """A file that the repository does not have or, when the hub cannot be reached, the cache."""


def download(name: str, revision: str | None = None) -> Path:
    """The folder with the checkpoint's files, downloaded as far as they are not in the cache yet.

    Raises:
        BadModelFile: no such repository, no access, offline with an incomplete cache, or damaged downloads; one line
            that says what to do.
    """
    folder = _fetch(name, NEEDED[0], revision).parent
    commit = folder.name  # of which all other files are, even if the branch moves meanwhile
    for file in NEEDED[1:]:
        _fetch(name, file, commit)
    for file in OPTIONAL:
        _find(name, file, commit)
    if index := _find(name, INDEX, commit):
        for shard in shard_names(read_json(index), f"{name}/{INDEX}"):
            _fetch(name, shard, commit)
    else:
        _fetch(name, SINGLE, commit)
    return folder


def _fetch(name: str, file: str, revision: str | None) -> Path:
    """One verified file of the cache."""
    for _ in range(2):
        try:
            path = Path(huggingface_hub.hf_hub_download(name, file, revision=revision))
            if _verified(path, name, file):
                return path
            _discard(path)  # hf_hub_download fetches it anew
        except errors.LocalEntryNotFoundError as error:
            cause = error.__cause__ or error
            if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code < 500:
                raise _failed(name, file, cause) from None
            raise _Absent(
                f"{name}: {file} is not in the cache and the hub cannot be reached ({_first_line(cause)}); "
                "connect, or give a folder"
            ) from None
        except errors.EntryNotFoundError:
            raise _Absent(f"{name}: the repository has no {file}") from None
        except errors.GatedRepoError:
            raise BadModelFile(
                f"{name}: gated; accept its terms at {constants.ENDPOINT}/{name} and log in with `hf auth login`"
            ) from None
        except errors.RevisionNotFoundError:
            raise BadModelFile(f"{name}: no revision {revision!r}") from None
        except errors.RepositoryNotFoundError:
            raise BadModelFile(
                f"{name}: no such repository, or a private one: check the name, or log in with `hf auth login`"
            ) from None
        except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: Xet's
            raise _failed(name, file, error) from None
    raise BadModelFile(f"{name}: {file} arrived damaged twice (its hash is not the hub's); nothing was kept")


def _find(name: str, file: str, commit: str) -> Path | None:
    """The same for a file that may be absent: then None."""
    known = huggingface_hub.try_to_load_from_cache(name, file, revision=commit)
    if known is huggingface_hub._CACHED_NO_EXIST:
        return None
    try:
        return _fetch(name, file, commit)
    except _Absent:
        return None


def _verified(path: Path, name: str, file: str) -> bool:
    """Whether a cached file's bytes give its hash. A good result is remembered by size and time of change."""
    state = path.stat()
    seen = f"{state.st_size} {state.st_mtime_ns}"
    # The first link alone: the blob it names may itself link to a store that names files by Xet's hash.
    blob = path.readlink().name if path.is_symlink() else ""
    marker = Path(constants.HF_HUB_CACHE) / ".gemma2-verified" / (blob or f"{path.parent.name}-{file}")
    if marker.is_file() and marker.read_text() == seen:
        return True
    stated = blob or _asked(name, file, path.parent.name)
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
        marker.write_text(seen)
    return True


def _asked(name: str, file: str, commit: str) -> str:
    """The hash as the hub states it, for a cache without symlinks, whose files do not bear it; offline, nothing."""
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


def _failed(name: str, file: str, error: BaseException) -> BadModelFile:
    refused = isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403)
    cure = "; it takes a token with access: log in with `hf auth login`" if refused else ""
    return BadModelFile(f"{name}: {file} could not be downloaded ({_first_line(error)}){cure}")


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return SECRET.sub("***", line)[:200]
