"""What all checkpoint formats give alike, and the threads that read them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.checkpoints.dtypes import RUNNABLE, SAFETENSORS, dtype_name, stored_name
from gemma2.checkpoints.gguf_weights import GGUFWeights
from gemma2.checkpoints.weights import Weights
from gemma2.convert import convert
from gemma2.load import POCKET
from gemma2.tied import EMBEDDING

NORM = "model.norm.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


def values_of(weights: Weights, name: str, start: int, stop: int) -> torch.Tensor:
    shape, dtype = weights.tensors[name]
    out = torch.empty(stop - start, *shape[1:], dtype=dtype)
    weights.read(name, start, out)
    return out


@pytest.mark.parametrize("form", ["out", "out.ckpt", "out.gguf"])
def test_raw_rows_of_plain_floats_are_the_bytes_of_their_values(form: str, tmp_path: Path) -> None:
    weights = open_checkpoint(convert(POCKET, tmp_path / form, type="bf16", progress=False).path).weights
    assert {weights.stored(name) for name in (EMBEDDING, QUERY)} == {"BF16"}
    for name in (EMBEDDING, QUERY):  # the query's rows are in the middle of a fused tensor of the .ckpt
        raw = weights.raw(name, 3, 8)
        assert raw.dtype == torch.uint8 and raw.shape == (5, 2 * weights.tensors[name][0][1])
        assert torch.equal(raw.view(torch.bfloat16), values_of(weights, name, 3, 8).bfloat16())


@pytest.mark.parametrize("form", ["out", "out.ckpt", "out.gguf"])
def test_a_vector_is_one_raw_row(form: str, tmp_path: Path) -> None:
    weights = open_checkpoint(convert(POCKET, tmp_path / form, type="f32", progress=False).path).weights
    (width,), _ = weights.tensors[NORM]
    raw = weights.raw(NORM, 0, 1)
    assert weights.stored(NORM) == "F32" and raw.shape == (1, 4 * width)
    w = values_of(weights, NORM, 0, width)
    assert torch.equal(raw.view(torch.float32)[0], 1 + w if form.endswith("gguf") else w)


def test_raw_rows_of_quantized_tensors_are_whole_blocks(tmp_path: Path) -> None:
    weights = open_checkpoint(convert(POCKET, tmp_path / "out.gguf", type="q8_0", progress=False).path).weights
    assert isinstance(weights, GGUFWeights)
    assert weights.stored(QUERY) == "Q8_0" and weights.stored(NORM) == "F32" and weights.types == {"Q8_0"}
    rows, width = weights.tensors[QUERY][0]
    raw = weights.raw(QUERY, 0, rows)
    assert raw.shape == (rows, width // 32 * 34)
    assert torch.equal(weights.raw(QUERY, 7, 9), raw[7:9])
    blocks = raw.view(-1, 34)
    by_hand = blocks[:, :2].clone().view(torch.float16).float() * blocks[:, 2:].view(torch.int8).float()
    assert torch.equal(by_hand.view(rows, width), values_of(weights, QUERY, 0, rows))


THREADS = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import torch
import gemma2
from gemma2.checkpoints.threads import one_thread_per_core

def fresh():  # what a thread computes with that begins now
    with ThreadPoolExecutor(1) as one:
        return one.submit(torch.get_num_threads).result()

torch.get_num_threads()  # the first use sets this thread up
torch.set_num_threads(4)
"""


def threads(script: str) -> str:
    command = [sys.executable, "-c", THREADS + script]
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8", timeout=120).stdout


def test_loads_at_once_leave_the_number_of_threads_as_it_was() -> None:
    said = threads("""
for _ in range(8):
    loads = [threading.Thread(target=lambda: gemma2.load(progress=False)) for _ in range(3)]
    for n, one in enumerate(loads):
        one.start()
        time.sleep(0.004 * n)  # so that one begins while another is at work
    for one in loads:
        one.join()
    print(torch.get_num_threads(), fresh())
""")
    assert said == "4 4\n" * 8


def test_a_pool_computes_with_one_thread_per_core_and_leaves_other_threads_alone() -> None:
    said = threads("""
with ThreadPoolExecutor(1) as other:
    other.submit(torch.set_num_threads, 3).result()  # also what new threads get from now on
    with one_thread_per_core() as pool:
        counts = set(pool.map(lambda _: torch.get_num_threads(), range(100)))
        print(pool._max_workers, counts, torch.get_num_threads(), fresh())
    print(torch.get_num_threads(), other.submit(torch.get_num_threads).result(), fresh())
""")
    assert said == "4 {1} 4 3\n4 3 3\n"


def test_a_pool_whose_threads_cannot_start_ends_with_the_error_and_the_number_as_it_was() -> None:
    said = threads("""
submit, left = ThreadPoolExecutor.submit, [3]
def fails(self, *args):
    if "load" in self._thread_name_prefix:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("can't start new thread")
    return submit(self, *args)
ThreadPoolExecutor.submit = fails
try:
    gemma2.load(progress=False)
except RuntimeError as error:
    print(error, torch.get_num_threads(), fresh())
""")
    assert said == "can't start new thread 4 4\n"


def test_dtypes_have_the_names_of_pytorch_and_of_files() -> None:
    assert [dtype_name(dtype) for dtype in RUNNABLE.values()] == list(RUNNABLE)
    assert [stored_name(dtype) for dtype in SAFETENSORS.values()] == list(SAFETENSORS)
    assert dtype_name("torch.bfloat16") == "bfloat16" and stored_name(torch.qint8) == "qint8"
