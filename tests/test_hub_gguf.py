"""GGUF files by name from a hub: the real client against a local server; `owner/repo:FILE.gguf` and its relatives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

import gemma2
from gemma2.checkpoints.gguf_weights import NORM, llama_cpp_name
from gemma2.checkpoints.safetensors import SINGLE
from gemma2.errors import BadModelFile
from gemma2.hub import download_gguf
from gemma2.load import POCKET, locate
from tests.conftest import raw_config, tensors_of, tiny
from tests.hub_server import (
    CONFIG,
    FILES,
    HOWS,
    LIST,
    NAME,
    OLD_CLIENT,
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

SHAPE: dict[str, Any] = {"size": "2b", "num_hidden_layers": 1, "vocab_size": 4096}
PARTS = [f"Q8_0/tiny-Q8_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
# A repository as they are: files beside and in folders, a split one, and what is no model.
GGUFS = {
    "tiny-Q4_K_M.gguf": b"GGUF small " * 100,
    "tiny.f16.gguf": b"GGUF large " * 30_000,
    "other/tiny-Q4_K_S.gguf": b"GGUF smaller " * 90,
    **{part: b"GGUF part " * 20_000 + part.encode() for part in PARTS},
}
REPOSITORY = {**GGUFS, "README.md": b"# Read me", "imatrix.dat": b"numbers"}
LISTED = (
    "Q8_0/tiny-Q8_0-00001-of-00003.gguf (3 parts, 0.6 MB)",
    "other/tiny-Q4_K_S.gguf (0.0 MB)",
    "tiny-Q4_K_M.gguf (0.0 MB)",
    "tiny.f16.gguf (0.3 MB)",
)
CHOICE = f"choose one as {NAME}:FILE.gguf: {', '.join(LISTED)}"


def write_model(path: Path, split: int = 0) -> None:
    """A tiny Gemma 2 with the pocket tokenizer, as llama.cpp's converter would write it; `split` tensors a part."""
    config, words = raw_config(**SHAPE), SentencePieceProcessor(model_file=str(POCKET / "tokenizer.model"))
    writer = gguf.GGUFWriter(path, "gemma2", split_max_tensors=split)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_tokenizer_model("llama")
    ids = range(len(words))
    writer.add_token_list([words.id_to_piece(i) for i in ids])
    writer.add_token_scores([words.get_score(i) for i in ids])
    writer.add_token_types([6 if words.is_byte(i) else 3 if words.is_control(i) else 1 for i in ids])
    for name, tensor in tensors_of(tiny(**SHAPE)).items():
        writer.add_tensor(llama_cpp_name(name), (tensor + 1 if name.endswith(NORM) else tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def state(model: gemma2.Gemma) -> dict[str, torch.Tensor]:
    return model.model.state_dict()


def refused(file: str | None, revision: str | None = None, name: str = NAME) -> str:
    """The one line with which `name:file`, or with None `name` alone, fails."""
    with pytest.raises(BadModelFile) as failed:
        locate(name if file is None else f"{name}:{file}", revision)
    message = str(failed.value)
    assert len(message.splitlines()) == 1 and message.startswith(name)
    return message


@pytest.fixture
def repository(hub: Hub) -> Hub:
    """The hub, with GGUF files and no Hugging Face checkpoint."""
    hub.push(REPOSITORY)
    return hub


def test_a_file_named_after_a_colon_gives_its_model(hub: Hub, tmp_path: Path) -> None:
    write_model(tmp_path / "local.gguf")
    hub.push({"sub folder/tiny F32.gguf": (tmp_path / "local.gguf").read_bytes()})
    loaded = gemma2.load(f"{NAME}:sub folder/tiny F32.gguf")
    assert same(loaded, state(gemma2.load(tmp_path / "local.gguf")))
    matrix = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(state(loaded)[matrix], tensors_of(tiny(**SHAPE))[matrix])
    assert hub.requests == [("HEAD", "sub folder/tiny F32.gguf"), ("GET", "sub folder/tiny F32.gguf")]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_part_of_a_split_file_gives_the_whole_model(hub: Hub, tmp_path: Path, number: int) -> None:
    write_model(tmp_path / "whole.gguf")
    write_model(tmp_path / "cut.gguf", split=5)
    parts = {f"Q8_0/{path.name}": path.read_bytes() for path in tmp_path.glob("cut-*.gguf")}
    assert len(parts) == 3
    hub.push({**REPOSITORY, **parts})
    loaded = gemma2.load(f"{NAME}:Q8_0/cut-0000{number}-of-00003.gguf")
    assert same(loaded, state(gemma2.load(tmp_path / "whole.gguf")))
    assert sorted(hub.got()) == sorted([LIST, *parts])


def test_a_local_file_of_that_name_goes_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / f"{NAME}:tiny-Q4_K_M.gguf"
    place.parent.mkdir()
    place.write_bytes(b"GGUF")
    assert locate(f"{NAME}:tiny-Q4_K_M.gguf").read_bytes() == b"GGUF"
    assert not hub.requests


def test_a_mistyped_local_path_is_no_hub_name(hub: Hub) -> None:
    with pytest.raises(
        BadModelFile, match=r"^models/x\.gguf: no such file or folder, nor a hub name like .*:file\.gguf"
    ):
        gemma2.load("models/x.gguf")
    assert not hub.requests


def test_parts_are_of_one_commit_though_the_branch_moves_meanwhile(repository: Hub) -> None:
    new = {**REPOSITORY, **{part: REPOSITORY[part][::-1] for part in PARTS}}
    repository.after = lambda file: repository.push(new) if file.endswith(".gguf") else None
    old = download_gguf(NAME, PARTS[1])
    assert [(old.parent / part[5:]).read_bytes() for part in PARTS] == [REPOSITORY[part] for part in PARTS]
    moved = download_gguf(NAME, PARTS[1])
    assert [(moved.parent / part[5:]).read_bytes() for part in PARTS] == [new[part] for part in PARTS]


def test_a_commit_may_be_named(repository: Hub) -> None:
    old = repository.head
    repository.push({"tiny-Q4_K_M.gguf": b"new"})
    assert download_gguf(NAME, "tiny-Q4_K_M.gguf").read_bytes() == b"new"
    assert download_gguf(NAME, "tiny-Q4_K_M.gguf", old).read_bytes() == GGUFS["tiny-Q4_K_M.gguf"]
    assert download_gguf(NAME, "f16", old).read_bytes() == GGUFS["tiny.f16.gguf"]
    assert refused("tiny-Q4_K_M.gguf", "no-such-branch") == f"{NAME}: no revision 'no-such-branch'"
    assert refused("f16", "no-such-branch") == f"{NAME}: no revision 'no-such-branch'"


def test_a_second_download_asks_once_for_a_file_and_twice_for_a_split_one(repository: Hub) -> None:
    first = [download_gguf(NAME, file) for file in ("tiny-Q4_K_M.gguf", PARTS[0])]
    repository.requests.clear()
    assert download_gguf(NAME, "tiny-Q4_K_M.gguf") == first[0]
    assert repository.requests == [("HEAD", "tiny-Q4_K_M.gguf")]
    repository.requests.clear()
    assert download_gguf(NAME, PARTS[0]) == first[1]
    assert repository.requests == [("GET", LIST), ("HEAD", PARTS[0])]


@pytest.mark.parametrize("named", PARTS)
@pytest.mark.parametrize("missing", PARTS)
def test_a_missing_part_is_named_before_any_is_transferred(repository: Hub, named: str, missing: str) -> None:
    repository.push({file: data for file, data in REPOSITORY.items() if file != missing})
    assert refused(named) == f"{NAME}: 1 of 3 parts missing in the repository: {missing}"
    assert repository.got() == [LIST]
    assert f"{min({*PARTS} - {missing})} (2 of 3 parts, 0.4 MB)" in refused("")


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (None, "the repository has no config.json"),
        ("", "no GGUF file is named"),
        ("tiny-Q5_K_M.gguf", "the repository has no tiny-Q5_K_M.gguf"),
        ("tiny-Q5_K_M-00002-of-00003.gguf", "the repository has no tiny-Q5_K_M-00002-of-00003.gguf"),
        ("Q8_0/tiny-Q8_0-00004-of-00003.gguf", "the repository has no Q8_0/tiny-Q8_0-00004-of-00003.gguf"),
        ("Q5_K_M", "no GGUF files are tagged 'Q5_K_M'"),
        ("README.md", "no GGUF files are tagged 'README.md'"),
    ],
)
def test_a_name_that_means_no_file_gets_the_list_of_them(repository: Hub, file: str | None, why: str) -> None:
    assert refused(file) == f"{NAME}: {why}; {CHOICE}"
    assert not {*repository.got()} - {LIST, "config.json"}


