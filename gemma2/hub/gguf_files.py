"""GGUF files of a repository: by path or by tag, and with all parts of a split one."""

from __future__ import annotations

import re
from pathlib import Path

from gemma2.errors import BadModelFile
from gemma2.hub.client import Repository
from gemma2.hub.holds import choice, is_gguf, named, split

TAG = re.compile(r"[\w.-]*")  # such as Q4_K_M


def download_gguf(name: str, file: str, revision: str | None = None) -> Path:
    """A repository's GGUF file, with all other parts of a split one beside it. `file` is its path in the repository, or
    a part of that path between dashes or dots, such as Q4_K_M, if one model alone has it (llama.cpp's shorthand).

    Raises:
        BadModelFile: as `download`; or a part that is missing, named so; or no file that is meant, with the names of
            those there are.
    """
    exact = file.endswith(".gguf")
    if not (is_gguf(file) if exact else TAG.fullmatch(file)):
        raise BadModelFile(
            f"{name}: {file!r:.200} is neither the path of a .gguf file inside a repository nor a tag such as Q4_K_M"
        )
    repository = Repository(name, revision)
    with named(repository):
        return _parts(repository, file if exact else _tagged(repository, file))


def _parts(repository: Repository, file: str) -> Path:
    """A GGUF file and, if it is one part of several, the others."""
    stem, count = split(file)
    others = [part for n in range(count) if (part := f"{stem}-{n + 1:05}-of-{count:05}.gguf") != file]
    if others:
        try:
            there = {*repository.listed()}
        except BadModelFile:  # then the cache may have all parts, or the first one fetched says what is wrong
            there = {file, *others}
        absent = [part for part in sorted([file, *others]) if part not in there]
        if 0 < len(absent) < count:  # known beforehand, an incomplete model costs no gigabytes
            raise BadModelFile(
                f"{repository.name}: {len(absent)} of {count} parts missing in the repository: {', '.join(absent[:5])}"
            )
    path = repository.fetch(file)
    for part in others:
        repository.fetch(part)
    return path


def _tagged(repository: Repository, tag: str) -> str:
    """The one GGUF file with this tag; of a split one, any part."""
    sizes = {file: size for file, size in repository.listed().items() if is_gguf(file)}
    has = re.compile(rf"(?:^|[-./]){re.escape(tag)}(?:[-./]|$)", re.IGNORECASE)
    fits = {file: sizes[file] for file in sizes if tag and has.search(split(file)[0])}
    models = {split(file) for file in fits}
    if len(models) == 1:
        return min(fits)
    why = f"{len(models) or 'no'} GGUF files are tagged {tag!r:.200}" if tag else "no GGUF file is named"
    raise BadModelFile(f"{repository.name}: {why}; {choice(repository.name, fits or sizes)}")
