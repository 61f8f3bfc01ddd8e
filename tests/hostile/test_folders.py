"""Folders, configs and small files that must not load: named in one line, at little cost, and nothing is waited for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gemma2
from gemma2.checkpoints.folder import PICKLED
from gemma2.checkpoints.safetensors import SINGLE
from gemma2.config import GLOBAL, LOCAL
from tests.conftest import raw_config, tensors_of, tiny
from tests.hostile.child import attempts, complaints, in_a_child
from tests.hostile.conftest import SMALL, shell

nan = float("nan")
WHOLE: dict[str, Any] = raw_config(vocab_size=4096, **SMALL)
LONG = "x" * 900_000


def nested(depth: int, inside: object) -> object:
    for _ in range(depth):
        inside = {LOCAL: inside, GLOBAL: inside}
    return inside


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "100,000 kinds of layers for two": ({"layer_types": [LOCAL, GLOBAL] * 20_000}, "layer_types must name 2 layers"),
    "layers and kinds of them without end": (
        {"num_hidden_layers": 40_000, "layer_types": [LOCAL, GLOBAL] * 20_000},
        "40,000 layers of ",
    ),
    "a kind of layer of a million letters": ({"layer_types": [LOCAL, LONG]}, "layer_types must name 2 layers"),
    "rotary numbers nested 10 deep": ({"rope_parameters": nested(10, {"rope_type": "yarn"})}, "plain rotary embedding"),
    "rotary numbers for kinds that are null": ({"rope_parameters": {LOCAL: None, GLOBAL: None}}, "plain rotary"),
    "a rotary base that is not a number": ({"rope_parameters": {"rope_theta": nan}, "rope_theta": nan}, "rope_theta"),
    "a rotary type that is null": ({"rope_parameters": {"rope_type": None}}, "plain rotary embedding"),
    "rotary scaling of a million letters": ({"rope_scaling": LONG}, "is not part of Gemma 2"),
    "an activation of a million letters": ({"hidden_activation": LONG}, "activation must be gelu_pytorch_tanh"),
    "an activation that is a list": ({"hidden_activation": ["gelu_pytorch_tanh"]}, "activation must be"),
    "a model type of a million letters": ({"model_type": LONG}, "this program runs 'gemma2'"),
    "a number of a million letters": ({"hidden_size": LONG}, "hidden_size must be a positive integer"),
    "a list of numbers for one": ({"vocab_size": [4096] * 100_000}, "vocab_size must be a positive integer"),
    "tying of a million letters": ({"tie_word_embeddings": LONG}, "Gemma 2 has True"),
    "another shape for a layer": ({"per_layer_config": {"0": {"head_dim": 8}}}, "all layers of Gemma 2 have the same"),
    "a cap that is null": ({"attn_logit_softcapping": None}, "means no cap on attention scores"),
    "too many bytes": ({"id2label": {str(n): "x" * 20 for n in range(40_000)}}, "are too many for such a file"),
    "weights elsewhere": ({"transformers_weights": ["../../etc/passwd"]}, "give that file itself"),
}
# What is said of whole weights, whatever these keys hold.
QUANTIZATIONS: tuple[object, ...] = (
    *(7, "bitsandbytes", [], None, {"quant_method": 7}, {"quant_method": None}, {"quant_method": ["x"]}),
    *({"quant_method": LONG, "bits": 10**400}, {"bits": -1, "quant_method": "\x1b[31m"}, {"load_in_4bit": "yes"}),
)


def refused_in_a_child(places: dict[str, tuple[Path, str]]) -> dict[str, list[str]]:
    found = in_a_child(attempts, [str(place) for place, _ in places.values()])
    short = {
        case: complaints(attempt, place / "x", words)
        for (case, (place, words)), attempt in zip(places.items(), found, strict=True)
    }
    return {case: said for case, said in short.items() if said}


def test_configs_of_odd_values_are_refused_at_little_cost(tmp_path: Path) -> None:
    tensors = tensors_of(tiny(vocab_size=4096, **SMALL))
    places = {}
    for number, (case, (changes, words)) in enumerate(CONFIGS.items()):
        place = shell(tmp_path / str(number))
        (place / "config.json").write_text(json.dumps({**WHOLE, **changes}), encoding="utf-8")
        save_file(tensors, place / SINGLE)
        places[case] = (place, words)
    assert refused_in_a_child(places) == {}


@pytest.mark.parametrize("stated", QUANTIZATIONS, ids=range(len(QUANTIZATIONS)))
def test_whatever_a_config_says_of_quantization_whole_weights_are_read(stated: object, tmp_path: Path) -> None:
    place = shell(tmp_path / "model")
    (place / "config.json").write_text(json.dumps({**WHOLE, "quantization_config": stated}), encoding="utf-8")
    save_file(tensors_of(tiny(vocab_size=4096, **SMALL)), place / SINGLE)
    assert all(len(note) < 400 for note in gemma2.load(place, device="cpu").notes)


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in the place of a file."""

    def change(place: Path) -> object:
        (place / name).unlink(missing_ok=True)
        return make(place / name)

    return change


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def weightless(*make: Callable[[Path], object]) -> Callable[[Path], object]:
    """No weights, and something else made in the folder."""

    def change(place: Path) -> None:
        (place / SINGLE).unlink()
        for one in make:
            one(place)

    return change


