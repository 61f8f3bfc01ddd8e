"""What is no Gemma 2 that this program reads is named for what it is, with what to do, from Python and by inspect."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gemma2
from gemma2.checkpoints.safetensors import SINGLE
from gemma2.inspect import inspect
from tests.conftest import tensors_of, tiny

Tensors = dict[str, Tensor]
Folder = Callable[..., Path]
UP, EMBED = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 4988025760\n"


@pytest.fixture(scope="module")
def good() -> Tensors:
    return tensors_of(tiny("9b", vocab_size=4096, num_hidden_layers=1))


@pytest.fixture
def place(folder: Folder, good: Tensors) -> Path:
    return folder(tensors=good, num_hidden_layers=1, **dict.fromkeys(("hidden_size",), 112), intermediate_size=448)


def says(source: Path, *words: str) -> None:
    """`source` is refused in one short line, by load and by inspect alike."""
    with pytest.raises(gemma2.BadModelFile) as caught:
        gemma2.load(source, device="cpu", progress=False)
    line = str(caught.value)
    assert all(word in line for word in words), line
    assert line.isprintable() and len(line.replace(str(source), "")) <= 300, line
    try:
        problems = inspect(source).problems
    except gemma2.BadModelFile as error:  # of a GGUF without a header there is nothing else to say
        problems = [str(error)]
    assert [problem for problem in problems if words[0] in problem], problems


def state(place: Path, **changes: Any) -> None:
    raw = json.loads((place / "config.json").read_text(encoding="utf-8")) | changes
    (place / "config.json").write_text(json.dumps(raw), encoding="utf-8")


# Adapters.


def adapter(place: Path) -> Path:
    """What PEFT's save_pretrained writes for a LoRA."""
    place.mkdir(exist_ok=True)
    stated: dict[str, Any] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "google/gemma-2-2b",
        "bias": "none",
        "lora_alpha": 16,
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (place / "adapter_config.json").write_text(json.dumps(stated, indent=2), encoding="utf-8")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({name.format("A"): torch.ones(2, 112), name.format("B"): torch.ones(128, 2)}, place / ADAPTER)
    return place


ADAPTER = "adapter_model.safetensors"


def test_an_adapter_is_named_with_its_base_and_how_to_load_both(tmp_path: Path) -> None:
    made = adapter(tmp_path / "lora")
    cure = f"load its base with it, as gemma2.load('google/gemma-2-2b', adapter={str(made)!r})"
    says(made, "a PEFT adapter of 'google/gemma-2-2b', not a model", cure)
    says(made / ADAPTER, "a PEFT adapter of 'google/gemma-2-2b', not a model", cure)


def test_an_adapter_with_the_config_of_its_base_beside_it_is_an_adapter(place: Path) -> None:
    (place / SINGLE).unlink()
    says(adapter(place), "a PEFT adapter of 'google/gemma-2-2b', not a model")
    says(place / ADAPTER, "a PEFT adapter of 'google/gemma-2-2b', not a model")


def test_whole_weights_beside_an_adapter_are_read_which_is_said(place: Path, good: Tensors) -> None:
    loaded = gemma2.load(adapter(place), device="cpu")
    assert torch.equal(loaded.model.state_dict()[UP], good[UP])
    assert "adapter_config.json is beside whole weights: they were read without an adapter" in loaded.notes[0]


def test_a_model_with_an_adapter_inside_is_to_be_merged(place: Path, good: Tensors) -> None:
    inside = {f"base_model.model.{name}": tensor for name, tensor in good.items()}
    up = inside.pop(f"base_model.model.{UP}")
    stem = f"base_model.model.{UP.removesuffix('.weight')}"
    inside |= {f"{stem}.base_layer.weight": up, f"{stem}.lora_A.default.weight": torch.ones(2, 112)}
    save_file(inside, place / SINGLE)
    says(place, "a model with a PEFT adapter that is not merged (", "merge it with merge_and_unload()")


# Quantized models: the tensors that each program writes for one matrix, and what it adds to config.json.


def packed(plain: Tensor, **parts: Tensor) -> Tensors:
    stem = UP.removesuffix("weight")
    return {stem + name.replace("__", "."): part for name, part in parts.items()} | (
        {UP: plain} if "weight" not in parts else {}
    )


