"""From one checkpoint format into another (safetensors, GGUF, Google's .ckpt), and from memory into any of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gemma2.atomic import check_space, check_target, naming_a_full_disk, replacing
from gemma2.checkpoints.beside import Turns, chat_template, chat_tuned, end_ids
from gemma2.checkpoints.checkpoint import Checkpoint, named_tokenizer, open_checkpoint, turns_for
from gemma2.checkpoints.dtypes import FLOAT8, FLOATS, PLAIN
from gemma2.checkpoints.export import FOLDER, Layout, layout_for, write
from gemma2.checkpoints.gguf_tokenizer_write import lost
from gemma2.checkpoints.gguf_weights import GGUFWeights
from gemma2.checkpoints.gguf_write import FILE_TYPES, FINER
from gemma2.checkpoints.hf_config import read_config
from gemma2.checkpoints.memory import WHERE, MemoryWeights
from gemma2.checkpoints.neutral import neutral
from gemma2.checkpoints.tokenizer_json import read_tokenizer_json
from gemma2.checkpoints.vocabulary import check_vocabulary, same_tokenizer
from gemma2.checkpoints.weights import hidden
from gemma2.gemma import Gemma
from gemma2.load import load, locate, locate_tokenizer
from gemma2.model import Gemma2
from gemma2.tokenizer import Tokenizer

TYPES = tuple(name.lower() for name in FILE_TYPES)
# What a folder written here holds; one with anything else in it is never replaced.
OWN = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
FILES = (".gguf", ".ckpt", ".safetensors", ".ggml", ".onnx", ".h5", ".npz", ".json", ".model", ".zip")  # never folders


@dataclass(frozen=True)
class Converted:
    """What was written: where, how many bytes, how many tensors of each type, and what the reader should know."""

    path: Path
    bytes: int
    tensors: dict[str, int]
    notes: tuple[str, ...]


@neutral
def convert(
    source: str | Path | Gemma | None,
    target: str | Path,
    *,
    type: str | None = None,
    force: bool = False,
    tokenizer: str | Path | Tokenizer | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    progress: bool | None = None,
) -> Converted:
    """Write `source` anew at `target`: a `.gguf`, a `.ckpt`, or a folder with safetensors.

    Args:
        source: as in `load`; or a `Gemma`, which is written as `save` does.
        target: its name decides the format. Beside a `.ckpt`, which states neither, config.json and tokenizer.model
            are written too.
        type: f32, bf16 or f16; for a folder or `.ckpt` also f64; and for GGUF also q8_0, q5_1, q5_0, q4_1, q4_0, mxfp4,
            tq2_0 or tq1_0. Norms are never rounded below float32: they are float32 in a GGUF, and elsewhere where the
            type does not hold them exactly. Below q8_0 the embedding, which is also the head, is kept finer. Default:
            the type of the source's matrices, f32 if they have several, and bf16 if they are quantized. float64 is f64,
            and in a GGUF f32, with a note.
        force: replace what is there.
        tokenizer, revision, progress: as in `load`. A `Gemma` has no revision.
        adapter: a PEFT adapter, as in `load`, to merge into the weights first. The merged model is in memory, in the
            dtype that the source runs in.
    Raises:
        FileExistsError: the target is there, and not to be replaced.
        OSError: it cannot be written, or there is too little space for it.
        BadModelFile: the source is not exactly a Gemma 2, or the target's format cannot state what it is.
        ValueError: a type that the target's format does not have, an empty name, or a source that is neither a
            path nor a `Gemma`.
    """
    if adapter is not None:
        if isinstance(source, Gemma):
            raise ValueError("adapter= is for a source that is loaded, and this one is a Gemma in memory")
        _Target(target, type, force)  # before weights are read
        merged = load(source, device="cpu", tokenizer=tokenizer, revision=revision, adapter=adapter, merge_adapter=True)
        return save(merged, target, type=type, force=force, progress=progress)
    if isinstance(source, Gemma):
        if revision is not None:
            raise ValueError("revision= is for a hub name, and the source is a Gemma in memory")
        return save(source, target, type=type, force=force, tokenizer=tokenizer, progress=progress)
    if source is not None and not isinstance(source, str | Path):
        raise ValueError(f"source is of type {source.__class__.__name__}: give a path, a name or a Gemma")
    asked = _Target(target, type, force)
    given = named_tokenizer(locate_tokenizer(tokenizer))
    origin = locate(source, revision, tokenizer_given=given is not None)
    opened = open_checkpoint(origin, given)
    _check_apart(asked.path, opened)
    return _written(asked, opened, _title(source, origin), progress)


@neutral
def save(
    model: Gemma | Gemma2,
    target: str | Path,
    *,
    type: str | None = None,
    force: bool = False,
    tokenizer: str | Path | Tokenizer | None = None,
    progress: bool | None = None,
) -> Converted:
    """Write a model as it is in memory, trained or edited, with its tokenizer and config.

    `load`, transformers and, for a `.gguf`, llama.cpp read what is written.

    Args:
        model: a `Gemma`; or its `Gemma2` alone, with `tokenizer`. One that is compiled is written as what it compiles.
        tokenizer: takes the place of the one of a `Gemma`, as in `load`.
        target, type, force, progress: as in `convert`; the default type is that of the model's matrices.
    Raises:
        BadModelFile: the model is no Gemma 2 any more, as with an adapter that is not merged, or has no values here.
        ValueError, OSError: as `convert`.
    """
    asked = _Target(target, type, force)
    return _written(asked, _in_memory(model, tokenizer), asked.path.stem, progress)


class _Target:
    """Where to write, in which format and type: checked before anything is opened, and again at the end."""

    def __init__(self, target: str | Path, type: str | None, force: bool) -> None:
        self.path = Path(target).expanduser()
        self.form = _form(self.path)
        self.type = _parse_type(type, self.form)
        self.check = partial(check_target, self.path, force=force, folder=self.form == FOLDER, own=OWN)
        self.check()


def _written(asked: _Target, opened: Checkpoint, title: str, progress: bool | None) -> Converted:
    main, target, whole = asked.type or _own_type(opened, asked.form), asked.path, asked.form == FOLDER
    layout = layout_for(asked.form, opened, main, title)
    beside = _beside(layout, opened, target.parent) if asked.form == "ckpt" else {}
    check_space(target.parent, layout.space)
    total, off = layout.bytes, hidden(progress)
    with (
        naming_a_full_disk(target),
        replacing(*beside, target, folder=whole, last=asked.check) as (*small, unfinished),
        tqdm(total=total, desc="writing", unit="B", unit_scale=True, disable=off, leave=False) as bar,
    ):
        for path, content in zip(small, beside.values(), strict=True):
            path.write_bytes(content)
        write(layout, opened, unfinished, bar.update)
        files = unfinished.iterdir() if whole else [unfinished]
        size = sum(file.stat().st_size for file in files)
    counts = Counter(entry.type.name for entry in layout.entries).most_common()
    return Converted(target, size, dict(counts), (*opened.notes, *_notes(opened, layout, main)))


def _in_memory(model: Gemma | Gemma2, tokenizer: str | Path | Tokenizer | None) -> Checkpoint:
    given = named_tokenizer(locate_tokenizer(tokenizer))
    if not isinstance(model, Gemma):
        if given is None:
            raise ValueError("a model alone has no tokenizer to write: give a Gemma, or name one with tokenizer=")
        model = Gemma(model, given.tokenizer)
    weights = MemoryWeights(getattr(model.model, "_orig_mod", model.model))
    config = model.config
    found = check_vocabulary(model.tokenizer if given is None else given.tokenizer, config)
    own = Turns(model.chat_tuned, model.chat_template, model.stop_ids, companions=model.companions)
    turns = turns_for(own, given, found, config.vocab_size)
    notes = (*model.notes, *(note for note in turns.notes if note not in model.notes))
    tuned, template, ends = turns.chat_tuned, turns.chat_template, turns.end_ids
    return Checkpoint(Path(WHERE), "memory", config, weights, found, tuned, template, notes, ends, turns.companions)


def _form(target: Path) -> str:
    if target.name in ("", ".."):
        raise ValueError(f"{target}: give the target a name of its own")
    if target.suffix in (".gguf", ".ckpt"):
        return target.suffix[1:]
    if target.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise ValueError(
            f"{target}: no {target.suffix} file is written; end the name in .gguf or .ckpt, or name a folder for "
            "safetensors, config.json and tokenizer"
        )
    if target.suffix.lower() in FILES:
        raise ValueError(f"{target}: no such format is written; end the name in .gguf or .ckpt, or name a folder")
    return FOLDER


def _parse_type(asked: str | None, form: str) -> str | None:
    taken = FILE_TYPES if form == "gguf" else PLAIN
    if asked is None or asked.upper() in taken:
        return asked and asked.upper()
    listed = ", ".join(name.lower() for name in taken)
    raise ValueError(f"type {asked!r}: {form if form == FOLDER else f'a .{form}'} takes {listed}")


def _check_apart(target: Path, opened: Checkpoint) -> None:
    """Not even --force lets a source be replaced by what was made of it."""
    files, weights = {opened.path}, opened.weights
    if isinstance(weights, GGUFWeights):
        files |= weights.files
    whole = {path for file in files for path in (file.resolve(), *file.resolve().parents)}
    if target.resolve() in whole:
        raise FileExistsError(f"{target}: is the source itself, or holds it; choose another name")


def _own_type(opened: Checkpoint, form: str) -> str:
    """The type of the source's matrices; of those that hold all their values, the narrowest."""
    types = {"BF16" if kind in FLOAT8 else kind for kind in _matrix_types(opened)}
    if not types <= PLAIN.keys():
        return "BF16"
    if any(dtype == torch.float64 for _, dtype in opened.weights.tensors.values()):
        return "F32" if form == "gguf" else "F64"
    return types.pop() if len(types) == 1 else "F32"


