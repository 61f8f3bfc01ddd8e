"""One door: every way in gives the same model, in the dtype and place asked for, within its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gemma2
from gemma2.checkpoints.gguf_weights import llama_cpp_name
from gemma2.checkpoints.gguf_write import BLOCKS, architecture_metadata, header_bytes, padding
from gemma2.checkpoints.hf_config import read_config
from gemma2.checkpoints.weights import shapes_of
from gemma2.load import POCKET
from tests.conftest import ids, raw_config, tensors_of, tiny

Folder = Callable[..., Path]


def same(a: gemma2.Gemma, tensors: dict[str, torch.Tensor]) -> bool:
    state = a.model.state_dict()
    return set(state) == set(tensors) and all(torch.equal(state[name], tensors[name]) for name in state)


def test_a_folder_and_its_file_give_the_stored_tensors(folder: Folder) -> None:
    place = folder()
    stored = load_file(place / "model.safetensors")
    assert same(gemma2.load(place), stored)
    assert same(gemma2.load(str(place / "model.safetensors")), stored)


def test_shards_with_an_index_give_the_same_model(folder: Folder) -> None:
    place = folder()
    stored = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    names = sorted(stored)
    index: dict[str, str] = {}
    for part in range(3):
        file = f"model-{part + 1:05}-of-00003.safetensors"
        save_file({name: stored[name] for name in names[part::3]}, place / file)
        index |= dict.fromkeys(names[part::3], file)
    (place / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8"
    )
    assert same(gemma2.load(place), stored)


def to_google(tensors: dict[str, torch.Tensor], int8: bool = False) -> dict[str, torch.Tensor]:
    """Hugging Face's names to those of gemma_pytorch, q, k and v fused, matrices perhaps int8 with row scales."""
    state = {name: tensor for name, tensor in tensors.items() if not any(f"{x}_proj" in name for x in "qkv")}
    state["embedder.weight"] = state.pop("model.embed_tokens.weight")
    depth = sum(name.endswith("q_proj.weight") for name in tensors)
    for i in range(depth):
        stem = f"model.layers.{i}.self_attn."
        state[f"{stem}qkv_proj.weight"] = torch.cat([tensors[f"{stem}{x}_proj.weight"] for x in "qkv"])
    if int8:
        for name in [name for name, tensor in state.items() if tensor.ndim == 2]:
            scale = state[name].abs().amax(dim=1) / 127
            state[name], state[f"{name}_scaler"] = (state[name] / scale[:, None]).round().to(torch.int8), scale
    return {**state, "freqs_cis": torch.zeros(4, 8, dtype=torch.complex64)}


@pytest.mark.parametrize("wrapped", [True, False])
def test_googles_ckpt_gives_the_same_model(folder: Folder, wrapped: bool) -> None:
    place = folder()
    stored = load_file(place / "model.safetensors")
    state = to_google(stored)
    torch.save({"model_state_dict": state} if wrapped else state, place / "model.ckpt")
    assert same(gemma2.load(place / "model.ckpt"), stored)


def test_googles_int8_ckpt_is_weight_times_scale(folder: Folder) -> None:
    place = folder()
    stored = load_file(place / "model.safetensors")
    state = to_google(stored, int8=True)
    torch.save({"model_state_dict": state}, place / "model.ckpt")
    loaded = gemma2.load(place / "model.ckpt").model.state_dict()
    wide = state["embedder.weight"].float() * state["embedder.weight_scaler"][:, None]
    assert torch.equal(loaded["model.embed_tokens.weight"], wide)
    for name, tensor in stored.items():
        assert (loaded[name] - tensor).abs().max() <= tensor.abs().max() / 200, name


def test_a_ckpt_without_config_of_no_published_size_is_refused(folder: Folder) -> None:
    place = folder()
    torch.save(to_google(load_file(place / "model.safetensors")), place / "model.ckpt")
    (place / "config.json").unlink()
    with pytest.raises(gemma2.BadModelFile, match=r"put its config.json beside it"):
        gemma2.load(place / "model.ckpt")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_dtype_is_the_checkpoints_own_unless_asked(folder: Folder, stored: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in tensors_of(tiny(vocab_size=4096)).items()}
    place = folder(tensors=tensors)
    assert gemma2.load(place).model.model.norm.weight.dtype == stored
    for name, wanted in {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}.items():
        for spelling in (name, wanted):
            loaded = gemma2.load(place, dtype=spelling, device="cpu")
            assert same(loaded, {name: tensor.to(wanted) for name, tensor in tensors.items()})


