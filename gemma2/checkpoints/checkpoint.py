"""A checkpoint on disk, whatever its format: its config, weights and tokenizer, opened and checked to fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gemma2.checkpoints import gguf, gguf_tokenizer, gguf_weights
from gemma2.checkpoints.beside import Turns, template_notes, turns_of, with_tokenizers
from gemma2.checkpoints.dtypes import FLOAT8
from gemma2.checkpoints.folder import PICKLED, PICKLED_INDEX, FileWeights, chosen, open_folder
from gemma2.checkpoints.foreign import (
    INSTEAD,
    quantization,
    refuse_broken_links,
    refuse_file,
    refuse_folder,
    refuse_foreign,
    refuse_names,
)
from gemma2.checkpoints.google import GoogleWeights
from gemma2.checkpoints.hf_config import MOST_JSON, TIED, config_and_notes, read_json
from gemma2.checkpoints.names import shown
from gemma2.checkpoints.pickled import PICKLE, ZIP, PickledFile, names_are_googles
from gemma2.checkpoints.safetensors import SHARD
from gemma2.checkpoints.safetensors_file import MOST_HEADER, SafetensorsFile
from gemma2.checkpoints.vocabulary import JSON, MODEL, Given, check_vocabulary, gguf_in, parse_tokenizer, tokenizer_of
from gemma2.checkpoints.weights import PlainWeights, Weights, check_names, shapes_of
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile
from gemma2.tied import EMBEDDING, HEAD
from gemma2.tokenizer import Tokenizer

# GGUF has no key for `Checkpoint.chat_tuned`, so this project writes one, which other readers leave alone.
CHAT_TUNED = "gemma2.chat_tuned"
CONFIG, ADAPTER = "config.json", "adapter_config.json"
TOKENIZERS = (MODEL, JSON)
TORCH = (".bin", ".pt", ".pth")  # how the names of PyTorch's files end; .ckpt is Google's


@dataclass(frozen=True)
class Checkpoint:
    """What `open_checkpoint` gives. No weight has been read yet.

    Attributes:
        path: the folder or file; for a model in memory a name for messages.
        form: "safetensors", "gguf", "ckpt", "bin" or "memory".
        chat_tuned: whether it says that it was tuned for chat; None when it says nothing.
        chat_template: the text of a chat template in it, passed on when converting and never run.
        notes: a line for everything that the file does not state and that was filled in.
        end_ids: ids at which the checkpoint says that a text ends, beside Gemma's own.
        companions: what its small files say for other programs, by the name of the file; passed on, never interpreted.
    """

    path: Path
    form: str
    config: Gemma2Config
    weights: Weights
    tokenizer: Tokenizer
    chat_tuned: bool | None
    chat_template: str | None
    notes: tuple[str, ...] = ()
    end_ids: frozenset[int] = frozenset()
    companions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class NamedTokenizer:
    """A tokenizer that is given in the place of a checkpoint's.

    Attributes:
        turns: what its folder or GGUF says about turns. None for one that was given ready, and for a file that holds a
            tokenizer and nothing else: then the checkpoint's own files say it.
        where: that folder or file.
    """

    tokenizer: Tokenizer
    turns: Turns | None = None
    where: str = ""


def named_tokenizer(given: Given) -> NamedTokenizer | None:
    """A given tokenizer, and what comes with it; None for None. Raises BadModelFile as `parse_tokenizer`."""
    found = parse_tokenizer(given)
    if found is None or isinstance(given, Tokenizer | None):
        return None if found is None else NamedTokenizer(found)
    path = Path(given).expanduser()
    header = gguf_in(path)
    if header is None and not path.is_dir():
        return NamedTokenizer(found)
    return NamedTokenizer(found, turns_of(path, found) if header is None else gguf_turns(header), str(given))


def open_checkpoint(path: Path, tokenizer: Given | NamedTokenizer = None) -> Checkpoint:
    """Open a folder or file. `tokenizer` takes the place of the one beside or inside it.

    Raises:
        BadModelFile: anything that is not exactly a Gemma 2 this program runs; says what, where, and the cure.
    """
    with naming_unreadable(path):
        form = form_of(path)
        named = tokenizer if isinstance(tokenizer, NamedTokenizer) else named_tokenizer(tokenizer)
        return _open_gguf(path, named) if form == "gguf" else _open_other(path, form, named)


@contextmanager
def naming_unreadable(path: Path) -> Iterator[None]:
    """Errors of the system while `path` is looked at become BadModelFile, with the name of the file meant."""
    try:
        yield
    except OSError as error:
        raise BadModelFile(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None


def form_of(path: Path) -> str:
    """ "gguf", "safetensors", "ckpt" (Google's) or "bin" (other files of PyTorch).

    The content decides. Where it begins like none of these formats, the name decides.

    Raises:
        BadModelFile: it is anything else; says what.
    """
    if path.is_dir():
        first = chosen(path)
        return "bin" if first is not None and first.name in (PICKLED, PICKLED_INDEX) else "safetensors"
    with path.open("rb") as file:
        head = file.read(9)
    ending = path.suffix.lower()
    if head.startswith(b"GGUF") or ending == ".gguf":  # nothing else is called so, and a damaged one is told best there
        return "gguf"
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= MOST_HEADER:
        return "safetensors"
    if head.startswith((ZIP, PICKLE)):
        return "ckpt" if ending == ".ckpt" or names_are_googles(path) else "bin"
    forms = {".safetensors": "safetensors", ".ckpt": "ckpt"} | dict.fromkeys(TORCH, "bin")
    return forms.get(ending) or refuse_file(path)


def folder_of(path: Path) -> Path:
    """Where the small files of a checkpoint are that are not inside it."""
    return path if path.is_dir() else path.parent


def stated_config(path: Path) -> tuple[Gemma2Config | None, tuple[str, ...]]:
    """What the config.json of a folder or file states, and a line for what was filled in; None for a `.ckpt` without
    one, which has the config of the published model of its shape."""
    stated = folder_of(path) / CONFIG
    refuse_broken_links([stated])
    if stated.is_file():
        return config_and_notes(stated)
    if not path.is_dir() and form_of(path) == "ckpt":
        return None, ()
    if path.is_dir() or path.name.startswith("adapter_model."):
        refuse_folder(folder_of(path))
    raise BadModelFile(
        f"{stated.parent}: no config.json, and the shapes and scales of a model are never guessed{_ggufs(path)}"
    )


def weights_of(path: Path, config: Gemma2Config | None) -> PlainWeights:
    """The weights of a folder, a `.safetensors` file or a PyTorch file.

    Args:
        config: needed for Google's `.ckpt`.
    """
    form = form_of(path)
    if path.is_dir():
        weights: PlainWeights = open_folder(path)
    elif form == "ckpt":
        weights = GoogleWeights(path, config)
    else:
        weights = FileWeights([PickledFile(path) if form == "bin" else SafetensorsFile(path)], str(path))
    stated = folder_of(path) / CONFIG
    read = read_json(stated, MOST_JSON) if stated.is_file() else {}
    raw = read if isinstance(read, dict) else {}
    if config is None or not _fits(weights, config):
        shard = None if path.is_dir() else SHARD.fullmatch(path.name)
        if shard:
            raise BadModelFile(
                f"{path}: one of the {int(shard[2])} shards of a model: give their folder, {path.parent}"
            )
        refuse_names([weights.in_file(name) for name in weights.tensors], weights.where, raw)
    if raw.get(TIED) is False:
        if weights.in_file(EMBEDDING).endswith(HEAD):
            raise BadModelFile(
                f"{stated}: {TIED} is False, and only {HEAD} is stored, not {EMBEDDING}: if the model was tied when it "
                "was saved, change that to true"
            )
        if HEAD not in weights.tensors:
            raise BadModelFile(f"{stated}: {TIED} is False, and no {HEAD} is stored: Gemma 2's head is the embedding")
        weights.notes += (f"{stated} says {TIED} false: the head is read as the embedding, which it must equal",)
    named = raw.get("transformers_weights") if path.is_dir() else None
    if named is not None and named != getattr(chosen(path), "name", None):
        raise BadModelFile(f"{stated}: transformers_weights names {named!r:.100} as the weights: give that file itself")
    if path.is_dir() and (path / ADAPTER).is_file():
        weights.notes += (f"{path / ADAPTER} is beside whole weights: they were read without an adapter",)
    how = quantization(raw)
    weights.notes += tuple(_unusual_dtypes(weights, how))
    if how:
        weights.notes += (f"{stated} says quantized by {how}, but the tensors are plain: they were read as they are",)
    return weights


def _unusual_dtypes(weights: PlainWeights, quantized: str) -> Iterator[str]:
    """A line for dtypes in which few checkpoints are. `quantized` is by what the config says that it was quantized."""
    eight = sum(dtype in FLOAT8.values() for _, dtype in weights.tensors.values())
    if eight and quantized:
        raise BadModelFile(
            f"{weights.where}: float8 (FP8) without scales, where its config says quantized by {quantized}: {INSTEAD}"
        )
    if eight:
        yield f"{weights.where} holds {eight} tensors of float8 (FP8) and no scales: they were read as they are"
    wide = [name for name, (_, dtype) in weights.tensors.items() if dtype == torch.float64]
    if wide and EMBEDDING not in wide:
        named = ", ".join(shown(weights.in_file(name)) for name in wide[:3])
        yield f"{weights.where}: {len(wide)} tensors are float64 ({named}), and run in the dtype of the embedding"


def tokenizer_for(folder: Path, named: NamedTokenizer | None) -> Tokenizer:
    """The tokenizer that is given, or else the one in a folder, which must not be a pointer or a page instead."""
    if named is not None:
        return named.tokenizer
    for name in TOKENIZERS:
        if (folder / name).is_file():
            refuse_foreign(folder / name, kind="tokenizer")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        refuse_broken_links(folder / name for name in TOKENIZERS)
    return tokenizer_of(folder)


def turns_for(own: Turns, named: NamedTokenizer | None, tokenizer: Tokenizer, rows: int) -> Turns:
    """What a checkpoint of so many rows says about turns, with what a given tokenizer brings, and all notes on it."""
    brought = None if named is None else named.turns
    if named is not None and brought is not None:
        own = with_tokenizers(own, brought, named.where, tokenizer, rows)
    return replace(own, notes=own.notes + template_notes(own.chat_template))


def _open_other(path: Path, form: str, named: NamedTokenizer | None) -> Checkpoint:
    config, notes = stated_config(path)
    weights = weights_of(path, config)
    if isinstance(weights, GoogleWeights):
        config = weights.config
    assert config is not None  # as `stated_config` says
    folder = folder_of(path)
    found = check_vocabulary(tokenizer_for(folder, named), config)
    turns = turns_for(turns_of(folder, found), named, found, config.vocab_size)
    return _checkpoint(path, form, config, weights, found, turns, (*notes, *weights.notes))


def _checkpoint(
    path: Path,
    form: str,
    config: Gemma2Config,
    weights: Weights,
    tokenizer: Tokenizer,
    turns: Turns,
    notes: Iterable[str],
) -> Checkpoint:
    return Checkpoint(
        path,
        form,
        config,
        weights,
        tokenizer,
        turns.chat_tuned,
        turns.chat_template,
        (*notes, *tokenizer.notes, *turns.notes),
        turns.end_ids,
        turns.companions,
    )


def _fits(weights: PlainWeights, config: Gemma2Config) -> bool:
    try:
        check_names(weights, shapes_of(config))
    except BadModelFile:
        return False
    return True


def _ggufs(path: Path) -> str:
    held = sorted(file.name for kind in ("gguf", "ckpt") for file in folder_of(path).glob(f"*.{kind}"))
    return f"; it holds {', '.join(held[:3])}: give that file itself" if held and path.is_dir() else ""


def _open_gguf(path: Path, named: NamedTokenizer | None) -> Checkpoint:
    header = gguf.read_parts(path)
    config, notes = gguf_weights.config_of(header)
    weights = gguf_weights.GGUFWeights(header)
    check_names(weights, shapes_of(config))  # milliseconds; a tokenizer of 256,000 pieces takes a second
    if named is None:
        found, notes = gguf_tokenizer.build_tokenizer(header), notes + gguf_tokenizer.notes(header)
    else:
        found = named.tokenizer
    found = check_vocabulary(found, config)
    turns = turns_for(gguf_turns(header), named, found, config.vocab_size)
    return _checkpoint(path, "gguf", config, weights, found, turns, notes)


def gguf_turns(header: gguf.GGUF) -> Turns:
    """What a GGUF says about turns."""
    stated = header.metadata.get(CHAT_TUNED)
    tuned = stated.value if stated is not None and stated.type == "bool" else gguf_tokenizer.chat_tuned(header)
    return Turns(tuned, gguf_tokenizer.chat_template(header), gguf_tokenizer.end_ids(header))
