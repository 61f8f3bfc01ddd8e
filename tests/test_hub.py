"""Names from the hub: the real client against a local server that speaks the hub's protocol, well and badly."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import gemma2
from gemma2.checkpoints.safetensors import INDEX, SINGLE
from gemma2.errors import BadModelFile
from gemma2.hub import download
from gemma2.hub.folders import ABOUT_CHAT, ADDED
from tests.conftest import LONG
from tests.hub_server import (
    CONFIG,
    FILES,
    HOWS,
    NAME,
    NEEDED,
    OLD_CLIENT,
    TOKEN,
    UNWEIGHTED,
    WEIGHTS,
    Hub,
    content,
    environment,
    flipped,
    in_cache,
    no_symlinks,
    offline,
    page,
    same,
)

OPTIONAL = {*ABOUT_CHAT, *ADDED, "tokenizer.json"}
OTHER_CONFIG = CONFIG + b"\n"


def refused(name: str = NAME, revision: str | None = None) -> str:
    """The one line with which a download fails."""
    with pytest.raises(BadModelFile) as failed:
        download(name, revision)
    message = str(failed.value)
    assert len(message.splitlines()) == 1 and message.startswith(name) and len(message) < 500
    return message


@pytest.fixture
def tiny_repository(hub: Hub, folder: Callable[..., Path]) -> Path:
    """The folder of a real tiny model, which is also what the hub serves."""
    place = folder("stored", size="2b", num_hidden_layers=1)
    hub.push({**FILES, **content(place)})
    return place


def test_a_name_gives_the_model_the_repository_holds(hub: Hub, tiny_repository: Path) -> None:
    assert same(gemma2.load(NAME), load_file(tiny_repository / SINGLE))
    assert set(hub.got()) == NEEDED


def test_a_sharded_repository_gives_the_same_model(hub: Hub, tiny_repository: Path) -> None:
    stored = load_file(tiny_repository / SINGLE)
    (tiny_repository / SINGLE).unlink()
    names = sorted(stored)
    where: dict[str, str] = {}
    for part in range(3):
        file = f"model-{part + 1:05}-of-00003.safetensors"
        save_file({name: stored[name] for name in names[part::3]}, tiny_repository / file)
        where |= dict.fromkeys(names[part::3], file)
    (tiny_repository / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    # A pickle of the weights and a shard that no index names are of no use.
    hub.push(
        {**UNWEIGHTED, **content(tiny_repository), "pytorch_model.bin": b"", "model-00004-of-00003.safetensors": b""}
    )
    assert same(gemma2.load(NAME), stored)
    assert set(hub.got()) == {"config.json", "tokenizer.model", INDEX, *where.values()}


def test_only_needed_files_are_asked_for(hub: Hub) -> None:
    folder = download(NAME)
    assert content(folder) == {file: FILES[file] for file in NEEDED}
    assert sorted(hub.got()) == sorted(NEEDED)
    assert {file for _, file in hub.requests} == {*NEEDED, *OPTIONAL}


@pytest.mark.parametrize("file", sorted(OPTIONAL))
def test_what_says_how_a_chat_goes_comes_along_when_it_is_there(hub: Hub, file: str) -> None:
    hub.push({**FILES, file: b"{}"})
    assert (download(NAME) / file).read_bytes() == b"{}"


def test_a_second_download_asks_once_whether_anything_is_new_and_transfers_nothing(hub: Hub) -> None:
    first = download(NAME)
    hub.requests.clear()
    assert download(NAME) == first
    assert hub.requests == [("HEAD", "config.json")]


def test_a_new_commit_transfers_only_the_files_that_changed(hub: Hub) -> None:
    download(NAME)
    hub.push({**FILES, "config.json": OTHER_CONFIG})
    hub.requests.clear()
    assert (download(NAME) / "config.json").read_bytes() == OTHER_CONFIG
    assert hub.got() == ["config.json"]


def test_all_files_are_of_one_commit_though_the_branch_moves_meanwhile(hub: Hub) -> None:
    new = {file: data[::-1] for file, data in FILES.items()} | {"config.json": OTHER_CONFIG}
    hub.after = lambda file: hub.push(new)
    assert content(download(NAME)) == {file: FILES[file] for file in NEEDED}
    assert content(download(NAME)) == {file: new[file] for file in NEEDED}


def test_a_commit_may_be_named(hub: Hub) -> None:
    old = hub.head
    hub.push({**FILES, SINGLE: b"new"})
    assert (download(NAME, old) / SINGLE).read_bytes() == WEIGHTS
    hub.requests.clear()
    download(NAME, old)
    assert not hub.requests, "a commit never changes"


@pytest.mark.parametrize("file", sorted(NEEDED))
@pytest.mark.parametrize("damage", [flipped, page])
def test_wrong_bytes_of_the_right_size_are_fetched_anew(hub: Hub, file: str, damage: Callable[[bytes], bytes]) -> None:
    hub.instead[file] = [damage(FILES[file]), FILES[file]]
    assert (download(NAME) / file).read_bytes() == FILES[file]
    assert hub.got().count(file) == 2 and damage(FILES[file]) not in in_cache(hub)


@pytest.mark.parametrize("file", sorted(NEEDED))
@pytest.mark.parametrize("damage", [flipped, page])
def test_wrong_bytes_that_stay_wrong_are_refused_and_not_kept(
    hub: Hub, file: str, damage: Callable[[bytes], bytes]
) -> None:
    hub.instead[file] = [damage(FILES[file])]
    assert file in (message := refused()) and "damaged" in message
    assert hub.got().count(file) == 2
    assert not os.path.lexists(hub.blob(file)) and damage(FILES[file]) not in in_cache(hub)
    assert not [path for path in hub.cache.rglob("*") if path.is_symlink() and not path.exists()]
    del hub.instead[file]
    assert (download(NAME) / file).read_bytes() == FILES[file]


@pytest.mark.parametrize("size", [0, len(WEIGHTS) // 2, len(WEIGHTS) + 1])
def test_a_body_of_another_size_is_refused_and_not_kept(hub: Hub, size: int) -> None:
    hub.instead[SINGLE] = [(WEIGHTS * 2)[:size]]
    assert SINGLE in refused()
    assert not os.path.lexists(hub.blob(SINGLE))


@pytest.mark.parametrize("file", sorted(NEEDED))
@pytest.mark.parametrize("damage", [flipped, page, lambda data: data[: len(data) // 2], lambda data: b""])
def test_a_cached_file_that_changed_on_disk_is_noticed_and_fetched_anew(
    hub: Hub, file: str, damage: Callable[[bytes], bytes]
) -> None:
    download(NAME)
    hub.blob(file).write_bytes(damage(FILES[file]))
    hub.requests.clear()
    assert (download(NAME) / file).read_bytes() == FILES[file]
    assert hub.got() == [file]


def test_an_unchanged_cache_is_hashed_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    download(NAME)
    monkeypatch.setattr(hashlib, "sha256", lambda: pytest.fail("hashed again"))
    download(NAME)


def test_a_cache_whose_verdicts_cannot_be_noted_still_serves(hub: Hub) -> None:
    hub.cache.mkdir()
    (hub.cache / ".gemma2-verified").write_text("a file where the folder should be", encoding="utf-8")
    assert (download(NAME) / SINGLE).read_bytes() == WEIGHTS


def test_a_cache_without_symlinks_is_checked_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    no_symlinks(monkeypatch)
    hub.instead[SINGLE] = [flipped(WEIGHTS), WEIGHTS]
    folder = download(NAME)
    assert not (folder / SINGLE).is_symlink() and content(folder) == {file: FILES[file] for file in NEEDED}
    (folder / "tokenizer.model").write_bytes(flipped(FILES["tokenizer.model"]))
    assert content(download(NAME)) == {file: FILES[file] for file in NEEDED}
    hub.requests.clear()
    download(NAME)
    assert hub.requests == [("HEAD", "config.json")]


@pytest.mark.posix
def test_a_file_in_the_clients_shared_store_is_held_to_its_own_hash(hub: Hub) -> None:
    """After a Xet transfer blobs/<sha256> is itself a link, to a file named by the hash that Xet uses."""
    download(NAME)
    stored = hub.cache / "blobs" / "ab" / ("ab" * 32)
    stored.parent.mkdir(parents=True)
    hub.blob(SINGLE).rename(stored)
    hub.blob(SINGLE).symlink_to(os.path.relpath(stored, hub.blob(SINGLE).parent))
    hub.requests.clear()
    assert (download(NAME) / SINGLE).read_bytes() == WEIGHTS
    assert not hub.got()
    stored.write_bytes(flipped(WEIGHTS))
    assert (download(NAME) / SINGLE).read_bytes() == WEIGHTS
    assert hub.got() == [SINGLE] and flipped(WEIGHTS) not in in_cache(hub)


def test_a_connection_cut_half_way_is_taken_up_where_it_ended(hub: Hub) -> None:
    hub.cuts[SINGLE] = 2
    for _ in range(2 if OLD_CLIENT else 0):  # the next call takes it up
        assert SINGLE in refused()
    assert (download(NAME) / SINGLE).read_bytes() == WEIGHTS
    assert hub.got().count(SINGLE) == 3
    assert len([headers for headers in hub.headers if "range" in headers]) == 2


def test_a_connection_that_is_always_cut_ends_in_one_line(hub: Hub) -> None:
    hub.cuts[SINGLE] = 1000
    hub.instead[SINGLE] = [b"xy"]  # so small that no part of it is kept, and the client gives up
    assert SINGLE in refused()
    assert not os.path.lexists(hub.blob(SINGLE)) and (OLD_CLIENT or not list(hub.cache.rglob("*.incomplete")))


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_names_its_terms_and_the_login(hub: Hub, status: int) -> None:
    hub.refusal = (status, "GatedRepo", f"Access to model {NAME} is restricted.")
    message = refused()
    assert "gated" in message and f"{hub.url}/{NAME}" in message and "`hf auth login`" in message


@pytest.mark.parametrize("status", [401, 404])
def test_an_unknown_repository_is_called_so(hub: Hub, status: int) -> None:
    hub.refusal = (status, "RepoNotFound", "Repository not found")
    message = refused("google/gemma-2-tinny")
    assert "no such repository" in message and "`hf auth login`" in message


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_points_to_the_login(hub: Hub, status: int) -> None:
    hub.refusal = (status, "", "Invalid credentials in Authorization header")
    message = refused()
    assert str(status) in message and "`hf auth login`" in message and "cannot be reached" not in message


@pytest.mark.parametrize("file", sorted(NEEDED))
def test_a_repository_without_a_needed_file_is_refused_naming_it(hub: Hub, file: str) -> None:
    hub.push({name: FILES[name] for name in NEEDED if name != file})
    neither = "neither tokenizer.json nor tokenizer.model; a tokenizer can be given with tokenizer="
    what = neither if file == "tokenizer.model" else f"no {file}"
    assert refused() == f"{NAME}: the repository has {what}"


@pytest.mark.parametrize("revision", ["no-such-branch", "0" * 40])
def test_an_unknown_revision_is_named(hub: Hub, revision: str) -> None:
    assert refused(revision=revision) == f"{NAME}: no revision {revision!r}"


@pytest.mark.parametrize("name", ["google/gemma--2", "google/gemma..2", "google/" + "g" * 200])
def test_a_name_that_cannot_be_is_refused_unasked(hub: Hub, name: str) -> None:
    refused(name)
    assert not hub.requests


@HOWS
def test_offline_with_an_empty_cache_says_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    offline(hub, monkeypatch, how)
    message = refused()
    assert "config.json is not in the cache" in message and "give a folder" in message


@HOWS
def test_offline_with_a_full_cache_loads_without_waiting(
    hub: Hub, tiny_repository: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float], how: str
) -> None:
    download(NAME)
    offline(hub, monkeypatch, how)
    assert same(gemma2.load(NAME), load_file(tiny_repository / SINGLE))
    assert not naps or OLD_CLIENT


@HOWS
def test_offline_a_damaged_cache_is_not_passed_off_as_good(hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    download(NAME)
    hub.blob(SINGLE).write_bytes(flipped(WEIGHTS))
    offline(hub, monkeypatch, how)
    assert f"{SINGLE} is not in the cache" in refused()


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/abs.safetensors",
        "a/../x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "..",
        "x.bin",
    ],
)
def test_an_index_that_reaches_elsewhere_is_refused_and_nothing_it_names_asked_for(hub: Hub, shard: str) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors", "lm_head.weight": shard}}
    hub.push({**UNWEIGHTED, INDEX: json.dumps(index).encode()})
    assert "is not a plain .safetensors file name" in refused()
    known = {*NEEDED, *OPTIONAL, INDEX}
    assert {file for _, file in hub.requests} == known


@pytest.mark.parametrize("index", [b"[]", b"{}", b"<html>", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused(hub: Hub, index: bytes) -> None:
    hub.push({**UNWEIGHTED, INDEX: index})
    with pytest.raises(BadModelFile, match="index"):
        download(NAME)


def test_a_shard_that_the_repository_lacks_is_named(hub: Hub) -> None:
    hub.push({**UNWEIGHTED, INDEX: json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode()})
    assert refused() == f"{NAME}: the repository has no model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    "refusal",
    [
        (401, "GatedRepo", ""),
        (404, "RepoNotFound", ""),
        (401, "", "Invalid credentials"),
        (403, "", f"{TOKEN} may not"),
        (404, "RevisionNotFound", ""),
        (404, "EntryNotFound", ""),
        (500, "", ""),
    ],
)
def test_the_token_is_sent_and_never_printed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], refusal: tuple[int, str, str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refusal = refusal
    assert TOKEN not in refused()
    assert hub.headers[0]["authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in "".join(capfd.readouterr())


@pytest.mark.parametrize("token", [f"{TOKEN}\x0b1", f"{TOKEN}é", f"other {TOKEN}\x0c"])
def test_a_token_that_cannot_be_sent_is_not_printed_either(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert TOKEN not in refused("google/gemma-2-tinny")
    assert TOKEN not in "".join(capfd.readouterr())


def downloading(hub: Hub, home: Path) -> subprocess.Popen[bytes]:
    code = f"from gemma2.hub import download; print(download({NAME!r}), end='')"
    return subprocess.Popen([sys.executable, "-c", code], env=environment(hub, home), stdout=subprocess.PIPE)


@pytest.mark.long
def test_two_processes_at_once_both_get_the_whole_repository(hub: Hub, tmp_path: Path) -> None:
    children = [downloading(hub, tmp_path / "home") for _ in range(2)]
    for child in children:
        out, _ = child.communicate(timeout=120)
        assert child.returncode == 0
        assert content(Path(out.decode())).items() <= FILES.items()


@pytest.mark.long
@pytest.mark.parametrize("gets", [1, 2, 3] if LONG else [2])
def test_a_process_killed_while_downloading_leaves_nothing_that_a_later_one_takes_for_good(
    hub: Hub, tmp_path: Path, gets: int
) -> None:
    child = downloading(hub, tmp_path / "home")
    hub.after = lambda file: child.kill() if len(hub.got()) >= gets else None
    child.communicate(timeout=120)
    assert child.returncode == -9 and len(hub.got()) >= gets
    hub.after = lambda file: None
    again = downloading(hub, tmp_path / "home")
    out, _ = again.communicate(timeout=120)
    found = content(Path(out.decode()))
    assert again.returncode == 0 and "model.safetensors" in found and found.items() <= FILES.items()


def test_the_command_ends_in_one_line_that_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    hub.refusal = (401, "GatedRepo", f"Access to model {NAME} is restricted.")
    command = [sys.executable, "-m", "gemma2", "generate", "Hello", "--model", NAME]
    done = subprocess.run(
        command, env=environment(hub, tmp_path / "home"), capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 1 and not done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and f"{hub.url}/{NAME}" in lines[0] and "`hf auth login`" in lines[0]
    assert TOKEN not in done.stderr
