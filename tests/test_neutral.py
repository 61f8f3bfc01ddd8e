"""What a caller has set in PyTorch changes neither what a file means nor what is generated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import gemma2
from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.checkpoints.ggml import TYPES, GGMLType, dequantize
from gemma2.checkpoints.weights import count_nonfinite
from gemma2.gemma import Options
from tests.conftest import tensors_of
from tests.parity.recordings import PARITY, folder

Setting = Callable[[], contextlib.AbstractContextManager[object]]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS: dict[str, Setting] = {
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device": lambda: default_device("meta"),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each format; the GGUF has 18 quantized types."""
    ckpt = gemma2.convert(folder(), tmp_path_factory.mktemp("ckpt") / "model.ckpt", progress=False).path
    return {"gguf": PARITY / "mixed.gguf", "folder": folder(), "ckpt": ckpt}


@every_setting
@pytest.mark.parametrize("form", ["gguf", "folder", "ckpt"])
def test_a_checkpoint_holds_the_same_weights(setting: Setting, form: str, sources: dict[str, Path]) -> None:
    expected = tensors_of(gemma2.load(sources[form], dtype="float32", device="cpu").model)
    with setting():
        model = gemma2.load(sources[form], dtype="float32", device="cpu").model
    found = model.state_dict()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in model.parameters())


@every_setting
def test_a_conversion_writes_the_same_bytes(setting: Setting, tmp_path: Path) -> None:
    for name, type in (("a.gguf", "q8_0"), ("a.ckpt", "bf16")):
        expected = gemma2.convert(PARITY / "mixed.gguf", tmp_path / "as_is" / name, type=type, progress=False)
        with setting():
            found = gemma2.convert(PARITY / "mixed.gguf", tmp_path / "under" / name, type=type, progress=False)
        assert found.path.read_bytes() == expected.path.read_bytes()


@pytest.fixture(autouse=True)
def places(tmp_path: Path) -> None:
    for name in ("as_is", "under"):
        (tmp_path / name).mkdir()


@narrow
@pytest.mark.parametrize("type", TYPES.values(), ids=lambda type: type.name)
def test_a_ggml_type_stands_for_the_same_numbers(type: GGMLType, dtype: torch.dtype) -> None:
    raw = torch.randint(256, (8, 4 * type.bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    expected = dequantize(raw, type)
    with default_dtype(dtype):
        found = dequantize(raw, type)
    assert found.dtype == torch.float32 and torch.equal(found.view(torch.int32), expected.view(torch.int32))


@narrow
def test_values_of_a_file_are_counted_in_float32(dtype: torch.dtype) -> None:
    weights = open_checkpoint(folder()).weights
    with default_dtype(dtype):
        assert count_nonfinite(weights, progress=False) == {}


@every_setting
def test_text_is_the_same(setting: Setting, pocket: gemma2.Gemma) -> None:
    asked: Options = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 5}
    expected = pocket.generate(["In the beginning", "And"], 12, **asked)
    with setting():
        found = pocket.generate(["In the beginning", "And"], 12, **asked)
    assert found == expected or setting is SETTINGS["autocast"]  # autocast computes in bfloat16, as was asked for
    assert len(found) == 2
