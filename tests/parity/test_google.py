"""google/gemma_pytorch's recorded traces of a small random Gemma 2, met with our profile of it.

Both programs leave products and sums to PyTorch, whose libraries choose by processor in which order they add. A trace
tells what PyTorch's operations gave where it was recorded. A test's name says what is demanded here: every bit where
they give the same, else that rounding explains all of the distance, at every recorded site.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.numerics import PROFILES, with_numerics
from gemma2.parity.judge import DIFFERENCE, EQUAL, Judgement, judge
from gemma2.parity.machine import fingerprints, other_bits, stated
from gemma2.parity.references.trace import Recorded
from gemma2.parity.trace import Trace
from gemma2.research import capture
from tests.conftest import SHARED
from tests.parity.recordings import BITS, PARITY, demand, folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PATHS = {dtype: PARITY / f"gemma_pytorch_{dtype}.safetensors" for dtype in DTYPES}
DEMANDED = {dtype: demand(Trace(path)) for dtype, path in PATHS.items()}
CHANGES = [change.name for change in PROFILES["gemma_pytorch"]]
# What is hidden weighs nothing; in float32 rotation is in float32 already; bfloat16 hides the last bits of 43 angles.
VOID = {("mask=-2.38e38", "float32"), ("mask=-2.38e38", "bfloat16")}
VOID |= {("rope_mul=float32", "float32"), ("rope_turn=polar", "bfloat16")}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=[f"{dtype} {what}" for dtype, what in DEMANDED.items()])


def verdict(dtype: str, numerics: str | None) -> Judgement:
    trace = Trace(PATHS[dtype])
    return judge(Recorded(PATHS[dtype]), open_checkpoint(folder()), trace.ids, numerics=numerics, cases=False)


def computed(dtype: str, changes: list[str]) -> tuple[Trace, dict[str, Tensor]]:
    trace = Trace(PATHS[dtype])
    twin = with_numerics(gemma2.load(folder(), dtype=dtype, device="cpu").model, "gemma_pytorch", changes)
    with torch.no_grad(), capture(twin, trace.names) as seen:
        twin(torch.tensor([trace.ids]))
    return trace, {name: seen[name][0] for name in trace.names}


@each_dtype
def test_gemma_pytorch_is_met_at_every_recorded_site(dtype: str) -> None:
    found = verdict(dtype, "gemma_pytorch")
    assert found.system == "gemma_pytorch 014acb7" and len(found.rows) == 4 and found.tokens == 43
    assert found.verdict == EQUAL if DEMANDED[dtype] == BITS else found.verdict != DIFFERENCE


@each_dtype
def test_without_a_profile_rounding_explains_the_distance_to_gemma_pytorch(dtype: str) -> None:
    found = verdict(dtype, None)
    assert found.verdict not in (DIFFERENCE, EQUAL)


@each_dtype
@pytest.mark.parametrize("missing", CHANGES)
def test_no_change_of_the_profile_can_be_left_out_but_those_that_show_nowhere(missing: str, dtype: str) -> None:
    if DEMANDED[dtype] != BITS:
        pytest.skip("PyTorch's operations have other bits on this machine than where the trace was recorded")
    trace, found = computed(dtype, [change for change in CHANGES if change != missing])
    assert all(torch.equal(found[name], trace[name]) for name in trace.names) == ((missing, dtype) in VOID)


def test_the_recorded_model_has_every_feature_that_a_mistake_could_miss() -> None:
    trace = Trace(PATHS["float32"])
    config = trace.about.config
    assert config.sliding_window * 5 < len(trace.ids)
    assert config.query_pre_attn_scalar != config.head_dim
    assert config.num_attention_heads * config.head_dim != config.hidden_size
    assert config.num_attention_heads > config.num_key_value_heads > 1
    model = gemma2.load(folder(), dtype="float32", device="cpu").model
    names = ["blocks.0.attn.hook_scores_raw", "blocks.1.attn.hook_scores_raw", "logits_raw"]
    with torch.no_grad(), capture(model, names) as seen:
        model(torch.tensor([trace.ids]))
    assert all(seen[name].abs().max() > 2 * config.attn_logit_softcapping for name in names[:2])
    assert seen["logits_raw"].abs().max() > 2 * config.final_logit_softcapping


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_recording_of_this_machine_has_no_other_bits_and_a_changed_one_is_named(dtype: torch.dtype) -> None:
    config = open_checkpoint(folder()).config
    here = stated(config, 43, dtype)
    assert other_bits({"torch": "2", **here}, config, 43, dtype) == []
    assert other_bits({**here, "bits of softmax": "0" * 16}, config, 43, dtype) == ["softmax"]
    wider = fingerprints(dataclasses.replace(config, sliding_window=9), 43, dtype)
    assert {f"bits of {name}": value for name, value in wider.items()} == here, "the window is in no operation's shape"
    with pytest.raises(ValueError, match="record it anew"):
        other_bits({"torch": "2"}, config, 43, dtype)


CHILD = """
import json, torch
torch.set_num_threads(1)
from tests.parity.test_google import DEMANDED, verdict
print(json.dumps({dtype: [DEMANDED[dtype], verdict(dtype, "gemma_pytorch").verdict] for dtype in DEMANDED}))
"""
KERNELS = [{"ATEN_CPU_CAPABILITY": "default"}, {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}]


@pytest.mark.long
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: " ".join(kernels))
def test_where_other_kernels_give_other_bits_the_fingerprints_say_so_and_rounding_explains_them(
    kernels: dict[str, str],
) -> None:
    """As on another processor: PyTorch and its libraries can be told to use other kernels than the best ones."""
    command = [sys.executable, "-c", CHILD]
    root = PARITY.parents[2]
    path = os.pathsep.join([str(root), str(root / "scripts")])
    done = subprocess.run(
        command,
        cwd=root,
        env={**os.environ, **kernels, "PYTHONPATH": path},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    for demanded, found in json.loads(done.stdout.splitlines()[-1]).values():
        assert found != DIFFERENCE
        assert found == EQUAL or demanded != BITS


@pytest.mark.needs("shared", "data/parity-model")
def test_googles_ckpt_gives_the_tensors_of_the_safetensors() -> None:
    data = SHARED / "data" / "parity-model"
    ckpt, safetensors = gemma2.load(data / "model.ckpt"), gemma2.load(data)
    ours = dict(safetensors.model.named_parameters())
    for name, parameter in ckpt.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, ours[name].bfloat16()), name