def test_float16_weights_run_in_float32_which_is_said_and_in_float16_only_if_forced(folder: Folder) -> None:
    tensors = {name: tensor.half() for name, tensor in tensors_of(tiny(vocab_size=4096)).items()}
    place = folder(tensors=tensors)
    with pytest.raises(ValueError, match="65,504"):
        gemma2.load(place, dtype="float16")
    loaded = gemma2.load(place, device="cpu")
    assert same(loaded, {name: tensor.float() for name, tensor in tensors.items()})
    assert {tensor.dtype for tensor in loaded.model.state_dict().values()} == {torch.float32}
    assert len(loaded.notes) == 1 and f"{place} holds float16, in which Gemma 2 overflows" in loaded.notes[0]
    assert gemma2.load(place, dtype="bfloat16").model.model.norm.weight.dtype == torch.bfloat16
    assert gemma2.load(place, dtype="bfloat16").notes == ()
    assert gemma2.load(place, force_float16=True).model.model.norm.weight.dtype == torch.float16


def test_redundant_tensors_are_tolerated_only_when_they_are_redundant(folder: Folder) -> None:
    tensors = tensors_of(tiny(vocab_size=4096))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    assert same(gemma2.load(folder("same", tensors=tensors | extra | head)), tensors)
    untied = gemma2.load(folder("untied", tensors=tensors | head, tie_word_embeddings=False))
    assert same(untied, tensors) and "tie_word_embeddings false: the head is read as the embedding" in untied.notes[0]
    with pytest.raises(gemma2.BadModelFile, match=r"tie_word_embeddings is False, and no lm_head.weight is stored"):
        gemma2.load(folder("headless", tensors=tensors, tie_word_embeddings=False))
    head["lm_head.weight"][4095, 287] += 1
    with pytest.raises(gemma2.BadModelFile, match=r"lm_head.weight differs from the embedding"):
        gemma2.load(folder("other", tensors=tensors | head))


def test_missing_extra_misshapen_and_non_finite_tensors_are_named_first_five(folder: Folder) -> None:
    tensors = tensors_of(tiny(vocab_size=4096))
    gone = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    with pytest.raises(gemma2.BadModelFile, match=r"11 missing: (model\.layers\.1\.\S+, ){4}\S+ \.\.\.$"):
        gemma2.load(folder("gone", tensors=gone))
    with pytest.raises(gemma2.BadModelFile, match=r"1 unknown: model\.layers\.9\.stray"):
        gemma2.load(folder("stray", tensors=tensors | {"model.layers.9.stray": torch.ones(2)}))
    bent = tensors | {"model.norm.weight": torch.ones(287)}
    with pytest.raises(gemma2.BadModelFile, match=r"1 misshapen: model.norm.weight \[287\] instead of \[288\]"):
        gemma2.load(folder("bent", tensors=bent))
    whole = tensors | {"model.norm.weight": torch.ones(288, dtype=torch.int32)}
    with pytest.raises(gemma2.BadModelFile, match=r"1 not floating-point: model\.norm\.weight \(int32\)"):
        gemma2.load(folder("whole", tensors=whole))
    nonfinite = {name: tensor.clone() for name, tensor in tensors.items()}
    nonfinite["model.norm.weight"][3] = torch.nan
    nonfinite["model.embed_tokens.weight"][5, :2] = torch.inf
    place = folder("nonfinite", tensors=nonfinite)
    with pytest.raises(
        gemma2.BadModelFile,
        match=r"2 tensors hold NaN or infinity in float32: model.embed_tokens.weight \(2\), model.norm.weight \(1\)",
    ):
        gemma2.load(place)
    assert gemma2.load(place, allow_nonfinite=True).model.model.norm.weight[3].isnan()


def test_a_value_that_becomes_infinite_in_the_asked_dtype_is_refused(folder: Folder) -> None:
    tensors = tensors_of(tiny(vocab_size=4096))
    tensors["model.norm.weight"][0] = 1e5
    place = folder(tensors=tensors)
    gemma2.load(place)
    with pytest.raises(gemma2.BadModelFile, match="NaN or infinity in float16"):
        gemma2.load(place, dtype="float16", force_float16=True)


def test_a_tokenizer_of_another_model_or_none_at_all_is_refused(folder: Folder) -> None:
    place = folder("short", tensors=tensors_of(tiny(vocab_size=4096)))
    raw = raw_config(vocab_size=3000)
    (place / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(gemma2.BadModelFile, match="4096 pieces, but the embedding has 3000 rows"):
        gemma2.load(place)
    (place / "tokenizer.model").unlink()
    with pytest.raises(gemma2.BadModelFile, match=r"neither tokenizer.json nor tokenizer.model; any Gemma 2 reposito"):
        gemma2.load(place)


def test_the_parameters_are_trainable_and_the_model_is_in_eval_mode(folder: Folder) -> None:
    model = gemma2.load(folder()).model
    assert not model.training
    model(ids(1, 5)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_whether_a_model_was_tuned_for_chat_is_read_from_its_stops(folder: Folder) -> None:
    place = folder()
    assert gemma2.load(place).chat_tuned is None
    for stops, tuned in (([1, 107], True), (1, False), ([1], False)):
        (place / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}), encoding="utf-8")
        assert gemma2.load(place).chat_tuned is tuned


