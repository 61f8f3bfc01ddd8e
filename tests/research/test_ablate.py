"""Each switch is held against a model that is built that way; the model is afterwards as it was, whatever happened."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gemma2
from gemma2 import Gemma2, HybridCache, ops
from gemma2.cache import NoCache
from gemma2.config import GLOBAL, LOCAL
from gemma2.fast.speed import speed_up
from gemma2.generate import generate_ids
from gemma2.research import ablate, capture, edit, zero
from gemma2.research.ablate import NoCap
from gemma2.research.ablation import Effect, batches, bootstrap, hidden, likelihoods, measure, standard, windows, work
from gemma2.research.saturation import BINS, END, saturation
from gemma2.twins import sharing
from tests.conftest import ids, tiny

MODEL = tiny("2b").double()
CONFIG = MODEL.config
TOKENS = ids(2, 40)
SWAPPED = tuple(GLOBAL if kind == LOCAL else LOCAL for kind in CONFIG.layer_types)


STEPS = [(0, 9), (9, 30), *((i, i + 1) for i in range(30, 40))]  # a prompt in two chunks, which wraps the rings


def under(switches: dict[str, Any], model: Gemma2 = MODEL, tokens: Tensor = TOKENS, **options: Any) -> Tensor:
    with torch.no_grad(), ablate(model, **switches):
        return model(tokens, **options)


@pytest.fixture(scope="module")
def plain() -> Tensor:
    with torch.no_grad():
        return MODEL(TOKENS)


def state(model: Gemma2) -> list[Any]:
    """Everything that an ablation could leave behind: modules, their attributes, hooks, buffers, parameters."""
    found: list[Any] = []
    for path, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        hooks = [len(value) for name, value in vars(module).items() if "hooks" in name]
        tensors = [(name, id(x)) for store in (module._parameters, module._buffers) for name, x in store.items()]
        found.append((path, id(module), own, hooks, tensors))
    return found


def with_config(**changes: Any) -> Callable[[], Tensor]:
    return lambda: sharing(MODEL, replace(CONFIG, **changes))(TOKENS)


def uncapped(cap: float) -> Callable[[], Tensor]:
    def compute() -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            own = ops.softcap
            patch.setattr(ops, "softcap", lambda x, by: x if by == cap else own(x, by))
            return MODEL(TOKENS)

    return compute


def by_hand(layers: Any = None, scale: float | None = None, post: bool = True) -> Callable[[], Tensor]:
    """A pass written out once more, from the model's parts."""

    def compute() -> Tensor:
        inner: Any = MODEL.model
        positions = torch.arange(TOKENS.shape[1]).expand(TOKENS.shape)
        rows = F.embedding(TOKENS, inner.embed_tokens.weight)
        x = rows * (CONFIG.hidden_size**0.5 if scale is None else scale)
        rotary = inner.rotary_emb(positions, x.dtype)
        for block in inner.layers if layers is None else [inner.layers[i] for i in layers]:
            attention = block.self_attn(block.input_layernorm(x), positions, rotary, NoCache(CONFIG))
            x = x + (block.post_attention_layernorm(attention) if post else attention)
            mlp = block.mlp(block.pre_feedforward_layernorm(x))
            x = x + (block.post_feedforward_layernorm(mlp) if post else mlp)
        return MODEL.softcap(MODEL.lm_head(inner.norm(x), inner.embed_tokens))

    return compute


def without_columns() -> Tensor:
    """Heads 2 and 5 of layer 1: the columns of `o_proj` that read them are zero."""
    other: Any = copy.deepcopy(MODEL)
    weight = other.model.layers[1].self_attn.o_proj.weight
    for head in (2, 5):
        weight[:, head * 16 : (head + 1) * 16] = 0
    return other(TOKENS)


