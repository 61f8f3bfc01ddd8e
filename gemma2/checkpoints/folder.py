"""Which weights a Hugging Face folder means, and all its files of them as one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gemma2.checkpoints.foreign import refuse_broken_links, refuse_folder
from gemma2.checkpoints.hf_config import MOST_JSON, read_json
from gemma2.checkpoints.names import REDUNDANT, TOKENIZER, outer_prefix, own_names, plain_name, shown, unwrapped
from gemma2.checkpoints.pickled import PickledFile
from gemma2.checkpoints.safetensors import ENDING, INDEX, SHARD, SINGLE, shard_names
from gemma2.checkpoints.safetensors_file import SafetensorsFile
from gemma2.checkpoints.weights import PlainWeights, TensorFile, chunks
from gemma2.errors import BadModelFile
from gemma2.tied import EMBEDDING, HEAD

PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
ORDER = (SINGLE, INDEX, PICKLED, PICKLED_INDEX)  # transformers takes the first that is there


class FileWeights(PlainWeights):
    """A `Weights` over one or more files of plain tensors. Headers are read at once, tensors when asked for.

    A head without an embedding is read as the embedding: programs that write tied tensors once may keep either.

    Raises:
        BadModelFile: two names mean one tensor, or two files hold one with different values.
    """

    def __init__(self, files: Sequence[TensorFile], where: str, notes: Iterable[str] = ()) -> None:
        self.where, self._files = where, files
        held: dict[str, TensorFile] = {}
        for file in files:
            for name in file.tensors:
                if name in held and not _equal(name, held[name], file):
                    raise BadModelFile(
                        f"{file.path}: tensor {shown(name)} is also in {held[name].path.name}, with other values"
                    )
                held[name] = file
        own = own_names((name for name in held if not name.endswith(REDUNDANT) and name != TOKENIZER), where)
        prefix = outer_prefix(own)
        alone = HEAD in own and EMBEDDING not in own
        if alone:
            own[EMBEDDING] = own.pop(HEAD)
        self._source = {name: (held[there], there) for name, there in own.items()}
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: file.tensors[there] for name, (file, there) in self._source.items()
        }
        read = (
            (f"the tensors of {where} were read without the prefix {shown(prefix)!r} of their names",) if prefix else ()
        )
        inside = (f"{where} holds a tokenizer as {TOKENIZER}, which is not read: the one beside it is used",)
        self.notes = (*notes, *read, *(inside if TOKENIZER in held else ()))
        if alone and not _says_tied(own[EMBEDDING], held[own[EMBEDDING]]):
            head = shown(own[EMBEDDING])
            self.notes += (f"{where} holds {head} and no embedding: in Gemma 2 they are one, so it is both",)
        self.release()

    def read(self, name: str, start: int, out: Tensor) -> None:
        file, there = self._source[name]
        out.copy_(file.rows(there, start, start + len(out)))

    def source(self, name: str) -> tuple[TensorFile, str]:
        """The file that holds a tensor, and what it calls it."""
        return self._source[name]

    def in_file(self, name: str) -> str:
        return self._source[name][1] if name in self._source else name

    def release(self) -> None:
        for file in self._files:
            file.release()


def chosen(folder: Path) -> Path | None:
    """The file that transformers begins with, or None where there is none."""
    return next((folder / name for name in ORDER if (folder / name).is_file()), None)


def open_folder(folder: Path) -> FileWeights:
    """The weights of a Hugging Face folder. Raises BadModelFile when there are none, or the index does not fit."""
    first = chosen(folder)
    if first is None:
        refuse_broken_links(folder / name for name in ORDER)
        refuse_folder(folder)
        raise BadModelFile(f"{folder}: neither {' nor '.join(ORDER[:3])}{_held(folder)}")
    others = [name for name in ORDER if name != first.name and (folder / name).is_file()]
    notes = [f"{first} is used, as transformers does, and not {' nor '.join(others)} beside it"] if others else []
    if first.name in (INDEX, PICKLED_INDEX):
        return _open_shards(first, notes)
    return FileWeights([_open_file(first)], str(first), notes)


def _open_file(path: Path) -> TensorFile:
    return PickledFile(path) if path.suffix == ".bin" else SafetensorsFile(path)


def _open_shards(path: Path, notes: list[str]) -> FileWeights:
    folder = path.parent
    index = read_json(path, MOST_JSON)
    names = shard_names(index, str(path), ".safetensors" if path.name == INDEX else ".bin")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        refuse_broken_links(folder / name for name in absent)
        raise BadModelFile(f"{folder}: {len(absent)} of {len(names)} shards missing: {', '.join(absent[:5])}")
    files = [_open_file(folder / name) for name in names]
    listed: Mapping[str, str] = index["weight_map"]
    held = {name: file.path.relative_to(folder).as_posix() for file in files for name in file.tensors}
    there = {plain_name(name) for name in held}
    ghosts = [
        name for name in listed if plain_name(name) not in there and not _redundant(name) and not _is_head(name, there)
    ]
    if ghosts:
        named = ", ".join(map(shown, sorted(ghosts)[:5]))
        raise BadModelFile(
            f"{folder / listed[ghosts[0]]}: index and shard disagree on {named}: no shard has what the index lists, so "
            "get the shards and the index anew"
        )
    elsewhere = sorted(name for name, file in held.items() if listed.get(name) != file and not _redundant(name))
    if elsewhere:
        named = ", ".join(map(shown, elsewhere[:3]))
        notes = [
            *notes,
            f"{path} does not say where {len(elsewhere)} tensors are ({named}); each was taken from the shard that has "
            "it, as transformers does",
        ]
    return FileWeights(files, str(folder), notes)


def _redundant(name: str) -> bool:
    """Whether a Gemma 2 is whole without this tensor: its head is the embedding, and its rotary table is computed."""
    return plain_name(name).endswith((HEAD, REDUNDANT))


def _is_head(name: str, there: Collection[str]) -> bool:
    """Whether this is an embedding that a head among the plain names `there` stands for."""
    return plain_name(name).endswith(EMBEDDING) and any(other.endswith(HEAD) for other in there)


def _says_tied(head: str, file: TensorFile) -> bool:
    """Whether a file says that its head is also its embedding, as `safetensors.torch.save_model` writes it: in the
    metadata, from the name that was left out to the one that was kept."""
    return any(kept == head and unwrapped(left).endswith(EMBEDDING) for left, kept in file.metadata.items())


def _equal(name: str, one: TensorFile, other: TensorFile) -> bool:
    shape, dtype = one.tensors[name]
    if name.endswith(REDUNDANT):
        return True
    if other.tensors[name] != (shape, dtype) or not shape:
        return False
    return all(
        torch.equal(one.rows(name, start, stop), other.rows(name, start, stop)) for start, stop in chunks(shape, dtype)
    )


def _held(folder: Path) -> str:
    """Other weights that a folder holds, each of which can be given itself."""
    files = [path for path in sorted(folder.glob("*")) if path.suffix in (".gguf", ".safetensors", ".ckpt", ".bin")]
    found = [path.name for path in files if path.is_file() and path.name != "training_args.bin"]
    shards = [match for match in map(SHARD.fullmatch, found) if match]
    if shards:
        index = INDEX if shards[0].string.endswith(ENDING) else PICKLED_INDEX
        held = f"{len(shards)} of {int(shards[0][2])} shards"
        return f"; it holds {held}, and no {index}: get what is missing from its source"
    return f"; it holds {', '.join(found[:3])}: give that file itself" if found else ""
