"""What a checkpoint is, what it states and leaves out, and everything that is wrong with it; nothing is guessed.

Header, names, shapes and tokenizer are always checked; values only on request, since that reads the whole file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from gemma2.checkpoints import gguf, gguf_tokenizer, gguf_weights
from gemma2.checkpoints.beside import chat_template, turns_of
from gemma2.checkpoints.checkpoint import (
    NamedTokenizer,
    folder_of,
    form_of,
    gguf_turns,
    named_tokenizer,
    naming_unreadable,
    stated_config,
    tokenizer_for,
    turns_for,
    weights_of,
)
from gemma2.checkpoints.dtypes import RUNNABLE
from gemma2.checkpoints.gguf_weights import GGUFWeights
from gemma2.checkpoints.google import GoogleWeights
from gemma2.checkpoints.hf_config import PUBLISHED, config_dict, published_config
from gemma2.checkpoints.neutral import neutral
from gemma2.checkpoints.vocabulary import check_vocabulary
from gemma2.checkpoints.weights import PlainWeights, Weights, check_names, count_nonfinite, shapes_of
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile
from gemma2.load import locate, locate_tokenizer
from gemma2.tokenizer import Tokenizer

SHOWN = 3  # elements of an array
T = TypeVar("T")


@dataclass(frozen=True)
class TensorLine:
    """One tensor as the file has it."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int

    @property
    def parameters(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass
class Inspection:
    """What `inspect` found. Sizes are in bytes.

    Attributes:
        model: the published model whose shape this is, or None.
        metadata: what the file states: key -> (type, value), arrays cut to their length and first elements.
        filled: a line for everything that the file leaves out and that was filled in, and why.
        end_ids: ids at which the files of a folder say that a text ends.
        memory: dtype -> weights, and the cache of one row at full context.
        problems: why the file cannot be loaded; none if it can.
    """

    path: str
    form: str
    bytes: int
    version: int | None = None
    architecture: str | None = None
    model: str | None = None
    chat_tuned: bool | None = None
    end_ids: list[int] = field(default_factory=list)
    config: dict[str, Any] | None = None
    metadata: dict[str, tuple[str, Any]] = field(default_factory=dict)
    filled: list[str] = field(default_factory=list)
    tensors: list[TensorLine] = field(default_factory=list)
    tokenizer: dict[str, Any] | None = None
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    values_checked: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def types(self) -> dict[str, dict[str, float]]:
        """Type -> tensors, parameters, bytes and bits per weight, the largest first."""
        found: dict[str, dict[str, float]] = {}
        for tensor in self.tensors:
            line = found.setdefault(tensor.type, {"tensors": 0, "parameters": 0, "bytes": 0})
            line["tensors"] += 1
            line["parameters"] += tensor.parameters
            line["bytes"] += tensor.bytes
        for line in found.values():
            line["bits_per_weight"] = round(8 * line["bytes"] / line["parameters"], 4)
        return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))

    def to_dict(self, tensors: bool = False) -> dict[str, Any]:
        """For machines: everything, the list of tensors only when asked for."""
        plain = dataclasses.asdict(self)
        listed = plain.pop("tensors")
        plain |= {"parameters": self.parameters, "types": self.types}
        return plain | ({"tensors": listed} if tensors else {})


@neutral
def inspect(
    source: str | Path | None,
    *,
    values: bool = False,
    tokenizer: str | Path | Tokenizer | None = None,
    revision: str | None = None,
    progress: bool | None = None,
) -> Inspection:
    """Check a folder or file as `load` does, but report all problems where `load` stops at the first.

    Args:
        source, tokenizer, revision, progress: as in `load`.
        values: also read every weight, and count those that are not finite.
    Raises:
        BadModelFile: nothing can be said about it at all: not there, or its header is damaged.
    """
    tokenizer = locate_tokenizer(tokenizer)
    path = locate(source, revision, tokenizer_given=tokenizer is not None)
    try:
        with naming_unreadable(path):
            form = form_of(path)
    except BadModelFile as error:  # then there is no more to say
        return Inspection(str(path), path.suffix[1:], path.lstat().st_size, problems=[_reason(error, path)])
    found, weights = _inspect_gguf(path, tokenizer) if form == "gguf" else _inspect_other(path, form, tokenizer)
    if weights is not None and values and not found.problems:
        bad = count_nonfinite(weights, progress=progress)
        for name, count in bad.items():
            found.problems.append(f"{weights.in_file(name)}: {count:,} values are NaN or infinite")
        found.values_checked = True
    return found


