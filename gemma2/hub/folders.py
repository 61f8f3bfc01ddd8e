"""Folders of a repository: a Hugging Face checkpoint, the files of a tokenizer, a PEFT adapter."""

from __future__ import annotations

from pathlib import Path

from gemma2.checkpoints.hf_config import read_json
from gemma2.checkpoints.safetensors import INDEX, SINGLE, shard_names
from gemma2.hub.client import Absent, Repository, Unreached
from gemma2.hub.holds import ADAPTER, check_config, named

CONFIG = "config.json"
PIECES = ("tokenizer.json", "tokenizer.model")  # either is enough
ADDED = ("added_tokens.json", "special_tokens_map.json")
# Whether it was tuned for chat and where its texts end; and its template, which is passed on and never run.
ABOUT_CHAT = (
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/default.jinja",
)
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def download(name: str, revision: str | None = None, *, tokenizer_given: bool = False) -> Path:
    """The folder with the checkpoint's files, downloaded as far as they are not in the cache yet. Of the weights, those
    are taken that transformers takes.

    Args:
        tokenizer_given: the files of its tokenizer are not wanted.
    Raises:
        BadModelFile: no such repository, no access, offline with an incomplete cache, damaged downloads, or a config
            that is not a Gemma 2's; one line that says what to do. If the repository holds something else, it is named.
    """
    repository = Repository(name, revision)
    with named(repository):
        config = repository.fetch(CONFIG)
        check_config(repository, config)
        if not tokenizer_given:
            _fetch_tokenizer(repository, "; a tokenizer can be given with tokenizer=")
        for file in ABOUT_CHAT:
            repository.find(file)
        _fetch_weights(repository)
    return config.parent


def download_tokenizer(name: str, revision: str | None = None) -> Path:
    """A folder with the files of a repository's tokenizer, and of what it says about chat, and no weights.

    Raises BadModelFile as `download`.
    """
    repository = Repository(name, revision)
    with named(repository):
        folder = _fetch_tokenizer(repository)
        for file in ABOUT_CHAT:
            repository.find(file)
    return folder


def download_adapter(name: str, revision: str | None = None, *, tokenizer_given: bool = False) -> Path:
    """A folder with a repository's PEFT adapter, and with its tokenizer where it has one and none is given. Raises
    BadModelFile as `download`."""
    repository = Repository(name, revision)
    with named(repository):
        folder = repository.fetch(ADAPTER).parent
        _first(repository, ADAPTER_WEIGHTS)
        for file in () if tokenizer_given else (*PIECES, *ADDED, *ABOUT_CHAT):
            repository.find(file)
    return folder


def _fetch_tokenizer(repository: Repository, cure: str = "") -> Path:
    """The files of the tokenizer, both kinds where both are there; gives their folder."""
    folder = _first(repository, PIECES, cure).parent
    for file in (*PIECES[1:], *ADDED):
        repository.find(file)
    return folder


def _fetch_weights(repository: Repository) -> None:
    """The weights, in transformers' order; none that it would not read."""
    missing: list[Absent] = []
    for single, index, ending in ((SINGLE, INDEX, ".safetensors"), (PICKLE, PICKLE_INDEX, ".bin")):
        for file in (single, index):
            try:
                found = repository.fetch(file)
            except Absent as error:
                missing.append(error)
                continue
            if file == index:
                for shard in shard_names(read_json(found), f"{repository.name}/{index}", ending):
                    repository.fetch(shard)
            return
    raise next((error for error in missing if isinstance(error, Unreached)), missing[0])


def _first(repository: Repository, files: tuple[str, str], cure: str = "") -> Path:
    """The first of two files that is there. `cure` is for the error where neither is."""
    missing: list[Absent] = []
    for file in files:
        try:
            return repository.fetch(file)
        except Absent as error:
            missing.append(error)
    neither, name = f"neither {' nor '.join(files)}", repository.name
    unreached = [error for error in missing if isinstance(error, Unreached)]
    if len(unreached) == len(files):
        raise Unreached(name, f"{neither} is", unreached[0].why, f"connect, or give a folder or a file{cure}")
    raise unreached[0] if unreached else Absent(f"{name}: the repository has {neither}{cure}")
