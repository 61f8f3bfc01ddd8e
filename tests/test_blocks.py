"""ggml's blocks laid out for registers: the same values to the bit, and products as exact as float32 sums are."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from gemma2.checkpoints import ggml
from gemma2.checkpoints.hf_config import read_config
from gemma2.errors import BadModelFile
from gemma2.fast import blocks
from gemma2.fast.blocks import LAYOUTS
from gemma2.fast.compiling import can_compile
from gemma2.fast.embedding import HeldEmbedding
from gemma2.fast.linear import WideHeldEmbedding
from gemma2.fast.packed import BY_NAME, Blocks, PackedMatrix, pack
from gemma2.model import ScaledEmbedding
from tests import gguf_files
from tests.conftest import raw_config
from tests.test_packed import Stored

few_rows = blocks.few_rows.__wrapped__  # type: ignore[attr-defined]  # as it is, without the compiler


def random_rows(kind: str, rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Blocks with random codes, in rows [rows, bytes]."""
    raw = bytearray(gguf_files.blocks(kind, rows * width, seed))
    return torch.frombuffer(raw, dtype=torch.uint8).view(rows, -1)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_packed_values_are_those_that_the_file_states_to_the_bit(kind: str) -> None:
    rows, width, layout = 32, 512, LAYOUTS[kind]
    raw = random_rows(kind, rows, width)
    values = blocks.values_of(pack(raw, BY_NAME[kind]), layout)  # [tiles groups group 16]
    assert torch.equal(values.permute(0, 3, 1, 2).reshape(rows, width), ggml.dequantize(raw, BY_NAME[kind]))


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("m", [1, 3])
def test_products_are_those_of_the_dequantised_matrix_within_a_millionth(kind: str, m: int) -> None:
    rows, width = 64, 2304
    raw = random_rows(kind, rows, width, seed=m)
    x = torch.randn(m, width, generator=torch.Generator().manual_seed(m))
    weight = ggml.dequantize(raw, BY_NAME[kind]).double()
    truth = x.double() @ weight.T
    found = few_rows(pack(raw, BY_NAME[kind]), LAYOUTS[kind], x)
    assert (found - truth).abs().max() <= 1e-6 * (x.double().abs() @ weight.abs().T).max()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_packed_matrix_takes_no_more_memory_than_a_tenth_over_the_files_blocks(kind: str) -> None:
    matrix, format = PackedMatrix(256, 2304, torch.bfloat16, kind), BY_NAME[kind]
    assert matrix.held_bytes <= 1.1 * 256 * 2304 // format.values * format.bytes


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
def test_rows_that_are_no_multiple_of_sixteen_are_filled_up_and_cut_off(kind: str) -> None:
    raw = random_rows(kind, 41, 256)
    matrix = PackedMatrix(41, 256, torch.float32, kind)
    matrix.fill(cast(Any, Stored(raw, kind)), "w", torch.device("cpu"))
    weight = ggml.dequantize(raw, BY_NAME[kind])
    assert torch.equal(matrix.values(0, 41), weight)
    assert torch.equal(matrix.at(torch.tensor([[40, 0], [7, 40]])), weight[[40, 0, 7, 40]].view(2, 2, 256))


@pytest.mark.skipif(not can_compile(), reason="there is no C++ compiler")
def test_compiled_products_are_as_exact_and_stay_compiled_while_hooks_force_the_model_to_run_eagerly() -> None:
    raw, kind = random_rows("Q4_K", 64, 512), "Q4_K"
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    weight = ggml.dequantize(raw, BY_NAME[kind]).double()
    packed = pack(raw, BY_NAME[kind])
    found = blocks.few_rows(packed, LAYOUTS[kind], x)
    assert (found - x.double() @ weight.T).abs().max() <= 1e-6 * (x.double().abs() @ weight.abs().T).max()
    with torch.compiler.set_stance("force_eager"), torch.autograd.profiler.profile() as profile:
        again = blocks.few_rows(packed, LAYOUTS[kind], x)
    assert torch.equal(again, found) and "aten::bitwise_and" not in {event.name for event in profile.function_events}


def test_an_embedding_of_blocks_is_scaled_in_the_models_dtype_as_the_dequantised_one_is() -> None:
    """Also where the scale is rounded: sqrt(96) is 9.8125 in bfloat16."""
    config = read_config(raw_config("2b", hidden_size=96, vocab_size=32))
    raw, tokens = random_rows("Q8_0", 32, 96), torch.tensor([[3, 31, 0]])
    plain = ScaledEmbedding(config)
    matrix = PackedMatrix(32, 96, torch.bfloat16, "Q8_0")
    matrix.fill(cast(Any, Stored(raw, "Q8_0")), "w", torch.device("cpu"))
    held = HeldEmbedding(plain, matrix)
    plain.weight = torch.nn.Parameter(ggml.dequantize(raw, BY_NAME["Q8_0"]).bfloat16())
    assert torch.equal(held(tokens), plain(tokens))
    single = WideHeldEmbedding(held)(tokens[:, :1])
    assert single.dtype == torch.float32
    assert torch.equal(single[0, 0], ggml.dequantize(raw, BY_NAME["Q8_0"])[3] * 9.8125)


@pytest.mark.parametrize("kind", ["IQ4_NL", "Q2_K"])
def test_blocks_without_a_layout_are_multiplied_by_tiles_and_checked_to_be_finite(kind: str) -> None:
    raw, format = random_rows(kind, 32, 512), BY_NAME[kind]
    matrix = Blocks(32, 512, torch.float32, kind)
    matrix.fill(cast(Any, Stored(raw, kind)), "w", torch.device("cpu"))
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    assert torch.equal(matrix(x), torch.nn.functional.linear(x, ggml.dequantize(raw, format)))
    assert matrix.held_bytes == raw.numel()
    at = {"IQ4_NL": 0, "Q2_K": 80}[kind]  # of the block's float16 scale
    raw[5, at : at + 2] = torch.tensor([torch.nan], dtype=torch.float16).view(torch.uint8)
    with pytest.raises(BadModelFile, match="w holds NaN or infinity"):
        matrix.fill(cast(Any, Stored(raw, kind)), "w", torch.device("cpu"))
