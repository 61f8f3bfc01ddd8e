"""Attention in blocks against the plain one: where every feature matters, in every dtype, hooked, trained, compiled."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gemma2 import HybridCache, left_padded
from gemma2.fast import attention
from gemma2.fast.attention import FastAttention, spans
from gemma2.fast.static import StaticCache
from gemma2.fast.step import compiled_step
from gemma2.generate import generate_ids
from gemma2.model import SoftcapAttention
from gemma2.ops import visible
from gemma2.research import capture
from gemma2.twins import on, replaced
from tests.conftest import ids, tiny

FAST = on(SoftcapAttention, FastAttention)
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}  # of the largest output
# Queries, and keys before them: one and few queries, one block, several, a chunk that continues a cache.
LENGTHS = [(1, 0), (1, 40), (1, 600), (3, 300), (9, 0), (300, 0), (300, 77), (700, 0)]


def both(window: int | None, cap: float = 50.0) -> tuple[SoftcapAttention, FastAttention]:
    """8 query heads over 4 key heads, and a scale of 1/6 that is not the head width's."""
    config = replace(tiny("27b").config, attn_logit_softcapping=cap)
    plain = SoftcapAttention(config, window)
    return plain, FastAttention(plain)


def inputs(t: int, before: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Two rows, the second with 7 columns of padding; slots not in the order of positions, some empty. Scores saturate
    the cap."""
    generator = torch.Generator().manual_seed(t)
    s = t + before
    q, k, v = (torch.randn(2, n, heads, 16, generator=generator) for n, heads in ((t, 8), (s, 4), (s, 4)))
    positions = torch.stack([torch.arange(s), torch.arange(s) - 7])
    keys = positions.clone()
    if before:
        keys[:, 3] = -1
        order = torch.randperm(s, generator=generator)
        k, v, keys = k[:, order], v[:, order], keys[:, order]
    return (q * 12).to(dtype), (k * 2).to(dtype), v.to(dtype), positions[:, before:], keys


def of_real(z: Tensor, positions: Tensor) -> Tensor:
    return z[positions >= 0].double()


@pytest.mark.parametrize("window", [None, 16, 100])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@torch.no_grad()
def test_blocks_give_the_plain_result_within_the_stated_tolerance(window: int | None, dtype: torch.dtype) -> None:
    plain, fast = both(window)
    for t, before in LENGTHS:
        given = inputs(t, before, dtype)
        expected, z = plain(*given), fast(*given)
        assert z.dtype == dtype and z.isfinite().all() and z.is_contiguous()
        difference = of_real(z - expected, given[3]).abs().max() if (given[3] >= 0).any() else torch.zeros(())
        assert difference <= BOUNDS[dtype] * expected.abs().max(), (t, before)


@pytest.mark.parametrize("window", [None, 16, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_in_half_precision_the_error_is_at_most_1_2_times_the_plain_ones(
    window: int | None, dtype: torch.dtype
) -> None:
    plain, fast = both(window)
    for t, before in LENGTHS[1:]:
        given = inputs(t, before, dtype)
        truth = plain(*(x.double() for x in given[:3]), *given[3:])
        errors = [of_real(z(*given) - truth, given[3]).pow(2).mean().sqrt() for z in (fast, plain)]
        assert errors[0] <= 1.2 * errors[1], (t, before, errors)


@torch.no_grad()
def test_a_cap_too_large_for_sums_of_exponentials_is_computed_as_the_plain_one_does() -> None:
    plain, fast = both(None, cap=500.0)
    given = inputs(300, 0, torch.float32)
    assert torch.equal(fast(*given), plain(*given))


@torch.no_grad()
def test_a_row_that_sees_nothing_gives_zeros() -> None:
    _, fast = both(16)
    for t, before in ((1, 40), (300, 77)):
        q, k, v, positions, keys = inputs(t, before, torch.float32)
        z = fast(q, k, v, positions, torch.full_like(keys, -1))
        assert not z.any()


def test_spans_leave_out_what_nobody_sees_and_mask_only_where_some_do() -> None:
    positions = torch.arange(2000)
    found = spans(positions, positions, 300)
    assert [(x.queries.start, x.slots.start, x.slots.stop) for x in found[:3]] == [
        (0, 0, 256),
        (256, 0, 512),
        (512, 213, 768),
    ]
    for span in found:
        rebuilt = torch.ones(
            span.queries.stop - span.queries.start, span.slots.stop - span.slots.start, dtype=torch.bool
        )
        for where, seen in span.masked:
            rebuilt[:, where] = seen
        assert torch.equal(rebuilt, visible(positions[None, span.queries], positions[None, span.slots], 300)[0, 0])
    inside = found[4]  # a window of 300 and blocks of 256: both ends are masked, what is between is not
    assert [x.stop - x.start for x, _ in inside.masked] == [255, 255]
    assert spans(torch.full((4,), -1), positions, None) == []


@torch.no_grad()
def test_no_more_than_a_block_of_scores_is_held() -> None:
    """A prompt of 1,500 in 8 heads has 72 MB of scores in float32."""
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else [result]:
                most = max(most, x.untyped_storage().nbytes() if isinstance(x, Tensor) else 0)
            return result

    _, fast = both(None)
    given = inputs(1500, 0, torch.float32)
    with Watch():
        fast(*given)
    assert most <= 2 * attention.QUERIES * 1500 * 4


@pytest.mark.parametrize("size", ["2b", "27b"])
@torch.no_grad()
def test_a_whole_model_gives_its_logits_in_chunks_past_the_window_and_ragged(size: str) -> None:
    model = tiny(size).double()
    rows = [ids(1, n, seed=n)[0].tolist() for n in (90, 61)]
    tokens, positions = left_padded(rows)
    expected = model(tokens, positions)
    with replaced(model, FAST):
        cache, logits = HybridCache(model.config, 2, 90), []
        for part, at in zip(tokens.split([50, 20, 1, 1, 18], 1), positions.split([50, 20, 1, 1, 18], 1), strict=True):
            logits.append(model(part, at, cache))
    assert of_real(torch.cat(logits, 1) - expected, positions).abs().max() <= 1e-10


@torch.no_grad()
def test_queries_go_through_onednn_and_the_switch_is_left_as_it_was() -> None:
    _, fast = both(None)
    for enabled in (False, True):
        with torch.backends.mkldnn.flags(enabled=enabled):
            fast(*inputs(1, 40, torch.bfloat16))
            assert torch._C._get_mkldnn_enabled() is enabled


@torch.no_grad()
def test_taps_keep_their_places_and_hooks_see_the_plain_computation() -> None:
    model, tokens = tiny("9b"), ids(2, 40)
    with capture(model) as plain:
        model(tokens)
    with replaced(model, FAST):
        with capture(model) as fast:
            logits = model(tokens)
        assert plain.keys() == fast.keys()
        assert all(torch.equal(plain[name], fast[name]) for name in plain)
        attend = model.model.layers[1].self_attn.attend
        handle = attend.hook_pattern.register_forward_hook(lambda m, i, pattern: torch.zeros_like(pattern))
        edited = model(tokens)
        handle.remove()
        seen: list[Tensor] = []
        handle = attend.hook_z.register_forward_hook(lambda m, i, z: seen.append(z))
        assert not torch.equal(edited, logits) and model(tokens).isfinite().all() and len(seen) == 1
        handle.remove()


def test_gradients_are_those_of_the_plain_one() -> None:
    plain, fast = both(16)
    for t, before in ((1, 40), (40, 0)):
        q, k, v, *at = inputs(t, before, torch.float64)
        found = []
        for module in (plain, fast):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            found.append(torch.autograd.grad(module(*leaves, *at).square().sum(), leaves))
        assert all(map(torch.equal, *found))


def test_transforms_see_the_plain_computation() -> None:
    plain, fast = both(16)
    q, k, v, *at = inputs(40, 0, torch.float64)
    for f in (
        lambda m: torch.func.jvp(lambda x: m(x, k, v, *at), (q,), (q,))[1],
        lambda m: torch.func.vmap(lambda x: m(x, k, v, *at))(q[None]),
    ):
        assert torch.equal(f(plain), f(fast))


@torch.no_grad()
def test_one_query_for_a_compiler_gives_the_plain_result() -> None:
    for window in (None, 100):
        plain, fast = both(window)
        for dtype, bound in BOUNDS.items():
            for before in (5, 40, 600):
                q, k, v, positions, keys = inputs(1, before, dtype)
                seen = visible(positions, keys, window)
                z = attention.one_query(q, k, v, seen, fast.scale, fast.softcap.cap)
                expected = plain(q, k, v, positions, keys)
                assert of_real(z - expected, positions).abs().max() <= bound * expected.abs().max()


@torch.no_grad()
@pytest.mark.long
def test_one_full_graph_decodes_with_the_twins_inside() -> None:
    model, graphs = tiny("2b", num_hidden_layers=2).double(), list[int]()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(1)
        return graph.forward

    tokens = ids(1, 30)
    expected = model(tokens)
    with replaced(model, FAST):
        cache = StaticCache(model, 1, 32)
        step = compiled_step(model, cache, backend=backend)
        steps = [step(tokens[:, i : i + 1], torch.tensor([[i]])) for i in range(30)]
    assert len(graphs) == 1
    assert (torch.stack(steps, 1) - expected).abs().max() <= 1e-10


@pytest.mark.long
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C++ compiler on CPU")
@torch.no_grad()
def test_one_query_is_compiled_once_for_all_multiples_of_32_slots() -> None:
    _, fast = both(None)
    compiled = torch.compile(attention.one_query, fullgraph=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for slots in (64, 96, 1024, 32 * 31):
            q, k, v, positions, keys = inputs(1, slots - 1, torch.float32)
            seen = visible(positions, keys, None)
            for x, axis in ((k, 1), (v, 1), (seen, 3)):
                torch._dynamo.mark_dynamic(x, axis)
            z = compiled(q, k, v, seen, fast.scale, 50.0)
            assert (z - fast(q, k, v, positions, keys)).abs().max() <= 1e-4


@torch.no_grad()
def test_greedy_text_is_that_of_the_plain_model() -> None:
    model, prompt = tiny("27b").double(), [ids(1, 30)[0].tolist(), ids(1, 12)[0].tolist()]
    expected = list(generate_ids(model, prompt, 20))
    with replaced(model, FAST):
        assert list(generate_ids(model, prompt, 20)) == expected
