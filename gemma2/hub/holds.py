"""What a repository holds when it does not hold what was asked for, and how to get a model from it all the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma2.checkpoints.foreign import INSTEAD, quantization
from gemma2.checkpoints.gguf import PART
from gemma2.checkpoints.hf_config import read_config, read_json
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile
from gemma2.hub.client import Absent, NoRepository, Repository, Unfit, Unreached, is_plain

ADAPTER = "adapter_config.json"
MOST_NAMES = 20  # files in one message
PLAIN_BYTES = 1.9  # of a parameter at least, if it is not quantized: two
# Files of other programs: what they are, and the endings of their names.
OTHER_KINDS = {
    "Keras": (".keras", ".h5"),
    "Flax": (".msgpack",),
    "ONNX": (".onnx",),
    "LiteRT": (".tflite", ".task", ".litertlm"),
    "gemma.cpp": (".sbs",),
    "PyTorch": (".bin", ".pt", ".pth"),
}
READ = (".safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json")  # endings of what could be loaded


@contextlib.contextmanager
def named(repository: Repository) -> Iterator[None]:
    """Adds to an error about a file that is absent what the repository, or the cache of it, holds instead."""
    try:
        yield
    except Absent as absent:
        cached = isinstance(absent, Unreached)
        try:
            files = repository.cached() if cached else repository.listed()
        except BadModelFile:
            raise absent from None
        ways = _ways(repository, files, " of the cache" if cached else "")
        if not ways and not isinstance(absent, Unfit):
            ways = _other(repository.name, files)
        link = ", or " if cached else "; "
        raise (BadModelFile(f"{absent}{link}{', or '.join(ways)}") if ways else absent) from None
    except NoRepository as error:
        kind = repository.kind()
        raise (BadModelFile(f"{repository.name}: a {kind} of the hub, not a model") if kind else error) from None


def check_config(repository: Repository, path: Path) -> None:
    """Refuse a repository by its config.json, before gigabytes of weights come.

    Raises:
        Unfit: it is quantized, a classifier, or what `read_config` refuses.
    """
    where = f"{repository.name}/{path.name}"
    try:
        raw = read_json(path)
        config = read_config(raw, where)
        if other := classifier(raw):
            raise BadModelFile(f"{where}: {other}")
        if (how := quantization(raw)) and _is_small(repository, config):
            raise BadModelFile(f"{where}: quantized by {how}, which is not read: {INSTEAD}")
    except BadModelFile as error:
        raise Unfit(str(error)) from None


def classifier(raw: Mapping[str, Any]) -> str:
    """What a parsed config.json says that the model is, if it is a classifier."""
    stated = raw.get("architectures")
    for name in stated if isinstance(stated, list) else []:
        if isinstance(name, str) and name.endswith("Classification") and name.isprintable():
            return f"a classifier ({name:.60}), which has no language head: use transformers for it"
    return ""


def _is_small(repository: Repository, config: Gemma2Config) -> bool:
    """Whether the weights have fewer bytes than plain ones would. Some plain models keep the config of their base."""
    try:
        files = repository.listed()
    except BadModelFile:  # then the tensors will say it
        return False
    size = sum(size for file, size in files.items() if file.endswith((".safetensors", ".bin")) and "/" not in file)
    return 0 < size < PLAIN_BYTES * config.parameter_count


def adapter_base(repository: Repository) -> str | None:
    """The name of the model that a repository's PEFT adapter was made for, if it is stated."""
    try:
        path = repository.find(ADAPTER)
        stated = read_json(path) if path else None
    except BadModelFile:
        return None
    base = stated.get("base_model_name_or_path") if isinstance(stated, dict) else None
    return base if isinstance(base, str) and base.isprintable() and 0 < len(base) <= 200 else None


def _ways(repository: Repository, files: Mapping[str, int], where: str) -> list[str]:
    """How to get a model from what is among `files`."""
    name, ways = repository.name, []
    if ADAPTER in files:
        base = adapter_base(repository)
        of = f" of {base}" if base else ""
        ways.append(f"it is a PEFT adapter{of}: gemma2.load({base or 'BASE'!r}, adapter={name!r})")
    ggufs = {file: size for file, size in files.items() if is_gguf(file)}
    if ggufs:
        ways.append(choice(name, ggufs, where))
    return ways


def _other(name: str, files: Mapping[str, int]) -> list[str]:
    """What kind of other program's files these are, and what to do, if nothing among them can be read."""
    if any(file.endswith(READ) for file in files):
        return []
    google = sorted(file for file in files if file.endswith(".ckpt"))
    if google:
        return [f"it holds {google[0]:.100}: download it with `hf download {name}` and give the path of that file"]
    for kind, endings in OTHER_KINDS.items():
        found = sorted(file for file in files if file.endswith(endings))
        if found:
            return [
                f"it holds {kind} files ({found[0]:.100}), which are not read: take a repository with safetensors or "
                "GGUF files"
            ]
    return []


def split(file: str) -> tuple[str, int]:
    """A GGUF file's path without its ending and, for one part of several, without its number; and how many there are,
    0 for a file that is no part."""
    if found := PART.fullmatch(file):
        stem, number, count = found["stem"], int(found["number"]), int(found["count"])
        if 1 <= number <= count and file == f"{stem}-{number:05}-of-{count:05}.gguf":
            return stem, count
    return file.removesuffix(".gguf"), 0


def is_gguf(file: str) -> bool:
    """Whether this is a path down from a repository's root to a GGUF file."""
    return file.endswith(".gguf") and is_plain(file) and file.split("/")[-1] != ".gguf"


def choice(name: str, sizes: Mapping[str, int], where: str = "") -> str:
    """For a message: the GGUF files, each split one once, and how to choose one of them."""
    models: dict[tuple[str, int], list[str]] = {}
    for file in sorted(sizes):
        models.setdefault(split(file), []).append(file)
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
