"""The table of sites is true: names, shapes, order, modules and sums; and watching leaves no hook behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gemma2
from gemma2 import ops
from gemma2.cli import main
from gemma2.model import Tap
from gemma2.research import capture, watching
from gemma2.research.sites import TABLE, chosen, sites
from tests.conftest import SHAPES, ids, tiny

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "sites.md"
EARLY, LATE = "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"


@torch.no_grad()
def everything(model: gemma2.Gemma2, tokens: Tensor) -> dict[str, Tensor]:
    with capture(model) as seen:
        returned = model(tokens)
    return {**seen, "returned": returned}


def hooks(model: gemma2.Gemma2) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("size", SHAPES)
def test_every_site_has_the_shape_that_the_table_gives(size: str, layers: int, length: int) -> None:
    model = tiny(size, num_hidden_layers=layers)
    seen, known = everything(model, ids(1, length)), sites(model.config)
    assert set(seen) == {*known, "returned"}
    for name, site in known.items():
        assert tuple(seen[name].shape) == site.sizes(model.config, length), name


def test_letters_that_mean_other_numbers_are_told_apart() -> None:
    """Otherwise a row with the wrong letter would pass."""
    config = tiny("27b").config
    widths = config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size
    assert len({40, *widths, config.num_attention_heads, config.num_key_value_heads, 1}) == 8


def test_sites_are_listed_in_the_order_of_computation() -> None:
    model, told = tiny(), list[str]()
    with torch.no_grad(), watching(model, lambda name, value: told.append(name)):
        model(ids(1, 20))
    assert told == list(sites(model.config))


def test_every_tap_of_the_model_is_a_site_and_every_site_a_module() -> None:
    model = tiny(num_hidden_layers=2)
    modules = dict(model.named_modules())
    paths = {site.module for site in sites(model.config).values()}
    assert paths <= modules.keys()
    taps = {name for name, module in modules.items() if isinstance(module, Tap)}
    assert {name for name in taps - paths if not name.endswith("hook_key_positions")} == set(), "whole numbers, no site"


def test_the_paths_of_the_table_are_those_of_the_modules() -> None:
    known = sites(tiny().config)
    for row in TABLE:
        site = known[row.name.replace("{i}", "2")]
        assert row.path.replace("{i}", "2") == site.module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SHAPES)
def test_sites_add_up_to_the_bit(size: str, dtype: torch.dtype) -> None:
    model = tiny(size).to(dtype)
    seen = everything(model, ids(1, 40))
    assert torch.equal(seen["blocks.0.hook_resid_pre"], seen["hook_embed"])
    stream = seen["hook_embed"]
    for i in range(4):
        at = {
            name.removeprefix(f"blocks.{i}."): value for name, value in seen.items() if name.startswith(f"blocks.{i}.")
        }
        assert torch.equal(at["hook_resid_pre"], stream)
        assert torch.equal(at["hook_resid_pre"] + at["hook_attn_out"], at["hook_resid_mid"])
        assert torch.equal(at["hook_resid_mid"] + at["hook_mlp_out"], at["hook_resid_post"])
        for norm, read in (("ln1", "hook_resid_pre"), ("ln2", "hook_resid_mid")):
            wide = ops.upcast(at[read])
            assert torch.equal(wide * at[f"{norm}.hook_inv_scale"], at[f"{norm}.hook_normalized"])
        pattern = ops.upcast(at["attn.hook_attn_scores"]).softmax(-1).to(dtype)
        assert torch.equal(pattern, at["attn.hook_pattern"])
        gate = F.gelu(at["mlp.hook_pre"], approximate="tanh")
        assert torch.equal(gate * at["mlp.hook_pre_linear"], at["mlp.hook_post"])
        stream = at["hook_resid_post"]
    final = ops.upcast(stream) * seen["ln_final.hook_inv_scale"]
    assert torch.equal(final, seen["ln_final.hook_normalized"])
    assert torch.equal(ops.softcap(seen["logits_raw"], 30.0), seen["logits"])
    assert torch.equal(seen["logits"], seen["returned"])


def test_watching_changes_no_bit_and_leaves_no_hook() -> None:
    model, tokens = tiny(), ids(1, 30)
    with torch.no_grad():
        plain = model(tokens)
    assert torch.equal(everything(model, tokens)["returned"], plain)
    assert hooks(model) == 0


def test_hooks_are_gone_after_an_exception_in_the_block_or_in_the_watcher() -> None:
    model = tiny()
    with pytest.raises(KeyboardInterrupt), watching(model, lambda name, value: None):
        assert hooks(model) > 50
        raise KeyboardInterrupt
    assert hooks(model) == 0

    def fail(name: str, value: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), watching(model, fail, "logits"):
        model(ids(1, 3))
    assert hooks(model) == 0


def test_no_hook_is_set_where_a_pattern_names_nothing() -> None:
    model = tiny()
    with (
        pytest.raises(ValueError, match=r"no site is called 'blocks.9.\*'"),
        watching(model, print, ["*", "blocks.9.*"]),
    ):
        pass
    assert hooks(model) == 0


def test_hooks_of_others_stay() -> None:
    model = tiny()
    theirs = model.model.layers[0].register_forward_hook(lambda module, inputs, output: None)
    everything(model, ids(1, 3))
    assert hooks(model) == 1
    theirs.remove()


def test_capture_keeps_the_last_pass_detached_and_watching_gives_the_graph() -> None:
    model, graph = tiny(), dict[str, Tensor]()
    with capture(model, LATE) as seen, watching(model, graph.__setitem__, LATE):
        model(ids(1, 3))
        model(ids(1, 5))
    assert seen[LATE].shape[1] == 5
    assert not seen[LATE].requires_grad and graph[LATE].requires_grad


def test_patterns_are_globs_and_keep_the_order_of_computation() -> None:
    config = tiny().config
    assert list(chosen(config, ["logits", "blocks.1.hook_resid_[pm]*", "hook_embed"])) == [
        "hook_embed",
        EARLY,
        "blocks.1.hook_resid_mid",
        LATE,
        "logits",
    ]
    assert len(chosen(config, "blocks.*.attn.hook_pattern")) == 4
    assert list(chosen(config)) == list(sites(config))
    assert chosen(config, []) == {}


WRONG = {
    "hook_resid_post": r"near are .*hook_resid_post.*gemma2 trace --list",
    "blocks.4.hook_resid_post": "this model has layers 0 to 3",
    "Logits": r"near are logits",
    "": r"near are hook_embed, blocks.0.hook_resid_post",
    "blocks.{i}.ln1": r"near are blocks.\d.ln1",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_name_that_is_none_is_refused_and_says_which_names_are_near(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"no site is called '{re.escape(wrong)}'.*{WRONG[wrong]}"):
        chosen(tiny().config, [wrong])


def test_the_page_of_sites_shows_the_table_as_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--list"]) == 0
    assert f"```text\n{capsys.readouterr().out}```" in PAGE.read_text(encoding="utf-8")
