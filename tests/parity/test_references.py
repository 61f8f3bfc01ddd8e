"""References: what each shows, that it is what we compute, and everything that each refuses."""

from __future__ import annotations

import builtins
import importlib
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parity_model
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import gemma2
from gemma2.checkpoints.checkpoint import Checkpoint, open_checkpoint
from gemma2.checkpoints.hf_config import read_config
from gemma2.errors import BadModelFile, ContextOverflow
from gemma2.load import POCKET
from gemma2.parity.references import CannotDo, Reference, open_reference
from gemma2.parity.references.ourselves import Ourselves
from gemma2.parity.trace import About, TraceWriter
from gemma2.research import watching
from gemma2.research.sites import sites
from tests.conftest import SHAPES, ids, tensors_of, tiny
from tests.parity.recordings import FILES, PARITY
from tests.parity.recordings import file as parity_file

GOOGLE = os.environ.get("GEMMA_PYTORCH", "")  # a checkout of google/gemma_pytorch, to run beside ours
google = pytest.mark.skipif(not GOOGLE, reason="GEMMA_PYTORCH names no checkout of google/gemma_pytorch")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROW = ids(1, 60, vocab=1024)[0].tolist()
ROWS = [ROW[:25], ROW[:40], ROW[50:51]]
WINDOW = 7
WITHIN = {torch.float32: 1e-5, torch.bfloat16: 0.05}  # of the largest logit, for sums in another order
Folder = Callable[..., Path]


def llama_cpp(opened: Checkpoint) -> Any:
    """Imported when it is asked for, because the other system is optional."""
    return importlib.import_module("gemma2.parity.references.llama_cpp").LlamaCpp(opened, torch.float32)


def check_reference(external: Reference, config: gemma2.Gemma2Config, within: float = 0.0) -> None:
    """What every reference promises, whatever its arithmetic: names, shapes, and the same logits however they are fed,
    to `within` of the largest."""
    within = within or WITHIN[external.dtype]

    def close(found: Tensor, expected: Tensor) -> bool:
        assert found.shape == expected.shape
        return bool((found - expected).abs().max() <= within * 30)

    known = sites(config)
    assert external.system and external.versions and external.sites <= known.keys() and "logits" in external.sites
    assert external.config.sliding_window == config.sliding_window
    seen = external.run(ROW, external.sites)
    assert seen.keys() == external.sites
    for name, value in seen.items():
        assert value.shape == known[name].sizes(config, len(ROW))[1:], name
        wide = name.endswith(("hook_normalized", "hook_inv_scale"))  # inside a norm
        assert value.device.type == "cpu" and (wide or value.dtype == external.dtype), name
    logits = seen["logits"]
    assert (
        external.run(ROW, ["logits"]).keys() == {"logits"}
        and external.run(ROW[:1], ["ln_final"])["ln_final"].shape[0] == 1
    )
    for chunks in ([60], [20, *[1] * 10, 30]):
        assert close(external.cached(ROW, chunks), logits), chunks
    for row, found in zip(ROWS, external.batched(ROWS), strict=True):
        assert close(found, external.run(row, ["logits"])["logits"])
    narrow = external.with_window(WINDOW)
    assert narrow.config.sliding_window == WINDOW and external.config.sliding_window == config.sliding_window
    found = narrow.run(ROW, ["logits"])["logits"]
    assert torch.allclose(found[:WINDOW], logits[:WINDOW], atol=1e-3) and not close(found[WINDOW:], logits[WINDOW:])
    assert close(narrow.cached(ROW, [20, 1, 1, 38]), found)
    assert torch.equal(external.run(ROW, ["logits"])["logits"], logits), "the wider one has changed"
    with pytest.raises(ValueError, match="do not add up to 60 token ids"):
        external.cached(ROW, [30, 31])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        external.run([config.vocab_size], ["logits"])
    with pytest.raises(ValueError, match="at least one token id"):
        external.run([], ["logits"])
    for ask in (
        lambda row: external.run(row, ["logits"]),
        lambda row: external.cached(row, [257]),
        lambda row: external.batched([row]),
    ):
        with pytest.raises(ContextOverflow, match="takes at most 256 token ids, not 257"):
            ask([5] * 257)
    with pytest.raises(CannotDo, match=r"does not show hook_everything"):
        external.run(ROW, ["hook_everything"])


