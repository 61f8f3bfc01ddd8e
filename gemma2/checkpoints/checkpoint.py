"""A checkpoint on disk, whatever its format, opened and held against itself: its numbers, weights and words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma2.checkpoints import gguf, gguf_tokenizer, gguf_weights, google, safetensors
from gemma2.checkpoints.hf_config import read_config, read_json
from gemma2.checkpoints.weights import Weights, check_names, shapes_of
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile
from gemma2.tokenizer import Tokenizer

# GGUF has no key for `Checkpoint.chat_tuned`, so this project writes one, which other readers leave alone.
CHAT_TUNED = "gemma2.chat_tuned"


@dataclass(frozen=True)
class Checkpoint:
    """What `open_checkpoint` gives. No weight has been read yet.

    Attributes:
        path: the folder or file.
        form: "safetensors", "gguf" or "ckpt".
        chat_tuned: whether it says that it was tuned for chat; None when it says nothing.
        chat_template: the text of a chat template in it, passed on when converting and never run.
        notes: a line for everything that the file does not state and that was filled in.
    """

    path: Path
    form: str
    config: Gemma2Config
    weights: Weights
    tokenizer: Tokenizer
    chat_tuned: bool | None
    chat_template: str | None
    notes: tuple[str, ...] = ()


def open_checkpoint(path: Path, tokenizer: str | Path | Tokenizer | None = None) -> Checkpoint:
    """Open a folder or file. `tokenizer` takes the place of the one beside or inside it.

    Raises:
        BadModelFile: anything that is not exactly a Gemma 2 this program runs; says what, where, and the cure.
    """
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path, tokenizer)
    folder = path if path.is_dir() else path.parent
    stated = folder / "config.json"
    config = read_config(stated) if stated.is_file() else None
    weights: Weights
    if path.is_file() and path.suffix == ".ckpt":
        weights = google.GoogleWeights(path, config)
        config, form = weights.config, "ckpt"
    elif path.is_file() and path.suffix != ".safetensors":
        raise BadModelFile(
            f"{path}: give a folder, a .gguf, a .safetensors file or Google's .ckpt, not a {path.suffix!r} file"
        )
    elif config is None:
        raise BadModelFile(f"{folder}: no config.json, and the shapes and scales of a model are never guessed")
    else:
        form = "safetensors"
        weights = safetensors.open_folder(path) if path.is_dir() else safetensors.open_file(path)
    words = _checked(_given(tokenizer) or _beside(folder), config)
    return Checkpoint(path, form, config, weights, words, chat_tuned(folder, words), chat_template(folder))


def _open_gguf(path: Path, tokenizer: str | Path | Tokenizer | None) -> Checkpoint:
    header = gguf.read_parts(path)
    config, notes = gguf_weights.config_of(header)
    weights = gguf_weights.GGUFWeights(header)
    check_names(weights, shapes_of(config))  # milliseconds; a tokenizer of 256,000 pieces takes a second
    words = _given(tokenizer)
    if words is None:
        words, notes = gguf_tokenizer.build_tokenizer(header), notes + gguf_tokenizer.notes(header)
    template = header.metadata.get("tokenizer.chat_template")
    tuned = header.metadata.get(CHAT_TUNED)
    return Checkpoint(
        path,
        "gguf",
        config,
        weights,
        _checked(words, config),
        tuned.value if tuned is not None and tuned.type == "bool" else gguf_tokenizer.chat_tuned(header),
        template.value if template is not None and template.type == "str" else None,
        tuple(notes),
    )


def _given(tokenizer: str | Path | Tokenizer | None) -> Tokenizer | None:
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    path = Path(tokenizer)
    if not path.is_file():
        raise BadModelFile(f"{path}: no such file")
    return Tokenizer.from_file(path)


def _beside(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise BadModelFile(f"{path}: no such file; put the tokenizer.model there or name one with tokenizer=")
    return Tokenizer.from_file(path)


def _checked(words: Tokenizer, config: Gemma2Config) -> Tokenizer:
    if len(words) != config.vocab_size:
        raise BadModelFile(f"{words.where}: {len(words)} pieces, but the embedding has {config.vocab_size} rows")
    return words


def chat_tuned(folder: Path, words: Tokenizer) -> bool | None:
    """Google's -it checkpoints stop at <end_of_turn>; the pre-trained ones stop at <eos> alone."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    stated = read_json(path)
    stops = stated.get("eos_token_id") if isinstance(stated, dict) else None
    end = words.special.get("end_of_turn")
    return end is not None and end in (stops if isinstance(stops, list) else [stops])


def chat_template(folder: Path) -> str | None:
    """Newer folders have the template in a file of its own, older ones in the tokenizer's settings."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    path = folder / "tokenizer_config.json"
    stated = read_json(path) if path.is_file() else None
    template = stated.get("chat_template") if isinstance(stated, dict) else None
    return template if isinstance(template, str) else None
