"""Every ggml type has, in float32, the bits of gguf-py's own dequantisation; in other dtypes it is rounded once."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from torch import Tensor

from gemma2.checkpoints import ggml
from gemma2.checkpoints.ggml import TYPES, GGMLType, dequantize, dequantize_into
from gemma2.checkpoints.gguf import read_header
from tests.conftest import GOLDEN, SHARED

# Where shared/data is, more of them than the repository holds.
FILES = [*sorted((GOLDEN / "parity").glob("*.gguf")), *sorted((SHARED / "data" / "parity-model").glob("*.gguf"))]
KINDS = list(TYPES.values())


def random_blocks(kind: GGMLType, rows: int, blocks: int, seed: int = 0) -> Tensor:
    """Any bits at all, so NaN and infinite scales among them."""
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks * kind.bytes), dtype=np.uint8)
    return torch.from_numpy(raw)


def oracle(raw: Tensor, kind: GGMLType) -> Tensor:
    with np.errstate(all="ignore"):
        found = quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(kind.id))
    return torch.from_numpy(np.array(found, np.float32)).view(len(raw), -1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, zeros' signs included; a NaN is only a NaN."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(torch.int32)[~nan], b.view(torch.int32)[~nan])


def test_every_type_that_gguf_py_can_dequantise_is_here_with_its_sizes() -> None:
    plain = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}
    known = {int(kind): gguf.GGML_QUANT_SIZES[kind] for kind in plain | set(quants._type_traits)}
    assert {kind.id: (kind.values, kind.bytes) for kind in KINDS} == known
    assert all(gguf.GGMLQuantizationType(kind.id).name == kind.name for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_random_blocks_have_the_bits_of_gguf_py(kind: GGMLType) -> None:
    raw = random_blocks(kind, 7, 4096 // kind.values + 1)
    assert same_bits(oracle(raw, kind), dequantize(raw, kind))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_of_one_byte_repeated_have_the_bits_of_gguf_py(kind: GGMLType) -> None:
    raw = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, kind.bytes).contiguous()
    assert same_bits(oracle(raw, kind), dequantize(raw, kind))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_real_blocks_written_by_llama_cpp_have_the_bits_of_gguf_py(path) -> None:
    content = path.read_bytes()
    for name, info in read_header(path).tensors.items():
        raw = torch.frombuffer(bytearray(content[info.offset : info.offset + info.bytes]), dtype=torch.uint8)
        raw = raw.view(-1, info.row_bytes)
        assert same_bits(oracle(raw, info.type), dequantize(raw, info.type)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_another_dtype_is_the_float32_value_rounded_once(kind: GGMLType, dtype: torch.dtype) -> None:
    raw = random_blocks(kind, 3, 1024 // kind.values, seed=1)
    out = torch.empty(3, raw.shape[1] // kind.bytes * kind.values, dtype=dtype)
    dequantize_into(raw, kind, out)
    assert torch.equal(out.nan_to_num(), oracle(raw, kind).to(dtype).nan_to_num())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_pieces_and_strides_change_nothing(kind: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "CPU_PIECE", 3 * kind.values)  # so that pieces end within rows, the last one short
    raw = random_blocks(kind, 5, 8, seed=2)
    wide = torch.empty(10, 8 * kind.values)
    dequantize_into(raw, kind, wide[::2])
    assert same_bits(oracle(raw, kind), wide[::2].contiguous())
    assert same_bits(oracle(raw, kind)[:, : 4 * kind.values], dequantize(raw[:, : 4 * kind.bytes], kind))


def test_what_does_not_fit_is_refused_with_both_sizes() -> None:
    kind = next(kind for kind in KINDS if kind.name == "Q4_K")
    with pytest.raises(
        ValueError, match=r"raw is \[2, 143\] of torch.uint8: Q4_K needs uint8 with whole blocks of 144"
    ):
        dequantize(torch.zeros(2, 143, dtype=torch.uint8), kind)
    with pytest.raises(ValueError, match=r"raw is \[2, 144\] of torch.int8"):
        dequantize(torch.zeros(2, 144, dtype=torch.int8), kind)
    raw = torch.zeros(2, 144, dtype=torch.uint8)
    for out in (torch.empty(2, 255), torch.empty(1, 256), torch.empty(2, 256, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"Q4_K needs \[2, 256\] of a float dtype"):
            dequantize_into(raw, kind, out)