def check_equal(external: Reference, ours: Reference) -> None:
    for theirs, own in ((external, ours), (external.with_window(WINDOW), ours.with_window(WINDOW))):
        expected, found = own.run(ROW, external.sites), theirs.run(ROW, external.sites)
        unequal = [name for name in external.sites if not torch.equal(found[name], expected[name])]
        assert not unequal, unequal


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", SHAPES)
def test_every_site_of_transformers_is_ours_to_the_bit(size: str, dtype: torch.dtype, folder: Folder) -> None:
    pytest.importorskip("transformers", reason="the live comparison needs the extra gemma2[transformers]")
    path = folder(query_pre_attn_scalar=36, **SHAPES[size])
    external, ours = open_reference("transformers", path, dtype), open_reference("self", path, dtype)
    assert len(external.sites) == 4 * 17 + 4
    check_reference(external, ours.config)
    check_equal(external, ours)


@pytest.mark.long
@pytest.mark.parametrize("form", ["x.gguf", "x.ckpt", "out/model.safetensors"])
def test_transformers_takes_every_form_of_a_checkpoint_in_silence(
    form: str, folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """GGUF states no query scale, so the model has the one that its readers assume. Its norms are bfloat16's, which
    transformers rounds them to."""
    pytest.importorskip("transformers", reason="the live comparison needs the extra gemma2[transformers]")
    pytest.importorskip("accelerate", reason="transformers needs it for GGUF")
    target, tensors = tmp_path / form, tensors_of(tiny(vocab_size=4096, query_pre_attn_scalar=16).bfloat16())
    gemma2.convert(
        folder(tensors=tensors, query_pre_attn_scalar=16), target.parent if target.parent != tmp_path else target
    )
    capfd.readouterr()
    for dtype in DTYPES.values():
        check_equal(open_reference("transformers", target, dtype), open_reference("self", target, dtype))
    assert capfd.readouterr() == ("", "")


@google
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", SHAPES)
def test_every_site_of_gemma_pytorch_is_ours_to_the_bit_with_its_numerics(
    size: str, dtype: torch.dtype, folder: Folder
) -> None:
    path = folder(query_pre_attn_scalar=36, **SHAPES[size])
    external = open_reference(f"gemma_pytorch:{GOOGLE}", path, dtype)
    assert len(external.sites) == 4 * 15 + 3 and external.system.startswith("gemma_pytorch ")
    check_reference(external, read_config(path / "config.json"))
    check_equal(external, open_reference("self:numerics=gemma_pytorch", path, dtype))


@google
def test_gemma_pytorch_refuses_what_its_code_has_no_place_for(folder: Folder) -> None:
    with pytest.raises(CannotDo, match="has rope_theta 10000 in its code, not 500000"):
        open_reference(f"gemma_pytorch:{GOOGLE}", folder("theta", rope_theta=5e5))
    with pytest.raises(CannotDo, match=r"not in torch\.float64"):
        open_reference(f"gemma_pytorch:{GOOGLE}", folder("wide"), torch.float64)


def test_a_folder_that_is_no_gemma_pytorch_is_refused_and_leaves_no_module(folder: Folder, tmp_path: Path) -> None:
    path, source = folder(), tmp_path / "source"
    (source / "gemma").mkdir(parents=True)
    with pytest.raises(BadModelFile, match=r"source: no gemma/model\.py in it; give the folder of a checkout"):
        open_reference(f"gemma_pytorch:{source}", path)
    (source / "gemma" / "config.py").write_text("", encoding="utf-8")
    (source / "gemma" / "model.py").write_text("import gemma.of_another_time", encoding="utf-8")
    mine = types.ModuleType("gemma")
    sys.modules["gemma"] = mine
    try:
        with pytest.raises(
            ImportError, match=r"gemma_pytorch cannot be imported \(No module named 'gemma\.of_another_time'\)"
        ):
            open_reference(f"gemma_pytorch:{source}", path)
        (source / "gemma" / "model.py").write_text("", encoding="utf-8")
        with pytest.raises(BadModelFile, match="its code is not that of revision 014acb7"):
            open_reference(f"gemma_pytorch:{source}", path)
        assert sys.modules["gemma"] is mine and "gemma.model" not in sys.modules and str(source) not in sys.path
    finally:
        del sys.modules["gemma"]
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_llama_cpp_shows_its_nodes_as_sites_and_keeps_what_is_promised(dtype: torch.dtype, folder: Folder) -> None:
    """F32 and BF16 files made for it; the distances are its 16-bit GELU and, for BF16, rounded activations."""
    pytest.importorskip("llama_cpp", reason="the live comparison needs the extra gemma2[llama-cpp]")
    path = folder(query_pre_attn_scalar=16, **SHAPES["9b"])
    external, ours = open_reference("llama.cpp", path, dtype), open_reference("self", path, torch.float32)
    assert len(external.sites) == 4 * 22 + 5 and external.dtype == torch.float32
    check_reference(external, ours.config, within=1e-3 if dtype == torch.float32 else 0.05)
    found, expected = external.run(ROW, external.sites), ours.run(ROW, external.sites)
    for name, value in found.items():
        apart = (value - expected[name]).norm() / expected[name].norm()
        assert apart < (5e-3 if dtype == torch.float32 else 0.3), name


def live_llama_cpp(name: str) -> Any:
    """llama.cpp over a file of the small model. Kernels for AMX add in an order of their own, which is recorded nowhere
    and followed by no profile."""
    installed = pytest.importorskip("llama_cpp", reason="the live comparison needs the extra gemma2[llama-cpp]")
    if b"AMX" in installed.llama_print_system_info():
        pytest.skip("this llama.cpp is built with AMX, whose sums the profile does not follow")
    return llama_cpp(open_checkpoint(parity_file(name)))


@pytest.mark.parametrize("name", ["f32", "q4_k_m"])
def test_llama_cpp_computes_at_every_site_what_was_recorded_of_it(name: str) -> None:
    """To the bit on a processor like the one that they were recorded on; on another one its sums may differ."""
    external = live_llama_cpp(name)
    recorded = load_file(PARITY / f"llama_cpp_sites_{name}.safetensors")
    found = external.run(parity_model.ids(), recorded)
    for site, value in recorded.items():
        by_head = site.endswith(("scores_raw", "pattern"))  # [h t s], and all others [t ...]
        last = found[site][:, -value.shape[1] :] if by_head else found[site][-len(value) :]
        assert last.shape == value.shape and (last - value).norm() <= 1e-3 * value.norm(), site


@pytest.mark.parametrize("name", FILES)
def test_llama_cpps_numerics_are_its_bits_for_prompts_of_any_length(name: str) -> None:
    """One row of activations, fewer than a tile, a number that is no multiple of four: each has kernels of its own.
    Those of IQ1_S, IQ2_S, IQ2_XXS and IQ3_XXS for fewer than eight rows are not followed; the mixed file has them."""
    external, row = live_llama_cpp(name), [token % 512 for token in ROW]
    ours = Ourselves(open_checkpoint(parity_file(name)), torch.float32, numerics="llama.cpp")
    for length in (8, 11, 60) if name == "mixed" else (1, 2, 5, 7, 8, 11, 60):
        theirs, found = (system.run(row[:length], external.sites) for system in (external, ours))
        assert [site for site in found if not torch.equal(found[site], theirs[site])] == [], length
    for chunks in (
        () if name == "mixed" else ([5, *[1] * 3], [3, 5])
    ):  # with its cache, as long as no local layer has left its window of 8
        theirs, found = (system.cached(row[:8], chunks) for system in (external, ours))
        assert torch.equal(found, theirs), chunks


def test_every_site_of_llama_cpp_is_the_node_of_its_name() -> None:
    external, row = live_llama_cpp("q8_0"), [token % 512 for token in ROW]
    nodes, sited = external.nodes(row), external.run(row, external.sites)
    pairs = {
        "hook_embed": "SCALE inp_scaled",
        "blocks.0.hook_resid_pre": "SCALE inp_scaled",
        "blocks.1.ln1.hook_normalized": "RMS_NORM norm-1",
        "blocks.1.ln1_post.hook_normalized": "RMS_NORM norm-1 2",
        "blocks.1.ln2.hook_normalized": "RMS_NORM norm-1 3",
        "blocks.1.ln2_post.hook_normalized": "RMS_NORM norm 2",
        "ln_final.hook_normalized": "RMS_NORM norm 3",
        "blocks.1.hook_resid_pre": "ADD l_out-0",
        "blocks.1.hook_mlp_out": "MUL ffn_post_norm 2",
        "logits_raw": "MUL_MAT node_ 3",
        "logits": "SCALE result_output",
    }
    assert all(torch.equal(sited[site].flatten(), nodes[node].flatten()) for site, node in pairs.items())
    cap = torch.tanh(sited["logits_raw"] / 30) * 30
    assert torch.allclose(cap, sited["logits"], atol=1e-4)
    pattern = sited["blocks.0.attn.hook_pattern"]
    assert torch.allclose(pattern.sum(-1), torch.ones(8, len(ROW))) and not pattern.triu(1).any()


def test_llama_cpp_refuses_what_a_gguf_cannot_state_a_cut_file_and_too_many_rows(
    folder: Folder, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="the live comparison needs the extra gemma2[llama-cpp]")
    with pytest.raises(BadModelFile, match="query_pre_attn_scalar"):
        open_reference("llama.cpp", folder("scale", query_pre_attn_scalar=36))
    path = gemma2.convert(folder(query_pre_attn_scalar=16), tmp_path / "x.gguf").path
    opened = open_checkpoint(path)
    external = llama_cpp(opened)
    with pytest.raises(CannotDo, match="takes 256 rows, not 257"):
        external.batched([[5]] * 257)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BadModelFile, match=r"x\.gguf: llama\.cpp does not load it: .*corrupted or incomplete"):
        llama_cpp(opened)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_we_ourselves_show_every_site_and_keep_what_is_promised(dtype: torch.dtype, folder: Folder) -> None:
    path = folder(**SHAPES["9b"])
    external = open_reference("self", path, dtype)
    assert external.sites == sites(external.config).keys()
    check_reference(external, read_config(path / "config.json"))


