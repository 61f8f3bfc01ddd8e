"""The hybrid cache gives the no-cache result, whatever the order in which tokens come, and refuses what it cannot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gemma2 import ContextOverflow, Gemma2, Gemma2Config, HybridCache, left_padded
from gemma2.checkpoints.hf_config import published_config
from tests.conftest import ids, tiny

WINDOW = 16
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # float32: of the largest logit; the order of sums differs


@torch.no_grad()
def fed(model: Gemma2, tokens: torch.Tensor, sizes: list[int], cache: HybridCache) -> torch.Tensor:
    parts = tokens.split(sizes, dim=1)
    return torch.cat([model(part, cache=cache) for part in parts], dim=1)


def cache_for(model: Gemma2, batch: int, capacity: int) -> HybridCache:
    return HybridCache(model.config, batch, capacity)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("chunk", [1, 7, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW, 100])
@torch.no_grad()
def test_chunked_prefill_of_any_size_gives_the_uncached_logits(chunk: int, dtype: torch.dtype) -> None:
    model, tokens = tiny("27b").to(dtype), ids(2, 100)
    whole = model(tokens)
    sizes = [chunk] * (100 // chunk) + ([100 % chunk] if 100 % chunk else [])
    parts = fed(model, tokens, sizes, cache_for(model, 2, 100))
    assert (parts - whole).abs().max() <= TOLERANCE[dtype] * whole.abs().max()


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW - 1, 2 * WINDOW, 2 * WINDOW + 1])
@torch.no_grad()
def test_decoding_and_then_continuing_with_a_chunk_at_every_phase_of_the_ring(length: int) -> None:
    model, tokens = tiny("2b").double(), ids(1, length + 30)
    parts = fed(model, tokens, [length, *[1] * 5, 20, *[1] * 5], cache_for(model, 1, length + 30))
    assert (parts - model(tokens)).abs().max() <= 1e-10


@torch.no_grad()
def test_ragged_rows_padded_on_the_left_equal_their_solo_runs() -> None:
    model = tiny("9b").double()
    lengths, width = (5, 40, 23), 40
    tokens, pads = ids(3, width), torch.tensor([[width - n] for n in lengths])
    positions = torch.arange(width) - pads
    cache = cache_for(model, 3, width + 4)
    out = torch.cat([model(tokens[:, s], positions[:, s], cache) for s in (slice(0, 17), slice(17, width))], dim=1)
    more, after = ids(3, 4, seed=9), []
    for step in range(4):
        after.append(model(more[:, step : step + 1], width + step - pads, cache))
    for row, n in enumerate(lengths):
        solo = model(torch.cat((tokens[row, width - n :], more[row]))[None])[0]
        batched = torch.cat((out[row, width - n :], torch.cat(after, dim=1)[row]))
        assert torch.isfinite(out).all()
        assert (batched - solo).abs().max() <= 1e-10


@torch.no_grad()
@pytest.mark.long
def test_four_thousand_steps_around_the_ring_stay_as_exact_as_the_first() -> None:
    """250 wraps of a window of 16. Feed the tokens one by one and compare with one pass over all of them."""
    length = 4100
    model = tiny("2b", num_hidden_layers=2, max_position_embeddings=8192)
    tokens = ids(1, length)
    whole = model(tokens)
    cache = cache_for(model, 1, length)
    errors, memory = [], [0, 0]
    for start in range(length):
        if start in (1000, length - 1):
            memory[start > 1000] = resident()
        step = model(tokens[:, start : start + 1], cache=cache)
        errors.append((step[0, 0] - whole[0, start]).abs().max())
    error = torch.stack(errors)
    assert error.max() <= 1e-5 * whole.abs().max()
    first, last = error[WINDOW : WINDOW + 410].max(), error[-410:].max()
    assert last <= 2 * first, f"the error grows: {first:.2e} after the first wraps, {last:.2e} at the end"
    assert memory[1] - memory[0] <= 5e6, f"{memory} bytes resident after 1,000 and {length} steps"


def resident() -> int:
    """Bytes of this process in memory now; 0 where Linux's /proc is not there to tell."""
    found = Path("/proc/self/statm")
    return int(found.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") if found.exists() else 0


@torch.no_grad()
def test_one_thread_and_two_agree() -> None:
    model, tokens = tiny("9b").double(), ids(2, 100)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(fed(model, tokens, [60, *[1] * 40], cache_for(model, 2, 100)))
    torch.set_num_threads(threads)
    assert (found[0] - found[1]).abs().max() <= 1e-10


def test_a_local_layer_holds_exactly_window_slots_and_2b_takes_654_megabytes() -> None:
    config = published_config("gemma-2-2b")
    assert [layer.slots for layer in HybridCache(config, 1, 8192).layers[:4]] == [4096, 8192, 4096, 8192]
    assert round(cache_bytes(config, 8192, torch.bfloat16) / 1e6) == 654
    full = 26 * 8192 * 2 * 4 * 256 * 2
    assert round(full / 1e6) == 872


def cache_bytes(config: Gemma2Config, capacity: int, dtype: torch.dtype) -> int:
    """Of a cache that holds one token, on the meta device."""
    cache = HybridCache(config, 1, capacity)
    for layer in cache.layers:
        key = torch.empty(1, 1, config.num_key_value_heads, config.head_dim, dtype=dtype, device="meta")
        layer.update(key, key, torch.empty(1, 1, dtype=torch.int64, device="meta"))
    return cache.nbytes


@torch.no_grad()
def test_writing_past_the_capacity_raises_before_anything_changes() -> None:
    model = tiny()
    cache = cache_for(model, 1, 20)
    model(ids(1, 18), cache=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(ContextOverflow, match="18 columns held and 3 new exceed 20, its capacity"):
        model(ids(1, 3), cache=cache)
    assert cache.length == 18
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, cache.layers, strict=True))
    model(ids(1, 2), cache=cache)
    with pytest.raises(ContextOverflow):
        model(ids(1, 1), cache=cache)