BUILT: dict[str, tuple[dict[str, Any], Callable[[], Tensor]]] = {
    "a score cap": ({"attn_softcap": 5.0}, with_config(attn_logit_softcapping=5.0)),
    "no score cap": ({"attn_softcap": None}, uncapped(50.0)),
    "a final cap": ({"final_softcap": 3}, with_config(final_logit_softcapping=3.0)),
    "no final cap": ({"final_softcap": None}, uncapped(30.0)),
    "a shorter window": ({"window": 7}, with_config(sliding_window=7)),
    "a longer window": ({"window": 25}, with_config(sliding_window=25)),
    "no window": ({"window": None}, with_config(layer_types=(GLOBAL,) * 4)),
    "swapped layers": ({"layer_types": list(SWAPPED)}, with_config(layer_types=SWAPPED)),
    "both": ({"layer_types": SWAPPED, "window": 9}, with_config(layer_types=SWAPPED, sliding_window=9)),
    "no post-norms": ({"post_norms": False}, by_hand(post=False)),
    "no scale": ({"embed_scale": False}, by_hand(scale=1.0)),
    "layers": ({"layers": [0, 2]}, by_hand(layers=[1, 3])),
    "heads": ({"heads": [(1, 2), (1, 5)]}, without_columns),
    "several": ({"layers": [3], "embed_scale": False, "post_norms": False}, by_hand([0, 1, 2], 1.0, False)),
}


@pytest.mark.parametrize("name", BUILT)
def test_a_switch_computes_what_a_model_built_that_way_computes_and_leaves_the_model_as_it_was(
    name: str, plain: Tensor
) -> None:
    switches, built = BUILT[name]
    before = state(MODEL)
    found = under(switches)
    assert state(MODEL) == before
    with torch.no_grad():
        assert torch.equal(MODEL(TOKENS), plain)
        expected = built()
    assert torch.equal(found, expected) and not torch.equal(found, plain)


@pytest.mark.parametrize("name", BUILT)
def test_generation_with_a_cache_made_inside_computes_the_changed_model(name: str) -> None:
    """Token by token past every window, beside one pass."""
    switches, _ = BUILT[name]
    expected = under(switches)
    with torch.no_grad(), ablate(MODEL, **switches) as config:
        assert config is MODEL.config is MODEL.model.config
        cache = HybridCache(config, 2, 40)
        found = [MODEL(TOKENS[:, start:end], cache=cache) for start, end in STEPS]
        new = [one for (one,) in generate_ids(MODEL, [TOKENS[0, :24].tolist()], 6)]
        told = MODEL(torch.cat((TOKENS[:1, :24], torch.tensor([new])), dim=1))[0, 23:-1].argmax(-1).tolist()
    assert (torch.cat(found, dim=1) - expected).abs().max() <= 1e-9
    assert new == told


def test_a_cache_that_forgets_what_the_changed_layers_see_is_refused_and_one_that_keeps_more_is_taken() -> None:
    small = HybridCache(CONFIG, 2, 40)
    wrong: list[dict[str, Any]] = [{"window": 17}, {"window": None}, {"layer_types": SWAPPED}]
    for switches in wrong:
        with pytest.raises(ValueError, match=r"sees \d+ positions in this block and the cache keeps 16: make"):
            under(switches, cache=small)
    assert small.length == 0
    taken = under({"window": 5}, cache=small)
    assert torch.equal(taken, under({"window": 5}))
    short = HybridCache(CONFIG, 2, 12)  # every ring holds all that fits
    first = TOKENS[:, :12]
    assert torch.equal(under({"window": None}, tokens=first, cache=short), under({"window": None}, tokens=first))


