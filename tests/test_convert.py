"""What is converted has the same tensors in each format and type, and back. Its numbers: test_convert_metadata."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType, LlamaFileType
from safetensors.torch import load_file, save_file
from torch import Tensor

import gemma2
from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.checkpoints.safetensors import SINGLE
from gemma2.convert import TYPES, convert
from tests.conftest import tensors_of, tiny
from tests.gguf_files import tiny_model
from tests.hostile.conftest import SMALL, shell

TARGETS = {"folder": "out", "gguf": "out.gguf", "ckpt": "out.ckpt"}
# Rows of whole blocks in every type.
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
}
PLAIN = {**SMALL, "query_pre_attn_scalar": SMALL["head_dim"]}  # what a GGUF can state
Make = Callable[..., Path]


def model_folder(
    place: Path, dtype: torch.dtype = torch.float32, tensors: dict[str, Tensor] | None = None, **changes: Any
) -> Path:
    """A folder of a small model; keyword arguments change its config."""
    changes = {**PLAIN, **changes}
    tensors = tensors or tensors_of(tiny(vocab_size=4096, **changes))
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, shell(place, **changes) / SINGLE)
    return place


@pytest.fixture
def source(tmp_path: Path) -> Make:
    return partial(model_folder, tmp_path / "source")


def stored(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint as its file has it (a GGUF's norms as w, and all in float32)."""
    weights = open_checkpoint(path).weights
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in weights.tensors.items()}
    for name, tensor in found.items():
        weights.read(name, 0, tensor)
    return found


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(torch.uint8)

    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(bits(a[name]), bits(b[name])) for name in a
    )


def floats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items()}


def test_the_types_are_those_that_gguf_py_quantizes_to() -> None:
    able = set()
    for kind in GGMLQuantizationType:
        with contextlib.suppress(NotImplementedError):
            gguf.quants.quantize(np.ones((1, 256), np.float32), kind)
            able.add(kind.name.lower())
    assert set(TYPES) == able


@pytest.mark.long
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_written_as_the_blocks_that_gguf_py_makes(kind: str, source: Make, tmp_path: Path) -> None:
    """Names, shapes and blocks are held against gguf-py: its reader, its table of names, its quantization."""
    place = source(**WIDE)
    made = convert(place, tmp_path / "out.gguf", type=kind.upper(), progress=False)
    reader = gguf.GGUFReader(made.path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, WIDE["num_hidden_layers"])
    finer = {"q8_0": "Q8_0", "f16": "F16", "bf16": "BF16", "f32": "F32", "tq1_0": "F16", "tq2_0": "F16"}
    counts: dict[str, int] = {}
    for name, tensor in load_file(place / SINGLE).items():
        own = found.pop(names.get_name(name, (".weight",)))
        expected = kind.upper()
        if "norm" in name:
            tensor, expected = 1 + tensor, "F32"
        elif "embed" in name:
            expected = finer.get(kind, "Q8_0")
        counts[expected] = counts.get(expected, 0) + 1
        assert (own.tensor_type.name, own.shape.tolist()) == (expected, list(reversed(tensor.shape))), name
        blocks = gguf.quants.quantize(tensor.numpy(), own.tensor_type)
        assert own.data.tobytes() == blocks.tobytes(), name
    assert not found and made.tensors == counts
    named = {"f32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"}.get(kind, f"MOSTLY_{kind.upper()}")
    assert reader.fields["general.file_type"].contents() == LlamaFileType[named]
    assert made.bytes == made.path.stat().st_size


@pytest.mark.long
def test_blocks_of_zeros_are_zeros(source: Make, tmp_path: Path) -> None:
    tensors = tensors_of(tiny("2b", vocab_size=4096, **WIDE))
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    place = source(tensors=tensors, **WIDE)
    for kind in TYPES:
        made = convert(place, tmp_path / f"{kind}.gguf", type=kind, progress=False)
        assert not stored(made.path)["model.layers.0.mlp.up_proj.weight"].any(), kind


