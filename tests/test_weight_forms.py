"""Weights held as int8 and int4: what is computed, in how much memory, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import gemma2
from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.checkpoints.dtypes import RUNNABLE
from gemma2.checkpoints.folder import FileWeights
from gemma2.cli import main
from gemma2.fast import int4
from gemma2.fast.embedding import HeldEmbedding
from gemma2.fast.forms import FORMS, sizes_of
from gemma2.fast.held import HeldLinear, HeldMatrix
from gemma2.fast.int4 import Int4
from gemma2.fast.int8 import Int8
from gemma2.load import POCKET
from gemma2.memory import Free
from gemma2.model import Gemma2
from gemma2.parity.references.ourselves import Ourselves, open_ourselves
from gemma2.parity.tolerances import TOLERANCES
from gemma2.research import capture
from gemma2.research.heads import by_head
from gemma2.tied import EMBEDDING, HEAD
from gemma2.twins import on, replaced, sharing
from tests.conftest import ids, tensors_of, tiny

MATRICES: dict[str, Callable[[int, int, torch.dtype], HeldMatrix]] = {"int8": Int8, "int4": Int4}
BYTES = {"int8": 1.01, "int4": 0.71}  # of a value at most, with scales, norms and an embedding in int8


@pytest.fixture
def base(folder: Callable[..., Path]) -> Path:
    """A model whose window is shorter than the prompts, whose caps saturate, and whose widths are all different."""
    return folder("base", size="27b", num_hidden_layers=2)


def dequantised(model: Gemma2) -> Gemma2:
    """A plain model with the values of one whose weights are held: the oracle."""
    plain = Gemma2(model.config).to(model.dtype)
    values = {name: tensor for name, tensor in model.state_dict().items() if ".matrix." not in name}
    for path, module in model.named_modules():
        if isinstance(module, HeldLinear | HeldEmbedding):
            values[f"{path}.weight"] = module.weight.clone()
    plain.load_state_dict(values, strict=True)
    return plain.eval()


class Stated:
    """Stands for a checkpoint with one tensor."""

    where = "a test"

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def read(self, name: str, start: int, out: Tensor) -> None:
        out.copy_(self.values[start : start + len(out)])

    def in_file(self, name: str) -> str:
        return name

    def release(self) -> None:
        """Nothing is mapped."""


def held(form: str, values: Tensor, dtype: torch.dtype = torch.float32) -> HeldMatrix:
    rows, width = values.shape
    matrix = MATRICES[form](rows, width, dtype)
    matrix.fill(Stated(values), "w", torch.device("cpu"))  # type: ignore[arg-type]
    return matrix


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", MATRICES)
def test_a_model_of_held_weights_computes_what_the_dequantised_weights_do(base: Path, form: str, dtype: str) -> None:
    gemma = gemma2.load(base, device="cpu", dtype=dtype, weights=form)
    plain = dequantised(gemma.model)
    tokens = ids(2, 40, vocab=4096)
    assert torch.equal(gemma.model.model.embed_tokens(tokens), plain.model.embed_tokens(tokens))
    cache, ours = gemma2.HybridCache(gemma.config, 2, 64), []
    for part in tokens.split([36, 1, 3], dim=1):  # by tiles, and by kernels
        ours.append(gemma.model(part, cache=cache))
    theirs = plain(tokens)
    assert (torch.cat(ours, 1) - theirs).abs().max() <= TOLERANCES[plain.dtype].allowed(float(theirs.abs().max()))
    assert (gemma2.load(base, device="cpu", dtype=dtype).model(tokens) - theirs).abs().max() > 0.1


@pytest.mark.parametrize("form", MATRICES)
def test_held_weights_are_as_near_to_the_stored_ones_as_their_codes_allow(form: str) -> None:
    values = torch.randn(70, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 70)[:, None]
    values[3], values[4, :32], values[5] = 0, 0, 0.375
    near = held(form, values).values(0, 70)
    groups = values.unflatten(1, (-1, 32 if form == "int4" else 96))
    step = groups.abs().amax(-1) / 127 if form == "int8" else (groups.amax(-1) - groups.amin(-1)) / 15
    off = (near - values).unflatten(1, groups.shape[1:]).abs().amax(-1)
    assert bool((off <= 0.6 * step + 1e-30).all())
    assert not near[3].any() and not near[4, :32].any() and (near[5] - values[5]).abs().max() <= 0.375 / 256


@pytest.mark.parametrize(("dtype", "kernel"), [("float32", True), ("bfloat16", True), ("bfloat16", False)])
@pytest.mark.parametrize("rows", [192, 70, 3])
@pytest.mark.parametrize("form", MATRICES)
def test_products_rows_and_gradients_are_those_of_the_values(
    form: str, rows: int, dtype: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(MATRICES[form], "kernel", lambda self, x: None)
        monkeypatch.setattr(int4, "kernel_block", lambda: None)
    monkeypatch.setattr("gemma2.fast.held.READ", 4096)  # so that there are several tiles
    monkeypatch.setattr("gemma2.fast.held.MADE", 8192)
    generator = torch.Generator().manual_seed(rows)
    matrix = held(form, torch.randn(rows, 96, generator=generator), RUNNABLE[dtype])
    values, wide = matrix.values(0, rows), held(form, torch.randn(rows, 96, generator=generator.manual_seed(rows)))
    torch.testing.assert_close(values.float(), wide.values(0, rows), rtol=2**-8, atol=2**-8)
    some = torch.tensor([[rows - 1, 0], [2, rows // 2]])
    assert torch.equal(matrix.at(some), values[some])
    off = 1e-4 if dtype == "float32" else 0.3  # of sums of about 10; bfloat16 is rounded to 0.06
    for shape in ((1, 96), (2, 5, 96), (80, 96), (0, 96)):
        x = torch.randn(shape, generator=generator).to(values.dtype).requires_grad_()
        y, expected = matrix(x), F.linear(x.double(), wide.values(0, rows).double())
        assert y.shape == expected.shape and y.dtype == x.dtype
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=off)
        weight = torch.randn(y.shape, generator=generator)
        (mine,), (theirs,) = (torch.autograd.grad((z * weight.to(z.dtype)).sum(), x) for z in (y, expected))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=off)


def test_the_kernel_of_this_machine_reads_the_codes_as_they_are_packed() -> None:
    block = int4.kernel_block()
    if block is None:
        pytest.skip("no kernel for int4 here")
    codes = torch.randint(16, (2 * block, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert torch.equal(theirs.flatten(), int4.pack(codes, block).flatten())
    values = int4.unpack(int4.pack(codes, block), torch.empty(64, 2, block))
    assert torch.equal(values.flatten(1).t() + 8, codes.float())


@pytest.mark.parametrize("form", MATRICES)
def test_gradients_reach_every_layer_and_are_those_of_the_dequantised_model(base: Path, form: str) -> None:
    gemma = gemma2.load(base, device="cpu", dtype="float32", weights=form)
    tokens, found = ids(1, 30, vocab=4096), []
    for model in (gemma.model, dequantised(gemma.model)):
        steered = torch.zeros(model.config.hidden_size, requires_grad=True)
        hook = model.model.layers[0].hook_resid_pre.register_forward_hook(lambda *seen, s=steered: seen[2] + s)
        model(tokens).logsumexp(-1).sum().backward()
        hook.remove()
        norm = model.model.layers[0].input_layernorm.weight.grad
        assert steered.grad is not None and norm is not None
        found.append((steered.grad, norm))
    for mine, theirs in zip(*found, strict=True):
        assert theirs.abs().max() > 0
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@torch.no_grad()
def test_capture_edits_and_replaced_modules_work_on_held_weights(base: Path) -> None:
    gemma = gemma2.load(base, device="cpu", dtype="float32", weights="int8")
    tokens, plain = ids(1, 24, vocab=4096), dequantised(gemma.model)
    with capture(gemma, ["blocks.*.attn.hook_pattern", "hook_embed", "blocks.1.hook_resid_pre"]) as seen:
        logits = gemma.model(tokens)
    with capture(plain, ["blocks.*.attn.hook_pattern", "hook_embed", "blocks.1.hook_resid_pre"]) as expected:
        plain(tokens)
    assert seen.keys() == expected.keys() and len(seen) == 4
    for name, value in seen.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)
    with replaced(gemma.model, by_head(gemma.config)) as model:  # reads the weight of o_proj
        torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-4)
    assert gemma.generate([[5, 6, 7]], 4) and torch.equal(gemma.model(tokens), logits)


@torch.no_grad()
@pytest.mark.parametrize("form", MATRICES)
def test_another_window_shares_held_weights_and_parity_names_the_first_site_that_they_change(
    base: Path, form: str
) -> None:
    gemma = gemma2.load(base, device="cpu", dtype="float32", weights=form)
    with capture(gemma, "hook_embed"):  # hooks are not shared
        other = sharing(gemma.model, replace(gemma.config, sliding_window=5))
        assert not any(module._forward_hooks for module in other.modules())
    tokens = ids(1, 24, vocab=4096)
    assert torch.equal(sharing(gemma.model)(tokens), gemma.model(tokens))
    assert not torch.equal(other(tokens), gemma.model(tokens))
    assert {x.data_ptr() for x in other.buffers()} >= {x.data_ptr() for x in gemma.model.state_dict().values()} - {
        x.data_ptr() for x in gemma.model.parameters()
    }
    opened = open_checkpoint(base)
    ours, theirs = Ourselves(opened, torch.float32), open_ourselves(f"weights={form}", opened, torch.float32)
    assert theirs.system.endswith(f"weights {form}")
    mine, seen = ours.run([2, 5, 6], ["hook_embed"]), theirs.run([2, 5, 6], ["hook_embed"])
    assert 0 < (mine["hook_embed"] - seen["hook_embed"]).abs().max() < 0.5
    with pytest.raises(ValueError, match="weights and numerics both replace modules"):
        open_ourselves(f"weights={form},numerics=litgpt", opened, None)


@torch.no_grad()
def test_what_asks_a_held_weight_for_its_dtype_or_device_makes_no_values(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gemma2.load(base, device="cpu", dtype="bfloat16", weights="int8").model
    narrow = model(ids(1, 3, vocab=4096))
    assert model.to(torch.float32).dtype == torch.float32  # as any other model
    assert model(ids(1, 3, vocab=4096)).sub(narrow).abs().max() < 1
    monkeypatch.setattr(Int8, "values", lambda *_: pytest.fail("values were made"))
    linear = model.model.layers[0].mlp.up_proj
    assert isinstance(linear, nn.Linear) and linear.weight.shape == (linear.out_features, linear.in_features)
    assert (model.dtype, model.device.type, len(model.model.embed_tokens.weight)) == (torch.float32, "cpu", 4096)
    assert not any(name.endswith("proj.weight") for name, _ in model.named_parameters())


@pytest.mark.parametrize("form", MATRICES)
def test_the_memory_of_held_weights_is_known_beforehand_and_no_matrix_is_ever_whole_in_floats(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, read = list[int](), FileWeights.read
    monkeypatch.setattr("gemma2.fast.held.READ", 2**16)

    def counted(self: Any, name: str, start: int, out: Tensor) -> None:
        sizes.append(out.numel())
        read(self, name, start, out)

    monkeypatch.setattr("gemma2.checkpoints.folder.FileWeights.read", counted)
    opened = open_checkpoint(POCKET)
    stated = sizes_of(opened, torch.device("cpu"), torch.bfloat16)[form]
    gemma = gemma2.load(device="cpu", weights=form)
    assert sum(tensor.nbytes for tensor in gemma.model.state_dict().values()) == stated
    assert stated <= BYTES[form] * gemma.config.parameter_count
    assert max(sizes) <= 2**16 < 4096 * 256  # the embedding


def test_too_little_memory_names_the_forms_that_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, form, named in ((7e6, None, ["int8", "int4"]), (5e6, None, ["int4"]), (5e6, "int8", ["int4"])):
        monkeypatch.setattr("gemma2.memory.free_memory", lambda _, free=free: Free(int(free), "a test"))
        with pytest.raises(MemoryError) as error:
            gemma2.load(device="cpu", weights=form)
        assert [name for name in FORMS if f'weights="{name}"' in str(error.value)] == named
    monkeypatch.setattr("gemma2.memory.free_memory", lambda _: Free(6_000_000, "a test"))
    assert gemma2.load(device="cpu", weights="int8").generate("And God said", 1)


@torch.no_grad()
def test_shards_a_stored_head_float16_and_a_gguf_of_floats_are_held_as_one_file_is(tmp_path: Path) -> None:
    wide = load_file(POCKET / "model.safetensors")
    tensors = {name: tensor.float() for name, tensor in wide.items()}

    def written(name: str, files: dict[str, dict[str, Tensor]]) -> Path:
        place = tmp_path / name
        place.mkdir()
        for small in ("config.json", "tokenizer.model"):
            (place / small).write_bytes((POCKET / small).read_bytes())
        for file, content in files.items():
            save_file(content, place / file)
        if len(files) > 1:
            index = {"weight_map": {key: file for file, content in files.items() for key in content}}
            (place / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        return place

    names = sorted(tensors)
    halves = {f"model-0000{i + 1}-of-00002.safetensors": {n: tensors[n] for n in names[i::2]} for i in range(2)}
    gemma2.convert("pocket", tmp_path / "p.gguf", type="bf16")
    one = {"model.safetensors": {**tensors, HEAD: tensors[EMBEDDING].clone()}}
    half = {"model.safetensors": {name: tensor.half() for name, tensor in tensors.items()}}
    sources = [written("head", one), written("halves", halves), tmp_path / "p.gguf", written("half", half)]
    tokens = torch.tensor([[2, 500, 600, 700]])
    expected = gemma2.load(device="cpu", dtype="float32", weights="int4").model(tokens)
    for source in sources:
        gemma = gemma2.load(source, device="cpu", dtype=None if source.name == "half" else "float32", weights="int4")
        assert gemma.model.dtype == torch.float32
        off = 0.05 if source.name == "half" else 0.0  # float16 rounds what is small
        assert (gemma.model(tokens) - expected).abs().max() <= off, source
    different = written("other", {"model.safetensors": {**tensors, HEAD: tensors[EMBEDDING] + 1}})
    with pytest.raises(gemma2.BadModelFile, match="differs from the embedding"):
        gemma2.load(different, device="cpu", weights="int8")


def test_what_cannot_be_is_refused_in_one_line_before_a_weight_is_read(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = folder("narrow", size="2b")  # 144 wide, and 4.5 groups are none
    monkeypatch.setattr("gemma2.checkpoints.folder.FileWeights.read", lambda *_: pytest.fail("a weight was read"))
    twin: Any = on(nn.Linear, lambda linear: linear)
    cases: dict[str, dict[str, Any]] = {
        "weights 'int3' is not one of int8, int4, packed, bnb-nf4, bnb-int8": {"weights": "int3"},
        "weights, numerics and make all replace modules": {"weights": "int8", "numerics": "litgpt"},
        "numerics and make all replace": {"weights": "int8", "make": twin},
        "device_map and weights cannot be combined": {"weights": "int8", "device_map": "auto"},
        "write the merged model first": {"weights": "int8", "adapter": tmp_path, "merge_adapter": True},
        "its weights are Q8_0, quantized already": {"source": "pocket:pocket-q8_0.gguf", "weights": "int8"},
        r"groups of 32 values, and the rows of model.embed_tokens.weight have 144": {
            "source": narrow,
            "weights": "int4",
        },
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            gemma2.load(**options)
        assert "\n" not in str(error.value)


def test_values_that_are_not_finite_are_refused_by_name(folder: Callable[..., Path]) -> None:
    tensors = tensors_of(tiny(vocab_size=4096))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    with pytest.raises(gemma2.BadModelFile, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        gemma2.load(folder("bad", tensors=tensors), device="cpu", weights="int8")


def test_a_model_of_held_weights_is_not_written_and_says_why(tmp_path: Path) -> None:
    gemma = gemma2.load(device="cpu", weights="int8")
    with pytest.raises(gemma2.BadModelFile, match="load the model without weights= to write it"):
        gemma2.save(gemma, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_bitsandbytes_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma2.fast.bnb import bitsandbytes

    bitsandbytes.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    for form in ("bnb-nf4", "bnb-int8"):
        with pytest.raises(ImportError, match="pip install bitsandbytes"):
            gemma2.load("nowhere/at-all", weights=form)


def test_the_command_line_takes_a_form_and_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "And God said", "-n", "3", "--device", "cpu", "--weights", "int8", "--verbose"]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == "unto him," and "the weights are int8" in shown.err
    assert main(["generate", "And God said", "--weights", "int3"]) == 2
    assert "'int3' is not one of int8" in capsys.readouterr().err