def test_a_cache_of_transformers_that_forgets_is_refused_and_one_that_keeps_all_is_taken() -> None:
    cache_utils = pytest.importorskip("transformers.cache_utils")
    face = gemma2.as_transformers(MODEL)
    prompt, before = TOKENS[:1, :10], state(MODEL)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with ablate(face, window=None):
        with pytest.raises(ValueError, match=r"layer 0 sees \d+ positions .* the cache has kept \d+: give one"):
            face.generate(prompt, **options)
        found = face.generate(prompt, past_key_values=cache_utils.DynamicCache(), **options)
        own = [one for (one,) in generate_ids(MODEL, [prompt[0].tolist()], 12)]
    assert found[0, 10:].tolist() == own and state(MODEL) == before
    rows, mask = torch.cat((prompt, prompt), dim=0), torch.ones(2, 10, dtype=torch.int64)
    rows[1, :6], mask[1, :6] = 0, 0  # padding on the left
    with ablate(face, window=None):
        padded = face.generate(rows, attention_mask=mask, past_key_values=cache_utils.DynamicCache(), **options)
        alone = [one for (one,) in generate_ids(MODEL, [prompt[0, 6:].tolist()], 12)]
    assert padded[:, 10:].tolist() == [own, alone]
    with ablate(face, window=4):
        found = face.generate(prompt, **options)
        own = [one for (one,) in generate_ids(MODEL, [prompt[0].tolist()], 12)]
    assert found[0, 10:].tolist() == own


@pytest.mark.parametrize("name", BUILT)
def test_fast_twins_are_changed_as_the_plain_parts_are(name: str) -> None:
    switches, _ = BUILT[name]
    fast = sharing(MODEL)
    speed_up(fast)
    before = state(fast)
    found, plain = under(switches, fast), under(switches)
    assert state(fast) == before
    assert (found - plain).abs().max() <= 1e-9
    cache = HybridCache(replace(CONFIG, sliding_window=40, layer_types=(GLOBAL,) * 4), 2, 40)  # keeps all
    with torch.no_grad(), ablate(fast, **switches):
        steps = [fast(TOKENS[:, start:end], cache=cache) for start, end in STEPS]
    assert (torch.cat(steps, dim=1) - plain).abs().max() <= 1e-9


def check_packed(switches: dict[str, dict[str, Any]]) -> None:
    gemma = gemma2.load("pocket:pocket-q8_0.gguf", weights="packed", fast=True, device="cpu", dtype="float32")
    exact = gemma2.load("pocket:pocket-q8_0.gguf", device="cpu", dtype="float32").model
    text = torch.tensor([gemma.tokenizer.encode("And God said, Let there be light: and there was light. " * 3)])
    before = state(gemma.model)
    with torch.no_grad():
        plain = gemma.model(text)
    for name, options in switches.items():
        found, expected = under(options, gemma.model, text), under(options, exact, text)
        assert (found - expected).abs().max() <= 1e-3 * expected.abs().max(), name
        steps = under(options, gemma.model, text, cache=HybridCache(gemma.config, 1, 64))
        assert (steps - expected).abs().max() <= 1e-3 * expected.abs().max(), name
    assert state(gemma.model) == before
    with torch.no_grad():
        assert torch.equal(gemma.model(text), plain)


def test_a_packed_fast_model_is_changed_and_is_afterwards_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("compiling", "packed"):
        monkeypatch.setattr(f"gemma2.fast.{place}.can_compile", lambda: False)
    check_packed({"several": {"window": 9, "attn_softcap": 3.0, "heads": [(0, 1)]}, "caps": {"final_softcap": None}})


@pytest.mark.long
def test_a_packed_fast_model_with_compiled_kernels_is_changed_by_each_switch() -> None:
    check_packed(standard(gemma2.load().config, layers=True))
    gemma = gemma2.load("pocket:pocket-q8_0.gguf", weights="packed", fast=True, device="cpu")
    plain = gemma.generate("And God said,", max_new_tokens=8)
    with ablate(gemma, layers=[0], window=None):
        assert gemma.generate("And God said,", max_new_tokens=8) != plain
    assert gemma.generate("And God said,", max_new_tokens=8) == plain