def test_a_long_list_is_cut_and_counted(hub: Hub) -> None:
    hub.push({f"tiny-{n:02}.gguf": b"GGUF" for n in range(25)})
    message = refused("")
    assert message.endswith("tiny-19.gguf (0.0 MB) and 5 more") and message.count(".gguf (") == 20


def test_a_repository_without_gguf_files_says_so(hub: Hub) -> None:
    hub.push({file: data for file, data in FILES.items() if not file.endswith(".gguf")})
    assert refused("") == f"{NAME}: no GGUF file is named; the repository has no GGUF files"
    assert refused("Q8_0") == f"{NAME}: no GGUF files are tagged 'Q8_0'; the repository has no GGUF files"
    assert refused("x.gguf") == f"{NAME}: the repository has no x.gguf"


def test_a_name_alone_means_the_safetensors_where_there_are_both(hub: Hub, folder: Callable[..., Path]) -> None:
    place = folder("stored", size="2b", num_hidden_layers=1)
    hub.push({**REPOSITORY, **content(place)})
    assert same(gemma2.load(NAME), load_file(place / SINGLE))
    assert not [file for _, file in hub.requests if file == LIST or file.endswith(".gguf")]
    assert download_gguf(NAME, "tiny-Q4_K_M.gguf").read_bytes() == GGUFS["tiny-Q4_K_M.gguf"]