def _matrix_types(opened: Checkpoint) -> set[str]:
    """The types that the source stores its matrices in, by ggml's names."""
    weights = opened.weights
    return {weights.stored(name) for name, (shape, _) in weights.tensors.items() if len(shape) > 1}


def _title(source: str | Path | None, path: Path) -> str:
    """A name for the model: what the user called it, since downloads lie in folders named by a hash."""
    given = Path(source or path)
    name = given.name if given.name not in ("", "..") else path.resolve().name
    return Path(name).stem if path.is_file() else name


def _beside(layout: Layout, opened: Checkpoint, folder: Path) -> dict[Path, bytes]:
    """What a .ckpt leaves out, where it is not there yet. Another model's files are neither used nor replaced."""
    gemmas = set(opened.tokenizer.special.values())
    same: dict[str, Callable[[Path], bool]] = {
        "config.json": lambda path: read_config(path) == opened.config,
        "tokenizer.model": lambda path: Tokenizer.from_file(path).to_proto() == layout.beside[path.name],
        "tokenizer.json": lambda path: same_tokenizer(read_tokenizer_json(path), opened.tokenizer),
        "generation_config.json": lambda path: (
            chat_tuned(folder, opened.tokenizer) == opened.chat_tuned
            and end_ids(folder, opened.tokenizer) - gemmas == opened.end_ids - gemmas
        ),
        "tokenizer_config.json": lambda path: chat_template(folder) == opened.chat_template,
        "chat_template.jinja": lambda path: chat_template(folder) == opened.chat_template,
    }
    for name, holds in same.items():
        if (folder / name).exists() and not holds(folder / name):
            raise FileExistsError(f"{folder / name}: is another model's, and would be read with {layout.form}")
    return {folder / name: content for name, content in layout.beside.items() if not (folder / name).exists()}