@torch.no_grad()
def test_rolling_back_is_exact_while_no_ring_has_wrapped_and_refused_after() -> None:
    model, tokens = tiny().double(), ids(1, 40)
    cache = cache_for(model, 1, 60)
    model(tokens[:, :WINDOW], cache=cache)
    cache.rollback(9)
    assert all((layer.positions[:, 9:] == -1).all() and (layer.positions[:, :9] >= 0).all() for layer in cache.layers)
    again = model(tokens[:, 9:30], cache=cache)
    assert (again - model(tokens[:, :30])[:, 9:]).abs().max() <= 1e-10
    with pytest.raises(ValueError, match="wrapped the local layers' rings, which can take back 0"):
        cache.rollback(28)  # a query in column 28 sees column 13, which column 29 has overwritten
    cache.rollback(30)
    with pytest.raises(ValueError, match="holds 30"):
        cache.rollback(31)
    cache.reset()
    assert torch.equal(model(tokens, cache=cache), model(tokens, cache=cache_for(model, 1, 60)))


@torch.no_grad()
def test_a_cache_left_half_written_says_so_and_can_be_reset() -> None:
    model, tokens = tiny(), ids(1, 10)
    cache = cache_for(model, 1, 30)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens, cache=cache)
    hook.remove()
    with pytest.raises(RuntimeError, match="half-written"):
        model(tokens, cache=cache)
    cache.reset()
    assert torch.equal(model(tokens, cache=cache), model(tokens))


@torch.no_grad()
def test_rows_that_do_not_match_are_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="holds 2 rows, the tokens have 1"):
        model(ids(1, 3), cache=cache_for(model, 2, 10))
    with pytest.raises(ValueError, match="at least one"):
        HybridCache(model.config, 0, 10)


def test_gradients_flow_without_a_cache_and_none_are_kept_with_one() -> None:
    model, tokens = tiny(), ids(1, 20)
    model(tokens).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    cache = cache_for(model, 1, 30)
    model(tokens, cache=cache)
    assert not any(layer.keys.requires_grad for layer in cache.layers)


@torch.no_grad()
def test_a_cache_of_another_dtype_or_misshapen_positions_are_refused_before_anything_is_written() -> None:
    model = tiny()
    cache = cache_for(model, 2, 10)
    model(ids(2, 3), cache=cache)
    before = cache.layers[0].keys.clone()
    with pytest.raises(ValueError, match=r"keys of torch\.float32 on cpu, \[2, 4, 16\].*torch\.bfloat16.*reset"):
        model.bfloat16()(ids(2, 3), cache=cache)
    with pytest.raises(ValueError, match="not one for each token"):
        model.float()(ids(2, 1), torch.tensor([[3]]), cache)
    assert cache.length == 3 and torch.equal(cache.layers[0].keys, before)
    cache.reset()
    model.bfloat16()(ids(2, 3), cache=cache)
    assert cache.layers[0].keys.dtype == torch.bfloat16