def test_a_config_beside_gguf_files_alone_gets_the_list_too(repository: Hub) -> None:
    """Many conversions keep the config.json, some the tokenizer."""
    repository.push({**REPOSITORY, "config.json": b'{"model_type": "gemma2"}'})  # as some conversions have it
    assert refused(None).startswith(f"{NAME}/config.json: ") and refused(None).endswith(f"; {CHOICE}")
    repository.push({**REPOSITORY, "config.json": CONFIG})
    neither = "neither tokenizer.json nor tokenizer.model; a tokenizer can be given with tokenizer="
    assert refused(None) == f"{NAME}: the repository has {neither}; {CHOICE}"
    repository.push({**REPOSITORY, "config.json": CONFIG, "tokenizer.model": b"pieces"})
    assert refused(None) == f"{NAME}: the repository has no {SINGLE}; {CHOICE}"


@pytest.mark.parametrize(
    ("tag", "file"),
    [
        ("Q4_K_M", "tiny-Q4_K_M.gguf"),
        ("q4_k_m", "tiny-Q4_K_M.gguf"),
        ("F16", "tiny.f16.gguf"),
        ("Q4_K_S", "other/tiny-Q4_K_S.gguf"),
        ("other", "other/tiny-Q4_K_S.gguf"),
        ("tiny-Q4_K_M", "tiny-Q4_K_M.gguf"),
        ("Q8_0", PARTS[0]),
    ],
)
def test_a_tag_that_one_model_alone_has_means_that_model(repository: Hub, tag: str, file: str) -> None:
    path = download_gguf(NAME, tag)
    assert path.read_bytes() == GGUFS[file] and path.as_posix().endswith(f"/{file}")
    assert {*repository.got()} == {LIST, *(PARTS if file in PARTS else [file])}


@pytest.mark.parametrize(
    "tag", ["Q4_K", "4_K_M", "Q4", "K_M", "gguf", "00001", "of", "Q8.0", ".", "-", "tiny-Q8_0-00001"]
)
def test_a_piece_of_a_tag_means_nothing(repository: Hub, tag: str) -> None:
    assert refused(tag) == f"{NAME}: no GGUF files are tagged {tag!r}; {CHOICE}"


def test_a_tag_that_several_models_have_is_refused_with_these_alone(repository: Hub) -> None:
    extra = {"tiny-UD-Q4_K_M.gguf": b"GGUF", "Q8_0/tiny-Q8_0.gguf": b"GGUF"}
    repository.push({**REPOSITORY, **extra})
    message = refused("Q4_K_M")
    assert message == (
        f"{NAME}: 2 GGUF files are tagged 'Q4_K_M'; choose one as {NAME}:FILE.gguf: "
        "tiny-Q4_K_M.gguf (0.0 MB), tiny-UD-Q4_K_M.gguf (0.0 MB)"
    )
    assert "2 GGUF files are tagged 'Q8_0'" in refused("Q8_0"), "a file and one in parts of the same name are two"
    assert download_gguf(NAME, "UD-Q4_K_M").read_bytes() == b"GGUF"


