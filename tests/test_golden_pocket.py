"""The pocket model's golden traces, which transformers computed with the weights that ship; it need not be installed.

They are in the format of docs/traces.md, so they also show that another's trace is read. To the bit transformers is met
where it is installed (tests/parity/test_golden.py): elsewhere another processor may add in another order.

Features are switched off one by one, as in test_golden.py. Two cannot show in this model, and show there: its query
scale is that of the head width, and its scores stay so far below the cap that a capped mask still hides.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2.parity.tolerances import TOLERANCES
from gemma2.parity.trace import Trace
from gemma2.research import capture
from tests.parity.injected import (
    Inject,
    erf_gelu,
    interleaved_rotary,
    no_final_cap,
    no_score_cap,
    unscaled_embedding,
)
from tests.test_golden import (
    with_relu,
    with_window,
    without_final_norm,
    without_gate,
    without_norm,
    without_one_plus,
    without_rotation,
)

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRACES = sorted(GOLDEN.glob("pocket_*.safetensors"))


def distances(model: gemma2.Gemma2, trace: Trace) -> dict[str, float]:
    """Largest difference at each site, by the site's largest value."""
    with torch.no_grad(), capture(model, trace.names) as seen:
        model(torch.tensor([trace.ids]))
    return {name: apart(seen[name][0], trace[name]) for name in trace.names}


def apart(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def test_there_is_a_short_and_a_long_one_in_two_dtypes_within_a_megabyte() -> None:
    assert [path.stem for path in TRACES] == [
        f"pocket_{length}_{dtype}" for length in ("long", "short") for dtype in sorted(DTYPES)
    ]
    assert sum(path.stat().st_size for path in TRACES) < 1e6


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_every_site_is_met(path: Path) -> None:
    trace, gemma = Trace(path), gemma2.load(dtype=path.stem.split("_")[-1], device="cpu")
    assert trace.about.config == gemma.config
    found = distances(gemma.model, trace)
    assert set(found) == set(trace.names) and found
    assert max(found.values()) <= TOLERANCES[DTYPES[trace.about.dtype]].bound, found


def test_the_long_prompt_leaves_the_window_and_the_short_one_shows_every_block() -> None:
    long, short = Trace(GOLDEN / "pocket_long_float32.safetensors"), Trace(GOLDEN / "pocket_short_float32.safetensors")
    assert len(long.ids) > long.about.config.sliding_window
    blocks = {f"blocks.{i}.hook_resid_{place}" for i in range(6) for place in ("mid", "post")}
    assert set(short.names) == {"hook_embed", *blocks, "ln_final", "logits"}
    for trace in (long, short):
        assert trace.about.system.startswith("transformers 5.") and trace.about.versions["torch"]


def local_layers_only(model: gemma2.Gemma2) -> None:
    for layer in model.model.layers:
        layer.self_attn.attend.window = model.config.sliding_window


def without_positions_of_the_first_block(model: gemma2.Gemma2) -> None:
    model.model.layers[0].self_attn.hook_rot_q.register_forward_hook(lambda m, i, o: o.flip(1))


def with_heads_of_another_group(model: gemma2.Gemma2) -> None:
    for layer in model.model.layers:
        layer.self_attn.hook_k.register_forward_hook(lambda m, i, o: o.roll(1, dims=2))


def without_scale(model: gemma2.Gemma2) -> None:
    for layer in model.model.layers:
        layer.self_attn.attend.scale = 1.0


def with_untied_head(model: gemma2.Gemma2) -> None:
    model.lm_head.register_forward_hook(lambda m, i, o: o.roll(1, dims=-1))


SWITCHED: dict[str, tuple[str, Inject]] = {
    **{
        f"{name} left out": ("short", without_norm(name))
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
    },
    "final norm left out": ("short", without_final_norm),
    "gain w instead of 1 + w": ("short", without_one_plus),
    "scores not capped": ("short", no_score_cap),
    "logits not capped": ("short", no_final_cap),
    "embedding not scaled": ("short", unscaled_embedding),
    "scores not scaled": ("short", without_scale),
    "another token's query": ("short", without_positions_of_the_first_block),
    "another group's keys": ("short", with_heads_of_another_group),
    "another head": ("short", with_untied_head),
    "no rotation": ("short", without_rotation),
    "rotary pairs interleaved": ("short", interleaved_rotary),
    "relu instead of gelu": ("short", with_relu),
    "erf gelu": ("short", erf_gelu),
    "no gate": ("short", without_gate),
    "window off": ("long", with_window(None)),
    "window one wider": ("long", with_window(129)),
    "window one narrower": ("long", with_window(127)),
    "every layer local": ("long", local_layers_only),
}


@pytest.mark.parametrize("name", SWITCHED)
def test_each_feature_switched_off_breaks_a_golden_trace(name: str) -> None:
    which, change = SWITCHED[name]
    model = gemma2.load(dtype="float32", device="cpu").model
    change(model)
    found = distances(model, Trace(GOLDEN / f"pocket_{which}_float32.safetensors"))
    assert max(found.values()) > 5 * TOLERANCES[torch.float32].bound, found