@pytest.mark.parametrize("numerics", ["transformers", "gemma_pytorch", "llama.cpp"])
def test_we_ourselves_with_other_numerics_keep_what_is_promised(numerics: str, folder: Folder) -> None:
    path = folder(**SHAPES["9b"])
    external = open_reference(f"self:dtype=float32,device=cpu,numerics={numerics}", path)
    assert numerics in external.system
    # llama.cpp's GELU is looked up by a 16-bit number, so an ulp of its input can become 2**-11 of its output.
    within = 1e-3 if numerics == "llama.cpp" else 0.0
    check_reference(external, read_config(path / "config.json"), within)
    plain = open_reference("self", path).run(ROW, ["logits"])["logits"]
    assert torch.equal(external.run(ROW, ["logits"])["logits"], plain) == (numerics == "transformers")


def test_our_own_dtype_and_checkpoint_are_those_asked_for(folder: Folder) -> None:
    path = folder()
    assert open_reference("self", path).dtype == torch.float32
    assert open_reference("self", path, torch.bfloat16).dtype == torch.bfloat16
    assert open_reference("self:dtype=float64", path, torch.bfloat16).dtype == torch.float64
    other = folder("a,b", tensors=tensors_of(tiny(seed=1, vocab_size=4096)))
    found, expected = (open_reference(spec, path).run(ROW, ["logits"]) for spec in ("self", f"self:model={other}"))
    assert not torch.allclose(found["logits"], expected["logits"], atol=1)