@pytest.mark.parametrize(
    "file",
    [
        "../x.gguf",
        "a/../../x.gguf",
        "a/../x.gguf",
        "./x.gguf",
        "/etc/x.gguf",
        "a//x.gguf",
        "~/../x.gguf",
        "..\\x.gguf",
        "C:x.gguf",
        "C:/x.gguf",
        ".gguf",
        "a/.gguf",
        "..gguf/..",
        "../../README.md",
        "a/b",
        "a b",
        "x.gguf\n",
        "x\n.gguf",
        "x\x1b[2J.gguf",
        "x\0.gguf",
        "\udcff.gguf",
        "\u202ex.gguf",
        "x" * 1000 + ".gguf",
    ],
)
def test_a_name_that_reaches_elsewhere_is_refused_unasked(repository: Hub, file: str) -> None:
    with pytest.raises(BadModelFile) as failed:
        download_gguf(NAME, file)
    message = str(failed.value)
    assert message.startswith(f"{NAME}: '") and "is neither the path of a .gguf file inside a repository" in message
    assert message.isprintable() and len(message) < 500
    assert not repository.requests and not repository.cache.exists()


def test_a_listed_name_that_reaches_elsewhere_is_not_offered(hub: Hub) -> None:
    bad = ["../x.gguf", "/x.gguf", "a\\x.gguf", "x\x1b[2J.gguf", "x\n.gguf"]
    hub.push({"good--Q8_0.gguf": b"GGUF", **dict.fromkeys(bad, b"GGUF")})
    assert refused("") == (f"{NAME}: no GGUF file is named; choose one as {NAME}:FILE.gguf: good--Q8_0.gguf (0.0 MB)")
    assert download_gguf(NAME, "Q8_0").read_bytes() == b"GGUF"


@pytest.mark.parametrize("file", ["x-00003-of-00002.gguf", "x-00000-of-00002.gguf", "x-0000\u0661-of-00002.gguf"])
def test_a_name_that_only_resembles_that_of_a_part_is_taken_as_it_is(hub: Hub, file: str) -> None:
    hub.push({file: b"GGUF"})
    assert download_gguf(NAME, file).read_bytes() == b"GGUF"
    assert hub.got() == [file]


@pytest.mark.parametrize(
    "listing",
    [
        b"<!DOCTYPE html><html>Sign in to this network</html>",
        b"",
        b"[]",
        b"null",
        b"{}",
        b'{"id": "a", "siblings": [{}]}',
        b'{"id": "a", "siblings": [{"rfilename": 1}]}',
        b'{"id": "a", "siblings": 7}',
    ],
)
def test_an_answer_that_is_no_list_ends_in_one_line(repository: Hub, listing: bytes) -> None:
    repository.listing = listing
    for file in ("", "Q8_0"):
        assert refused(file).startswith(f"{NAME}: list of files could not be downloaded (")
    assert refused(None) == f"{NAME}: the repository has no config.json"
    assert refused("x.gguf") == f"{NAME}: the repository has no x.gguf"
    assert download_gguf(NAME, PARTS[2]).read_bytes() == GGUFS[PARTS[2]], "a file named in full needs no list"


@pytest.mark.parametrize("file", ["tiny-Q4_K_M.gguf", PARTS[0], PARTS[2]])
@pytest.mark.parametrize("damage", [flipped, page])
def test_wrong_bytes_of_the_right_size_are_fetched_anew_and_if_they_stay_wrong_not_kept(
    repository: Hub, file: str, damage: Callable[[bytes], bytes]
) -> None:
    good, bad = GGUFS[file], damage(GGUFS[file])
    repository.instead[file] = [bad, bad, good]
    assert refused(file) == f"{NAME}: {file} arrived damaged twice (its hash is not the hub's); nothing was kept"
    assert bad not in in_cache(repository)
    path = download_gguf(NAME, file)
    assert path.read_bytes() == good and repository.got().count(file) == 3


def test_a_cached_part_that_changed_on_disk_is_fetched_anew(repository: Hub) -> None:
    download_gguf(NAME, PARTS[0])
    repository.blob(PARTS[1]).write_bytes(flipped(GGUFS[PARTS[1]]))
    repository.requests.clear()
    path = download_gguf(NAME, PARTS[0])
    assert (path.parent / PARTS[1][5:]).read_bytes() == GGUFS[PARTS[1]]
    assert repository.got() == [LIST, PARTS[1]]


