"""From one checkpoint format into another: Hugging Face's safetensors, GGUF and Google's .ckpt, either way."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from gemma2.atomic import replacing
from gemma2.checkpoints.checkpoint import Checkpoint, open_checkpoint
from gemma2.checkpoints.export import (
    FLOATS,
    Entry,
    companions,
    entries_for,
    write_gguf,
    write_google,
    write_safetensors,
)
from gemma2.checkpoints.gguf_weights import GGUFWeights
from gemma2.checkpoints.gguf_write import FILE_TYPES, FINER
from gemma2.checkpoints.weights import check_names, hidden, shapes_of
from gemma2.config import Gemma2Config
from gemma2.load import locate
from gemma2.tokenizer import Tokenizer

TYPES = tuple(name.lower() for name in FILE_TYPES)
FOLDER = "safetensors"  # the form of a target that is a folder
# What a folder written here holds; one with anything else in it is never replaced.
OWN = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json")
SPARE = 2**24  # bytes for what lies beside the weights: config, tokenizer, header


@dataclass(frozen=True)
class Converted:
    """What was written: where, how many bytes, how many tensors of each type, and what the reader should know."""

    path: Path
    bytes: int
    tensors: dict[str, int]
    notes: tuple[str, ...]


def convert(
    source: str | Path | None,
    target: str | Path,
    *,
    type: str | None = None,
    force: bool = False,
    tokenizer: str | Path | Tokenizer | None = None,
    revision: str | None = None,
    progress: bool | None = None,
) -> Converted:
    """Write `source` anew at `target`: a `.gguf`, a `.ckpt`, or a folder with safetensors.

    Args:
        source: as in `load`.
        target: its name decides the format. Beside a `.ckpt`, which states neither, config.json and tokenizer.model
            are written too.
        type: f32, bf16 or f16, and for GGUF also q8_0, q5_1, q5_0, q4_1, q4_0, mxfp4, tq2_0 or tq1_0. Norms stay
            float32 in a GGUF, and below q8_0 the embedding, which is also the head, is kept finer. Default: the dtype
            that the source stores, and bf16 for a GGUF other than F32.
        force: replace what is there.
        tokenizer, revision, progress: as in `load`.
    Raises:
        FileExistsError: the target is there, and not to be replaced.
        OSError: it cannot be written, or there is too little space for it.
        BadModelFile: the source is not exactly a Gemma 2, or the target's format cannot state what it is.
        ValueError: a type that the target's format does not have.
    """
    target = Path(target).expanduser()
    form = _form(target)
    asked = _checked_type(type, form)
    _check_target(target, form, force)
    opened = open_checkpoint(locate(source, revision), tokenizer)
    if target.exists() and opened.path.exists() and target.samefile(opened.path):
        raise FileExistsError(f"{target}: is the source itself")
    shapes = shapes_of(opened.config)
    check_names(opened.weights, shapes)
    main = asked or {dtype: name for name, dtype in FLOATS.items()}[opened.weights.dtype]
    entries = entries_for(form, opened, shapes, main)
    total = sum(entry.bytes for entry in entries)
    _check_space(target.parent, (2 if form == "ckpt" else 1) * total + SPARE)
    if form == "ckpt":
        _write_companions(opened, target.parent)
    with (
        replacing(target) as unfinished,
        tqdm(total=total, desc="writing", unit="B", unit_scale=True, disable=hidden(progress), leave=False) as bar,
    ):
        if form == "gguf":
            write_gguf(opened, entries, unfinished, bar.update, main)
        elif form == "ckpt":
            write_google(opened, entries, unfinished, bar.update)
        else:
            write_safetensors(opened, entries, unfinished, bar.update)
        files = [unfinished] if unfinished.is_file() else list(unfinished.iterdir())
        size = sum(path.stat().st_size for path in files)
    counts = Counter(entry.kind.name for entry in entries)
    return Converted(target, size, dict(counts), (*opened.notes, *_notes(opened, entries, form, main)))


def _form(target: Path) -> str:
    if target.suffix in (".gguf", ".ckpt"):
        return target.suffix[1:]
    if target.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise ValueError(f"{target}: give a folder for safetensors: a model is also its config.json and tokenizer")
    return FOLDER


def _checked_type(asked: str | None, form: str) -> str | None:
    taken = FILE_TYPES if form == "gguf" else FLOATS
    if asked is None or asked.upper() in taken:
        return asked and asked.upper()
    listed = ", ".join(name.lower() for name in taken)
    raise ValueError(f"type {asked!r}: {'a .' + form if form != FOLDER else form} can have {listed}")


def _check_target(target: Path, form: str, force: bool) -> None:
    parent = target.parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent}: no such folder to write to")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"{parent}: cannot be written to")
    inside = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if not target.exists() or (form == FOLDER and target.is_dir() and not inside):
        return
    if target.is_dir() != (form == FOLDER):
        kind = "a folder" if target.is_dir() else "a file"
        raise FileExistsError(f"{target}: is {kind}, and not replaced by what is none; choose another name")
    foreign = [name for name in inside if name not in OWN]
    if foreign:
        raise FileExistsError(f"{target}: also holds {', '.join(foreign[:3])}, so it is not replaced; choose another")
    if not force:
        raise FileExistsError(f"{target}: is there already; --force (force=True) replaces it")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder}: {needed / 1e9:.3g} GB are needed there, and {free / 1e9:.3g} GB are free")


def _write_companions(opened: Checkpoint, folder: Path) -> None:
    """What a .ckpt leaves out, where it is not there yet. Another model's files are neither used nor replaced."""
    words = opened.tokenizer.to_proto()
    config, model = folder / "config.json", folder / "tokenizer.model"
    if (config.is_file() and Gemma2Config.from_file(config) != opened.config) or (
        model.is_file() and Tokenizer.from_file(model).to_proto() != words
    ):
        raise FileExistsError(f"{folder}: its config.json or tokenizer.model is another model's; choose another folder")
    for name, content in companions(opened).items():
        if not (folder / name).exists():
            with replacing(folder / name) as unfinished:
                unfinished.write_bytes(content)


def _notes(opened: Checkpoint, entries: list[Entry], form: str, main: str) -> list[str]:
    said = []
    rounded = isinstance(opened.weights, GGUFWeights) and opened.weights.kinds - {"F32", "BF16", main}
    if rounded and main in ("BF16", "F16"):
        said.append(f"values of quantized tensors were rounded to {main.lower()}; --type f32 keeps every bit of them")
    wide = sum(entry.kind.name == "F32" for entry in entries)
    if form != "gguf" and main != "F32" and wide:
        said.append(f"{wide} norm weights are float32, because {main.lower()} cannot hold them exactly")
    if form == "gguf" and main in FINER:
        said.append(f"the embedding, which is also the head, is {FINER[main]}: coarser, it costs most")
    return said
