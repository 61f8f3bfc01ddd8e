"""Names from the hub: the real client against a local server that speaks the hub's protocol, well and badly."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import gemma2
from gemma2.checkpoints.safetensors import INDEX, SINGLE
from gemma2.errors import BadModelFile
from gemma2.hub import download

NAME = "google/gemma-2-tiny"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
WEIGHTS = bytes(range(256)) * 400
FILES = {
    "config.json": b'{"model_type": "gemma2"}',
    "tokenizer.model": b"pieces " * 500,
    SINGLE: WEIGHTS,
    "README.md": b"# Read me",
    "pytorch_model.bin": b"pickle",
    "gemma-2-tiny.gguf": b"GGUF",
}
NEEDED = {"config.json", "tokenizer.model", SINGLE}


class Hub:
    """One repository of a hub on this machine, and the ways in which it may misbehave."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.commits: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []  # method, file
        self.headers: list[dict[str, str]] = []
        self.instead: dict[str, list[bytes]] = {}  # bodies sent in place of the right one, the last for ever
        self.cuts: dict[str, int] = {}  # how often a file's connection ends half-way
        self.refusal: tuple[int, str, str] | None = None  # status, X-Error-Code, X-Error-Message, for any request
        self.after: Callable[[str], None] = lambda file: None
        self.push(FILES)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def push(self, files: dict[str, bytes]) -> None:
        self.head = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[self.head] = files

    def got(self, method: str = "GET") -> list[str]:
        return [file for verb, file in self.requests if verb == method]

    def blob(self, file: str) -> Path:
        return self.cache / "models--google--gemma-2-tiny" / "blobs" / etag(file, self.commits[self.head][file])

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        huggingface_hub.close_session()  # connections that are kept alive would be answered still