def check_compiled(several: list[dict[str, Any]], plain: Tensor) -> None:
    torch._dynamo.reset()
    whole = torch.compile(MODEL, backend="eager")
    with torch.no_grad():
        assert torch.equal(whole(TOKENS), plain)
        for switches in several:
            with ablate(MODEL, **switches):
                changed = whole(TOKENS)
            with ablate(whole, **switches):
                again = whole(TOKENS)
            assert torch.equal(whole(TOKENS), plain)
            assert torch.equal(changed, again) and torch.equal(changed, under(switches))


EVERYTHING: dict[str, Any] = {"attn_softcap": None, "final_softcap": 4, "window": 3, "layer_types": SWAPPED}
EVERYTHING |= {"post_norms": False, "embed_scale": False, "heads": [(0, 1)]}


def test_a_model_that_someone_compiled_is_changed_too(plain: Tensor) -> None:
    """Compiled code looks whether its modules are still those it was compiled for; hooks it would pass by."""
    check_compiled([{"layers": [0, 2]}, EVERYTHING], plain)


def test_the_window_of_the_fast_twin_changes_for_compiled_single_tokens_too() -> None:
    torch._dynamo.reset()
    fast = sharing(MODEL)
    speed_up(fast)
    places = [model.get_submodule("model.layers.0.self_attn.attend") for model in (MODEL, fast)]
    compiled = torch.compile(places[1], backend="eager")
    q, k, v = (torch.randn(1, n, heads, 16, dtype=torch.float64) for n, heads in ((1, 8), (30, 4), (30, 4)))
    given = (q, k, v, torch.tensor([[29]]), torch.arange(30)[None])
    found = []
    with torch.no_grad():
        for window in (5, None, 20):
            with ablate(MODEL, window=window), ablate(fast, window=window):
                found.append(compiled(*given))
                assert (found[-1] - places[0](*given)).abs().max() <= 1e-12
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


@pytest.mark.long
@pytest.mark.parametrize("name", BUILT)
def test_a_model_that_someone_compiled_is_changed_by_each_switch(name: str, plain: Tensor) -> None:
    check_compiled([BUILT[name][0]], plain)


def test_nested_blocks_change_together_and_the_inner_one_wins(plain: Tensor) -> None:
    before = state(MODEL)
    with torch.no_grad(), ablate(MODEL, final_softcap=None, window=8):
        outer = MODEL(TOKENS)
        with ablate(MODEL, final_softcap=None), ablate(MODEL, final_softcap=3, layers=[1]):
            both = MODEL(TOKENS)
            with ablate(MODEL, window=None):
                MODEL(TOKENS, cache=HybridCache(MODEL.config, 2, 40))
        assert torch.equal(MODEL(TOKENS), outer)
    assert torch.equal(outer, under({"final_softcap": None, "window": 8}))
    assert torch.equal(both, under({"final_softcap": 3.0, "window": 8, "layers": [1]}))
    with torch.no_grad(), ablate(MODEL, heads=[(1, 2)], layers=[3]), ablate(MODEL, heads=[(1, 5)], layers=[0]):
        assert torch.equal(MODEL(TOKENS), under({"heads": [(1, 5), (1, 2)], "layers": [0, 3]}))
    assert state(MODEL) == before


def test_an_exception_inside_leaves_nothing_behind(plain: Tensor) -> None:
    before = state(MODEL)
    everything = EVERYTHING | {"layers": [2]}
    with pytest.raises(KeyError), ablate(MODEL, **everything):
        raise KeyError
    with pytest.raises(IndexError), ablate(MODEL, **everything), edit(MODEL, {"ln_final": lambda x, hook: x[99]}):
        MODEL(TOKENS)
    assert state(MODEL) == before
    with torch.no_grad():
        assert torch.equal(MODEL(TOKENS), plain)


