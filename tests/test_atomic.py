"""What is written appears whole under its name or not at all, and what was there stays until then."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma2.atomic import check_space, check_target, naming_a_full_disk, replacing, reserve

LEFT = ".target.0123456789abcdef.partial"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(place: Path, text: str, folder: bool) -> None:
    (place / "inside" if folder else place).write_text(text, encoding="utf-8")


def content(place: Path) -> str:
    return (place / "inside" if place.is_dir() else place).read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_the_target_is_absent_until_the_block_ends_and_then_whole(folder: bool, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with replacing(target, folder=folder) as (place,):
        assert place.parent == tmp_path and place.is_dir() == folder
        fill(place, "new", folder)
        assert not target.exists()
    assert content(target) == "new" and names(tmp_path) == ["target"]


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_was_there_is_replaced_at_the_end(folder: bool, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with replacing(target, folder=folder) as (place,):
        fill(place, "old", folder)
    with replacing(target, folder=folder) as (place,):
        fill(place, "new", folder)
        assert content(target) == "old"
    assert content(target) == "new" and names(tmp_path) == ["target"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_an_error_leaves_what_was_there_and_nothing_else(
    folder: bool, error: type[BaseException], tmp_path: Path
) -> None:
    target = tmp_path / "target"
    for old in (False, True):
        if old:
            with replacing(target, folder=folder) as (place,):
                fill(place, "old", folder)
        with pytest.raises(error), replacing(target, folder=folder) as (place,):
            fill(place, "new", folder)
            raise error
        assert names(tmp_path) == (["target"] if old else [])
        assert not old or content(target) == "old"


def test_several_targets_appear_together_or_not_at_all(tmp_path: Path) -> None:
    targets = [tmp_path / name for name in "abc"]
    with pytest.raises(ValueError), replacing(*targets) as places:
        for place in places:
            place.write_text("new", encoding="utf-8")
        raise ValueError
    assert names(tmp_path) == []
    with replacing(*targets) as places:
        for place in places:
            place.write_text("new", encoding="utf-8")
    assert names(tmp_path) == ["a", "b", "c"]


def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with replacing(target, folder=True) as (place,):
        fill(place, "old", folder=True)
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt), replacing(target, folder=True) as (place,):
        fill(place, "new", folder=True)
    assert names(tmp_path) == ["target"] and content(target) == "old"


def test_a_folder_that_another_process_puts_there_meanwhile_is_replaced_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    real, others = Path.rename, [1, 2, 3]

    def rename(self: Path, to: Path) -> Path:
        if self.name.endswith(".partial") and others:  # just before it is renamed
            others.pop()
            target.mkdir()
            fill(target, "the other's", folder=True)
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with replacing(target, folder=True) as (place,):
        fill(place, "new", folder=True)
    assert not others and names(tmp_path) == ["target"] and content(target) == "new"


def test_leftovers_go_with_the_next_success_and_what_only_looks_like_one_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    kept = [".target.0123.partial", ".other.0123456789abcdef.partial", "target.0123456789abcdef.partial", ".target.txt"]
    for name in [LEFT, *kept]:
        (tmp_path / name).write_text("x", encoding="utf-8")
    left = tmp_path / ".target.0000000000000000.old"
    left.mkdir()
    (left / "inside").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError), replacing(target) as (place,):
        raise ValueError
    assert (tmp_path / LEFT).exists()
    with replacing(target) as (place,):
        place.write_text("new", encoding="utf-8")
    assert names(tmp_path) == sorted(["target", *kept])


@pytest.mark.posix
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_another_process_is_writing_is_no_leftover_until_that_process_is_gone(
    folder: bool, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    script = (
        "import sys; from pathlib import Path; from gemma2.atomic import replacing\n"
        f"with replacing(Path(sys.argv[1]), folder={folder}) as (place,): print(place.name, flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as child:
        assert child.stdout
        theirs = child.stdout.readline().strip()
        with replacing(target, folder=folder) as (place,):
            fill(place, "new", folder)
        assert names(tmp_path) == sorted([theirs, "target"])
        child.kill()
    with replacing(target, folder=folder) as (place,):
        fill(place, "newer", folder)
    assert names(tmp_path) == ["target"]


def test_two_at_once_in_one_process_leave_each_other_alone(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with replacing(target) as (first,):
        first.write_text("first", encoding="utf-8")
        with replacing(target) as (second,):
            second.write_text("second", encoding="utf-8")
        assert target.read_text(encoding="utf-8") == "second" and first.exists()
    assert target.read_text(encoding="utf-8") == "first" and names(tmp_path) == ["target"]


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "target") as (place,):
        place.write_text("new", encoding="utf-8")
    (tmp_path / "plain").write_text("x", encoding="utf-8")
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.posix
def test_a_symbolic_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for folder in (False, True):
        behind = tmp_path / "elsewhere" / f"{folder}"
        behind.mkdir() if folder else behind.write_text("kept", encoding="utf-8")
        target = tmp_path / f"target-{folder}"
        target.symlink_to(behind)
        with replacing(target, folder=folder) as (place,):
            fill(place, "new", folder)
        assert not target.is_symlink() and content(target) == "new"
        assert behind.is_dir() == folder and (folder or behind.read_text(encoding="utf-8") == "kept")


@pytest.mark.posix
def test_a_target_is_refused_with_the_reason_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    check_target(tmp_path / "new")
    check_target(tmp_path / "new", folder=True)
    check_target(tmp_path / "empty", folder=True)
    check_target(tmp_path / "file", force=True)
    check_target(tmp_path / "folder", force=True, folder=True, own=["notes.txt"])
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("no/new", {}, "no: no such folder to write to"),
        ("file", {}, "file: is there already; --force"),
        ("gone", {}, "gone: is there already; --force"),
        ("file", {"folder": True, "force": True}, "file: is a file, and not replaced by a folder"),
        ("folder", {"force": True}, "folder: is a folder, and not replaced by a file"),
        ("folder", {"folder": True, "force": True}, "folder: also holds notes.txt, so it is not replaced"),
        ("pipe", {"force": True}, "pipe: is not a regular file; choose another name"),
    ]
    for name, options, said in refused:
        with pytest.raises(OSError, match=re.escape(f"{tmp_path / said.split(':')[0]}:{said.split(':', 1)[1]}")):
            check_target(tmp_path / name, **options)


def test_room_is_reserved_or_refused_with_the_name_of_the_target(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        reserve(file, 100_000, tmp_path / "target")
        assert os.fstat(file.fileno()).st_size == 100_000
        with pytest.raises(
            OSError, match=rf"{re.escape(str(tmp_path))}: 1e\+09 GB are needed there, and [\d.]+ GB are free"
        ):
            check_space(tmp_path, 10**18)
        with (
            pytest.raises(OSError, match=f"{re.escape(str(tmp_path / 'target'))}: .* while writing; make room"),
            naming_a_full_disk(tmp_path / "target"),
        ):
            raise OSError(errno.ENOSPC, "No space left on device")
