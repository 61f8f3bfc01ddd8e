"""What a folder, a file and a tensor's name mean: as in transformers where that reads them, and named where not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor

import gemma2
from gemma2.checkpoints.checkpoint import form_of
from gemma2.checkpoints.dtypes import stored_name
from gemma2.checkpoints.folder import ORDER, PICKLED, PICKLED_INDEX
from gemma2.checkpoints.google import fused
from gemma2.checkpoints.names import own_names
from gemma2.checkpoints.safetensors import INDEX, SINGLE
from gemma2.inspect import inspect
from tests.conftest import ids, tensors_of, tiny

Tensors = dict[str, Tensor]
Folder = Callable[..., Path]
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def good() -> Tensors:
    return tensors_of(tiny(vocab_size=4096, num_hidden_layers=2))


@pytest.fixture(scope="module")
def other() -> Tensors:
    return tensors_of(tiny(vocab_size=4096, num_hidden_layers=2, seed=1))


@pytest.fixture
def bare(folder: Folder, good: Tensors) -> Path:
    """A folder with everything but weights."""
    place = folder(tensors=good, num_hidden_layers=2)
    (place / SINGLE).unlink()
    return place


def write(path: Path, tensors: Tensors) -> None:
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def shard(place: Path, tensors: Tensors, index: str, **listed: str | None) -> None:
    """Two shards and their index, in which the keywords change where a tensor is said to be."""
    ending = ".safetensors" if index == INDEX else ".bin"
    files = {name: f"model-{1 if '.0.' in name else 2:05}-of-00002{ending}" for name in tensors}
    for file in sorted(set(files.values())):
        write(place / file, {name: tensors[name] for name in tensors if files[name] == file})
    stated = {**files, **{name.replace("__", "."): file for name, file in listed.items()}}
    mapping = {name: file for name, file in stated.items() if file is not None}
    (place / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapping}), encoding="utf-8")


def same(loaded: gemma2.Gemma, tensors: Tensors) -> bool:
    state = loaded.model.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in state)


def in_transformers(place: Path) -> Any:
    transformers = pytest.importorskip(
        "transformers", reason="the live comparison needs the extra gemma2[transformers]"
    )
    with torch.no_grad():
        model = transformers.Gemma2ForCausalLM.from_pretrained(place, attn_implementation="eager", dtype="auto").eval()
        return model(ids(1, 40), use_cache=False).logits


@torch.no_grad()
def means_the_same_as_in_transformers(place: Path) -> gemma2.Gemma:
    loaded = gemma2.load(place, device="cpu", progress=False)
    assert torch.equal(loaded.model(ids(1, 40)), in_transformers(place))
    return loaded


# Which weights a folder means.


@pytest.mark.parametrize("kept", [ORDER[n:] for n in range(4)], ids=lambda kept: f"from {kept[0]}")
def test_of_several_weights_a_folder_means_those_that_transformers_takes(
    kept: tuple[str, ...], bare: Path, good: Tensors, other: Tensors
) -> None:
    for name in kept:
        tensors = good if name == kept[0] else other
        shard(bare, tensors, name) if name in (INDEX, PICKLED_INDEX) else write(bare / name, tensors)
    loaded = means_the_same_as_in_transformers(bare)
    assert same(loaded, good)
    said = [note for note in loaded.notes if f"{bare / kept[0]} is used, as transformers does, and not " in note]
    assert len(said) == (len(kept) > 1) and all(name in note for note in said for name in kept[1:])
    assert form_of(bare) == ("safetensors" if kept[0] in (SINGLE, INDEX) else "bin")


def test_an_index_none_of_whose_shards_is_there_does_not_stop_the_single_file(bare: Path, good: Tensors) -> None:
    shard(bare, good, INDEX)
    for path in bare.glob("model-*"):
        path.unlink()
    write(bare / SINGLE, good)
    assert same(means_the_same_as_in_transformers(bare), good)


@pytest.mark.parametrize("index", [INDEX, PICKLED_INDEX])
def test_the_head_may_be_in_the_index_or_in_a_shard_alone(index: str, bare: Path, good: Tensors) -> None:
    ending = index.split(".")[1]
    shard(bare, good, index, lm_head__weight=f"model-00002-of-00002.{ending}")
    assert means_the_same_as_in_transformers(bare).notes == ()
    shard(bare, good | {HEAD: good[EMBED].clone()}, index, lm_head__weight=None)
    assert means_the_same_as_in_transformers(bare).notes == ()
    shard(bare, good | {HEAD: good[EMBED] + 1}, index, lm_head__weight=None)
    with pytest.raises(gemma2.BadModelFile, match=r"lm_head\.weight differs from the embedding"):
        gemma2.load(bare)


def test_rotary_tables_may_be_in_the_index_or_in_a_shard_alone(bare: Path, good: Tensors) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    shard(bare, good, INDEX, **{name.replace(".", "__"): "model-00001-of-00002.safetensors"})
    assert means_the_same_as_in_transformers(bare).notes == ()
    shard(bare, good | {name: torch.ones(8)}, INDEX, **{name.replace(".", "__"): None})
    assert means_the_same_as_in_transformers(bare).notes == ()


@pytest.mark.parametrize("index", [INDEX, PICKLED_INDEX])
def test_an_index_that_says_the_wrong_shard_is_no_fault_if_the_shards_have_each_tensor_once(
    index: str, bare: Path, good: Tensors
) -> None:
    ending = index.split(".")[1]
    shard(bare, good, index, model__norm__weight=f"model-00001-of-00002.{ending}", model__embed_tokens__weight=None)
    loaded = means_the_same_as_in_transformers(bare)
    assert same(loaded, good)
    assert f"does not say where 2 tensors are ({EMBED}, {NORM})" in loaded.notes[0]


def test_a_tensor_in_two_shards_is_taken_if_both_have_the_same_values(bare: Path, good: Tensors) -> None:
    shard(bare, good, INDEX)
    first = {name: tensor for name, tensor in good.items() if ".0." in name}
    write(bare / "model-00001-of-00002.safetensors", first | {NORM: good[NORM]})
    assert same(means_the_same_as_in_transformers(bare), good)
    write(bare / "model-00001-of-00002.safetensors", first | {NORM: good[NORM] + 1})
    with pytest.raises(gemma2.BadModelFile, match=r"tensor model\.norm\.weight is also in .*, with other values"):
        gemma2.load(bare)


def test_other_weights_in_a_folder_are_named(bare: Path, good: Tensors) -> None:
    write(bare / "model.fp16.safetensors", good)
    with pytest.raises(gemma2.BadModelFile, match=r"it holds model\.fp16\.safetensors: give that file itself"):
        gemma2.load(bare)
    assert same(gemma2.load(bare / "model.fp16.safetensors", device="cpu"), good)


# Names.


def with_steps(*steps: str) -> Callable[[str], str]:
    """Wrappers' names before every step of a name that is a module's."""

    def named(name: str) -> str:
        for step in steps:
            name = name.replace("layers.0.", f"layers.0.{step}.").replace("mlp.", f"mlp.{step}.")
        return f"{steps[0]}.{name}"

    return named


NAMES: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "DDP of torch.compile": lambda name: f"module._orig_mod.{name}",
    "torch.compile of DDP": lambda name: f"_orig_mod.module.{name}",
    "layers compiled one by one": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "FSDP": with_steps("_fsdp_wrapped_module"),
    "FSDP with checkpointing": with_steps("_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    "DDP of all": lambda name: "module." + with_steps("_orig_mod", "_checkpoint_wrapped_module")(name),
    "Gemma2Model": lambda name: name.removeprefix("model."),
    "Gemma2Model in DDP": lambda name: "module." + name.removeprefix("model."),
    "PEFT, merged and not unloaded": lambda name: f"base_model.model.{name}",
    "a larger model": lambda name: f"language_model.{name}",
    "a larger model of today": lambda name: name.replace("model.", "model.language_model."),
    "Lightning": lambda name: f"model.{name}",
    "half with their prefix": lambda name: name.removeprefix("model.") if "mlp" in name else name,
}
OUTER = {
    "PEFT, merged and not unloaded": "base_model.model.",
    "a larger model": "language_model.",
    "a larger model of today": "model.language_model.",
    "Lightning": "model.",
}


@pytest.mark.parametrize("file", [SINGLE, PICKLED, "m.ckpt"])
@pytest.mark.parametrize("kind", NAMES)
def test_prefixes_of_training_programs_and_of_larger_models_are_understood(
    kind: str, file: str, bare: Path, good: Tensors
) -> None:
    renamed = {NAMES[kind](name): tensor for name, tensor in good.items()}
    assert renamed.keys() != good.keys() and len(renamed) == len(good)
    write(bare / file, renamed)
    loaded = gemma2.load(bare if file in ORDER else bare / file, device="cpu", progress=False)
    assert same(loaded, good)
    if file != "m.ckpt":
        said = [note for note in loaded.notes if "without the prefix" in note]
        assert [repr(OUTER[kind]) in note for note in said] == [True] * (kind in OUTER)


def test_the_names_without_a_head_mean_the_same_as_in_transformers(bare: Path, good: Tensors) -> None:
    for kind in ("Gemma2Model", "half with their prefix"):
        write(bare / SINGLE, {NAMES[kind](name): tensor for name, tensor in good.items()})
        assert same(means_the_same_as_in_transformers(bare), good)


def test_google_names_in_a_wrapper_are_understood(bare: Path, good: Tensors) -> None:
    state = {f"module.{name}": torch.cat([good[part] for part in parts]) for name, parts in fused(good).items()}
    torch.save({"model_state_dict": state}, bare / "x.ckpt")
    assert same(gemma2.load(bare / "x.ckpt", device="cpu"), good)


def test_messages_have_the_names_of_the_file(bare: Path, good: Tensors) -> None:
    renamed = {NAMES["FSDP"](name): tensor for name, tensor in good.items()}
    write(bare / SINGLE, renamed | {"_fsdp_wrapped_module.model.norm.weight": good[NORM] * float("nan")})
    with pytest.raises(gemma2.BadModelFile, match=r"NaN or infinity in float32: _fsdp_wrapped_module\.model\.norm"):
        gemma2.load(bare)


@pytest.mark.parametrize("index", [INDEX, PICKLED_INDEX])
def test_shards_may_be_in_a_folder_below_the_index(index: str, bare: Path, good: Tensors) -> None:
    shard(bare, good, index)
    stated = json.loads((bare / index).read_text(encoding="utf-8"))
    one = stated["weight_map"][NORM]
    (bare / "below").mkdir()
    (bare / one).rename(bare / "below" / one)
    stated["weight_map"] = {
        name: f"below/{one}" if file == one else file for name, file in stated["weight_map"].items()
    }
    (bare / index).write_text(json.dumps(stated), encoding="utf-8")
    loaded = means_the_same_as_in_transformers(bare)
    assert same(loaded, good) and loaded.notes == ()


# Which of two tied tensors is there.


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_a_head_without_an_embedding_is_the_embedding_as_save_model_writes_it(
    prefix: str, bare: Path, good: Tensors
) -> None:
    transformers = pytest.importorskip("transformers", reason="it makes the tied model that is saved")
    write(bare / SINGLE, good)
    model = transformers.Gemma2ForCausalLM.from_pretrained(bare)
    saved = torch.nn.ModuleDict({"language_model": model}) if prefix else model
    save_model(saved, str(bare / SINGLE))
    assert prefix + HEAD in load_file(bare / SINGLE) and prefix + EMBED not in load_file(bare / SINGLE)
    loaded = gemma2.load(bare, device="cpu", progress=False) if prefix else means_the_same_as_in_transformers(bare)
    assert same(loaded, good) and len(loaded.notes) == bool(prefix)  # the note about the prefix
    assert inspect(bare).problems == []
    again = gemma2.convert(bare, bare / "out", progress=False).path
    assert load_file(again / SINGLE).keys() == good.keys()


@pytest.mark.parametrize("index", [None, INDEX, PICKLED_INDEX])
def test_a_head_without_an_embedding_is_noted_where_the_file_does_not_say_that_they_are_one(
    index: str | None, bare: Path, good: Tensors
) -> None:
    tensors = {HEAD if name == EMBED else name: tensor for name, tensor in good.items()}
    if index is None:
        write(bare / PICKLED, tensors)
    else:
        shard(bare, tensors, index, model__embed_tokens__weight=f"model-00002-of-00002.{index.split('.')[1]}")
    loaded = means_the_same_as_in_transformers(bare)
    assert same(loaded, good)
    assert [note.split(" holds ")[1] for note in loaded.notes] == [
        "lm_head.weight and no embedding: in Gemma 2 they are one, so it is both"
    ]


def test_what_is_wrong_with_a_head_that_is_the_embedding_is_said_by_its_name(bare: Path, good: Tensors) -> None:
    tensors = {HEAD if name == EMBED else name: tensor for name, tensor in good.items()}
    write(bare / SINGLE, tensors | {HEAD: good[EMBED][:-1]})
    with pytest.raises(gemma2.BadModelFile, match=r"1 misshapen: lm_head\.weight \[4095, "):
        gemma2.load(bare)
    write(bare / SINGLE, tensors)
    stated = json.loads((bare / "config.json").read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
    (bare / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    with pytest.raises(gemma2.BadModelFile, match=r"and only lm_head\.weight is stored, not model\.embed_tokens"):
        gemma2.load(bare)


def test_two_names_of_one_tensor_are_refused_by_name(bare: Path, good: Tensors) -> None:
    write(bare / SINGLE, good | {"norm.weight": good[NORM].clone()})
    with pytest.raises(gemma2.BadModelFile, match=r"model\.norm\.weight and norm\.weight are the same tensor"):
        gemma2.load(bare)


def test_what_has_several_prefixes_keeps_its_names() -> None:
    names = ["policy.model.norm.weight", "reference.model.norm.weight", "stray"]
    assert own_names(names, "x") == {name: name for name in names}


# PyTorch's files.


@pytest.mark.parametrize("file", ["x.bin", "x.pt", "x.pth", "x"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pytorch_file_is_read_whatever_its_name(file: str, legacy: bool, bare: Path, good: Tensors) -> None:
    torch.save(good, bare / file, _use_new_zipfile_serialization=not legacy)
    assert form_of(bare / file) == "bin"
    assert same(gemma2.load(bare / file, device="cpu", progress=False), good)


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model", "module"])
def test_the_weights_inside_a_training_programs_file_are_found(key: str, bare: Path, good: Tensors) -> None:
    torch.save({key: good, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}, bare / "x.pt")
    assert same(gemma2.load(bare / "x.pt", device="cpu", progress=False), good)


def test_a_head_that_shares_the_embeddings_memory_is_no_fault(bare: Path, good: Tensors) -> None:
    torch.save(good | {HEAD: good[EMBED]}, bare / PICKLED)
    assert same(means_the_same_as_in_transformers(bare), good)


def test_parameters_that_need_gradients_and_views_are_read(bare: Path, good: Tensors) -> None:
    state = {name: torch.nn.Parameter(tensor.T.contiguous().T) for name, tensor in good.items()}
    torch.save(state, bare / PICKLED)
    loaded = gemma2.load(bare, device="cpu")
    assert same(loaded, good) and loaded.notes == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pickled_folder_of_16_bits_means_the_same_as_in_transformers(
    dtype: torch.dtype, bare: Path, good: Tensors
) -> None:
    torch.save({name: tensor.to(dtype) for name, tensor in good.items()}, bare / PICKLED)
    loaded = gemma2.load(bare, device="cpu", dtype="float32" if dtype == torch.float16 else None)
    assert same(loaded, {name: t.to(dtype).to(loaded.model.model.norm.weight.dtype) for name, t in good.items()})
    if dtype == torch.bfloat16:
        means_the_same_as_in_transformers(bare)


# Dtypes that few checkpoints have.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("file", [SINGLE, PICKLED])
def test_float64_and_plain_float8_are_read_as_in_transformers(
    file: str, dtype: torch.dtype, bare: Path, good: Tensors
) -> None:
    stored = {name: t.to(dtype if t.ndim > 1 or dtype == torch.float64 else torch.bfloat16) for name, t in good.items()}
    write(bare / file, stored)
    loaded = gemma2.load(bare, device="cpu", progress=False)
    own = torch.float64 if dtype == torch.float64 else torch.bfloat16
    assert loaded.model.dtype == own and same(loaded, {name: tensor.to(own) for name, tensor in stored.items()})
    assert len(loaded.notes) == 1 and ("float8 (FP8)" if dtype.itemsize == 1 else "holds float64") in loaded.notes[0]
    transformers = pytest.importorskip("transformers", reason="the live comparison needs gemma2[transformers]")
    theirs = transformers.Gemma2ForCausalLM.from_pretrained(bare, dtype=own).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in loaded.model.state_dict().items())
    narrow = gemma2.load(bare, device="cpu", dtype="float32", progress=False)
    assert same(narrow, {name: tensor.float() for name, tensor in stored.items()})
    found = inspect(bare)
    assert found.problems == [] and set(found.types) == (
        {"F64"} if own == torch.float64 else {"BF16", stored_name(dtype)}
    )
    again = gemma2.convert(bare, bare / "out", progress=False)
    assert same(gemma2.load(again.path, device="cpu", progress=False), loaded.model.state_dict())
    assert not any("quantized" in note or "rounded" in note for note in again.notes)


def test_a_few_tensors_of_float64_are_named(bare: Path, good: Tensors) -> None:
    write(bare / SINGLE, good | {NORM: good[NORM].double()})
    loaded = gemma2.load(bare, device="cpu", progress=False)
    assert same(loaded, good) and "1 tensors are float64 (model.norm.weight)" in loaded.notes[0]


def test_float8_of_a_model_that_was_quantized_is_refused_without_its_scales(bare: Path, good: Tensors) -> None:
    write(bare / SINGLE, good | {name: t.to(torch.float8_e4m3fn) for name, t in good.items() if "proj" in name})
    stated = json.loads((bare / "config.json").read_text(encoding="utf-8"))
    stated["quantization_config"] = {"quant_method": "fp8"}
    (bare / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    with pytest.raises(gemma2.BadModelFile, match=r"float8 \(FP8\) without scales, .* quantized by fp8: use the unq"):
        gemma2.load(bare)


# The form goes by the content.


@pytest.mark.parametrize("name", ["sha256-ff", "x.GGUF", "x.bin", "x.safetensors", "x.ckpt"])
def test_a_file_that_begins_as_a_gguf_is_one_whatever_its_name(name: str, bare: Path, good: Tensors) -> None:
    stated = json.loads((bare / "config.json").read_text(encoding="utf-8")) | {
        "query_pre_attn_scalar": 16
    }  # as a GGUF can state it
    (bare / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    write(bare / SINGLE, good)
    path = gemma2.convert(bare, bare / "x.gguf.gguf", progress=False).path.rename(bare / name)
    assert form_of(path) == "gguf"
    loaded = gemma2.load(path, device="cpu", progress=False)
    assert same(loaded, good)
    found = inspect(path)
    assert (found.form, found.problems) == ("gguf", [])
    copied = gemma2.load(gemma2.convert(path, bare / "out", progress=False).path, device="cpu")
    assert same(copied, good)


@pytest.mark.parametrize("name", ["x", "x.bin", "x.ckpt", "x.SAFETENSORS"])
def test_a_safetensors_file_is_one_whatever_its_name(name: str, bare: Path, good: Tensors) -> None:
    write(bare / SINGLE, good)
    path = (bare / SINGLE).rename(bare / name)
    assert form_of(path) == "safetensors" and inspect(path).form == "safetensors"
    assert same(gemma2.load(path, device="cpu", progress=False), good)


@pytest.mark.parametrize("name", ["x", "x.pt", "x.ckpt", "x.CKPT"])
def test_googles_file_is_one_whatever_its_name(name: str, bare: Path, good: Tensors) -> None:
    state = {name: torch.cat([good[part] for part in parts]) for name, parts in fused(good).items()}
    torch.save({"model_state_dict": state}, bare / name)
    assert form_of(bare / name) == "ckpt" and inspect(bare / name).form == "ckpt"
    assert same(gemma2.load(bare / name, device="cpu", progress=False), good)


def test_inspect_calls_a_pickled_folder_right_and_says_what_was_chosen(bare: Path, good: Tensors) -> None:
    write(bare / PICKLED, {NAMES["a larger model"](name): tensor for name, tensor in good.items()})
    shard(bare, good, PICKLED_INDEX)
    found = inspect(bare)
    assert (found.form, found.problems, set(found.types)) == ("bin", [], {"F32"})
    assert [note.split(str(bare))[0] for note in found.filled] == ["", "the tensors of "]
    assert found.tensors[0].name.startswith("language_model.model.")