@torch.no_grad()
def test_sites_show_the_changed_model_whichever_block_was_entered_first() -> None:
    names = ["blocks.*.hook_attn_out", "blocks.1.attn.hook_z", "blocks.2.hook_resid_*", "logits_raw", "logits"]
    switches: dict[str, Any] = {"final_softcap": None, "post_norms": False, "heads": [(1, 3)], "layers": [2]}
    with capture(MODEL, names) as first, ablate(MODEL, **switches), capture(MODEL, names) as second:
        MODEL(TOKENS)
    for seen in (first, second):
        assert torch.equal(seen["logits"], seen["logits_raw"]) and not seen["blocks.1.attn.hook_z"][:, :, 3].any()
        assert torch.equal(seen["blocks.2.hook_resid_post"], seen["blocks.2.hook_resid_pre"])
    assert all(torch.equal(first[name], second[name]) for name in first)
    with capture(MODEL, names) as usual:
        MODEL(TOKENS)
    assert not torch.equal(usual["blocks.0.hook_attn_out"], first["blocks.0.hook_attn_out"])
    inside = "blocks.0.ln1_post.hook_inv_scale"
    with pytest.raises(ValueError, match="hidden by the twin NoNorm"), ablate(MODEL, post_norms=False):
        capture(MODEL, inside).__enter__()


@torch.no_grad()
def test_an_edit_of_what_enters_a_layer_that_is_left_out_goes_on() -> None:
    edits, after = {"blocks.1.hook_resid_pre": zero()}, "blocks.1.hook_resid_post"
    with ablate(MODEL, layers=[1]), edit(MODEL, edits), capture(MODEL, after) as seen:
        MODEL(TOKENS)
    assert not seen["blocks.1.hook_resid_post"].any()


def test_gradients_flow_through_a_changed_model() -> None:
    for switches, _ in BUILT.values():
        with ablate(MODEL, **switches):
            loss = MODEL(TOKENS[:1, :20])[0, -1].square().sum()
        (gradient,) = torch.autograd.grad(loss, MODEL.model.embed_tokens.weight)
        assert gradient.isfinite().all() and gradient.abs().max() > 0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "there is nothing to ablate"),
    ({"post_norms": True}, "there is nothing to ablate"),
    ({"attn_softcap": 0}, "attn_softcap must be a number above 0, or None"),
    ({"final_softcap": True}, "final_softcap must be a number above 0"),
    ({"final_softcap": float("nan")}, "final_softcap must be a number above 0"),
    ({"window": 0}, "window must be a positive integer"),
    ({"window": 2.5}, "window must be a positive integer"),
    ({"window": 8, "layer_types": (GLOBAL,) * 4}, "no layer is local, so a window changes nothing"),
    ({"window": None, "layer_types": SWAPPED}, "window=None makes every layer global"),
    ({"layer_types": SWAPPED[:3]}, "layer_types must name 4 layers"),
    ({"layer_types": ("local",) * 4}, "layer_types must name 4 layers"),
    ({"post_norms": None}, "post_norms must be True or False"),
    ({"embed_scale": 1}, "embed_scale must be True or False"),
    ({"heads": [(0, 8)]}, "heads 0 to 7, not 8"),
    ({"heads": [(4, 0)]}, "layers 0 to 3, not 4"),
    ({"heads": [3]}, r"pairs \(layer, head\)"),
    ({"layers": [-1]}, "layers 0 to 3, not -1"),
    ({"layers": [True]}, "layers 0 to 3, not True"),
]


@pytest.mark.parametrize(("switches", "message"), WRONG)
def test_a_switch_that_cannot_be_is_refused(switches: dict[str, Any], message: str) -> None:
    before = state(MODEL)
    with pytest.raises(ValueError, match=message), ablate(MODEL, **switches):
        pass
    assert state(MODEL) == before
    with pytest.raises(ValueError, match="expected a Gemma2 or a Gemma, not Linear"), ablate(nn.Linear(2, 2), window=3):
        pass


def test_a_part_that_a_twin_does_without_is_named() -> None:
    model = sharing(MODEL)
    model.set_submodule("model.layers.2.self_attn.attend.softcap", nn.Tanh())
    before = state(model)
    for switches in ({"attn_softcap": None}, {"final_softcap": 2.0, "attn_softcap": 5.0}):
        with pytest.raises(ValueError, match=r"layers.2.self_attn.attend.softcap cannot be ablated: Tanh"):
            under(switches, model)
        assert state(model) == before