def write_zeros(path: Path, config: gemma2.Gemma2Config, kind: str) -> None:
    """A GGUF whose every block is zero, without a tokenizer."""
    described = []
    for name, shape in shapes_of(config).items():
        block = BLOCKS["F32" if len(shape) == 1 else kind]
        size = torch.Size(shape).numel() // block.values * block.bytes
        described.append((llama_cpp_name(name), tuple(shape), block, size))
    header = header_bytes(architecture_metadata(config, "zeros"), described)
    path.write_bytes(header)
    with path.open("r+b") as file:
        file.truncate(len(header) + sum(size + padding(size) for *_, size in described))


# VmHWM, because ru_maxrss of a child starts at what its parent held when it forked.
PEAK = """
import re, sys
import gemma2
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
gemma = gemma2.load(sys.argv[1], dtype=sys.argv[2], device="cpu", tokenizer=sys.argv[3])
print(before, peak(), sum(p.nbytes for p in gemma.model.parameters()))
"""


def write_zero_safetensors(path: Path, shapes: dict[str, torch.Size], dtype: torch.dtype) -> None:
    """A safetensors file of zeros, which takes no room on the disk."""
    described, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
        described[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with path.open("r+b") as file:
        file.truncate(8 + len(header) + end)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from Linux's /proc")
@pytest.mark.parametrize(
    ("form", "stored", "layers"),
    [
        ("safetensors", "float32", 4),
        ("safetensors", "bfloat16", 1),
        ("ckpt", "bfloat16", 1),
        ("gguf", "Q4_K", 1),
    ],
)
def test_loading_takes_the_final_weights_and_little_more(tmp_path: Path, form: str, stored: str, layers: int) -> None:
    """Peak resident memory of a child, mapped pages of the file included: over importing the package at most the final
    weights, of bfloat16, and 80 MB. A second copy of them would take 160 MB, and the largest matrix in float32 85. For
    the model of 0.6 GB, Python and torch included, at most 1.10 x the final weights + 256 MB."""
    raw = raw_config(
        "2b", vocab_size=4096, hidden_size=2304, intermediate_size=9216, head_dim=128, num_hidden_layers=layers
    ) | {"query_pre_attn_scalar": 128}
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in gemma2.Gemma2(read_config(raw)).named_parameters()}
    path = tmp_path / f"model.{form}"
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    if form == "gguf":
        write_zeros(path, read_config(raw), stored)
    elif form == "ckpt":
        tensors = {name: torch.full(shape, 0.01, dtype=getattr(torch, stored)) for name, shape in shapes.items()}
        torch.save({"model_state_dict": to_google(tensors)}, path)
        del tensors
    else:
        write_zero_safetensors(path, shapes, getattr(torch, stored))
    command = [sys.executable, "-c", PEAK, str(path), "bfloat16", str(POCKET / "tokenizer.model")]
    before, peak, weights = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
    print(f"{form} {stored}: weights {weights / 1e6:.0f} MB, before {before / 1e6:.0f}, peak {peak / 1e6:.0f} MB")
    assert weights > 140e6 * layers
    assert peak - before <= weights + 80e6
    assert layers == 1 or peak <= 1.10 * weights + 256e6


def test_a_numerics_profile_computes_otherwise_with_the_same_weights() -> None:
    plain, google = gemma2.load(device="cpu"), gemma2.load(device="cpu", numerics="gemma_pytorch")
    tokens = torch.tensor([plain.tokenizer.encode("In the beginning God created the heaven")])
    with torch.no_grad():
        apart = (plain.model(tokens) - google.model(tokens)).abs().max()
    assert 0 < apart < 0.5
    assert same(google, dict(plain.model.named_parameters()))
    assert gemma2.load(device="cpu", numerics="llama.cpp").model.dtype == torch.float32
    with pytest.raises(ValueError, match="numerics 'ggml' is not one of transformers, gemma_pytorch"):
        gemma2.load("nowhere", numerics="ggml")


@pytest.mark.posix
def test_a_path_that_cannot_be_looked_at_is_named_in_one_line(tmp_path: Path) -> None:
    """A name that is longer than the system's names stands for a folder that is not readable: root reads any."""
    path = tmp_path / ("x" * 300)
    for name in ("source", "adapter", "tokenizer"):
        given = {name: str(path)} if name != "source" else {}
        with pytest.raises(gemma2.BadModelFile, match=r"/x{300}: cannot be read \(File name too long\)"):
            gemma2.load(path if name == "source" else None, **given)  # type: ignore[arg-type]
    link = tmp_path / "link"
    link.symlink_to("gone")
    with pytest.raises(gemma2.BadModelFile, match="link: a link to gone, which is not there"):
        gemma2.load(link)


def test_a_device_that_pytorch_does_not_know_is_named_without_all_that_it_knows() -> None:
    for given in ({"device": "foo"}, {"device_map": "foo"}, {"device_map": {"": "foo"}}):
        with pytest.raises(ValueError, match=r"'foo' is n.*\(PyTorch knows no such device\)$"):
            gemma2.load(**given)