def etag(file: str, data: bytes) -> str:
    """What the hub gives: git's name for a small text file, sha256 for a large one."""
    if file.endswith((".json", ".md")):
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()
        self.hub.after(self.path.rpartition("/")[2])

    def refuse(self, status: int, code: str, message: str, commit: str = "") -> None:
        self.send_response(status)
        for name, value in (("X-Error-Code", code), ("X-Error-Message", message), ("X-Repo-Commit", commit)):
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self) -> None:
        hub, parts = self.hub, re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        name, revision, file = parts.groups() if parts else ("", "", self.path)
        hub.requests.append((self.command, file))
        hub.headers.append({key.lower(): value for key, value in self.headers.items()})
        if hub.refusal:
            return self.refuse(*hub.refusal)
        if name != NAME:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        commit = hub.head if revision == "main" else revision
        if commit not in hub.commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if file not in hub.commits[commit]:
            return self.refuse(404, "EntryNotFound", "Entry not found", commit)
        data = hub.commits[commit][file]
        sent = data
        if self.command == "GET" and (others := hub.instead.get(file)):
            sent = others.pop(0) if len(others) > 1 else others[0]
        start = int(re.sub(r"bytes=(\d+)-", r"\1", self.headers.get("Range", "0")))
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        if file.endswith((".json", ".md")):
            self.send_header("ETag", f'"{etag(file, data)}"')
        else:
            self.send_header("ETag", '"of-the-store"')
            self.send_header("X-Linked-Etag", f'"{etag(file, data)}"')
            self.send_header("X-Linked-Size", str(len(data)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(sent) - 1}/{len(sent)}")
        self.send_header("Content-Length", str(len(sent) - start))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if hub.cuts.get(file, 0) > 0:
            hub.cuts[file] -= 1
            self.wfile.write(sent[start : (start + len(sent)) // 2])
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.wfile.write(sent[start:])
        return None


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between the client's retries, which are noted and not slept."""
    taken: list[float] = []
    monkeypatch.setattr(time, "sleep", taken.append)
    return taken


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float]) -> Iterator[Hub]:
    """A hub with one repository, an empty cache, and no way to any other machine."""
    huggingface_hub.close_session()
    hub = Hub(tmp_path / "cache")
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(hub.cache),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_SYMLINKS": False,
        "HF_HUB_ETAG_TIMEOUT": 5,
        "HF_HUB_DOWNLOAD_TIMEOUT": 5,
        "DOWNLOAD_CHUNK_SIZE": 2**13,
    }
    for key, value in settings.items():
        monkeypatch.setattr(constants, key, value)
    for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    connect = socket.create_connection

    def only_here(address: tuple[str, int], *args, **kwargs) -> socket.socket:
        assert address[0] == "127.0.0.1", f"a test reached for {address}"
        return connect(address, *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", only_here)
    yield hub
    hub.stop()


def refused(name: str = NAME, revision: str | None = None) -> str:
    """The one line with which a download fails."""
    with pytest.raises(BadModelFile) as failed:
        download(name, revision)
    message = str(failed.value)
    assert len(message.splitlines()) == 1 and message.startswith(name) and len(message) < 500
    return message


def same(loaded: gemma2.Gemma, tensors: dict[str, torch.Tensor]) -> bool:
    state = loaded.model.state_dict()
    return set(state) == set(tensors) and all(torch.equal(state[name], tensors[name]) for name in state)


def content(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


def in_cache(hub: Hub) -> list[bytes]:
    """Every file below the cache, also half ones; the notes on what was verified aside."""
    found = [path for path in hub.cache.rglob("*") if path.is_file() and ".gemma2-verified" not in path.parts]
    return [path.read_bytes() for path in found]


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def page(data: bytes) -> bytes:
    return b"<!DOCTYPE html><html>Sign in to this network</html>".ljust(len(data))[: len(data)]


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
    (tiny_repository / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    # A copy of the weights in one file and a shard that no index names are of no use.
    hub.push({**FILES, **content(tiny_repository), "model-00004-of-00003.safetensors": b"stray"})
    assert same(gemma2.load(NAME), stored)
    assert set(hub.got()) == {"config.json", "tokenizer.model", INDEX, *where.values()}


def test_only_needed_files_are_asked_for(hub: Hub) -> None:
    folder = download(NAME)
    assert content(folder) == {file: FILES[file] for file in NEEDED}
    assert sorted(hub.got()) == sorted(NEEDED)
    assert {file for _, file in hub.requests} == {*NEEDED, "generation_config.json", INDEX}


def test_a_generation_config_comes_along_when_there_is_one(hub: Hub) -> None:
    hub.push({**FILES, "generation_config.json": b"{}"})
    assert (download(NAME) / "generation_config.json").read_bytes() == b"{}"


def test_a_second_download_asks_once_whether_anything_is_new_and_transfers_nothing(hub: Hub) -> None:
    first = download(NAME)
    hub.requests.clear()
    assert download(NAME) == first
    assert hub.requests == [("HEAD", "config.json")]


def test_a_new_commit_transfers_only_the_files_that_changed(hub: Hub) -> None:
    download(NAME)
    hub.push({**FILES, "config.json": b"{}"})
    hub.requests.clear()
    assert (download(NAME) / "config.json").read_bytes() == b"{}"
    assert hub.got() == ["config.json"]


def test_all_files_are_of_one_commit_though_the_branch_moves_meanwhile(hub: Hub) -> None:
    new = {file: data[::-1] for file, data in FILES.items()}
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
    (hub.cache / ".gemma2-verified").write_text("a file where the folder should be")
    assert (download(NAME) / SINGLE).read_bytes() == WEIGHTS


def test_a_cache_without_symlinks_is_checked_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    hub.instead[SINGLE] = [flipped(WEIGHTS), WEIGHTS]
    folder = download(NAME)
    assert not (folder / SINGLE).is_symlink() and content(folder) == {file: FILES[file] for file in NEEDED}
    (folder / "tokenizer.model").write_bytes(flipped(FILES["tokenizer.model"]))
    assert content(download(NAME)) == {file: FILES[file] for file in NEEDED}
    hub.requests.clear()
    download(NAME)
    assert hub.requests == [("HEAD", "config.json")]


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
    assert (download(NAME) / SINGLE).read_bytes() == WEIGHTS
    assert hub.got().count(SINGLE) == 3
    assert len([headers for headers in hub.headers if "range" in headers]) == 2


def test_a_connection_that_is_always_cut_ends_in_one_line(hub: Hub) -> None:
    hub.cuts[SINGLE] = 1000
    hub.instead[SINGLE] = [b"xy"]  # so small that no part of it is kept, and the client gives up
    assert SINGLE in refused()
    assert not os.path.lexists(hub.blob(SINGLE)) and not list(hub.cache.rglob("*.incomplete"))


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
    hub.push({name: data for name, data in FILES.items() if name != file})
    assert refused() == f"{NAME}: the repository has no {file}"


@pytest.mark.parametrize("revision", ["no-such-branch", "0" * 40])
def test_an_unknown_revision_is_named(hub: Hub, revision: str) -> None:
    assert refused(revision=revision) == f"{NAME}: no revision {revision!r}"


@pytest.mark.parametrize("name", ["google/gemma--2", "google/gemma..2", "google/" + "g" * 200])
def test_a_name_that_cannot_be_is_refused_unasked(hub: Hub, name: str) -> None:
    refused(name)
    assert not hub.requests


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "asked for":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "broken":
        hub.refusal = (503, "", "")
    else:
        hub.stop()


HOWS = pytest.mark.parametrize("how", ["asked for", "broken", "no server"])


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
    assert not naps


@HOWS
def test_offline_a_damaged_cache_is_not_passed_off_as_good(hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    download(NAME)
    hub.blob(SINGLE).write_bytes(flipped(WEIGHTS))
    offline(hub, monkeypatch, how)
    assert f"{SINGLE} is not in the cache" in refused()


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/abs.safetensors", "a/b.safetensors", "..\\x.safetensors", "C:x.safetensors", "..", "x.bin"],
)
def test_an_index_that_reaches_elsewhere_is_refused_and_nothing_it_names_asked_for(hub: Hub, shard: str) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors", "lm_head.weight": shard}}
    hub.push({**FILES, INDEX: json.dumps(index).encode()})
    assert "is not a plain .safetensors file name" in refused()
    known = {"config.json", "tokenizer.model", "generation_config.json", INDEX}
    assert {file for _, file in hub.requests} == known


@pytest.mark.parametrize("index", [b"[]", b"{}", b"<html>", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused(hub: Hub, index: bytes) -> None:
    hub.push({**FILES, INDEX: index})
    with pytest.raises(BadModelFile, match="index"):
        download(NAME)


def test_a_shard_that_the_repository_lacks_is_named(hub: Hub) -> None:
    hub.push({**FILES, INDEX: json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode()})
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


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """For a child that finds this hub, with a cache of its own below `home`."""
    return {key: value for key, value in os.environ.items() if "HUB_CACHE" not in key} | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
    }


def downloading(hub: Hub, home: Path) -> subprocess.Popen[bytes]:
    code = f"from gemma2.hub import download; print(download({NAME!r}), end='')"
    return subprocess.Popen([sys.executable, "-c", code], env=environment(hub, home), stdout=subprocess.PIPE)


def test_two_processes_at_once_both_get_the_whole_repository(hub: Hub, tmp_path: Path) -> None:
    children = [downloading(hub, tmp_path / "home") for _ in range(2)]
    for child in children:
        out, _ = child.communicate(timeout=120)
        assert child.returncode == 0
        assert content(Path(out.decode())).items() <= FILES.items()


@pytest.mark.parametrize("gets", [1, 2, 3])
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
    done = subprocess.run(command, env=environment(hub, tmp_path / "home"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and f"{hub.url}/{NAME}" in lines[0] and "`hf auth login`" in lines[0]
    assert TOKEN not in done.stderr
