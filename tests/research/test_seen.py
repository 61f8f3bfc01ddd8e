"""What a capture keeps: every pass of a generation, chosen tokens, in memory or on the disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma2
from gemma2 import HybridCache
from gemma2.generate import generate_ids
from gemma2.research import Seen, capture, opened, watching
from gemma2.research.aliases import IN_BLOCK, OUTSIDE, canonical
from gemma2.research.sites import chosen, sites
from tests.conftest import ids, tiny

NAMES = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_*", "ln_final", "hook_embed"]


def generated(model: gemma2.Gemma2, prompt: list[list[int]], names: Iterable[str], **options: Any) -> Any:
    with capture(model, names, **options) as seen:
        written = list(generate_ids(model, prompt, 12))
    return seen, written


@torch.no_grad()
def test_a_generation_stacked_is_one_pass_over_its_text_past_the_rings_wrap() -> None:
    model, prompt = tiny("2b").double(), [ids(1, 21)[0].tolist()]
    seen, written = generated(model, prompt, NAMES)
    assert len(seen.passes) == 12 and [one.positions.shape[1] for one in seen.passes] == [21, *[1] * 11]
    assert seen.positions.tolist() == [list(range(32))]
    text = torch.tensor([prompt[0] + [step[0] for step in written[:-1]]])
    with capture(model, NAMES) as whole:
        model(text)
    for name, value in whole.items():
        stacked = seen.stacked(name)
        assert stacked.shape == value.shape, name
        if name.endswith(("scores_raw", "pattern", "attn_scores")):  # a ring drops keys that nobody sees
            seen_by = whole[name.rpartition(".")[0] + ".hook_pattern"] > 0
            assert (stacked - value)[seen_by].abs().max() <= 1e-9, name
        else:
            assert (stacked - value).abs().max() <= 1e-9, name


@pytest.mark.parametrize("where", [3, -1, [2, 17], [0, -2], slice(4, 9), slice(1, None, 5)], ids=str)
@torch.no_grad()
def test_chosen_positions_are_those_of_the_text_and_negative_ones_of_each_pass(where: Any) -> None:
    model, prompt = tiny("2b"), [ids(1, 15)[0].tolist()]
    everything, _ = generated(model, prompt, NAMES)
    seen, _ = generated(model, prompt, NAMES, positions=where)
    for whole, some in zip(everything.passes, seen.passes, strict=True):
        (positions,) = whole.positions.tolist()
        last = positions[-1] + 1
        asked = [where] if isinstance(where, int) else range(last)[where] if isinstance(where, slice) else where
        kept = [i for i, p in enumerate(positions) if p in asked or i - len(positions) in asked]
        assert some.positions.tolist() == [[positions[i] for i in kept]] or not kept
        for name, value in some.values.items():
            axis = sites(model.config)[name].axis
            assert torch.equal(value, whole.values[name].index_select(axis, torch.tensor(kept, dtype=torch.int64)))


@torch.no_grad()
def test_the_disk_gives_back_the_bits_of_every_pass_in_the_dtype_asked_for(tmp_path: Path) -> None:
    model, prompt = tiny("9b").bfloat16(), [ids(1, 15)[0].tolist()]
    kept, _ = generated(model, prompt, "*")
    streamed, _ = generated(model, prompt, "*", to=tmp_path / "seen")
    again = opened(tmp_path / "seen")
    assert len(list((tmp_path / "seen").iterdir())) == len(kept.passes) == len(again.passes)
    for a, b, c in zip(kept.passes, streamed.passes, again.passes, strict=True):
        assert torch.equal(a.positions, b.positions) and torch.equal(a.positions, c.positions)
        assert a.values.keys() == b.values.keys() == c.values.keys() == sites(model.config).keys()
        assert all(
            torch.equal(value, b.values[name]) and torch.equal(value, c.values[name])
            for name, value in a.values.items()
        )
    wide, _ = generated(model, prompt, "blocks.1.*", dtype=torch.float32)
    assert all(value.dtype == torch.float32 for value in wide.values())
    with pytest.raises(FileExistsError), capture(model, to=tmp_path / "seen"):
        pass
    with pytest.raises(FileNotFoundError, match="no capture was written here"):
        opened(tmp_path)


@torch.no_grad()
def test_passes_of_two_texts_are_kept_apart_and_a_broken_pass_says_what_it_lacks() -> None:
    model = tiny()
    with capture(model, NAMES) as seen:
        model(ids(1, 9))
        model(ids(1, 5, seed=1))
    assert len(seen.passes) == 2 and seen["hook_embed"].shape[1] == 5
    with pytest.raises(ValueError, match="pass 1 does not continue pass 0"):
        seen.stacked("hook_embed")
    assert Seen(seen.names, seen.passes[:1]).stacked("hook_embed").shape[1] == 9

    def stop(module: object, inputs: object) -> None:
        raise RuntimeError("stop")

    with capture(model, NAMES) as broken, pytest.raises(RuntimeError, match="stop"):
        with pytest.raises(KeyError, match="no pass yet"):
            broken["ln_final"]
        handle = model.model.layers[2].register_forward_pre_hook(stop)
        try:
            model(ids(1, 4))
        finally:
            handle.remove()
    assert broken["blocks.1.hook_resid_post"].shape[1] == 4
    with pytest.raises(KeyError, match="ln_final: the pass was broken off"):
        broken["ln_final"]
    with pytest.raises(KeyError, match=r"blocks.1.mlp.hook_post was not captured"):
        broken["blocks.1.mlp.hook_post"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_rows_of_a_batch_keep_their_own_positions_or_are_refused() -> None:
    model = tiny()
    rows = [ids(1, n, seed=n)[0].tolist() for n in (20, 14)]
    tokens, positions = gemma2.left_padded(rows)
    with capture(model, "hook_embed") as whole:
        model(tokens, positions)
    with capture(model, "hook_embed", positions=[3, -1]) as seen:
        model(tokens, positions)
    assert torch.equal(seen["hook_embed"][1], whole["hook_embed"][1, [6 + 3, -1]])
    message = r"positions 16 are \[1, 0\] tokens in the rows"
    with pytest.raises(ValueError, match=message), capture(model, "hook_embed", positions=16):
        model(tokens, positions)
    for wrong in (True, "3", [], [1.0], slice(-3, None)):
        with pytest.raises(ValueError, match="positions"), capture(model, positions=wrong):  # type: ignore[arg-type]
            pass


@torch.no_grad()
def test_other_names_lead_to_the_same_sites() -> None:
    model = tiny()
    config = model.config
    for alias, own in [*((f"blocks.1.{a}", f"blocks.1.{b}") for a, b in IN_BLOCK.items()), *OUTSIDE.items()]:
        assert list(chosen(config, alias)) == [own], alias
    assert canonical(("resid_post", 5)) == "blocks.5.hook_resid_post"
    assert canonical(("pattern", 2)) == "blocks.2.attn.hook_pattern"
    assert canonical(("pre", 2)) == "blocks.2.mlp.hook_pre"
    assert canonical(("inv_scale", 2, "ln2")) == "blocks.2.ln2.hook_inv_scale"
    assert canonical("model.layers[3].mlp.gate_proj.output") == "blocks.3.mlp.hook_pre"
    assert canonical("model.model.layers.3") == "blocks.3.hook_resid_post"
    assert len(chosen(config, "blocks.*.hook_out")) == config.num_hidden_layers
    with capture(model, "blocks.*.hook_out") as seen:
        model(ids(1, 5))
    assert torch.equal(seen["resid_post", 2], seen["blocks.2.hook_out"])
    with pytest.raises(
        ValueError, match=r"no site is called 'blocks.1.hook_resid_pots'; near are blocks.1.hook_resid_post"
    ):
        chosen(config, "blocks.1.hook_resid_pots")
    with pytest.raises(ValueError, match="this model has layers 0 to 3"):
        chosen(config, "blocks.7.hook_resid_post")


@torch.no_grad()
def test_a_large_capture_says_what_it_keeps_before_it_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny()
    monkeypatch.setattr("gemma2.research.seen.LARGE", 1000)
    with (
        capture(model, "hook_embed"),
        pytest.warns(UserWarning, match=r"keeps 2.3e-05 GB of a pass of 1 x 20 tokens: choose"),
    ):
        model(ids(1, 20))
    with capture(model, "hook_embed", positions=[3]):
        model(ids(1, 20))
    monkeypatch.setattr("gemma2.research.seen.free_memory", lambda device: gemma2.memory.Free(2000, "a test"))
    with capture(model, "hook_embed"), pytest.raises(MemoryError, match=r"2e-06 GB are free \(a test\): choose sites"):
        model(ids(1, 20))
    with capture(model, "hook_embed", to=tmp_path / "seen"), pytest.warns(UserWarning, match="keeps"):
        model(ids(1, 20))


@torch.no_grad()
def test_watching_and_capture_see_a_cache_that_was_filled_before() -> None:
    model, tokens = tiny("2b").double(), ids(1, 40)
    cache = HybridCache(model.config, 1, 50)
    model(tokens[:, :30], cache=cache)
    told: list[str] = []
    with capture(model, "blocks.*.attn.hook_pattern") as seen, watching(model, lambda n, x: told.append(n), "logits"):
        model(tokens[:, 30:33], cache=cache)
        model(tokens[:, 33:34], cache=cache)
    with capture(model, "blocks.*.attn.hook_pattern") as whole:
        model(tokens[:, :34])
    assert seen.positions.tolist() == [[30, 31, 32, 33]] and told == ["logits", "logits"]
    for name, value in whole.items():
        stacked = seen.stacked(name)
        assert (stacked - value[:, :, 30:, -stacked.shape[-1] :]).abs().max() <= 1e-9, name