def test_llama_cpp_numerics_round_by_the_types_in_the_file() -> None:
    path = POCKET / "pocket-q8_0.gguf"
    as_file = open_reference("self:numerics=llama.cpp", path)
    assert as_file.dtype == torch.float32 and "weights in" not in as_file.system
    dequantized = open_reference("self:dtype=float32", path)
    first = "blocks.0.mlp.hook_pre"
    found, expected = (external.run(ROW[:20], [first])[first] for external in (as_file, dequantized))
    assert 1e-3 < (found - expected).norm() / expected.norm() < 0.1


@pytest.fixture
def trace(folder: Folder, tmp_path: Path) -> tuple[Path, Path]:
    """A model and a trace of some of its sites."""
    path, file = folder(), tmp_path / "trace.safetensors"
    model = gemma2.load(path, device="cpu").model
    about = About("another program 1.0", "float32", model.config, {"torch": torch.__version__})
    writer = TraceWriter(file, about, ROW, ["blocks.*.hook_resid_post", "logits"], torch.float32)
    with torch.no_grad(), writer as opened, watching(model, opened.add, opened.sites):
        model(torch.tensor([ROW]))
    return path, file


def test_a_trace_answers_for_its_own_ids_alone(trace: tuple[Path, Path]) -> None:
    path, file = trace
    ours = open_reference("self", path)
    for spec in (str(file), f"trace:{file}"):
        external = open_reference(spec, path)
        assert (external.system, external.dtype, external.longest) == ("another program 1.0", torch.float32, len(ROW))
        assert external.config == ours.config and len(external.sites) == 5
        found, expected = (each.run(ROW, external.sites) for each in (external, ours))
        assert all(torch.equal(found[name], expected[name]) for name in external.sites)
    asked: list[Callable[[], Any]] = [
        lambda: external.run(ROW[:-1], ["logits"]),
        lambda: external.with_window(WINDOW),
        lambda: external.cached(ROW, [60]),
        lambda: external.batched(ROWS),
    ]
    for ask in asked:
        with pytest.raises(CannotDo, match=r"trace\.safetensors: a trace is a record: "):
            ask()
    with pytest.raises(CannotDo, match=r"another program 1\.0 does not show hook_embed"):
        external.run(ROW, ["hook_embed"])