@torch.no_grad()
def test_a_ragged_batch_goes_on_by_default_from_each_rows_own_position() -> None:
    model = tiny().double()
    rows, more = [ids(1, n, seed=n)[0].tolist() for n in (30, 11)], ids(2, 25, seed=5)
    cache = cache_for(model, 2, 60)
    model(*left_padded(rows), cache)
    parts = torch.cat([model(part, cache=cache) for part in more.split([1, 1, 20, 3], dim=1)], dim=1)
    for row, prompt in enumerate(rows):
        solo = model(torch.tensor([prompt + more[row].tolist()]))[0, len(prompt) :]
        assert (parts[row] - solo).abs().max() <= 1e-10


WRONG = {
    "padding after tokens": ([[0, 1, 2, -1]], "row 0 goes from 2 to -1 at column 3"),
    "a jump": ([[0, 1, 5, 6]], "row 0 goes from 1 to 5 at column 2"),
    "a step back": ([[3, 4, 5, 5]], "row 0 goes from 5 to 5 at column 3"),
}


@pytest.mark.parametrize("case", WRONG)
@torch.no_grad()
def test_positions_that_a_ring_would_get_wrong_are_refused_before_anything_is_written(case: str) -> None:
    positions, message = WRONG[case]
    model, tokens = tiny(), ids(1, 4)
    cache = cache_for(model, 1, 20)
    with pytest.raises(ValueError, match=message):
        model(tokens, torch.tensor(positions), cache)
    assert cache.length == 0
    model(tokens, torch.arange(4)[None], cache)
    with pytest.raises(ValueError, match="row 0 goes from 3 to 6 at column 4"):
        model(tokens, torch.arange(6, 10)[None], cache)
    model(tokens, torch.tensor(positions))  # one pass holds all it sees


@torch.no_grad()
def test_rows_may_begin_anywhere_and_padding_may_have_any_negative_positions() -> None:
    model, tokens = tiny().double(), ids(1, 40)
    cache = cache_for(model, 1, 60)
    positions = torch.tensor([[-1] * 5 + list(range(100, 135))])
    parts = [model(tokens[:, s], positions[:, s], cache) for s in (slice(0, 3), slice(3, 30), slice(30, 40))]
    assert (torch.cat(parts, 1)[:, 5:] - model(tokens[:, 5:], positions[:, 5:])).abs().max() <= 1e-10


@pytest.mark.parametrize("slack", [0, 4, 40])
@torch.no_grad()
def test_a_ring_with_slack_gives_the_uncached_logits_in_chunks_of_any_size(slack: int) -> None:
    model, tokens = tiny("27b").double(), ids(1, 120)
    whole = model(tokens)
    for sizes in ([7] * 17 + [1], [1] * 120, [16, 1, 20, 3, 3, 40, 1, 1, 5, 30], [100, 5, 5, 5, 5]):
        parts = fed(model, tokens, sizes, HybridCache(model.config, 1, 120, slack))
        assert (parts - whole).abs().max() <= 1e-10


@torch.no_grad()
def test_with_slack_rolling_back_across_the_wrap_equals_never_having_fed() -> None:
    """Speculation: four wrong tokens are fed and taken back before each three right ones, over six wraps."""
    model, tokens = tiny("2b").double(), ids(1, 110)
    cache = HybridCache(model.config, 1, 120, slack=4)
    parts = [model(tokens[:, :50], cache=cache)]
    for start in range(50, 110, 3):
        model(ids(1, 5, seed=start), cache=cache)
        cache.rollback(start)
        parts.append(model(tokens[:, start : start + 3], cache=cache))
    assert (torch.cat(parts, 1) - model(tokens)).abs().max() <= 1e-10
    with pytest.raises(ValueError, match=r"which can take back 4 \(slack\)"):
        cache.rollback(100)
    assert cache.length == 110


@pytest.mark.parametrize("t", [1, 2, 20])
def test_gradients_reach_keys_and_values_of_a_pass_with_a_cache(t: int) -> None:
    model, tokens = tiny().double(), ids(1, 20 + t)
    cache = cache_for(model, 1, 60)
    with torch.no_grad():
        model(tokens[:, :20], cache=cache)
    model(tokens[:, 20:], cache=cache)[:, -1].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert not any(layer.keys.requires_grad for layer in cache.layers)


