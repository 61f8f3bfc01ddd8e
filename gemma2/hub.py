"""Names to verified local files, through huggingface_hub: its cache, its resume, its progress bars.

The hub client does not hash what it downloads, so this module does: the cache names every blob by its hash (sha256
for large files, git's sha1 for small ones), and a blob whose bytes do not give its name is deleted and fetched anew.
"""

from __future__ import annotations

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


def download(name: str, revision: str | None = None) -> Path:
    """The folder with the checkpoint's files, downloaded as far as they are not in the cache yet.

    Raises:
        BadModelFile: no such repository, no access, offline with an incomplete cache, or damaged downloads; one line
            that says what to do.
    """
    for file in NEEDED:
        found = _fetch(name, file, revision)
    for file in OPTIONAL:
        _fetch(name, file, revision, required=False)
    if index := _fetch(name, INDEX, revision, required=False):
        for shard in shard_names(read_json(index), f"{name}/{INDEX}"):
            _fetch(name, shard, revision)
    else:
        _fetch(name, SINGLE, revision)
    return found.parent


def _fetch(name: str, file: str, revision: str | None, required: bool = True) -> Path:
    """One verified file of the cache; an empty path when it is optional and the repository has none."""
    for attempt in range(2):
        try:
            path = Path(huggingface_hub.hf_hub_download(name, file, revision=revision))
        except errors.EntryNotFoundError as error:
            offline = isinstance(error, errors.LocalEntryNotFoundError)
            if not required:
                return Path()
            if offline:
                raise BadModelFile(
                    f"{name}: {file} is not in the cache and the hub cannot be reached; connect, or give a folder"
                ) from None
            raise BadModelFile(f"{name}: the repository has no {file}") from None
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
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            raise BadModelFile(f"{name}: {file} could not be downloaded ({_first_line(error)})") from None
        if _verified(path):
            return path
        path.resolve().unlink()  # the blob; hf_hub_download fetches it anew
        if attempt == 0:
            path.unlink(missing_ok=True)
    raise BadModelFile(f"{name}: {file} arrived damaged twice (its hash is not the hub's); nothing was kept")


def _verified(path: Path) -> bool:
    """Whether a cached file's bytes give its blob's name. A good result is remembered by size and time of change."""
    blob = path.resolve()
    state = blob.stat()
    seen = f"{state.st_size} {state.st_mtime_ns}"
    marker = Path(constants.HF_HUB_CACHE) / ".gemma2-verified" / blob.name
    if marker.is_file() and marker.read_text() == seen:
        return True
    if SHA256.fullmatch(blob.name):
        digest = hashlib.sha256()
    elif SHA1.fullmatch(blob.name):
        digest = hashlib.sha1(b"blob %d\0" % state.st_size, usedforsecurity=False)
    else:
        return True  # a server that gives no hash: nothing to compare with
    with (
        blob.open("rb") as file,
        tqdm(total=state.st_size, desc="verifying", unit="B", unit_scale=True, leave=False, disable=None) as bar,
    ):
        while part := file.read(2**22):
            digest.update(part)
            bar.update(len(part))
    if digest.hexdigest() != blob.name:
        return False
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(seen)
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