def test_a_trace_of_another_model_or_dtype_or_cut_short_is_refused(trace: tuple[Path, Path], folder: Folder) -> None:
    path, file = trace
    with pytest.raises(BadModelFile, match=r"another model than .*shallow: its num_hidden_layers is 4, not 2"):
        open_reference(str(file), folder("shallow", num_hidden_layers=2))
    with pytest.raises(BadModelFile, match=r"another model than .*: its vocab_size is 4096, not 512"):
        open_reference(str(file), PARITY / "q8_0.gguf")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(BadModelFile, match="not a whole safetensors file"):
        open_reference(str(file), path)
    file.write_bytes(whole.replace(b'"dtype":"float32"', b'"dtype":"floatXX"'))
    with pytest.raises(BadModelFile, match="dtype 'floatXX' is not one of"):
        open_reference(str(file), path)
    with pytest.raises(BadModelFile, match="no such file"):
        open_reference("trace:nowhere", path)


def test_a_reference_with_another_vocabulary_or_depth_is_refused(folder: Folder) -> None:
    path, other = folder(), folder("other", num_hidden_layers=3)
    with pytest.raises(
        BadModelFile,
        match=rf"self:model=.*: another model than {re.escape(str(path))}: its num_hidden_layers is 3, not 4",
    ):
        open_reference(f"self:model={other}", path)
    with pytest.raises(BadModelFile, match="its num_hidden_layers is 6, not 4"):
        open_reference(f"self:model={POCKET}", path)


def test_specs_that_name_nothing_are_refused_with_the_cure(folder: Folder) -> None:
    path = folder()
    for spec in ("mlx", "", "gemma_pytorch", "trace", "trace:", "transformers:4", "llama.cpp:x"):
        with pytest.raises(
            ValueError, match=r"no reference .*; there are transformers, llama\.cpp, gemma_pytorch:FOLDER"
        ):
            open_reference(spec, path)
    for spec in ("dtpye=float32", "dtype", "dtype=", "dtype=float32,dtype=float32"):
        with pytest.raises(
            ValueError,
            match=r"give model=\.\.\., dtype=\.\.\., device=\.\.\., numerics=\.\.\., weights=\.\.\., each once",
        ):
            open_reference(f"self:{spec}", path)
    with pytest.raises(ValueError, match="dtype is not one of float32, bfloat16, float64"):
        open_reference("self:dtype=int8", path)
    with pytest.raises(ValueError, match="device 'nowhere' is not available here"):
        open_reference("self:device=nowhere", path)
    with pytest.raises(ValueError, match="numerics 'mlx' is not one of"):
        open_reference("self:numerics=mlx", path)
    for spec, place in (("self:model=nowhere", path), ("self", Path("nowhere"))):
        with pytest.raises(BadModelFile, match="nowhere: no such file or folder"):
            open_reference(spec, place)


@pytest.mark.parametrize(
    "spec, external, package",
    [("transformers", "transformers", "transformers"), ("llama.cpp", "llama_cpp", "llama-cpp-python")],
)
def test_a_reference_that_is_not_installed_is_named_with_its_package(
    spec: str, external: str, package: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == external]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"gemma2.parity.references.{external}", raising=False)
    importing = builtins.__import__

    def without(name: str, *args: Any, **named: Any) -> Any:
        if name.split(".")[0] == external:
            raise ImportError(f"No module named {name!r}")
        return importing(name, *args, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"is not installed: pip install {package} \("):
        open_reference(spec, folder())