def _inspect_gguf(path: Path, tokenizer: Path | Tokenizer | None) -> tuple[Inspection, Weights | None]:
    header = gguf.read_parts(path)
    stated = header.metadata.get("general.architecture")
    found = Inspection(str(path), "gguf", header.bytes, header.version)
    found.architecture = str(stated.value) if stated is not None else None
    found.metadata = {key: (value.type, _shortened(value.value)) for key, value in header.metadata.items()}
    found.tensors = [TensorLine(name, info.shape, info.type.name, info.bytes) for name, info in header.tensors.items()]
    weights: Weights | None = None
    config: Gemma2Config | None = None
    try:
        config, found.filled = gguf_weights.config_of(header)
    except BadModelFile as error:
        found.problems.append(_reason(error, path))
        if found.architecture != gguf_weights.ARCHITECTURE:
            return found, None  # another model: what it lacks of a Gemma 2 is no news
    try:
        weights = GGUFWeights(header)
    except BadModelFile as error:
        found.problems.append(_reason(error, path))
    found_tokenizer: Tokenizer | None = None
    try:
        named = named_tokenizer(tokenizer)
        found_tokenizer = gguf_tokenizer.build_tokenizer(header) if named is None else named.tokenizer
        found.filled += gguf_tokenizer.notes(header) if named is None else []
        turns = turns_for(gguf_turns(header), named, found_tokenizer, _rows(config, found_tokenizer))
        found.chat_tuned, found.end_ids = turns.chat_tuned, sorted(turns.end_ids)
        found.filled += turns.notes
    except BadModelFile as error:
        found.problems.append(_reason(error, path))
    _complete(found, path, config, weights, found_tokenizer)
    return found, weights


def _inspect_other(path: Path, form: str, tokenizer: Path | Tokenizer | None) -> tuple[Inspection, Weights | None]:
    folder = folder_of(path)
    files = [path] if path.is_file() else sorted(folder.glob("*.bin" if form == "bin" else "*.safetensors"))
    found = Inspection(str(path), form, sum(file.stat().st_size for file in files if file.is_file()))

    def tried(part: Callable[[], T]) -> T | None:
        """What a part of the checkpoint is, or None with one more problem."""
        try:
            with naming_unreadable(path):
                return part()
        except BadModelFile as error:
            if _reason(error, path) not in found.problems:
                found.problems.append(_reason(error, path))
            return None

    config, notes = tried(lambda: stated_config(path)) or (None, ())
    weights: PlainWeights | None = None
    if form != "ckpt" or not found.problems:  # a .ckpt cannot be read without its config
        weights = tried(lambda: weights_of(path, config))
    if isinstance(weights, GoogleWeights):
        config = weights.config
    found.filled = [*notes, *(weights.notes if weights is not None else ())]

    def tokenizers() -> tuple[NamedTokenizer | None, Tokenizer]:
        named = named_tokenizer(tokenizer)
        return named, tokenizer_for(folder, named)

    named, found_tokenizer = tried(tokenizers) or (None, None)
    if found_tokenizer is not None:
        rows = _rows(config, found_tokenizer)
        own = tried(lambda: turns_of(folder, found_tokenizer))
        if own is not None:
            turns = turns_for(own, named, found_tokenizer, rows)
            found.chat_tuned, found.end_ids = turns.chat_tuned, sorted(turns.end_ids)
            found.filled += turns.notes
    else:
        tried(lambda: chat_template(folder))
    found.architecture = "gemma2" if config is not None else None
    if weights is not None:
        for name, (shape, dtype) in weights.tensors.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            found.tensors.append(TensorLine(weights.in_file(name), shape, weights.stored(name), size))
    _complete(found, path, config, weights, found_tokenizer)
    return found, weights


def _complete(
    found: Inspection, path: Path, config: Gemma2Config | None, weights: Weights | None, tokenizer: Tokenizer | None
) -> None:
    """Fill in what follows from the config, and add to the problems where the parts do not fit each other."""
    if tokenizer is not None:
        found.tokenizer = {"pieces": len(tokenizer), "special": dict(tokenizer.special)}
    if config is None:
        return
    found.config = config_dict(config)
    found.model = next((name for name in PUBLISHED if _same_shape(published_config(name), config)), None)
    found.memory = {
        name: {"weights": config.parameter_count * dtype.itemsize, "cache": _cache_bytes(config, dtype)}
        for name, dtype in RUNNABLE.items()
        if name != "float16"
    }
    try:
        if weights is not None:
            check_names(weights, shapes_of(config))
    except BadModelFile as error:
        found.problems.append(_reason(error, path))
    try:
        if tokenizer is not None:
            found.filled += check_vocabulary(tokenizer, config).notes
    except BadModelFile as error:
        found.problems.append(_reason(error, path))


def _rows(config: Gemma2Config | None, tokenizer: Tokenizer) -> int:
    return len(tokenizer) if config is None else config.vocab_size


def _same_shape(published: Gemma2Config, config: Gemma2Config) -> bool:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return all(getattr(published, name) == getattr(config, name) for name in (*names, "head_dim", "vocab_size"))


def _cache_bytes(config: Gemma2Config, dtype: torch.dtype) -> int:
    """Keys and values of one row at full context, local layers in rings (see `HybridCache`)."""
    context = config.max_position_embeddings
    slots = sum(min(config.window(i) or context, context) for i in range(config.num_hidden_layers))
    return 2 * slots * config.num_key_value_heads * config.head_dim * dtype.itemsize


def _shortened(value: Any) -> Any:
    """A metadata value for people and JSON: arrays as their length and first elements."""
    if isinstance(value, np.ndarray | list):
        first = value[:SHOWN].tolist() if isinstance(value, np.ndarray) else value[:SHOWN]
        return {"length": len(value), "first": first}
    return value


def _reason(error: BadModelFile, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