def test_windows_hold_each_token_once_behind_a_bos() -> None:
    text = list(range(10, 33))
    found = windows(text, 8, bos=2)
    assert [window[0] for window in found] == [2] * 4 and [len(window) for window in found] == [8, 8, 8, 3]
    assert [token for window in found for token in window[1:]] == text
    made = batches(text, 8, bos=2)
    assert [list(batch.shape) for batch in made] == [[3, 8], [1, 3]]
    for wrong, message in (([], "the text has no tokens"), ([3], "context must be an integer of at least 2")):
        with pytest.raises(ValueError, match=message):
            windows(wrong, 1 if wrong else 8, bos=2)


TEXT = ids(1, 70, seed=4)[0].tolist()


@torch.no_grad()
def test_effects_are_those_of_whole_logits_written_out() -> None:
    switches: dict[str, dict[str, Any]] = {"cap": {"final_softcap": 4.0}, "same window": {"window": 16}}
    ticks: list[int] = []
    found = {effect.name: effect for effect in measure(MODEL, TEXT, switches, 32, bos=2, tick=ticks.append)}
    assert sum(ticks) == work(TEXT, [32], switches) == 70 * 3
    nats, kl, other = [], [], []
    for row in windows(TEXT, 32, bos=2):
        tokens = torch.tensor([row])
        p, q = (
            MODEL(tokens).log_softmax(-1)[0, :-1],
            under(switches["cap"], tokens=tokens).log_softmax(-1)[0, :-1],
        )
        nats.append(F.nll_loss(q, tokens[0, 1:], reduction="none"))
        kl.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
        other.append((p.argmax(-1) != q.argmax(-1)).double())
    cap = found["cap"]
    assert (cap.windows, cap.tokens, cap.context) == (3, 70, 32)
    for estimate, parts in ((cap.nats, nats), (cap.kl, kl), (cap.top, other)):
        assert estimate.value == pytest.approx(float(torch.cat(parts).mean()), rel=1e-9)
        assert estimate.low is not None and estimate.high is not None
        assert estimate.low <= estimate.value <= estimate.high
    assert cap.more.value == pytest.approx(cap.nats.value - found["unchanged"].nats.value, rel=1e-9)
    assert cap.kl.value > 0.1 and cap.ratio == pytest.approx(cap.perplexity / found["unchanged"].perplexity)
    same = found["same window"]
    assert (same.kl.value, same.more.value, same.top.value) == (0, 0, 0)


def test_only_a_part_of_a_windows_logits_is_held_at_once_and_that_changes_no_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switches: dict[str, dict[str, Any]] = {"cap": {"final_softcap": 4.0}, "window": {"window": 5}}
    whole = measure(MODEL, TEXT, switches, 40, bos=2)
    shapes: list[int] = []
    monkeypatch.setattr("gemma2.research.ablation.LOGITS", 512 * 6)
    monkeypatch.setattr("gemma2.research.ablation.PREFILL_CHUNK", 8)
    monkeypatch.setattr("gemma2.research.ablation.PASS", 40)
    with MODEL.lm_head.register_forward_hook(lambda module, inputs, out: shapes.append(out.shape[0] * out.shape[1])):
        parted = measure(MODEL, TEXT, switches, 40, bos=2)
    assert max(shapes) == 6
    for one, other in zip(whole, parted, strict=True):
        for kind in ("nats", "more", "kl", "top"):
            assert getattr(one, kind).value == pytest.approx(getattr(other, kind).value, rel=1e-8, abs=1e-12)


