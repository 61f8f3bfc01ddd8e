"""Which files of a repository are fetched, and what is said of a repository that holds something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import load_file

import gemma2
from gemma2.checkpoints.safetensors import INDEX, SINGLE
from gemma2.errors import BadModelFile
from gemma2.hub import download, download_adapter, download_tokenizer
from gemma2.hub.folders import ABOUT_CHAT, ADDED, PICKLE, PICKLE_INDEX
from gemma2.load import POCKET, locate, locate_adapter, locate_tokenizer
from tests.hub_server import CONFIG, HOWS, LIST, NAME, UNWEIGHTED, WEIGHTS, Hub, content, offline, same

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
PICKLES = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
PIECES = {"tokenizer.json": b'{"model": {}}', "tokenizer.model": b"pieces"}
SMALL = dict.fromkeys([*ABOUT_CHAT, *ADDED], b"{}")
ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "google/gemma-2-2b"}).encode()


def index(files: list[str]) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {f"t{n}": file for n, file in enumerate(files)}}).encode()


EVERY = {
    SINGLE: WEIGHTS,
    INDEX: index(SHARDS),
    PICKLE: b"pickle",
    PICKLE_INDEX: index(PICKLES),
    **{file: file.encode() for file in (*SHARDS, *PICKLES)},  # each another, or the client would fetch one for all
}


def refused(act: Callable[[], Any], name: str = NAME) -> str:
    """The one line with which it fails."""
    with pytest.raises(BadModelFile) as failed:
        act()
    message = str(failed.value)
    assert len(message.splitlines()) == 1 and message.startswith(name) and len(message) < 500
    return message


@pytest.mark.parametrize(
    ("without", "fetched"),
    [
        ([], [SINGLE]),
        ([SINGLE], [INDEX, *SHARDS]),
        ([SINGLE, INDEX], [PICKLE]),
        ([SINGLE, INDEX, PICKLE], [PICKLE_INDEX, *PICKLES]),
    ],
)
def test_of_the_weights_those_are_fetched_that_transformers_reads(
    hub: Hub, without: list[str], fetched: list[str]
) -> None:
    hub.push({**UNWEIGHTED, **{file: data for file, data in EVERY.items() if file not in without}})
    folder = download(NAME)
    assert sorted(content(folder)) == sorted(["config.json", "tokenizer.model", *fetched])
    assert sorted(hub.got()) == sorted(content(folder)), "nothing is transferred that is not used"
    hub.requests.clear()
    download(NAME)
    assert hub.requests == [("HEAD", "config.json")]


@pytest.mark.parametrize("shard", ["../x.bin", "/abs.bin", "a/../x.bin", "C:x.bin", "x.safetensors", "x.pkl"])
def test_an_index_of_pickles_that_reaches_elsewhere_is_refused_and_nothing_it_names_asked_for(
    hub: Hub, shard: str
) -> None:
    hub.push({**UNWEIGHTED, PICKLE_INDEX: index([PICKLES[0], shard])})
    assert "is not a plain .bin file name" in refused(lambda: download(NAME))
    assert not {shard, *PICKLES} & {file for _, file in hub.requests}


@pytest.mark.parametrize("there", [["tokenizer.json"], ["tokenizer.model"], [*PIECES]])
def test_either_file_of_a_tokenizer_is_enough_and_both_come_where_both_are(hub: Hub, there: list[str]) -> None:
    hub.push({"config.json": CONFIG, SINGLE: WEIGHTS, **SMALL, **{file: PIECES[file] for file in there}})
    assert {*content(download(NAME))} == {"config.json", SINGLE, *SMALL, *there}


def test_a_tokenizer_of_ones_own_takes_the_place_of_the_repositorys(hub: Hub, folder: Callable[..., Path]) -> None:
    place = folder("stored", size="2b", num_hidden_layers=1)
    files = content(place)
    del files["tokenizer.model"]
    hub.push(files)
    assert same(gemma2.load(NAME, tokenizer=POCKET / "tokenizer.model"), load_file(place / SINGLE))
    assert not {*PIECES, *ADDED} & {file for _, file in hub.requests}
    assert refused(lambda: gemma2.load(NAME)) == (
        f"{NAME}: the repository has neither tokenizer.json nor tokenizer.model; a tokenizer can be given with "
        "tokenizer="
    )
    with pytest.raises(BadModelFile, match="no such file"):
        gemma2.load("google/gemma-2-other", tokenizer="absent/tokenizer.model")
    assert "google/gemma-2-other" not in str(hub.requests), "a tokenizer that is not there is refused first"


@HOWS
def test_offline_a_tokenizer_of_ones_own_serves_with_a_cache_that_has_none(
    hub: Hub, folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    place = folder("stored", size="2b", num_hidden_layers=1)
    hub.push(content(place))
    huggingface_hub.snapshot_download(NAME, allow_patterns=["config.json", SINGLE])  # as `hf download` does
    offline(hub, monkeypatch, how)
    assert same(gemma2.load(NAME, tokenizer=POCKET / "tokenizer.model"), load_file(place / SINGLE))
    message = refused(lambda: gemma2.load(NAME))
    assert message.startswith(f"{NAME}: neither tokenizer.json nor tokenizer.model is in the cache and the hub cannot")
    assert message.endswith("; connect, or give a folder or a file; a tokenizer can be given with tokenizer=")


@HOWS
@pytest.mark.parametrize("cached", [[SINGLE], [INDEX, *SHARDS], [PICKLE]])
def test_offline_a_cache_that_another_program_filled_serves(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str, cached: list[str]
) -> None:
    hub.push({**UNWEIGHTED, **EVERY, **PIECES})
    patterns = ["config.json", "tokenizer.json", *cached]
    place = Path(huggingface_hub.snapshot_download(NAME, allow_patterns=patterns))
    offline(hub, monkeypatch, how)
    assert download(NAME) == place and {*content(place)} == {*patterns}


def test_a_cache_that_transformers_filled_serves_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_file = pytest.importorskip("transformers.utils", exc_type=ImportError).cached_file  # by its own demands
    hub.push({**UNWEIGHTED, SINGLE: WEIGHTS, "tokenizer.json": PIECES["tokenizer.json"]})
    asked = ["config.json", "generation_config.json", SINGLE, "tokenizer.json", "added_tokens.json"]
    for file in asked:
        cached_file(NAME, file, _raise_exceptions_for_missing_entries=False, cache_dir=str(hub.cache))
    offline(hub, monkeypatch, "asked for")
    assert {*content(download(NAME))} == {"config.json", SINGLE, "tokenizer.json"}


@HOWS
@pytest.mark.parametrize("lost", ["config.json", SHARDS[1], INDEX])
def test_offline_the_line_says_which_file_of_an_incomplete_cache_is_missing(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str, lost: str
) -> None:
    hub.push({**UNWEIGHTED, **{file: EVERY[file] for file in (INDEX, *SHARDS)}})
    download(NAME)
    (download(NAME) / lost).unlink()
    offline(hub, monkeypatch, how)
    assert refused(lambda: download(NAME)).startswith(f"{NAME}: {lost} is not in the cache and the hub cannot be")


def test_a_hub_that_does_not_answer_is_asked_once_and_not_for_each_file(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push({**UNWEIGHTED, SINGLE: WEIGHTS})
    huggingface_hub.snapshot_download(NAME, allow_patterns=["config.json", "tokenizer.model", SINGLE])
    hub.requests.clear()
    offline(hub, monkeypatch, "broken")
    download(NAME)
    files = {file for _, file in hub.requests}
    assert files == {"config.json", "tokenizer.json"}, "the first by its branch, the second as the first not cached"


def test_a_tokenizer_comes_with_what_is_said_about_chat_and_without_weights(hub: Hub) -> None:
    hub.push({**UNWEIGHTED, **EVERY, **PIECES, **SMALL})
    folder = download_tokenizer(NAME)
    assert {*content(folder)} == {*PIECES, *SMALL}
    hub.push({SINGLE: WEIGHTS, "tokenizer.model": b"newer"})
    assert content(download_tokenizer(NAME)) == {"tokenizer.model": b"newer"}
    hub.push({"config.json": CONFIG, SINGLE: WEIGHTS})
    neither = "the repository has neither tokenizer.json nor tokenizer.model"
    assert refused(lambda: download_tokenizer(NAME)) == f"{NAME}: {neither}"
    hub.push({"tiny-Q8_0.gguf": b"GGUF"})
    choice = f"choose one as {NAME}:FILE.gguf: tiny-Q8_0.gguf (0.0 MB)"
    assert refused(lambda: locate_tokenizer(NAME)) == f"{NAME}: {neither}; {choice}"


def test_a_tokenizer_is_located_by_a_hub_name_unless_a_local_path_has_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.push({**PIECES, "Q8 0/tiny.gguf": b"GGUF"})
    found = locate_tokenizer(NAME)
    assert isinstance(found, Path) and {*content(found)} == {*PIECES}
    for name in (f"{NAME}:Q8 0/tiny.gguf", f"{NAME}:tiny"):
        file = locate_tokenizer(name)
        assert isinstance(file, Path) and file.read_bytes() == b"GGUF"
    hub.requests.clear()
    for path in ("models/tokenizer.model", "models/tokenizer.json", "models/x.gguf", "tokenizer.model"):
        assert locate_tokenizer(path) == Path(path), "a mistyped path is no hub name"
    place = tmp_path / NAME
    place.mkdir(parents=True)
    assert locate_tokenizer(NAME) == Path(NAME) and locate_tokenizer(place) == place
    assert locate_tokenizer("pocket") == POCKET and locate_tokenizer(None) is None
    assert not hub.requests


@pytest.mark.parametrize("more", [{}, {"config.json": CONFIG, "tokenizer.model": b"pieces"}])
def test_a_repository_with_an_adapter_is_called_so_with_its_base_and_the_cure(hub: Hub, more: dict[str, bytes]) -> None:
    hub.push({"adapter_config.json": ADAPTER, "adapter_model.safetensors": WEIGHTS, "training_args.bin": b"", **more})
    message = refused(lambda: gemma2.load(NAME))
    assert message.endswith(
        f"; it is a PEFT adapter of google/gemma-2-2b: gemma2.load('google/gemma-2-2b', adapter='{NAME}')"
    )
    assert "adapter_model.safetensors" not in hub.got()
    hub.push({"adapter_config.json": b"[", "tiny.gguf": b"GGUF"})
    message = refused(lambda: gemma2.load(NAME))
    assert f"it is a PEFT adapter: gemma2.load('BASE', adapter='{NAME}'), or choose one as" in message


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized by bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized by gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantized by awq"),
        ({"quantization_config": {"bits": 4}, "quantization": {"bits": 4, "group_size": 64}}, "quantized by MLX"),
        ({"quantization_config": {"quant_method": "x\n" * 100}}, "quantized"),
        ({"architectures": ["Gemma2ForSequenceClassification"]}, "a classifier (Gemma2ForSequenceClassification)"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_what_a_config_says_of_weights_that_are_not_read_is_said_before_they_come(
    hub: Hub, changes: dict[str, Any], what: str
) -> None:
    config = json.dumps(json.loads(CONFIG) | changes).encode()
    hub.push({"config.json": config, "tokenizer.model": b"pieces", SINGLE: WEIGHTS})
    message = refused(lambda: gemma2.load(NAME))
    assert message.startswith(f"{NAME}/config.json: ") and what in message
    assert {*hub.got()} <= {"config.json", LIST}


def test_plain_weights_are_fetched_whatever_their_config_says_of_its_base(
    hub: Hub, folder: Callable[..., Path]
) -> None:
    place = folder("stored", size="2b", num_hidden_layers=1)
    stated = json.loads((place / "config.json").read_text(encoding="utf-8")) | {
        "quantization_config": {"quant_method": "gptq"}
    }
    hub.push({**content(place), "config.json": json.dumps(stated).encode()})
    assert (download(NAME) / SINGLE).read_bytes() == (place / SINGLE).read_bytes()
    hub.push({**content(place), "config.json": json.dumps(stated | {"x": 1}).encode()})
    hub.listing = b"[]"
    assert (download(NAME) / SINGLE).is_file(), "where the hub lists nothing, the tensors will say it"


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (["gemma-2-2b.ckpt", "tokenizer.model"], "it holds gemma-2-2b.ckpt: download it with `hf download"),
        (["metadata.json", "model.weights.h5"], "it holds Keras files (model.weights.h5), which are not read: take"),
        (["flax_model.msgpack"], "it holds Flax files"),
        (["onnx/model.onnx"], "it holds ONNX files"),
        (["gemma2-2b-it-cpu-int8.task"], "it holds LiteRT files"),
        (["2b-it-sfp.sbs", "tokenizer.spm"], "it holds gemma.cpp files"),
        (["consolidated.00.pth"], "it holds PyTorch files"),
    ],
)
def test_files_of_other_programs_are_called_so(hub: Hub, files: list[str], what: str) -> None:
    hub.push(dict.fromkeys(files, b"other"))
    message = refused(lambda: gemma2.load(NAME))
    assert message.startswith(f"{NAME}: the repository has no config.json; {what}")
    assert hub.got() == [LIST]


@pytest.mark.parametrize(("kind", "what"), [("datasets", "a data set"), ("spaces", "a Space")])
def test_a_data_set_and_a_space_are_called_so(hub: Hub, kind: str, what: str) -> None:
    hub.kind = kind
    assert refused(lambda: gemma2.load(NAME)) == f"{NAME}: {what} of the hub, not a model"


def test_an_adapter_is_fetched_by_its_name_with_its_tokenizer_and_nothing_else_of_the_repository(
    hub: Hub, tmp_path: Path
) -> None:
    files = {"adapter_config.json": ADAPTER, "adapter_model.safetensors": WEIGHTS, "adapter_model.bin": b"pickle"}
    hub.push({**files, "tokenizer.json": b"{}", "optimizer.pt": b"state"})
    weighted = {"adapter_config.json", "adapter_model.safetensors"}
    assert {*content(locate_adapter(NAME, tokenizer_given=True))} == weighted
    assert {*content(locate_adapter(NAME))} == weighted | {"tokenizer.json"}
    hub.push({**{file: data for file, data in files.items() if file != "adapter_model.safetensors"}})
    assert {*content(download_adapter(NAME))} == {"adapter_config.json", "adapter_model.bin"}
    hub.push({"adapter_config.json": ADAPTER})
    neither = "neither adapter_model.safetensors nor adapter_model.bin"
    assert refused(lambda: download_adapter(NAME)).startswith(f"{NAME}: the repository has {neither}")
    hub.push(UNWEIGHTED)
    assert refused(lambda: download_adapter(NAME)) == f"{NAME}: the repository has no adapter_config.json"
    assert locate_adapter(tmp_path) == tmp_path and locate_adapter("a/b/c") == Path("a/b/c")


def test_a_name_with_the_ending_of_a_file_is_no_hub_name(hub: Hub) -> None:
    for name in (
        "models/model.safetensors",
        "models/pytorch_model.bin",
        "models/tokenizer.model",
        "models/c.json",
        "m/x.pt",
        "m/x.pth",
    ):
        assert "no such file or folder" in refused(lambda name=name: locate(name), name)  # type: ignore[misc]
    assert not hub.requests