def _notes(opened: Checkpoint, layout: Layout, main: str) -> list[str]:
    """What the target does not keep of the source, and what is in it of another type than asked for."""
    said = []
    config, form = opened.config, layout.form
    doubles = sum(dtype == torch.float64 for _, dtype in opened.weights.tensors.values())
    if doubles and main in FLOATS:
        cure = "a folder of type f64 keeps every bit" if form == "gguf" else "--type f64 keeps every bit"
        said.append(f"{doubles} tensors of float64 were rounded to {main.lower()}; {cure}")
    floats = {*PLAIN, *(FLOAT8 if main in FLOATS else ())}
    if not _matrix_types(opened) <= floats and main not in ("F32", "F64"):
        said.append(
            f"values of quantized tensors were rounded to {main.lower()}; --type f32 keeps every bit of them"
            if main in FLOATS
            else "the source was quantized already: the errors of both add up"
        )
    wide = sum(entry.type.name == "F32" for entry in layout.entries)
    if form != "gguf" and main not in ("F32", "F64") and wide:
        said.append(f"{wide} norm weights are float32, because {main.lower()} cannot hold them exactly")
    said += layout.notes
    if form == "gguf":
        said += lost(opened.tokenizer)
        if main in FINER:
            said.append(f"the embedding, which is also the head, is {FINER[main]}: coarser, it costs most")
        for name in ("rms_norm_eps", "rope_theta", "attn_logit_softcapping", "final_logit_softcapping"):
            exact, held = float(getattr(config, name)), float(str(np.float32(getattr(config, name))))
            if exact != held:
                said.append(f"{name} {exact!r} is {held!r} in a GGUF, which has float32 for it")
    return said