def test_the_gradient_with_a_cache_is_that_of_a_pass_whose_past_is_detached() -> None:
    """For one token past the window: the value projection's gradient is that of one pass in which only the last token's
    values depend on it."""
    model, tokens = tiny(num_hidden_layers=1).double(), ids(1, 30)
    weight = model.model.layers[0].self_attn.v_proj.weight
    cache = cache_for(model, 1, 60)
    with torch.no_grad():
        model(tokens[:, :29], cache=cache)
    model(tokens[:, 29:], cache=cache)[0, -1].sum().backward()
    found, weight.grad = weight.grad, None
    tap = model.model.layers[0].self_attn.hook_v
    hook = tap.register_forward_hook(lambda m, i, v: torch.cat((v[:, :-1].detach(), v[:, -1:]), dim=1))
    model(tokens)[0, -1].sum().backward()
    hook.remove()
    assert found is not None and weight.grad is not None
    assert (found - weight.grad).abs().max() <= 1e-9 * weight.grad.abs().max()


class Sized(HybridCache):
    """A cache of a user's own, which is false while it is empty."""

    def __len__(self) -> int:
        return self.length


@torch.no_grad()
def test_a_cache_that_has_a_length_of_0_is_used() -> None:
    model = tiny()
    cache = Sized(model.config, 1, 20)
    model(ids(1, 7), cache=cache)
    assert len(cache) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_autocast_decodes_with_a_cache_as_in_one_pass(dtype: torch.dtype) -> None:
    model, tokens = tiny().to(dtype), ids(1, 40)
    with torch.autocast("cpu", torch.bfloat16):
        whole = model(tokens)
        parts = fed(model, tokens, [20, *[1] * 20], cache_for(model, 1, 40))
    assert (parts - whole).abs().max() <= 0.0625 * whole.abs().max()


def test_a_cache_fits_in_whatever_is_computed_first() -> None:
    """Heads, dtype and device are those of the keys: half of the heads, say, as with tensor parallelism."""
    model = tiny()
    layer = HybridCache(model.config, 2, 20).layers[0]
    layer.update(torch.ones(2, 3, 2, 16).half(), torch.ones(2, 3, 2, 16).double(), torch.arange(3).expand(2, 3))
    assert layer.keys.shape == (2, 16, 2, 16) and (layer.keys.dtype, layer.values.dtype) == (torch.half, torch.double)


@pytest.mark.parametrize("again", [(47, 43), (46, 44)], ids=str)
@torch.no_grad()
def test_a_second_rollback_knows_what_the_first_did_not_bring_back(again: tuple[int, int]) -> None:
    """50 columns through a ring of 20: columns 0 to 29 are overwritten for good, however far it is rolled back."""
    model, tokens = tiny("2b").double(), ids(1, 60)
    cache = HybridCache(model.config, 1, 80, slack=4)
    model(tokens[:, :50], cache=cache)
    cache.rollback(again[0])
    with pytest.raises(ValueError, match="cannot roll back"):
        cache.rollback(again[1])
    model(tokens[:, again[0] : again[0] + 1], cache=cache)
    with pytest.raises(ValueError, match="cannot roll back"):
        cache.rollback(again[1])
    rest = model(tokens[:, again[0] + 1 :], cache=cache)
    assert (rest - model(tokens)[:, again[0] + 1 :]).abs().max() <= 1e-10
    cache.rollback(0)
    assert cache.length == 0
    assert torch.equal(model(tokens, cache=cache), model(tokens, cache=HybridCache(model.config, 1, 80)))


@torch.no_grad()
def test_what_was_not_finite_is_gone_after_a_rollback() -> None:
    model, tokens = tiny("2b").double(), ids(1, 40)
    cache = HybridCache(model.config, 1, 60, slack=4)
    model(tokens[:, :30], cache=cache)
    hook = model.model.layers[0].self_attn.hook_v.register_forward_hook(lambda m, i, v: v * torch.nan)
    model(tokens[:, 30:33], cache=cache)
    hook.remove()
    cache.rollback(30)
    assert (model(tokens[:, 30:], cache=cache) - model(tokens)[:, 30:]).abs().max() <= 1e-10


@torch.no_grad()
def test_after_a_part_that_is_only_padding_default_positions_begin_at_0() -> None:
    model, tokens = tiny().double(), ids(1, 20)
    cache = cache_for(model, 1, 60)
    model(tokens[:, :5], torch.arange(-100, -95)[None], cache)
    assert (model(tokens[:, 5:], cache=cache) - model(tokens[:, 5:])).abs().max() <= 1e-10


def test_a_cache_that_is_first_fed_in_inference_mode_can_be_fed_outside_of_it() -> None:
    model, tokens = tiny().double(), ids(1, 40)
    cache = cache_for(model, 1, 60)
    with torch.inference_mode():
        model(tokens[:, :20], cache=cache)
    with torch.no_grad():
        rest = model(tokens[:, 20:], cache=cache)
        assert (rest - model(tokens)[:, 20:]).abs().max() <= 1e-10
