"""Names to verified local files, through huggingface_hub: its cache, its resume, its progress bars.

The hub client does not hash what it downloads, so this module does: the cache names every blob by its hash (sha256
for large files, git's sha1 for small ones), and a blob whose bytes do not give its name is deleted and fetched anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors
from tqdm import tqdm

from gemma2.checkpoints.gguf import PART
from gemma2.checkpoints.hf_config import read_json
from gemma2.checkpoints.safetensors import INDEX, SINGLE, shard_names
from gemma2.errors import BadModelFile, first_line

NEEDED = ("config.json", "tokenizer.model")
# Whether it was tuned for chat; and its template, which is passed on when converting and never run.
OPTIONAL = ("generation_config.json", "chat_template.jinja", "tokenizer_config.json")
TAG = re.compile(r"[\w.-]*")  # such as Q4_K_M
MOST_NAMES, MOST_PATH = 20, 1000  # files in one message; characters
SHA256, SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
SECRET = re.compile(r"Bearer [^'\"]*|hf_\w+")
HTTPError = errors.HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2, whichever the client uses


class _Absent(BadModelFile):
    """A file that the repository does not have or, when the hub cannot be reached, the cache."""


class _Unreached(_Absent):
    """A file that is not in the cache while the hub cannot be reached, so nobody knows whether it exists."""


def download(name: str, revision: str | None = None) -> Path:
    """The folder with the checkpoint's files, downloaded as far as they are not in the cache yet.

    Raises:
        BadModelFile: no such repository, no access, offline with an incomplete cache, or damaged downloads; one line
            that says what to do. If the repository has GGUF files instead, it names them.
    """
    try:
        return _checkpoint(name, revision)
    except _Absent as absent:
        raise _with_choice(absent, name, revision) from None


def download_gguf(name: str, file: str, revision: str | None = None) -> Path:
    """A repository's GGUF file, with all other parts of a split one beside it. `file` is its path in the repository, or
    a part of that path between dashes or dots, such as Q4_K_M, if one model alone has it (llama.cpp's shorthand).

    Raises:
        BadModelFile: as `download`; or a part that is missing, named so; or no file that is meant, with the names of
            those there are.
    """
    exact = file.endswith(".gguf")
    if not (_plain(file) if exact else TAG.fullmatch(file)):
        raise BadModelFile(
            f"{name}: {file!r:.200} is neither the path of a .gguf file inside a repository nor a tag such as Q4_K_M"
        )
    try:
        return _parts(name, file if exact else _tagged(name, file, revision), revision)
    except _Absent as absent:
        raise _with_choice(absent, name, revision) from None


def _checkpoint(name: str, revision: str | None) -> Path:
    """The files of a Hugging Face folder."""
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


def _parts(name: str, file: str, revision: str | None) -> Path:
    """A GGUF file and, if it is one part of several, the others; all of one commit."""
    stem, count = _split(file)
    others = [part for n in range(count) if (part := f"{stem}-{n + 1:05}-of-{count:05}.gguf") != file]
    if others:
        try:
            there = {*_listed(name, revision)}
        except BadModelFile:  # then the cache may have all parts, or the first one fetched says what is wrong
            there = {file, *others}
        absent = [part for part in sorted([file, *others]) if part not in there]
        if 0 < len(absent) < count:  # known beforehand, an incomplete model costs no gigabytes
            raise BadModelFile(
                f"{name}: {len(absent)} of {count} parts missing in the repository: {', '.join(absent[:5])}"
            )
    path = _fetch(name, file, revision)
    for part in others:
        _fetch(name, part, _commit(path, file))
    return path


def _tagged(name: str, tag: str, revision: str | None) -> str:
    """The one GGUF file with this tag; of a split one, any part."""
    sizes = _listed(name, revision)
    has = re.compile(rf"(?:^|[-./]){re.escape(tag)}(?:[-./]|$)", re.IGNORECASE)
    fits = {file: sizes[file] for file in sizes if tag and has.search(_split(file)[0])}
    models = {_split(file) for file in fits}
    if len(models) == 1:
        return min(fits)
    why = f"{len(models) or 'no'} GGUF files are tagged {tag!r:.200}" if tag else "no GGUF file is named"
    raise BadModelFile(f"{name}: {why}; {_choice(name, fits or sizes)}")


def _split(file: str) -> tuple[str, int]:
    """A GGUF file's path without its ending and, for one part of several, without its number; and how many there are,
    0 for a file that is no part."""
    if named := PART.fullmatch(file):
        stem, number, count = named["stem"], int(named["number"]), int(named["count"])
        if 1 <= number <= count and file == f"{stem}-{number:05}-of-{count:05}.gguf":
            return stem, count
    return file.removesuffix(".gguf"), 0


def _plain(file: str) -> bool:
    """Whether this is a path down from a repository's root to a GGUF file. It comes from outside."""
    steps = file.split("/")
    return (
        file.endswith(".gguf")
        and len(file) <= MOST_PATH
        and file.isprintable()
        and not {"\\", ":"} & {*file}
        and all(step.strip(". ") for step in steps)
        and steps[-1] != ".gguf"
    )


def _listed(name: str, revision: str | None) -> dict[str, int]:
    """The repository's GGUF files and how many bytes they have, 0 if it does not say."""
    with _explained(name, "list of files", revision):
        try:
            info = huggingface_hub.HfApi().model_info(
                name, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
            return {file.rfilename: file.size or 0 for file in info.siblings or [] if _plain(file.rfilename)}
        except (HTTPError, OSError) as error:
            if _answered(error):
                raise
            raise errors.LocalEntryNotFoundError(str(error)) from error  # as the client does for a file
        except (KeyError, TypeError, AttributeError):
            raise ValueError("the answer is not in the hub's format") from None


def _cached(name: str, revision: str | None) -> dict[str, int]:
    """The repository's GGUF files that are in the cache already, and how many bytes they have."""
    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
    except (OSError, ValueError) as error:
        folder = getattr(error, "snapshot_path", "")  # of a snapshot that is known to be incomplete
    files = [path for path in Path(folder).rglob("*.gguf") if path.is_file()] if folder else []
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _with_choice(absent: _Absent, name: str, revision: str | None) -> BadModelFile:
    """The error `absent`, and with it the GGUF files that can be chosen instead."""
    if isinstance(absent, _Unreached):
        cached = _cached(name, revision)
        return BadModelFile(f"{absent}, or {_choice(name, cached, ' of the cache')}") if cached else absent
    try:
        sizes = _listed(name, revision)
    except BadModelFile:
        return absent
    return BadModelFile(f"{absent}; {_choice(name, sizes)}") if sizes else absent


def _choice(name: str, sizes: Mapping[str, int], where: str = "") -> str:
    """For a message: the GGUF files, each split one once, and how to choose one of them."""
    models: dict[tuple[str, int], list[str]] = {}
    for file in sorted(sizes):
        models.setdefault(_split(file), []).append(file)
    shown = []
    for (_, count), files in list(models.items())[:MOST_NAMES]:
        size = sum(sizes[file] for file in files)
        parts = f"{count} parts" if count == len(files) else f"{len(files)} of {count} parts" if count else ""
        bulk = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB" if size else ""
        about = ", ".join(filter(None, [parts, bulk]))
        shown.append(f"{files[0]} ({about})" if about else files[0])
    if not shown:
        return "the repository has no GGUF files"
    more = f" and {len(models) - MOST_NAMES} more" if len(models) > MOST_NAMES else ""
    return f"choose one{where} as {name}:FILE.gguf: {', '.join(shown)}{more}"


def _fetch(name: str, file: str, revision: str | None) -> Path:
    """One verified file of the cache."""
    for _ in range(2):
        with _explained(name, file, revision):
            path = Path(huggingface_hub.hf_hub_download(name, file, revision=revision))
            if _verified(path, name, file):
                return path
            _discard(path)  # hf_hub_download fetches it anew
    raise BadModelFile(f"{name}: {file} arrived damaged twice (its hash is not the hub's); nothing was kept")


@contextlib.contextmanager
def _explained(name: str, file: str, revision: str | None) -> Iterator[None]:
    """Turns what the client raises into one line that says what to do."""
    try:
        yield
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        if _answered(cause):
            raise _failed(name, file, cause) from None
        raise _Unreached(
            f"{name}: {file} is not in the cache and the hub cannot be reached ({_without_secrets(cause)}); "
            "connect, or give a folder or a file"
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


def _find(name: str, file: str, commit: str) -> Path | None:
    """One verified file of the cache, as from `_fetch`; None where the repository does not have it."""
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
    commit = _commit(path, file)
    marker = Path(constants.HF_HUB_CACHE) / ".gemma2-verified" / (blob or f"{commit}-{file}")
    if marker.is_file() and marker.read_text() == seen:
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
        marker.write_text(seen)
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
    return isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500


def _failed(name: str, file: str, error: BaseException) -> BadModelFile:
    refused = isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403)
    cure = "; it takes a token with access: log in with `hf auth login`" if refused else ""
    return BadModelFile(f"{name}: {file} could not be downloaded ({_without_secrets(error)}){cure}")


def _without_secrets(error: BaseException) -> str:
    """The first line of an error, without the access tokens that one of the hub client may quote."""
    return SECRET.sub("***", first_line(error))
