"""A checkpoint on disk, whatever its format: its config, weights and tokenizer, opened and checked to fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma2.checkpoints import gguf, gguf_tokenizer, gguf_weights, google, safetensors
from gemma2.checkpoints.beside import chat_template, chat_tuned, end_ids, turn_notes
from gemma2.checkpoints.hf_config import read_config
from gemma2.checkpoints.vocabulary import check_vocabulary, parse_tokenizer, tokenizer_of
from gemma2.checkpoints.weights import Weights, check_names, shapes_of
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile
from gemma2.templates import NOT_GEMMAS, is_gemmas
from gemma2.tokenizer import Tokenizer

# GGUF has no key for `Checkpoint.chat_tuned`, so this project writes one, which other readers leave alone.
CHAT_TUNED = "gemma2.chat_tuned"


@dataclass(frozen=True)
class Checkpoint:
    """What `open_checkpoint` gives. No weight has been read yet.

    Attributes:
        path: the folder or file; for a model in memory a name for messages.
        form: "safetensors", "gguf", "ckpt" or "memory".
        chat_tuned: whether it says that it was tuned for chat; None when it says nothing.
        chat_template: the text of a chat template in it, passed on when converting and never run.
        notes: a line for everything that the file does not state and that was filled in.
        end_ids: ids at which the checkpoint says that a text ends, beside Gemma's own.
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


def open_checkpoint(path: Path, tokenizer: str | Path | Tokenizer | None = None) -> Checkpoint:
    """Open a folder or file. `tokenizer` takes the place of the one beside or inside it.

    Raises:
        BadModelFile: anything that is not exactly a Gemma 2 this program runs; says what, where, and the cure.
    """
    form = form_of(path)
    if form == "gguf":
        return _open_gguf(path, tokenizer)
    config = config_of(path)
    weights = weights_of(path, config)
    if isinstance(weights, google.GoogleWeights):
        config = weights.config
    assert config is not None  # as `config_of` says
    found = tokenizer_of(folder_of(path), tokenizer)
    check_vocabulary(found, config)
    folder = folder_of(path)
    tuned, template, ends = chat_tuned(folder, found), chat_template(folder), end_ids(folder, found)
    said = tuple(turn_notes(folder, found))
    return Checkpoint(path, form, config, weights, found, tuned, template, said, ends)


def form_of(path: Path) -> str:
    """ "gguf", "ckpt" or "safetensors", by the name. Raises BadModelFile for a file of another name."""
    if path.is_dir() or path.suffix == ".safetensors":
        return "safetensors"
    if path.suffix in (".gguf", ".ckpt"):
        return path.suffix[1:]
    raise BadModelFile(
        f"{path}: give a folder, a .gguf, a .safetensors file or Google's .ckpt, not a {path.suffix!r} file"
    )


def folder_of(path: Path) -> Path:
    """Where the small files of a checkpoint are that are not inside it."""
    return path if path.is_dir() else path.parent


def config_of(path: Path) -> Gemma2Config | None:
    """What the config.json of a folder, a `.safetensors` file or a `.ckpt` states; None for a `.ckpt` without one."""
    stated = folder_of(path) / "config.json"
    if stated.is_file():
        return read_config(stated)
    if path.suffix == ".ckpt" and path.is_file():
        return None
    raise BadModelFile(f"{stated.parent}: no config.json, and the shapes and scales of a model are never guessed")


def weights_of(path: Path, config: Gemma2Config | None) -> Weights:
    """The weights of a folder, a `.safetensors` file or a `.ckpt`, for which `config` is needed."""
    if path.is_dir():
        return safetensors.open_folder(path)
    return google.GoogleWeights(path, config) if path.suffix == ".ckpt" else safetensors.open_file(path)


def _open_gguf(path: Path, tokenizer: str | Path | Tokenizer | None) -> Checkpoint:
    header = gguf.read_parts(path)
    config, notes = gguf_weights.config_of(header)
    weights = gguf_weights.GGUFWeights(header)
    check_names(weights, shapes_of(config))  # milliseconds; a tokenizer of 256,000 pieces takes a second
    found = parse_tokenizer(tokenizer)
    if found is None:
        found, notes = gguf_tokenizer.build_tokenizer(header), notes + gguf_tokenizer.notes(header)
    check_vocabulary(found, config)
    template = gguf_tokenizer.chat_template(header)
    notes += [] if template is None or is_gemmas(template) else [NOT_GEMMAS]
    tuned = header.metadata.get(CHAT_TUNED)
    return Checkpoint(
        path,
        "gguf",
        config,
        weights,
        found,
        tuned.value if tuned is not None and tuned.type == "bool" else gguf_tokenizer.chat_tuned(header),
        template,
        tuple(notes),
    )