def test_the_bootstrap_is_seeded_and_its_interval_is_that_of_the_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.full((400,), 10.0, dtype=torch.float64)
    sums = 10 * torch.randn(400, 1, generator=generator, dtype=torch.float64)
    (found,) = bootstrap(sums, tokens, samples=2000, seed=3)
    assert found == bootstrap(sums, tokens, samples=2000, seed=3)[0] != bootstrap(sums, tokens, samples=2000, seed=4)[0]
    assert found.low is not None and found.high is not None
    spread = 1.96 * float((sums / 10).std()) / 20  # of a mean of 400
    assert found.high - found.value == pytest.approx(spread, rel=0.1)
    assert found.value - found.low == pytest.approx(spread, rel=0.1)
    (alone,) = bootstrap(sums[:1], tokens[:1])
    assert (alone.low, alone.high) == (None, None)


@torch.no_grad()
def test_saturation_counts_what_is_seen_before_the_cap() -> None:
    found = {near.name: near for near in saturation(MODEL, TEXT, 40, bos=2)}
    scores: dict[int, list[Tensor]] = {i: [] for i in range(4)}
    tops, logits = [], []
    for row in windows(TEXT, 40, bos=2):
        tokens = torch.tensor([row[:-1]])
        with capture(MODEL, ["blocks.*.attn.hook_scores_raw", "logits_raw"]) as seen:
            MODEL(tokens)
        at = torch.arange(tokens.shape[1])[None]
        for i in range(4):
            raw, visible = seen[f"blocks.{i}.attn.hook_scores_raw"], ops.visible(at, at, CONFIG.window(i))
            scores[i].append(raw.masked_select(visible))
            tops.append(raw.masked_fill(~visible, -torch.inf).amax(-1).flatten())
        logits.append(seen["logits_raw"][0])
    expected = {f"scores, layer {i}": (torch.cat(parts), 50) for i, parts in scores.items()}
    expected["scores, all layers"] = (torch.cat([x for parts in scores.values() for x in parts]), 50)
    expected["largest score of each query and head"] = (torch.cat(tops), 50)
    expected["logits"] = (torch.cat(logits).flatten(), 30)
    expected["top logit of each token"] = (torch.cat(logits).amax(-1), 30)
    assert list(found) == list(expected)
    for name, (x, cap) in expected.items():
        near, ratio = found[name], x.abs() / cap
        assert (near.cap, near.count) == (cap, x.numel()), name
        assert near.largest == pytest.approx(float(x.abs().max()))
        assert near.half == pytest.approx(float((ratio > 0.5).double().mean()))
        assert near.most == pytest.approx(float((ratio > 0.9).double().mean()))
        gradient = torch.autograd.functional.jvp(lambda x, cap=cap: ops.softcap(x, cap), x, torch.ones_like(x))[1]
        assert near.slope == pytest.approx(float(gradient.mean()), rel=1e-9)
        middle = int(0.5 / END * BINS)
        assert sum(near.shares) == pytest.approx(1) and sum(near.shares[middle:]) == pytest.approx(near.half)
    assert found["top logit of each token"].most > 0 and found["scores, all layers"].half > 0  # these caps bite here


def test_the_standard_switches_all_change_a_model_in_which_every_feature_bites() -> None:
    switches = standard(CONFIG, layers=True, heads=True)
    assert len(switches) == 10 + 4 + 4 * 8
    some = {name: switches[name] for name in switches if not name.startswith(("head", "without"))}
    effects: list[Effect] = measure(MODEL, TEXT, some | {"x": {"heads": [(3, 7)]}}, 64, bos=2)
    assert all(effect.kl.value > 1e-6 for effect in effects[1:])
    everywhere = replace(CONFIG, layer_types=(GLOBAL,) * 4)
    assert not any("window" in name or "global" in name for name in standard(everywhere) if "swapped" not in name)


def test_the_parts_of_the_measurement_compute_what_the_model_computes(plain: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(likelihoods(MODEL, hidden(MODEL, TOKENS)), plain.log_softmax(-1))
    assert isinstance(NoCap(MODEL.softcap)(plain), Tensor)