BYTES = torch.zeros(10, 1, dtype=torch.uint8)
INTS = torch.zeros(10, 4, dtype=torch.int32)
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
BNB8 = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
QUANTIZED: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "bitsandbytes in 4 bits": (
        packed(
            BYTES,
            weight__absmax=torch.ones(10),
            weight__quant_map=torch.ones(16),
            weight__quant_state__bitsandbytes__nf4=BYTES,
        ),
        {"quantization_config": BNB4},
        "quantized by bitsandbytes to 4 bits",
    ),
    "bitsandbytes in 8 bits": (
        packed(BYTES.char(), SCB=torch.ones(10), weight_format=BYTES[0, 0]),
        {"quantization_config": BNB8},
        "quantized by bitsandbytes to 8 bits",
    ),
    "bitsandbytes without a word in config.json": (
        packed(BYTES, weight__absmax=torch.ones(10)),
        {},
        "quantized by bitsandbytes,",
    ),
    "GPTQ": (
        packed(BYTES, qweight=INTS, qzeros=INTS, scales=INTS.half(), g_idx=INTS[:, 0]),
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
        "quantized by gptq to 4 bits",
    ),
    "AWQ": (
        packed(BYTES, qweight=INTS, qzeros=INTS, scales=INTS.half()),
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "quantized by awq to 4 bits",
    ),
    "GPTQ or AWQ": (packed(BYTES, qweight=INTS, qzeros=INTS, scales=INTS.half()), {}, "quantized by GPTQ or AWQ,"),
    "compressed-tensors": (
        packed(BYTES.to(torch.float8_e4m3fn), weight_scale=torch.ones(1), input_scale=torch.ones(1)),
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
        "quantized by compressed-tensors,",
    ),
    "FP8": (packed(BYTES.to(torch.float8_e4m3fn), weight_scale=torch.ones(1)), {}, "compressed-tensors or FP8,"),
    "MLX": (
        packed(BYTES, weight=INTS, scales=INTS.half(), biases=INTS.half()),
        {"quantization": {"group_size": 64, "bits": 4}},
        "quantized by MLX to 4 bits",
    ),
    "MLX, both keys": (
        packed(BYTES, weight=INTS, scales=INTS.half(), biases=INTS.half()),
        {"quantization": {"group_size": 64, "bits": 8}, "quantization_config": {"group_size": 64, "bits": 8}},
        "quantized by MLX to 8 bits",
    ),
    "torchao": (
        packed(BYTES.char()),
        {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}},
        "quantized by torchao,",
    ),
    "HQQ": (packed(BYTES, W_q=BYTES), {}, "quantized by HQQ,"),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_a_quantized_model_is_named_by_what_quantized_it(case: str, place: Path, good: Tensors) -> None:
    parts, changes, words = QUANTIZED[case]
    plain = {name: tensor for name, tensor in good.items() if name != UP}
    save_file({**plain, **{name: tensor.clone().contiguous() for name, tensor in parts.items()}}, place / SINGLE)
    state(place, **changes)
    says(place, words, "use the unquantized model, or a GGUF of it")


def test_plain_weights_whose_config_says_quantized_are_read_which_is_said(place: Path, good: Tensors) -> None:
    state(place, quantization_config=BNB4)
    loaded = gemma2.load(place, device="cpu")
    assert torch.equal(loaded.model.state_dict()[UP], good[UP])
    assert "says quantized by bitsandbytes to 4 bits, but the tensors are plain" in loaded.notes[0]


# Other models.


