"""A hub on this machine that speaks the hub's protocol, well and badly; for all tests that load by a name."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download

import gemma2
from gemma2.checkpoints.hf_config import config_dict, published_config
from gemma2.checkpoints.safetensors import SINGLE

NAME = "google/gemma-2-tiny"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
WEIGHTS = bytes(range(256)) * 400
CONFIG = json.dumps(config_dict(published_config("gemma-2-2b"))).encode()
FILES = {
    "config.json": CONFIG,
    "tokenizer.model": b"pieces " * 500,
    SINGLE: WEIGHTS,
    "README.md": b"# Read me",
    "pytorch_model.bin": b"pickle",
    "gemma-2-tiny.gguf": b"GGUF",
}
UNWEIGHTED = {file: data for file, data in FILES.items() if not file.endswith((".safetensors", ".bin", ".gguf"))}
# Older clients wait between retries when there is no answer, do not take up a cut connection, and lack this setting.
OLD_CLIENT = not hasattr(constants, "HF_HUB_DISABLE_SYMLINKS")
LIST = "list of files"  # how a request for it is noted
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
        self.gated = False  # what the hub says of a repository anyone may know, and of its files only some may have
        self.listing: bytes | None = None  # in place of the right one
        self.kind = "models"  # or "datasets", "spaces": what the repository of that name is
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
        close_session()  # connections that are kept alive would be answered still


def close_session() -> None:
    """Let the client forget its connections. Before version 1 this had another name."""
    close = getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions
    close()


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

    def describe(self, commit: str) -> None:
        """What model_info asks for: the commit and its files, with sizes if it wants them."""
        siblings = [
            {"rfilename": file} | ({"size": len(data)} if "blobs=" in self.path else {})
            for file, data in self.hub.commits[commit].items()
        ]
        body = json.dumps({"id": NAME, "modelId": NAME, "sha": commit, "siblings": siblings}).encode()
        body = body if self.hub.listing is None else self.hub.listing
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def tree(self, commit: str) -> None:
        """What snapshot_download asks for: all files of a commit, with their hashes."""
        files = self.hub.commits[commit]
        self.send_json(
            [{"type": "file", "path": file, "size": len(data), "oid": etag(file, data)} for file, data in files.items()]
        )

    def send_json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        about = re.fullmatch(rf"/api/{hub.kind}/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        parts = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name, revision, file = (unquote(part) for part in parts.groups()) if parts else ("", "", path)
        if about:
            name, revision, file = about[1], unquote(about[3] or "main"), LIST
        hub.requests.append((self.command, file))
        hub.headers.append({key.lower(): value for key, value in self.headers.items()})
        if hub.refusal:
            return self.refuse(*hub.refusal)
        if name != NAME or (hub.kind != "models" and not about):
            return self.refuse(404, "RepoNotFound", "Repository not found")
        commit = hub.head if revision == "main" else revision
        if commit not in hub.commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if about:
            return self.tree(commit) if about[2] == "tree" else self.describe(commit)
        if hub.gated:
            return self.refuse(403, "GatedRepo", f"Access to model {NAME} is restricted.")
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
    close_session()
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
        for module in (constants, file_download):  # older versions know fewer, and copy some into the second
            monkeypatch.setattr(module, key, value, raising=False)
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


def same(loaded: gemma2.Gemma, tensors: dict[str, torch.Tensor]) -> bool:
    state = loaded.model.state_dict()
    return set(state) == set(tensors) and all(torch.equal(state[name], tensors[name]) for name in state)


def content(place: Path) -> dict[str, bytes]:
    files = [path for path in place.rglob("*") if path.is_file()]
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in files}


def in_cache(hub: Hub) -> list[bytes]:
    """Every file below the cache, also half ones; the notes on what was verified aside."""
    found = [path for path in hub.cache.rglob("*") if path.is_file() and ".gemma2-verified" not in path.parts]
    return [path.read_bytes() for path in found]


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def page(data: bytes) -> bytes:
    return b"<!DOCTYPE html><html>Sign in to this network</html>".ljust(len(data))[: len(data)]


def no_symlinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of copies, as on Windows."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    if OLD_CLIENT:  # has no such setting
        monkeypatch.setattr(file_download, "are_symlinks_supported", lambda *_: False)


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "asked for":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        close_session()
    elif how == "broken":
        hub.refusal = (503, "", "")
    else:
        hub.stop()


HOWS = pytest.mark.parametrize("how", ["asked for", "broken", "no server"])


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