@pytest.mark.parametrize("file", ["other/tiny-Q4_K_S.gguf", PARTS[1]])
def test_a_cache_without_symlinks_is_checked_in_folders_too(
    repository: Hub, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    no_symlinks(monkeypatch)
    repository.instead[file] = [flipped(GGUFS[file]), GGUFS[file]]
    path = download_gguf(NAME, file)
    assert not path.is_symlink() and path.read_bytes() == GGUFS[file]
    path.write_bytes(flipped(GGUFS[file]))
    assert download_gguf(NAME, file).read_bytes() == GGUFS[file]
    repository.requests.clear()
    download_gguf(NAME, file)
    assert set(repository.requests) <= {("HEAD", file), ("GET", LIST)}


@HOWS
def test_offline_what_is_in_the_cache_is_had_without_waiting(
    repository: Hub, monkeypatch: pytest.MonkeyPatch, naps: list[float], how: str
) -> None:
    paths = {file: download_gguf(NAME, file) for file in ("tiny-Q4_K_M.gguf", *PARTS)}
    offline(repository, monkeypatch, how)
    assert {file: download_gguf(NAME, file) for file in paths} == paths
    assert not naps or OLD_CLIENT


@HOWS
def test_offline_what_is_not_in_the_cache_ends_in_one_line_that_says_what_is(
    repository: Hub, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    download_gguf(NAME, "f16")
    download_gguf(NAME, PARTS[0])
    repository.blob(PARTS[0]).unlink()
    offline(repository, monkeypatch, how)
    cure = (
        f"; connect, or give a folder or a file, or choose one of the cache as {NAME}:FILE.gguf: "
        "Q8_0/tiny-Q8_0-00002-of-00003.gguf (2 of 3 parts, 0.4 MB), tiny.f16.gguf (0.3 MB)"
    )
    for file, absent in {
        None: "config.json",
        "": "list of files",
        "f16": "list of files",
        "tiny-Q4_K_M.gguf": "tiny-Q4_K_M.gguf",
        PARTS[2]: PARTS[0],
    }.items():
        message = refused(file)
        assert message.startswith(f"{NAME}: {absent} is not in the cache and the hub cannot be reached (")
        assert message.endswith(cure)


@HOWS
@pytest.mark.parametrize("file", ["", "Q8_0", "tiny-Q4_K_M.gguf", PARTS[0]])
def test_offline_with_an_empty_cache_says_what_to_do(
    repository: Hub, monkeypatch: pytest.MonkeyPatch, naps: list[float], how: str, file: str
) -> None:
    offline(repository, monkeypatch, how)
    message = refused(file)
    assert "is not in the cache and the hub cannot be reached" in message
    assert message.endswith("; connect, or give a folder or a file")
    assert not naps or file.endswith(".gguf"), "the client waits for files, and nothing waits for a list"


@pytest.mark.parametrize("file", ["tiny-Q4_K_M.gguf", PARTS[1], "Q4_K_M"])
def test_a_gated_repository_names_its_terms_and_the_login(repository: Hub, file: str) -> None:
    repository.gated = True
    message = refused(file)
    assert "gated" in message and f"{repository.url}/{NAME}" in message and "`hf auth login`" in message
    assert CHOICE in refused(""), "its file names are no secret"


@pytest.mark.parametrize("file", ["", "Q4_K_M", "tiny-Q4_K_M.gguf", PARTS[0]])
def test_refusals_of_the_hub_are_told_as_for_a_folder(repository: Hub, file: str) -> None:
    assert "no such repository" in refused(file, name="google/gemma-2-tinny")
    repository.refusal = (401, "GatedRepo", "restricted")
    assert "gated" in refused(file)
    repository.refusal = (403, "", "not yours")
    assert "could not be downloaded" in (message := refused(file)) and "`hf auth login`" in message


def command(hub: Hub, home: Path, model: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "gemma2", "generate", "Hello", "-n", "2", "--model", model]
    return subprocess.run(argv, env=environment(hub, home), capture_output=True, encoding="utf-8", timeout=120)


@pytest.mark.long
def test_the_command_takes_the_same_names(hub: Hub, tmp_path: Path) -> None:
    write_model(tmp_path / "tiny-F32.gguf")
    hub.push({"tiny-F32.gguf": (tmp_path / "tiny-F32.gguf").read_bytes()})
    local = command(hub, tmp_path / "home", str(tmp_path / "tiny-F32.gguf"))
    assert local.returncode == 0 and local.stdout and not hub.requests
    named = command(hub, tmp_path / "home", f"{NAME}:tiny-F32.gguf")
    assert (named.returncode, named.stdout) == (0, local.stdout)
    unnamed = command(hub, tmp_path / "home", NAME)
    assert unnamed.returncode == 1 and not unnamed.stdout
    line = f"{NAME}: the repository has no config.json; choose one as {NAME}:FILE.gguf: tiny-F32.gguf ("
    assert len(unnamed.stderr.splitlines()) == 1 and line in unnamed.stderr