def adapter(content: bytes) -> Callable[[Path], object]:
    return weightless(lambda place: (place / "adapter_config.json").write_bytes(content))


def holding(*names: str) -> Callable[[Path], object]:
    """Weights of one number each under these names."""
    return lambda place: save_file({name: torch.ones(1) for name in names}, place / SINGLE)


def snapshot(place: Path) -> None:
    (place / "snapshots" / "aa").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_bytes(bytes(range(256)) * 1000)


def checkpoints(place: Path) -> None:
    for number in range(2_000):
        (place / f"c-{number}").mkdir()
    (place / "c-1000" / "config.json").write_text("{}", encoding="utf-8")


NONE, NO_CONFIG = f"neither {SINGLE} nor ", "no config.json, and the shapes and scales of a model are never guessed"
PEFT, MERGE = "a PEFT adapter", "a model with a PEFT adapter that is not merged"
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights that link to themselves": (replaced(SINGLE, loop), NONE),
    "a config that links to itself": (replaced("config.json", loop), NO_CONFIG),
    "a folder for weights": (replaced(SINGLE, Path.mkdir), NONE),
    "a folder for a config": (replaced("config.json", Path.mkdir), NO_CONFIG),
    "a folder for a tokenizer": (replaced("tokenizer.model", Path.mkdir), "tokenizer.model"),
    "a pipe for weights": (replaced(SINGLE, os.mkfifo), NONE),
    "a pipe for pickled weights": (weightless(lambda place: os.mkfifo(place / PICKLED)), NONE),
    "a pipe for a config": (replaced("config.json", os.mkfifo), NO_CONFIG),
    "a pipe for a tokenizer": (replaced("tokenizer.model", os.mkfifo), "tokenizer.model"),
    "a folder for an adapter's config": (weightless(lambda place: (place / "adapter_config.json").mkdir()), NONE),
    "a snapshot folder that links to itself": (weightless(lambda place: loop(place / "snapshots")), NONE),
    "an adapter's config that is no JSON": (adapter(b"\xff{"), PEFT),
    "an adapter's config 100,000 deep": (adapter(b"[" * 100_000), PEFT),
    "an adapter of a list": (adapter(b'{"base_model_name_or_path": ["x"]}'), PEFT),
    "an adapter of a million letters": (
        adapter(b'{"base_model_name_or_path": "' + LONG.encode() + b'"}'),
        f"{PEFT} of 'xxx",
    ),
    "an adapter of an escape": (adapter(b'{"base_model_name_or_path": "\\u001b[31m"}'), f"{PEFT} of '\\x1b[31m'"),
    "an adapter's config of 20 MB": (adapter(b'{"a": "' + b"x" * 20_000_000), PEFT),
    "an adapter's tensors, 10,000 of them": (holding(*(f"base_model.{n}.lora_A.weight" for n in range(10_000))), MERGE),
    "names without end": (holding("a." * 100_000 + "lora_B.weight"), MERGE),
    "a name made to be slow": (holding("layers.1." * 5_000, ".".join("a" * 9_000)), "tensors do not fit the config"),
    "a cache without a snapshot": (
        weightless(lambda place: (place / "snapshots").mkdir()),
        "a folder of the Hugging Face cache: and nothing was downloaded into it",
    ),
    "a cache whose branch is binary": (weightless(snapshot), "snapshots/aa"),
    "2,000 folders, one of them a checkpoint": (weightless(checkpoints), "give {place}/c-1000"),
}


@pytest.mark.long
def test_folders_of_odd_things_are_refused_at_little_cost(tmp_path: Path) -> None:
    tensors = tensors_of(tiny(vocab_size=4096, **SMALL))
    places = {}
    for number, (case, (change, words)) in enumerate(FOLDERS.items()):
        place = shell(tmp_path / str(number))
        save_file(tensors, place / SINGLE)
        change(place)
        places[case] = (place, words.replace("{place}", str(place)))
    assert refused_in_a_child(places) == {}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["config.json", SINGLE, "tokenizer.model", "."])
def test_what_may_not_be_read_is_said(name: str, tmp_path: Path, refused: Callable[[Path, str], None]) -> None:
    place = shell(tmp_path / "model")
    save_file(tensors_of(tiny(vocab_size=4096, **SMALL)), place / SINGLE)
    (place / name).chmod(0)
    try:
        refused(place, "Permission denied")
    finally:
        (place / name).chmod(0o700)


def test_a_pipe_in_the_place_of_a_model_is_not_waited_for(tmp_path: Path, refused: Callable[[Path, str], None]) -> None:
    os.mkfifo(tmp_path / "x.bin")
    refused(tmp_path / "x.bin", "neither a file nor a folder")
    loop(tmp_path / "y.bin")
    refused(tmp_path / "y.bin", "no such file or folder")
