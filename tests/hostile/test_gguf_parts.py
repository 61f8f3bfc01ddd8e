"""Models split into several GGUF files: any part leads to all, and parts that do not belong together are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gemma2
from tests.gguf_files import File, split, tiny_model
from tests.hostile.child import attempts, complaints, in_a_child

GOOD = tiny_model("Q4_0")
SIZES = (8, 0, 16)  # the second part has no tensors, and is no shorter than its header
Parts = list[File]


def name(number: int, count: int = 3) -> str:
    return f"model-{number:05d}-of-{count:05d}.gguf"


def write(folder: Path, parts: Parts) -> None:
    for number, part in enumerate(parts, start=1):
        (folder / name(number, len(parts))).write_bytes(part.write())


def changed(which: int, change: Callable[[File], File]) -> Callable[[Path, Parts], str]:
    """All parts, one of them changed."""

    def lay(folder: Path, parts: Parts) -> str:
        write(folder, [change(part) if number == which else part for number, part in enumerate(parts, start=1)])
        return name(1)

    return lay


def replaced(which: int, change: Callable[[bytes], bytes]) -> Callable[[Path, Parts], str]:
    """All parts, the bytes of one of them changed."""

    def lay(folder: Path, parts: Parts) -> str:
        write(folder, parts)
        path = folder / name(which)
        path.write_bytes(change(path.read_bytes()))
        return name(1)

    return lay


def absent(*which: int, asked: int = 1) -> Callable[[Path, Parts], str]:
    def lay(folder: Path, parts: Parts) -> str:
        write(folder, parts)
        for number in which:
            (folder / name(number)).unlink()
        return name(asked)

    return lay


def called(*names: str) -> Callable[[Path, Parts], str]:
    """The parts under other names, of which the first is asked for."""

    def lay(folder: Path, parts: Parts) -> str:
        for own, part in zip(names, parts, strict=False):
            (folder / own).write_bytes(part.write())
        return names[0]

    return lay


def special(which: int, make: Callable[[Path], object]) -> Callable[[Path, Parts], str]:
    """All parts, in place of one of them something that is no file."""

    def lay(folder: Path, parts: Parts) -> str:
        write(folder, parts)
        (folder / name(which)).unlink()
        make(folder / name(which))
        return name(1)

    return lay


TAKEN = GOOD.tensors[0]  # a tensor of the first part
BAD: dict[str, tuple[Callable[[Path, Parts], str], str]] = {
    "second missing": (absent(2), f"1 of 3 parts missing: {name(2)}"),
    "first missing": (absent(1, asked=3), f"1 of 3 parts missing: {name(1)}"),
    "all others missing": (absent(1, 3, asked=2), f"2 of 3 parts missing: {name(1)}, {name(3)}"),
    "99,998 missing": (
        called(name(1, 99_999)),
        f"99,998 of 99,999 parts missing: {', '.join(name(n, 99_999) for n in range(2, 7))}",
    ),
    "part 0": (called(name(0)), "there is no part 0 of 3"),
    "part 4 of 3": (called(name(4)), "there is no part 4 of 3"),
    "part 0 of 0": (called(name(0, 0)), "there is no part 0 of 0"),
    "under a name without a number": (called("model.gguf"), "its name must end in -00001-of-00003.gguf"),
    "under a name with a short number": (called("model-1-of-3.gguf"), "its name must end in -00001-of-00003.gguf"),
    "first and third exchanged": (
        called(name(3), name(2), name(1)),
        f"{name(1)}: named part 1 of 3, but split.no is 2",
    ),
    "counted from 1": (
        changed(1, lambda part: part.with_pair("split.no", "u16", 1)),
        f"{name(1)}: named part 1 of 3, but split.no is 1 and not 0",
    ),
    "of another split": (
        changed(3, lambda part: part.with_pair("split.count", "u16", 2)),
        f"{name(3)}: named part 3 of 3, but split.count is 2 and not 3",
    ),
    "a negative number": (
        changed(2, lambda part: part.with_pair("split.no", "i32", -1)),
        "but split.no is -1 and not 1",
    ),
    "no number": (
        changed(2, lambda part: part.without("split.no")),
        f"{name(2)}: named part 2 of 3, but split.no is missing",
    ),
    "no count": (changed(2, lambda part: part.without("split.count")), "named part 2 of 3, but split.count is missing"),
    "a whole model under a part's name": (called(name(1, 1)), "named part 1 of 1, but split.count is 3 and not 1"),
    "a number that is text": (
        changed(3, lambda part: part.with_pair("split.no", "str", "2")),
        f"{name(3)}: split.no is '2' (str), and must be an integer",
    ),
    "a count that is a float": (
        changed(1, lambda part: part.with_pair("split.count", "f32", 3.0)),
        "split.count is 3.0 (f32), and must be an integer",
    ),
    "a count that is an array": (
        changed(1, lambda part: part.with_pair("split.count", "u16[]", (3, 3))),
        "split.count is an array of 2 (u16[]), and must be an integer",
    ),
    "a count that is text, in a whole file": (
        lambda folder, parts: called("model.gguf")(folder, [GOOD.with_pair("split.count", "str", "3")]),
        "split.count is '3' (str), and must be an integer",
    ),
    "another total": (
        changed(1, lambda part: part.with_pair("split.tensors.count", "i32", 25)),
        "its parts hold 24 tensors, split.tensors.count states 25",
    ),
    "a tensor short": (
        changed(3, lambda part: part.without_tensors("blk.1.ffn_up.weight")),
        "its parts hold 23 tensors, split.tensors.count states 24",
    ),
    "a total that is text": (
        changed(1, lambda part: part.with_pair("split.tensors.count", "str", "24")),
        "split.tensors.count is '24' (str), and must be an integer",
    ),
    "a tensor in two parts": (
        changed(3, lambda part: part.plus(TAKEN)),
        f"{name(3)}: tensor 'token_embd.weight' is also in an earlier part",
    ),
    "the metadata in the last part": (
        changed(1, lambda part: part.without(*(str(key) for key, _, _ in GOOD.pairs))),
        "general.architecture is missing",
    ),
    "second part a pipe": (special(2, lambda path: os.mkfifo(path)), f"{name(2)}: no such file"),
    "second part a folder": (special(2, Path.mkdir), f"{name(2)}: a folder where a file was expected"),
    "second part a dangling link": (special(2, lambda path: path.symlink_to("gone")), f"{name(2)}: no such file"),
    "third part empty": (replaced(3, lambda raw: b""), f"{name(3)}: an empty file"),
    "third part HTML": (replaced(3, lambda raw: b"<html>404</html>"), f"{name(3)}: an HTML page"),
    "third part cut": (replaced(3, lambda raw: raw[:-1]), f"{name(3)}: byte "),
    "second part cut": (replaced(2, lambda raw: raw[:-1]), f"{name(2)}: byte "),
    "third part too long": (replaced(3, lambda raw: raw + bytes(32)), "32 bytes after the last tensor"),
    "third part big-endian": (replaced(3, lambda raw: b"FUGG" + raw[4:]), f"{name(3)}: byte 0: a big-endian GGUF file"),
    "NaN in the third part": (
        changed(3, lambda part: part.with_tensor("blk.1.ffn_norm.weight", data=b"\xff" * 128)),
        "1 tensors hold NaN or infinity in bfloat16: blk.1.ffn_norm.weight (32)",
    ),
}


@pytest.mark.long
@pytest.mark.posix
def test_parts_that_do_not_belong_together_are_refused_at_once(tmp_path: Path) -> None:
    asked = []
    for number, (lay, _) in enumerate(BAD.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        asked.append(folder / lay(folder, split(GOOD, SIZES)))
    found = in_a_child(attempts, [str(path) for path in asked])
    short = {
        case: complaints(attempt, path, words)
        for (case, (_, words)), path, attempt in zip(BAD.items(), asked, found, strict=True)
    }
    assert {case: said for case, said in short.items() if said} == {}


@pytest.mark.parametrize("sizes", [(8, 8, 8), SIZES, (24,), (1,) * 24], ids=str)
def test_a_split_model_is_the_whole_one_whichever_part_is_named(sizes: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "whole.gguf").write_bytes(GOOD.write())
    write(tmp_path, split(GOOD, sizes))
    whole = gemma2.load(tmp_path / "whole.gguf", device="cpu")
    for number in {1, len(sizes) // 2 + 1, len(sizes)}:
        loaded = gemma2.load(tmp_path / name(number, len(sizes)), device="cpu")
        assert loaded.config == whole.config
        for parameter, expected in whole.model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[parameter], expected), parameter
        assert loaded.tokenizer.encode("In the beginning") == whole.tokenizer.encode("In the beginning")


@pytest.mark.posix
def test_a_part_that_is_a_symbolic_link_leads_to_its_neighbours_by_name(tmp_path: Path) -> None:
    real, linked = tmp_path / "blobs", tmp_path / "snapshot"
    real.mkdir()
    linked.mkdir()
    for number, part in enumerate(split(GOOD, SIZES), start=1):
        (real / f"blob{number}").write_bytes(part.write())
        (linked / name(number)).symlink_to(real / f"blob{number}")
    assert gemma2.load(linked / name(2), device="cpu").config.num_hidden_layers == 2
