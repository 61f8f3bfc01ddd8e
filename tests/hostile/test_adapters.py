"""Adapters that are malformed or malicious: one line, nothing run, in bounded time, and before PEFT is imported."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

import gemma2
from gemma2.checkpoints.adapters import Plan, open_adapter, plan_for
from gemma2.checkpoints.apply_adapter import note_of
from gemma2.checkpoints.hf_config import read_config
from gemma2.errors import BadModelFile
from tests.conftest import raw_config
from tests.hostile.conftest import SMALL, Complaint

RAW = raw_config(vocab_size=4096, **SMALL)
D, Q, VOCAB = RAW["hidden_size"], RAW["num_attention_heads"] * RAW["head_dim"], RAW["vocab_size"]
PREFIX = "base_model.model."
# As PEFT 0.21 writes it, keys in its order.
CONFIG: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "google/gemma-2-2b",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
Tensors = dict[str, Tensor]
TENSORS: Tensors = {
    f"{PREFIX}model.layers.{i}.self_attn.q_proj.lora_{side}.weight": torch.ones(shape)
    for i in range(RAW["num_hidden_layers"])
    for side, shape in (("A", (4, D)), ("B", (Q, 4)))
}
A0 = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
EMBED, HEAD = f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"
ROWS = torch.ones(VOCAB, D)


def write(place: Path, config: Any = None, tensors: Tensors | None = None) -> Path:
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps(CONFIG if config is None else config), encoding="utf-8")
    save_file(TENSORS if tensors is None else tensors, place / "adapter_model.safetensors")
    return place


def plan(place: Path, merge: bool = False) -> Plan:
    return plan_for(open_adapter(place), read_config(RAW), merge=merge)


def refused(place: Path, merge: bool = False) -> str:
    """The one line with which an adapter is refused, soon."""
    started = time.perf_counter()
    with pytest.raises(BadModelFile) as failed:
        plan(place, merge)
    message = str(failed.value)
    assert message.startswith(str(place)) and message.isprintable() and len(message) < 1500
    assert time.perf_counter() - started < 5
    return message


def test_a_sound_adapter_is_taken(tmp_path: Path) -> None:
    """What the refusals below are held against."""
    found = plan(write(tmp_path / "sound"))
    assert found.targets == tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(2))
    assert found.tensors.keys() == TENSORS.keys() and not found.own_head and not found.saved
    line = note_of(open_adapter(tmp_path / "sound"), found, False)
    assert (
        line
        == f"the PEFT adapter {tmp_path / 'sound'} is in the model (LORA, on 2 modules, made for google/gemma-2-2b)"
    )


def test_what_is_no_adapter_is_called_so(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "absent")
    (tmp_path / "file").write_bytes(b"")
    assert "a file: give the folder that it is in" in refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").endswith("no adapter_config.json, so not a PEFT adapter")
    (tmp_path / "empty" / "config.json").write_text("{}", encoding="utf-8")
    assert "a whole model is no adapter" in refused(tmp_path / "empty")


TEXTS = {
    "empty": b"",
    "not JSON": b"<html>",
    "not UTF-8": b'{"peft_type": "\xff"}',
    "a list": b"[]",
    "nested": b'{"a":' * 100_000,
    "a number of 5,000 digits": b'{"r": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    place = write(tmp_path / "bad")
    (place / "adapter_config.json").write_bytes(text)
    assert "adapter_config.json: " in refused(place)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "no kind": ({"peft_type": None}, "no peft_type"),
    "a number for a kind": ({"peft_type": 7}, "no peft_type"),
    "an unknown kind": ({"peft_type": "MAGIC\n"}, "no peft_type"),
    "another kind": ({"peft_type": "VERA"}, "peft_type is VERA; applied are LORA"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "learned vectors before the prompt"),
    "a prefix": ({"peft_type": "PREFIX_TUNING"}, "learned vectors before the prompt"),
    "a classifier's": ({"task_type": "SEQ_CLS"}, "task_type must be CAUSAL_LM or null, not 'SEQ_CLS'"),
    "a list of tasks": ({"task_type": ["CAUSAL_LM"]}, "task_type must be"),
    "a text for a rank": ({"r": "4"}, "r must be a whole number"),
    "rank 0": ({"r": 0}, "r must be a whole number"),
    "a rank of true": ({"r": True}, "r must be a whole number"),
    "an endless rank": ({"r": 10**9}, "r must be a whole number"),
    "no rank": ({"r": None}, "missing r"),
    "no alpha": ({"lora_alpha": None}, "missing lora_alpha"),
    "no targets": ({"target_modules": None}, "missing target_modules"),
    "NaN for alpha": ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
    "infinity for alpha": ({"lora_alpha": float("inf")}, "lora_alpha must be a number"),
    "an alpha that no float holds": ({"lora_alpha": 10**400}, "lora_alpha must be a number"),
    "targets of numbers": ({"target_modules": [1]}, "target_modules must be a list of names"),
    "targets in an object": ({"target_modules": {"q_proj": 1}}, "target_modules must be a list of names"),
    "a pattern among the targets": ({"target_modules": [r"(\w+\s?)*$"]}, "target_modules must be a list of names"),
    "a million targets": ({"target_modules": ["q_proj"] * 10**6}, "target_modules must be a list of names"),
    "a target that Gemma 2 lacks": ({"target_modules": ["q_proj", "c_attn"]}, "target_modules has c_attn, and Gemma 2"),
    "targets that hold no matrix": ({"target_modules": ["self_attn", "norm"]}, "target_modules has self_attn, norm"),
    "no target": ({"target_modules": []}, "unknown"),
    "saved modules that Gemma 2 lacks": ({"modules_to_save": ["classifier", "score"]}, "has classifier, score"),
    "a text for saved modules": ({"modules_to_save": "all"}, "modules_to_save must be a list"),
    "a pattern of ranks": ({"rank_pattern": {"(.*)*x": 4}}, "rank_pattern must be an object from names"),
    "ranks in a list": ({"rank_pattern": [4]}, "rank_pattern must be an object from names"),
    "alphas of texts": ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern must be an object from names"),
    "a layer before the first": ({"layers_to_transform": [-1]}, "layers_to_transform must be"),
    "a text for a flag": ({"use_dora": "yes"}, "use_dora must be true or false"),
    "DoRA without magnitudes": ({"use_dora": True}, "2 missing: model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
    "a module to import": (
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        "megatron_config is {'a': 1}",
    ),
    "repeated layers": ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication is [[0, 2], [0, 2]]"),
    "transposed weights": ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    "a start that needs data": ({"init_lora_weights": "loftq"}, "init_lora_weights must be true, false"),
    "a switch that nobody knows": ({"use_magic": True}, "'use_magic' is set, and what it does is not known here"),
    "tokens beyond the last": ({"trainable_token_indices": [VOCAB]}, "trainable_token_indices are not rows"),
    "a token twice": ({"trainable_token_indices": [5, 5]}, "trainable_token_indices must be a list of token ids"),
    "tokens of another module": ({"trainable_token_indices": {"wte": [5]}}, "trainable_token_indices must be"),
    "a base that is no text": ({"base_model_name_or_path": 7}, "base_model_name_or_path must be a string"),
    "another rank than the tensors'": (
        {"r": 8},
        "4 misshapen: model.layers.0.self_attn.q_proj.lora_A.weight [4, 8]",
    ),
    "fewer targets than tensors": ({"layers_to_transform": 0}, "2 unknown: model.layers.1.self_attn.q_proj.lora_A"),
    "more targets than tensors": ({"target_modules": ["q_proj", "v_proj"]}, "4 missing: model.layers.0.self_attn.v_pr"),
}


@pytest.mark.parametrize(("changes", "words"), CHANGES.values(), ids=CHANGES.keys())
def test_a_config_that_does_not_fit_is_refused_by_what_is_wrong(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    assert words in refused(write(tmp_path / "bad", CONFIG | changes))


def test_a_pattern_of_targets_is_not_run(tmp_path: Path) -> None:
    """It would take longer than the universe has: the tensors say where the adapter goes."""
    place = write(tmp_path / "slow", CONFIG | {"target_modules": r"(([a-z_.0-9]+)+)+!"})
    assert plan(place).targets == plan(write(tmp_path / "sound")).targets


WEIGHTS: dict[str, tuple[Tensors, str]] = {
    "none": ({}, "4 missing"),
    "one too few": ({name: t for name, t in TENSORS.items() if name != A0}, "1 missing: model.layers.0.self_attn.q_"),
    "one too many": (TENSORS | {f"{PREFIX}score.weight": torch.ones(2, D)}, "1 unknown: score.weight"),
    "a long name": (TENSORS | {"x" * 5000: torch.ones(1)}, "1 unknown: xxx"),
    "of another model": (TENSORS | {A0: torch.ones(4, 2304)}, "it was made for google/gemma-2-2b"),
    "turned": (TENSORS | {A0: torch.ones(D, 4)}, f"lora_A.weight [{D}, 4] instead of [4, {D}]"),
    "a scalar": (TENSORS | {A0: torch.tensor(1.0)}, "lora_A.weight [] instead of [4"),
    "integers": (
        TENSORS | {A0: torch.ones(4, D, dtype=torch.int8)},
        "is int8, not float64, float32, bfloat16 or float16",
    ),
    "NaN": (TENSORS | {A0: torch.full((4, D), float("nan"))}, "1 tensors hold NaN or infinity: model.layers.0"),
    "infinity": (TENSORS | {A0: torch.full((4, D), float("inf"))}, "1 tensors hold NaN or infinity"),
    "one name twice": (TENSORS | {A0.removeprefix(PREFIX): torch.ones(4, D)}, "two tensors are called model.layers.0"),
    "an embedding of another size": (
        TENSORS | {EMBED: torch.ones(VOCAB + 2, D)},
        f"its embedding has {VOCAB + 2:,} rows",
    ),
    "an embedding and a head of two sizes": (
        TENSORS | {EMBED: torch.ones(VOCAB + 1, D), HEAD: torch.ones(VOCAB + 2, D)},
        f"{D}] instead of [{VOCAB}",
    ),
    "a copy unlike its embedding": (
        TENSORS | {EMBED: ROWS, EMBED.replace("weight", "modules_to_save.weight"): ROWS * 2},
        "model.embed_tokens.modules_to_save.weight differs from model.embed_tokens.weight",
    ),
    "a copy of nothing": (TENSORS | {HEAD.replace("weight", "original_module.weight"): ROWS}, "and they are one"),
    "a head unlike its embedding": (TENSORS | {EMBED: ROWS, HEAD: ROWS * 2}, "lm_head.weight differs from model.embed"),
}


@pytest.mark.parametrize(("tensors", "words"), WEIGHTS.values(), ids=WEIGHTS.keys())
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, tensors: Tensors, words: str) -> None:
    assert words in refused(write(tmp_path / "bad", tensors=tensors))


def test_an_adapter_that_parts_head_and_embedding_is_not_merged(tmp_path: Path) -> None:
    place = write(tmp_path / "apart", CONFIG | {"modules_to_save": ["embed_tokens"]}, TENSORS | {EMBED: ROWS})
    assert plan(place).own_head
    assert "load it without merging (merge_adapter=False)" in refused(place, merge=True)
    stated = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    tied = write(tmp_path / "tied", CONFIG | stated, TENSORS | {EMBED: ROWS, HEAD: ROWS.clone()})
    found = plan(tied, merge=True)
    assert not found.own_head and HEAD not in found.tensors and found.saved == ("model.embed_tokens",)


class Caller:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "an empty file": (lambda: b"", "an empty file"),
    "an LFS pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a Git LFS pointer",
    ),
    "a page": (lambda: b"<!DOCTYPE html><html></html>", "an HTML page"),
    "cut off": (lambda: save(TENSORS)[:-9], "not a whole safetensors file"),
    "cut in its header": (lambda: save(TENSORS)[:90], "not a whole safetensors file"),
    "an endless header": (lambda: (2**62).to_bytes(8, "little") + b"{}", "not a whole safetensors file"),
    "noise": (lambda: bytes(range(256)) * 4, "not a whole safetensors file"),
}


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=FILES.keys())
def test_a_weight_file_that_is_none_is_called_what_it_is(
    tmp_path: Path, content: Callable[[], bytes], words: str
) -> None:
    place = write(tmp_path / "bad")
    (place / "adapter_model.safetensors").write_bytes(content())
    assert words in refused(place)
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")
    assert (words if words.startswith(("a ", "an ")) else "adapter_model.bin: ") in refused(place)
    (place / "adapter_model.bin").unlink()
    assert "neither adapter_model.safetensors nor adapter_model.bin" in refused(place)


def test_a_pickle_that_calls_something_is_refused_and_nothing_is_called(tmp_path: Path) -> None:
    place = write(tmp_path / "bad")
    (place / "adapter_model.safetensors").unlink()
    target = tmp_path / "called"
    for number, write_it in enumerate((torch.save, lambda it, to: to.write_bytes(pickle.dumps(it)))):
        write_it({**TENSORS, "x": Caller(target)}, place / "adapter_model.bin")
        assert "adapter_model.bin: " in refused(place) and not target.exists(), number
    os.mkdir(target)  # what it would have done


NAMELESS = "1 tensors without a name or without plain values"
ODD: dict[str, tuple[Any, str]] = {
    "a list": ([1], "no model_state_dict of tensors in it"),
    "a tensor": (torch.ones(2), "no model_state_dict of tensors in it"),
    "values that are no tensors": ({"a": 1}, "no model_state_dict of tensors in it: 'a' is of type int"),
    "names that are no texts": ({1: torch.ones(2)}, NAMELESS),
    "integers": ({A0: torch.ones(4, D, dtype=torch.int64)}, f"{A0} is int64, not float64, float32, bfloat16"),
    "sparse": ({A0: torch.ones(4, D).to_sparse()}, NAMELESS),
    "without values": ({A0: torch.ones(4, D, device="meta")}, NAMELESS),
}


@pytest.mark.parametrize("case", ODD)
def test_a_pickle_of_anything_but_plain_tensors_is_refused(case: str, tmp_path: Path) -> None:
    place, (content, said) = write(tmp_path / "bad"), ODD[case]
    (place / "adapter_model.safetensors").unlink()
    torch.save(content, place / "adapter_model.bin")
    assert f"adapter_model.bin: {said}" in refused(place)


def test_loading_refuses_a_bad_adapter_before_the_model_is_looked_at(tmp_path: Path, complaint: Complaint) -> None:
    place = write(tmp_path / "bad", CONFIG | {"r": 0})
    with pytest.raises(BadModelFile, match="r must be a whole number"):
        gemma2.load(tmp_path / "no such model", adapter=place)
    line = complaint("generate", "x", "--model", tmp_path / "no such model", "--adapter", place, code=1)
    assert "r must be a whole number" in line
    line = complaint("convert", tmp_path / "no such model", tmp_path / "x.gguf", "--adapter", place, code=1)
    assert "r must be a whole number" in line and not (tmp_path / "x.gguf").exists()


def test_arguments_that_cannot_be_together_are_refused(tmp_path: Path, pocket: gemma2.Gemma) -> None:
    place = write(tmp_path / "sound")
    with pytest.raises(ValueError, match="merge_adapter says to merge an adapter, and none is given"):
        gemma2.load(merge_adapter=True)
    for options in ({"numerics": "llama.cpp"}, {"make": lambda path, module: None}):
        with pytest.raises(ValueError, match="an adapter goes around Gemma 2's own modules"):
            gemma2.load(adapter=place, **options)
    with pytest.raises(ValueError, match="adapter= is for a source that is loaded"):
        gemma2.convert(pocket, tmp_path / "x.gguf", adapter=place)


@pytest.mark.skipif(find_spec("peft") is not None, reason="PEFT is installed")
def test_without_peft_the_line_says_what_to_install(tmp_path: Path, complaint: Complaint) -> None:
    place = write(tmp_path / "sound")
    with pytest.raises(ImportError, match="an adapter is applied by PEFT, which is not installed: pip install peft"):
        gemma2.load(tmp_path / "no such model", adapter=place)
    assert "pip install peft" in complaint("generate", "x", "--adapter", place, code=1)