@pytest.mark.long
def test_the_type_is_the_sources_own_unless_asked(source: Make, tmp_path: Path) -> None:
    def kinds(path: Path, name: str, **asked: Any) -> set[str]:
        return set(convert(path, tmp_path / name, force=True, progress=False, **asked).tensors)

    for dtype, own in ((torch.float32, "F32"), (torch.bfloat16, "BF16"), (torch.float16, "F16")):
        tensors = {name: torch.zeros_like(t) for name, t in tensors_of(tiny(vocab_size=4096, **PLAIN)).items()}
        place = source(dtype, tensors)
        assert kinds(place, "out") == {own}
        assert kinds(place, "out.ckpt") == {own}
        assert kinds(place, "out.gguf") == {own, "F32"}
        assert kinds(tmp_path / "out.gguf", "again") == {own}
        assert kinds(place, "out") == {own}
        assert (
            json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["torch_dtype"] == str(dtype)[6:]
        )
        for asked in ("f32", "BF16", "f16"):
            assert kinds(place, "out", type=asked) == {asked.upper()}
    quantized = convert(source(**WIDE), tmp_path / "q.gguf", type="q8_0", progress=False).path
    assert kinds(quantized, "out2") == {"BF16", "F32"}
    assert kinds(quantized, "out2.gguf") == {"BF16", "F32"}