OTHERS: dict[str, tuple[Tensors, str]] = {
    "classifier": ({"score.weight": torch.ones(2, 112)}, "a classifier (Gemma2ForSequenceClassification)"),
    "token classifier": ({"score.weight": torch.ones(2, 112), "score.bias": torch.ones(2)}, "a classifier"),
    "older token classifier": ({"classifier.weight": torch.ones(2, 112)}, "a token classifier"),
    "value head": ({"v_head.summary.weight": torch.ones(1, 112)}, "a model with a value head"),
    "vision": ({"vision_tower.vision_model.head.weight": torch.ones(1)}, "a model with a vision tower"),
    "Gemma 3": ({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, "a Gemma 3, not a Gemma 2"),
    "DeepMind": ({"transformer/layer_0/attn/q_einsum.w": torch.ones(1)}, "under the names of DeepMind's Flax code"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_model_is_named_by_its_own_tensors(case: str, place: Path, good: Tensors) -> None:
    more, words = OTHERS[case]
    save_file({**good, **more}, place / SINGLE)
    says(place, words)


def test_a_text_encoder_in_one_file_is_read_and_its_tokenizer_is_said(place: Path, good: Tensors) -> None:
    """As ComfyUI's gemma_2_2b_fp16.safetensors."""
    save_file({**good, "spiece_model": torch.zeros(100, dtype=torch.uint8)}, place / SINGLE)
    loaded = gemma2.load(place, device="cpu")
    assert torch.equal(loaded.model.state_dict()[UP], good[UP]) and "as spiece_model, which is not" in loaded.notes[0]


def test_the_file_that_config_json_names_is_asked_for(place: Path) -> None:
    state(place, transformers_weights="other.safetensors")
    says(place, "transformers_weights names 'other.safetensors' as the weights: give that file itself")
    state(place, transformers_weights=SINGLE)
    assert gemma2.load(place, device="cpu").notes == ()


# Folders.


def test_a_folder_of_the_hubs_cache_names_the_snapshot(tmp_path: Path, place: Path) -> None:
    held = tmp_path / "models--google--gemma-2-2b"
    for commit in ("aa11", "bb22"):
        (held / "snapshots" / commit).mkdir(parents=True)
    (held / "refs").mkdir()
    says(held, f"a folder of the Hugging Face cache: give {held / 'snapshots' / 'aa11'}")
    (held / "refs" / "main").write_text("bb22", encoding="utf-8")
    says(held, f"a folder of the Hugging Face cache: give {held / 'snapshots' / 'bb22'}")
    (tmp_path / "hub").mkdir()
    held.rename(tmp_path / "hub" / held.name)
    says(tmp_path / "hub", "a Hugging Face cache of 1 models: give a name, such as google/gemma-2-2b")


def test_a_folder_of_checkpoints_names_the_last(tmp_path: Path, place: Path) -> None:
    runs = tmp_path / "run"
    for step in (500, 1000, 90):
        (runs / f"checkpoint-{step}").mkdir(parents=True)
        (runs / f"checkpoint-{step}" / "config.json").write_text("{}", encoding="utf-8")
    (runs / "runs").mkdir()
    (runs / "trainer_state.json").write_text("{}", encoding="utf-8")
    says(runs, f"no checkpoint itself, but a folder of some: give {runs / 'checkpoint-1000'}, the last of 3")


FOLDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "global_step500/": ("a DeepSpeed checkpoint", ("zero_to_fp32.py",)),
    "zero_pp_rank_0_mp_rank_00_optim_states.pt": ("a DeepSpeed checkpoint", ("zero_to_fp32.py",)),
    "pytorch_model_fsdp_0/": ("an FSDP checkpoint", ("accelerate merge-weights",)),
    "__0_0.distcp": ("an FSDP checkpoint", ("accelerate merge-weights",)),
    "optimizer.pt": ("the state of an optimizer without weights", ("give the folder",)),
    "model.weights.h5": ("a Keras model", ("export it to Hugging Face's safetensors",)),
    "flax_model.msgpack": ("a Flax checkpoint", ("export it",)),
    "_METADATA": ("a Flax checkpoint", ("export it",)),
    "model.onnx": ("an ONNX model", ("export it",)),
    "2b-it.sbs": ("weights of gemma.cpp", ("export it",)),
    "x.npz": ("NumPy arrays", ("export it",)),
    "model.safetensors.incomplete": ("a download that did not finish", ("download it again",)),
    "Unconfirmed 481.crdownload": ("a download that did not finish", ("download it again",)),
    "x.gguf": ("it holds x.gguf: give that file itself", ()),
    "x.ckpt": ("it holds x.ckpt: give that file itself", ()),
}


@pytest.mark.parametrize("config", [False, True], ids=["alone", "with config.json"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_something_else_is_named(name: str, config: bool, place: Path) -> None:
    (place / SINGLE).unlink()
    if not config:
        (place / "config.json").unlink()
    (place / name).mkdir() if name.endswith("/") else (place / name).write_bytes(b"x")
    words, cure = FOLDERS[name]
    says(place, words, *cure)


def test_shards_without_their_index_are_called_so(place: Path, good: Tensors) -> None:
    (place / SINGLE).unlink()
    half = {name: tensor for name, tensor in good.items() if "layers" in name}
    one, two = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    save_file(half, place / one)
    says(place, "it holds 1 of 2 shards, and no model.safetensors.index.json: get what is missing")
    says(place / one, f"one of the 2 shards of a model: give their folder, {place}")
    save_file({name: tensor for name, tensor in good.items() if name not in half}, place / two)
    says(place, "it holds 2 of 2 shards, and no model.safetensors.index.json")
    save_file(good, place / two)  # a whole model, whatever its name
    assert gemma2.load(place / two, device="cpu", progress=False).notes == ()


@pytest.mark.posix
@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.model", "model-00001-of-00001.safetensors"])
def test_a_link_to_a_file_that_is_gone_is_called_so(name: str, place: Path, good: Tensors) -> None:
    if name.startswith("model-"):
        (place / SINGLE).unlink()
        mapping = {"weight_map": dict.fromkeys(good, name)}
        (place / "model.safetensors.index.json").write_text(json.dumps(mapping), encoding="utf-8")
    (place / name).unlink(missing_ok=True)
    (place / name).symlink_to("../../blobs/4d7a21")
    says(place, f"{place / name}: a link to ../../blobs/4d7a21, which is not there: download it again")


# Files.


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return file.getvalue()


def saved(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def torch_saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


FILES: dict[str, tuple[str, bytes, str]] = {
    "LFS pointer": ("x.safetensors", LFS.encode(), "a Git LFS pointer, not the weights: run `git lfs pull`"),
    "LFS pointer without an ending": ("x", LFS.encode(), "a Git LFS pointer, not the weights: run `git lfs pull`"),
    "LFS pointer for a .bin": ("x.bin", LFS.encode(), "a Git LFS pointer, not the weights"),
    "LFS pointer for a GGUF": ("x.gguf", LFS.encode(), "a Git LFS pointer, not the weights"),
    "HTML": ("x.bin", b"<!doctype html><title>Sign in</title>", "an HTML page, perhaps an error page that was saved"),
    "HTML without an ending": ("model", b"\n<HTML>", "an HTML page"),
    "Keras": ("model.weights.h5", b"\x89HDF\r\n\x1a\n" + bytes(600), "an HDF5 file, as Keras writes them: export it"),
    "keras archive": ("x.keras", zipped("config.json", "model.weights.h5"), "a Keras model: export it"),
    "npz": ("x.npz", saved(a=np.ones(3)), "NumPy arrays: export it"),
    "npy": ("x.npy", b"\x93NUMPY\1\0" + bytes(100), "a NumPy array: export it"),
    "ONNX": ("x.onnx", b"\x08\x08\x12\x07pytorch", "an ONNX model: export it"),
    "msgpack": ("x.msgpack", b"\x82\xa5", "Flax weights: export it"),
    "TensorFlow Lite": ("x.bin", b"\x1c\0\0\0TFL3" + bytes(100), "a TensorFlow Lite model: export it"),
    "gemma.cpp": ("2b-it-sfp.sbs", b"SFP\0" * 10, "weights of gemma.cpp: export it"),
    "zip": ("x.zip", zipped("gemma/config.json", "gemma/model.safetensors"), "a packed archive: unpack it and give"),
    "tar.gz": ("x.tar.gz", gzip.compress(b"x"), "a packed archive: unpack it"),
    "old ggml": ("ggml-model-q4_0.bin", b"tjgg" + bytes(100), "a ggml file from before GGUF"),
    "an index": ("model.safetensors.index.json", b'{"weight_map": {}}', "a JSON file, not weights: give its folder"),
    "a config": ("config.json", b"", "a JSON file, not weights: give its folder"),
    "a tokenizer": ("tokenizer.model", b"", "a tokenizer, not weights: give its folder"),
    "an optimizer": ("optimizer.pt", torch_saved({"state": {}, "param_groups": []}), "the state of an optimizer, not"),
    "settings": ("training_args.bin", torch_saved({"lr": 1.0}), "the settings of a training run, not weights"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_of_something_else_is_named(case: str, place: Path) -> None:
    name, content, words = FILES[case]
    if content:
        (place / name).write_bytes(content)
    says(place / name, words)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", SINGLE])
@pytest.mark.parametrize("content", [LFS, "<!DOCTYPE html><html>"], ids=["LFS", "HTML"])
def test_pointers_and_pages_in_the_place_of_small_files_are_named(name: str, content: str, place: Path) -> None:
    (place / name).write_text(content, encoding="utf-8")
    says(place, "a Git LFS pointer, not the" if content == LFS else "an HTML page, perhaps an error page")


def test_a_gguf_in_the_place_of_the_weights_is_to_be_given_itself(place: Path) -> None:
    (place / SINGLE).write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    says(place, "model.safetensors: a GGUF file: give it itself")