def test_matrices_of_several_types_become_float32_so_that_none_is_rounded(source: Make, tmp_path: Path) -> None:
    place = source()
    tensors = load_file(place / SINGLE)
    tensors = {
        name: tensor.to(torch.bfloat16 if "embed" in name else torch.float32) for name, tensor in tensors.items()
    }
    save_file(tensors, place / SINGLE)
    made = convert(place, tmp_path / "out", progress=False)
    assert set(made.tensors) == {"F32"}
    assert same_bits(stored(made.path), floats(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("end", TARGETS)
@pytest.mark.parametrize("start", TARGETS)
def test_tensors_survive_every_direction_bit_for_bit(
    start: str, end: str, dtype: torch.dtype, source: Make, tmp_path: Path
) -> None:
    place = source(dtype)
    original = load_file(place / SINGLE)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first = convert(place, tmp_path / "first" / TARGETS[start], progress=False)
    second = convert(first.path, tmp_path / "second" / TARGETS[end], progress=False)
    found = stored(second.path)
    assert same_bits(floats(found), floats(original))
    if end != "gguf":
        assert same_bits(found, original)


def test_a_target_is_the_same_bytes_every_time(source: Make, tmp_path: Path) -> None:
    place = source()
    for name in TARGETS.values():
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "b" / name).parent.mkdir(exist_ok=True)
        made = [convert(place, tmp_path / letter / name, progress=False).path for letter in "ab"]
        files = [path / SINGLE if path.is_dir() else path for path in made]
        assert files[0].read_bytes() == files[1].read_bytes()


def norms(count: int, seed: int = 0) -> Tensor:
    """Weights of a norm, the first few of which 1 + w cannot keep in float32."""
    w = torch.randn(count, generator=torch.Generator().manual_seed(seed)).bfloat16()
    w[:6] = torch.tensor([2.0**-18, -(2.0**-26), 1.5 * 2.0**-120, -0.0, 0.0, 3 * 2.0**-19])
    return w


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_safetensors_to_gguf_and_back_is_byte_identical_small_norm_weights_included(
    dtype: torch.dtype, source: Make, tmp_path: Path
) -> None:
    tensors = tensors_of(tiny("2b", vocab_size=4096, **PLAIN))
    for i, name in enumerate(name for name in tensors if "norm" in name):
        tensors[name] = norms(8, i).to(dtype)
    tensors["model.norm.weight"] = torch.tensor([-0.0] + [0.5] * 7, dtype=dtype)  # of which only a sign is lost
    place = source(dtype, tensors)
    first = convert(place, tmp_path / "first", progress=False).path
    middle = convert(first, tmp_path / "middle.gguf", progress=False)
    assert "BF16" in middle.tensors or dtype == torch.float32
    again = convert(middle.path, tmp_path / "again", progress=False).path
    assert (first / SINGLE).read_bytes() == (again / SINGLE).read_bytes()
    assert same_bits(load_file(again / SINGLE), load_file(place / SINGLE))
    w = stored(middle.path)["model.layers.0.input_layernorm.weight"]
    assert not torch.equal((1 + w) - 1, w), "without small weights this shows nothing"
    reader = gguf.GGUFReader(middle.path)
    beside = [name for name in reader.fields if name.startswith("gemma2.norm_weight.")]
    assert len(beside) == sum("norm" in name for name in tensors)


def test_weights_that_the_sum_keeps_are_not_written_twice(source: Make, tmp_path: Path) -> None:
    tensors = tensors_of(tiny("2b", vocab_size=4096, **PLAIN))
    tensors |= {name: torch.full((8,), 0.25) for name in tensors if "norm" in name}
    made = convert(source(tensors=tensors), tmp_path / "out.gguf", progress=False).path
    assert not [name for name in gguf.GGUFReader(made).fields if name.startswith("gemma2.norm_weight.")]


@pytest.mark.parametrize("end", ["folder", "ckpt"])
def test_norms_that_a_type_would_round_stay_float32_and_it_is_said(end: str, source: Make, tmp_path: Path) -> None:
    """Also when the folder that holds them in float32 is converted again."""
    tensors = tensors_of(tiny("2b", vocab_size=4096, **PLAIN))
    place = source(tensors=tensors)
    middle = convert(place, tmp_path / "middle.gguf", type="bf16", progress=False).path
    made = convert(middle, tmp_path / TARGETS[end], progress=False)
    count = sum("norm" in name for name in tensors)
    assert made.tensors["F32"] == count
    assert f"{count} norm weights are float32, because bf16 cannot hold them exactly" in made.notes
    again = convert(made.path, tmp_path / "again.gguf", progress=False).path
    for path in (made.path, again):
        found = stored(path)
        for name, tensor in tensors.items():
            expected = tensor if "norm" in name else tensor.bfloat16().float()
            assert torch.equal(found[name].float(), expected), name


def test_every_tensor_is_aligned_to_its_numbers_in_a_folder(source: Make, tmp_path: Path) -> None:
    """Also where a norm of an odd width is bfloat16 and the next one float32."""
    changes = {**PLAIN, "hidden_size": 7}
    tensors = tensors_of(tiny("2b", vocab_size=4096, **changes))
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(7)
    made = convert(source(tensors=tensors, **changes), tmp_path / "out", type="bf16", progress=False)
    assert made.tensors["F32"] == 8
    raw = (made.path / SINGLE).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    described = json.loads(raw[8:start])
    del described["__metadata__"]
    sizes = {"F32": 4, "BF16": 2}
    assert all((start + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0 for entry in described.values())


def test_gains_that_no_float32_weight_gives_stay_in_gguf(tmp_path: Path) -> None:
    """A file that another program made: 1 + w is its g to the bit in the model and in a GGUF, and nowhere else."""
    path = tmp_path / "foreign.gguf"
    path.write_bytes(tiny_model().write())
    gains = gains_of(path)
    model = gemma2.load(path, device="cpu").model
    weights = {name: p.detach() for name, p in model.named_parameters() if "norm" in name}
    assert any(w.dtype == torch.float64 for w in weights.values())
    assert all(
        torch.equal((1 + w).float(), gains[name]) and torch.equal(1 + w, gains[name].to(w.dtype))
        for name, w in weights.items()
    )
    again = convert(path, tmp_path / "again.gguf", type="q8_0", progress=False).path
    assert same_bits(gains_of(again), gains)
    for name in ("out", "out.ckpt"):
        with pytest.raises(gemma2.BadModelFile, match=r"foreign\.gguf: \S+norm\.weight holds a gain that 1 \+ w gives"):
            convert(path, tmp_path / name, progress=False)
    assert sorted(tmp_path.iterdir()) == [again, path]


def gains_of(path: Path) -> dict[str, Tensor]:
    """The norm tensors of a GGUF as they are in it, by Hugging Face's names."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, 2)
    own = {names.get_name(name, (".weight",)): name for name in stored_names()}
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    return {own[name]: torch.from_numpy(data.copy()) for name, data in found.items() if "norm" in name}


def stored_names() -> list[str]:
    return list(tensors_of(tiny("2b", vocab_size=4096, **PLAIN)))


# A .ckpt, as gemma_pytorch and PyTorch read it.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pytorch_reads_the_ckpt_with_names_and_fused_rows_as_gemma_pytorch_has_them(
    dtype: torch.dtype, source: Make, tmp_path: Path
) -> None:
    place = source(dtype, {name: t.to(dtype) for name, t in tensors_of(tiny("2b", vocab_size=4096, **PLAIN)).items()})
    path = convert(place, tmp_path / "out.ckpt", progress=False).path
    original = load_file(place / SINGLE)
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert list(loaded) == ["model_state_dict"]
        state = loaded["model_state_dict"]
        expected = {name: tensor for name, tensor in original.items() if not any(f".{x}_proj" in name for x in "qkv")}
        expected["embedder.weight"] = expected.pop("model.embed_tokens.weight")
        for layer in range(2):
            stem = f"model.layers.{layer}.self_attn."
            rows = [original[f"{stem}{letter}_proj.weight"] for letter in "qkv"]
            expected[f"{stem}qkv_proj.weight"] = torch.cat(rows)
        assert same_bits(dict(state), expected)
        assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in state.values())


def test_a_ckpt_is_a_zip_file_that_other_programs_find_whole(source: Make, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(convert(source(), tmp_path / "out.ckpt", progress=False).path) as archive:
        assert archive.testzip() is None
