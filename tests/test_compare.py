"""Two models on a text: every figure against a direct computation with all logits; the atlas against B made by hand."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.convert import convert
from gemma2.errors import NonFiniteError
from gemma2.evaluate.atlas import Atlas, atlas, passes, swapped
from gemma2.evaluate.compare import Comparison, check_comparable, compare, percentile
from gemma2.evaluate.costs import Stored, speed, stored, total
from gemma2.evaluate.states import Recorded, cut_text, head_of
from gemma2.load import POCKET
from gemma2.research import capture
from gemma2.tokenizer import Tokenizer
from tests.conftest import tiny

TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void."
LONG = TEXT + " And darkness was upon the face of the deep. And the Spirit of God moved upon the face of the waters."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(POCKET / "tokenizer.model")


def first() -> gemma2.Gemma2:
    """A model in float64 whose embedding is small, so that its likeliest token is not the one that it reads."""
    made = tiny("27b", vocab_size=4096, num_hidden_layers=2).double()
    made.model.embed_tokens.weight.data *= 0.02
    return made


@pytest.fixture(scope="module")
def pair(tokenizer: Tokenizer) -> tuple[gemma2.Gemma, gemma2.Gemma]:
    """A model and one whose matrices are a little other, both in float64."""
    a = first()
    b, generator = copy.deepcopy(a), torch.Generator().manual_seed(1)
    for parameter in b.parameters():
        if parameter.ndim == 2:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.3 * parameter.std() * noise
    return gemma2.Gemma(a, tokenizer), gemma2.Gemma(b, tokenizer)


def directly(a: Any, b: Any, ids: list[int], window: int, stride: int) -> list[Tensor]:
    """kl, before, after, top of each token out of whole passes over each window, with all logits in float64."""
    found = []
    end = scored = 0
    while scored < len(ids):
        end = min(len(ids), max(window, end + stride) if scored else window)
        start = max(0, end - window)
        tokens = torch.tensor([[2, *ids[start : end - 1]]])
        with torch.no_grad():
            p, q = (model.double()(tokens)[0, scored - start :].log_softmax(-1) for model in (a, b))
        after = torch.tensor(ids[scored:end])[:, None]
        kl = (p.exp() * (p - q)).sum(-1)
        found.append(
            [kl, p.gather(1, after)[:, 0], q.gather(1, after)[:, 0], torch.stack([p.argmax(-1), q.argmax(-1)], 1)]
        )
        scored = end
    return [torch.cat(each) for each in zip(*found, strict=True)]


@pytest.mark.parametrize(("window", "stride"), [(200, 100), (24, 12), (20, 7), (9, 9)])
def test_every_token_has_the_kl_of_all_logits_in_float64(
    pair: tuple[gemma2.Gemma, gemma2.Gemma], window: int, stride: int
) -> None:
    a, b = pair
    ids = a.tokenizer.encode(LONG, bos=False)
    kl, before, after, top = directly(a.model, b.model, ids, window, stride)
    found = compare(a, b, LONG, window=window, stride=stride)
    assert found.ids == ids and sum(found.scored) == len(ids) and found.kl.dtype == torch.float64
    for one, wanted in ((found.kl, kl), (found.before, before), (found.after, after)):
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-11)
    assert torch.equal(found.top, top)
    same = int(found.same.sum())
    assert 0 < same < len(ids) and float(found.kl.min()) > 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_beside_itself_has_no_kl_and_always_agrees(dtype: str) -> None:
    gemma = gemma2.load(dtype=dtype, device="cpu")
    found = compare(gemma, gemma, LONG, window=32)
    assert bool((found.kl == 0).all()) and bool(found.same.all())
    summary = found.summary()
    assert summary.kl.value == summary.most == summary.change == summary.ratio.value == 0 and summary.same.value == 1
    assert summary.before == summary.after == pytest.approx(gemma.score(LONG, window=32).perplexity, rel=1e-5)
    assert found.worst() == []


def test_float32_is_near_float64(pair: tuple[gemma2.Gemma, gemma2.Gemma]) -> None:
    exact = compare(*pair, LONG)
    a, b = (gemma2.Gemma(copy.deepcopy(one.model).float(), one.tokenizer) for one in pair)
    found = compare(a, b, LONG)
    assert found.kl.dtype == torch.float32
    torch.testing.assert_close(found.kl.double(), exact.kl, rtol=1e-3, atol=1e-4)


def test_the_summary_has_the_definitions_of_llama_cpp() -> None:
    kl = torch.tensor([0.4, 0.0, 0.1, 0.2, 0.3])
    before, after = torch.tensor([-1.0, -2.0, -3.0, -1.0, -0.5]), torch.tensor([-1.5, -2.0, -2.5, -1.0, -0.7])
    top = torch.tensor([[1, 1], [2, 3], [4, 4], [5, 5], [6, 7]])
    found = Comparison([1, 2, 3, 4, 5], [3, 2], kl, before, after, top, torch.zeros(5, 2)).summary(samples=50)
    assert found.kl.value == pytest.approx(0.2) and found.median == pytest.approx(0.2)
    assert found.high == pytest.approx(0.3 + 0.96 * 0.1) and found.most == pytest.approx(0.4)  # at 0.99 * 4
    assert found.same.value == pytest.approx(3 / 5)
    assert found.before == pytest.approx(math.exp(7.5 / 5)) and found.after == pytest.approx(math.exp(7.7 / 5))
    assert found.ratio.value == pytest.approx(0.2 / 5)
    changes = [math.exp(q) - math.exp(p) for p, q in zip(before.tolist(), after.tolist(), strict=True)]
    assert found.change == pytest.approx(math.sqrt(sum(x * x for x in changes) / 5))
    assert found.kl.low is not None and found.kl.high is not None
    assert found.kl.low <= found.kl.value <= found.kl.high
    assert percentile(torch.tensor([3.0]), 0.99) == 3 and percentile(torch.tensor([1.0, 3.0]), 0.5) == 2


def test_perplexities_are_those_of_the_scores(pair: tuple[gemma2.Gemma, gemma2.Gemma]) -> None:
    summary = compare(*pair, LONG, window=24, stride=10).summary()
    for gemma, found in zip(pair, (summary.before, summary.after), strict=True):
        assert found == pytest.approx(gemma.score(LONG, window=24, stride=10).perplexity, rel=1e-9)
    assert math.exp(summary.ratio.value) == pytest.approx(summary.after / summary.before, rel=1e-9)


def test_what_was_recorded_compares_as_the_model_itself(
    pair: tuple[gemma2.Gemma, gemma2.Gemma], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma2.evaluate.states.TOKENS", 50)  # some windows at a time
    a, b = pair
    wanted = compare(a, b, LONG, window=24, stride=10)
    cut = cut_text(LONG, a.tokenizer, [a.config, b.config], window=24, stride=10)
    with Recorded(a, cut, folder=tmp_path) as recorded:
        assert len(cut.batches) > 1 and len(list(tmp_path.rglob("states"))) == 1
        assert not list(recorded.head.model.layers) and len(a.model.model.layers) == 2
        found = compare(recorded, b)
        with pytest.raises(ValueError, match="are those of the recording"):
            compare(recorded, b, LONG)
    for name in ("kl", "before", "after", "top", "sure"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="this recording was closed"):
        compare(recorded, b)

    def stop(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Recorded(a, cut, folder=tmp_path, tick=stop)
    assert not list(tmp_path.iterdir())


def test_a_recorded_model_leaves_memory(tokenizer: Tokenizer) -> None:
    gemma = gemma2.Gemma(first(), tokenizer)
    with Recorded(gemma, cut_text(TEXT, tokenizer, [gemma.config])) as recorded:
        layer = weakref.ref(gemma.model.model.layers[0])
        del gemma
        gc.collect()
        assert layer() is None
        assert sum(map(len, recorded.states())) == len(recorded.cut.ids)


def test_no_more_logits_are_held_than_stated(
    pair: tuple[gemma2.Gemma, gemma2.Gemma], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    wanted, sizes = compare(a, b, LONG), list[int]()
    monkeypatch.setattr("gemma2.scoring.LOGITS", 5 * 4096)
    monkeypatch.setattr("gemma2.evaluate.compare.WIDE", 2 * 4096)
    head, found = type(a.model.lm_head).forward, torch.Tensor.log_softmax

    def counted(self: Any, x: Tensor, embedding: Any) -> Tensor:
        sizes.append(len(x))
        return head(self, x, embedding)

    def softmax(x: Tensor, dim: int) -> Tensor:
        assert len(x) <= 2
        return found(x, dim)

    monkeypatch.setattr(type(a.model.lm_head), "forward", counted)
    monkeypatch.setattr(torch.Tensor, "log_softmax", softmax)
    torch.testing.assert_close(compare(a, b, LONG).kl, wanted.kl, rtol=0, atol=1e-12)
    assert max(sizes) == 5 and sum(sizes) == 2 * len(wanted.ids)


def test_the_worst_passages_do_not_overlap_and_name_the_worst_token() -> None:
    kl = torch.full((50,), 0.01)
    kl[20], kl[21], kl[40] = 3.0, 5.0, 4.0
    top = torch.arange(100).view(50, 2)
    sure = torch.full((50, 2), math.log(0.25))
    found = Comparison(list(range(100, 150)), [50], kl, kl, kl, top, sure).worst(3, tokens=4)
    first, second, third = found
    assert first.start <= 20 and first.start + 4 > 21 and first.mean == pytest.approx((8 + 0.02) / 4)
    assert first.ids[first.worst] == 121 and [id for id, _ in first.top] == [42, 43]
    assert [p for _, p in first.top] == pytest.approx([0.25, 0.25])
    assert second.start <= 40 < second.start + 4 and second.ids[second.worst] == 140 and third.mean < 0.02
    spans = [range(one.start, one.start + 4) for one in found]
    assert len({i for span in spans for i in span}) == 12
    assert [len(one.ids) for one in Comparison([7], [1], kl[:1], kl, kl, top, sure).worst(3, tokens=24)] == [1]


@pytest.mark.long  # kernels are compiled
@pytest.mark.parametrize("fast", [False, True])
def test_packed_weights_compare_as_the_floats_that_they_hold(fast: bool) -> None:
    a = gemma2.load(dtype="float32", device="cpu")
    source = "pocket:pocket-q8_0.gguf"
    plain = compare(a, gemma2.load(source, dtype="float32", device="cpu"), LONG, window=40)
    packed = gemma2.load(source, dtype="float32", device="cpu", weights="packed", fast=fast)
    found = compare(a, packed, LONG, window=40)
    torch.testing.assert_close(found.kl, plain.kl, rtol=0, atol=2e-6)
    assert 1e-5 < float(plain.kl.mean()) < 1e-3
    cut = cut_text(LONG, a.tokenizer, [a.config], window=40)
    with Recorded(packed, cut) as recorded:
        assert float(compare(recorded, packed).kl.abs().max()) == 0


def test_models_of_other_vocabularies_are_refused(
    tokenizer: Tokenizer, pair: tuple[gemma2.Gemma, gemma2.Gemma]
) -> None:
    proto = tokenizer.to_proto()
    other = Tokenizer(proto.replace("▁LORD".encode(), "▁LORX".encode(), 1))
    with pytest.raises(
        ValueError, match=r"A and B have different tokenizers, as id \d+ '▁LORD' and '▁LORX': only models"
    ):
        compare(pair[0], gemma2.Gemma(pair[1].model, other), TEXT)
    wide = gemma2.Gemma(tiny("2b", vocab_size=4100), tokenizer)
    with pytest.raises(ValueError, match="A has 4,096 pieces and 4,096 logits, B has 4,096 pieces and 4,100 logits"):
        compare(pair[0], wide, TEXT)
    check_comparable(tokenizer, Tokenizer(proto), (4096, 4096))


def test_predictions_with_nan_are_named_by_token(pair: tuple[gemma2.Gemma, gemma2.Gemma]) -> None:
    a, b = pair
    broken = copy.deepcopy(b.model)
    at = torch.arange(40)[None, :, None] == 5
    broken.model.norm.register_forward_hook(lambda module, args, out: out.masked_fill(at[:, : out.shape[1]], math.nan))
    with pytest.raises(NonFiniteError, match="at token 5 of the text, the predictions of a model hold NaN"):
        compare(a, gemma2.Gemma(broken, a.tokenizer), TEXT, limit=30)


def test_texts_and_windows_that_cannot_be_are_refused(pair: tuple[gemma2.Gemma, gemma2.Gemma]) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ("", {}, "the text has no tokens"),
        (None, {}, "there is no text to compare"),
        (TEXT, {"window": 1}, "window must be an integer of at least 2"),
        (TEXT, {"window": 257}, "window 257 is longer than the context of a model, 256"),
        (TEXT, {"window": 8, "stride": 9}, "stride 9 is longer than the window of 8"),
        (TEXT, {"limit": 0}, "limit must be a positive integer"),
        ([5, 4096], {}, r"token id 4096 at 1 is not an integer in \[0, 4096\)"),
        ([-1], {}, "token id -1 at 0"),
        ([5.5], {}, "token id 5.5 at 0"),
    ]
    for text, options, message in cases:
        with pytest.raises(ValueError, match=message):
            compare(*pair, text, **options)
    one = compare(*pair, [700])
    assert one.ids == [700] and one.summary().kl.low is None
    assert compare(*pair, TEXT, limit=5).ids == pair[0].tokenizer.encode(TEXT, bos=False)[:5]


def test_sizes_are_those_of_the_tensors_in_the_file() -> None:
    found = stored(open_checkpoint(POCKET / "pocket-q8_0.gguf").weights)
    embedding = found["model.embed_tokens.weight"]
    assert (embedding.type, embedding.bytes, embedding.bits) == ("Q8_0", 4096 * 256 // 32 * 34, 8.5)
    norm = found["model.norm.weight"]
    assert (norm.type, norm.bytes, norm.weights) == ("F32", 4 * 256, 256)
    whole = total(found)
    assert whole.type == "Q8_0" and whole.weights == gemma2.load(device="cpu").config.parameter_count
    assert whole.bits == pytest.approx(8.53, abs=0.01)
    lost = (POCKET / "pocket-q8_0.gguf").stat().st_size - whole.bytes
    assert 0 < lost < 200_000  # the header, with the tokenizer
    assert total(stored(open_checkpoint(POCKET).weights)).bits == 16


def test_a_model_is_timed_on_the_text() -> None:
    gemma = gemma2.load(device="cpu")
    found = speed(gemma, gemma.tokenizer.encode("In the beginning"), rounds=1)
    assert found.prompt > 0 and found.decode > 0


# --- the atlas ---

CHANGED = ["model.embed_tokens.weight", "model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight"]


@pytest.fixture(scope="module")
def mapped(pair: tuple[gemma2.Gemma, gemma2.Gemma]) -> Atlas:
    a, b = pair
    sizes = {name: Stored("Q4_0", p.numel() * 18 // 32, p.numel()) for name, p in b.model.named_parameters()}
    ticks = list[int]()
    found = atlas(a, b, LONG, sizes, limit=30, window=20, tick=ticks.append)
    assert sum(ticks) == passes(2)
    return found


def with_matrices(a: gemma2.Gemma, change: Callable[[str, Tensor], Tensor]) -> gemma2.Gemma:
    made = copy.deepcopy(a.model)
    for name, parameter in made.named_parameters():
        parameter.data = change(name, parameter.data)
    return gemma2.Gemma(made, a.tokenizer)


def test_the_kl_of_a_matrix_is_that_of_the_model_with_this_matrix_alone(
    pair: tuple[gemma2.Gemma, gemma2.Gemma], mapped: Atlas
) -> None:
    a, b = pair
    theirs = dict(b.model.named_parameters())

    def kl(names: list[str], half: str = "") -> float:
        def change(name: str, own: Tensor) -> Tensor:
            other = theirs[name].data
            return (own + other) / 2 if name == half else other if name in names else own

        one = compare(a, with_matrices(a, change), LONG, limit=30, window=20, stride=20)
        return float(one.kl.mean())

    matrices = {m.name: m for m in mapped.matrices}
    every = list(matrices)
    assert len(every) == 15 and every[0] == CHANGED[0] and mapped.tokens == 30 and mapped.others == []
    assert mapped.kl == pytest.approx(kl(every), rel=1e-9)
    for name in CHANGED:
        one = matrices[name]
        assert one.kl == pytest.approx(kl([name]), rel=1e-9) and one.kl > 0
        assert one.gain == pytest.approx(mapped.kl - kl(every, half=name), rel=1e-7)
        own, other = dict(a.model.named_parameters())[name].data, theirs[name].data
        assert one.error == pytest.approx(float((other - own).norm() / own.norm()), rel=1e-12)
    layer = [name for name in every if ".layers.1." in name]
    assert mapped.layers[1].name == "layer 1" and mapped.layers[1].kl == pytest.approx(kl(layer), rel=1e-9)
    kind = [name for name in every if name.endswith("o_proj.weight")]
    assert {g.name: g.kl for g in mapped.kinds}["o_proj"] == pytest.approx(kl(kind), rel=1e-9)


def test_sites_have_the_relative_error_of_their_values(pair: tuple[gemma2.Gemma, gemma2.Gemma], mapped: Atlas) -> None:
    a, b = pair
    ids = a.tokenizer.encode(LONG, bos=False)[:30]
    rows = [torch.tensor([[2, *ids[:19]]]), torch.tensor([[2, *ids[10:29]]])]
    errors = {site.name: site.error for site in mapped.sites}
    names = [
        "hook_embed",
        "blocks.1.hook_resid_post",
        "blocks.0.attn.hook_pattern",
        "blocks.1.attn.hook_attn_scores",
        "logits",
    ]
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in names}
    for tokens in rows:
        with torch.no_grad(), capture(a, names) as first:
            a.model(tokens)
        with torch.no_grad(), capture(b, names) as second:
            b.model(tokens)
        for name in names:
            x, y = first[name], second[name]
            seen = x > torch.finfo(x.dtype).min
            sums[name] += torch.stack([(y - x)[seen].square().sum(), x[seen].square().sum()])
    for name, found in sums.items():
        assert errors[name] == pytest.approx(float((found[0] / found[1]).sqrt()), rel=1e-9), name
    assert len(errors) == len(mapped.sites) > 60
    assert {site.kind for site in mapped.sites if site.layer == 1} >= {"hook_resid_post", "attn.hook_z"}


def test_the_ranking_is_by_kl_saved_a_byte(mapped: Atlas) -> None:
    worth = [matrix.worth for matrix in mapped.ranked]
    assert worth == sorted(worth, reverse=True) and {m.name for m in mapped.ranked} == {m.name for m in mapped.matrices}
    first = mapped.ranked[0]
    assert first.worth == pytest.approx(first.gain / (first.stored.weights / 8 / 1e6))


def test_a_has_its_own_parameters_again_also_after_an_error(
    pair: tuple[gemma2.Gemma, gemma2.Gemma], mapped: Atlas
) -> None:
    a = pair[0]
    own = first()
    assert all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), own.state_dict().values(), strict=True))
    name = CHANGED[1]
    before, head = dict(a.model.named_parameters()), head_of(a.model)
    with (
        pytest.raises(KeyError),
        swapped(a.model, {name: torch.zeros_like(before[name]), CHANGED[0]: before[CHANGED[0]] * 2}),
    ):
        assert not bool(dict(a.model.named_parameters())[name].any())
        assert head.model.embed_tokens.weight is before[CHANGED[0]]
        raise KeyError
    assert all(parameter is before[name] for name, parameter in a.model.named_parameters())


def test_an_atlas_of_what_is_no_quantized_form_is_refused(pair: tuple[gemma2.Gemma, gemma2.Gemma]) -> None:
    a, b = pair
    deeper = gemma2.Gemma(tiny("27b", vocab_size=4096, num_hidden_layers=1), a.tokenizer)
    with pytest.raises(ValueError, match=r"B has no model\.layers\.1"):
        atlas(a, deeper, TEXT, {})
    other = gemma2.Gemma(tiny("2b", vocab_size=4096, num_hidden_layers=2), a.tokenizer)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is \(4096, 288\) in A, \(4096, 144\) in B"):
        atlas(a, other, TEXT, {})
    held = gemma2.load("pocket:pocket-q8_0.gguf", weights="packed", device="cpu", dtype="float32")
    fast = gemma2.load(device="cpu", dtype="float32", fast=True)
    plain = gemma2.load(device="cpu", dtype="float32")
    for one, kind in ((held, "HeldEmbedding"), (fast, "Attention")):
        with pytest.raises(ValueError, match=f"A has a .*{kind}|A has a Fast"):
            atlas(one, plain, TEXT, {})
    with pytest.raises(ValueError, match=r"`stored` does not say how model\.embed_tokens\.weight is stored"):
        atlas(a, b, TEXT, {})


def test_the_atlas_of_a_model_beside_itself_is_nothing(pair: tuple[gemma2.Gemma, gemma2.Gemma]) -> None:
    a = pair[0]
    sizes = {name: Stored("F64", p.nbytes, p.numel()) for name, p in a.model.named_parameters()}
    found = atlas(a, a, TEXT, sizes, limit=3)
    assert found.kl == 0 and not any(matrix.kl or matrix.error for matrix in found.matrices) and found.others == []
    assert not any(site.error for site in found.sites)


def test_matrices_that_are_of_the_right_kind_already_are_not_copied(
    pair: tuple[gemma2.Gemma, gemma2.Gemma], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    sizes = {name: Stored("F64", p.nbytes, p.numel()) for name, p in b.model.named_parameters()}
    put: list[tuple[str, int]] = []

    def seen(model: gemma2.Gemma2, values: dict[str, Tensor]) -> Any:
        put.extend((name, value.data_ptr()) for name, value in values.items())
        return swapped(model, values)

    monkeypatch.setattr("gemma2.evaluate.atlas.swapped", seen)
    atlas(a, b, TEXT, sizes, limit=2)
    theirs = {name: p.data_ptr() for name, p in b.model.named_parameters()}
    assert put[:15] == [(name, theirs[name]) for name, _ in put[:15]]


def test_other_parameters_that_differ_are_named(pair: tuple[gemma2.Gemma, gemma2.Gemma]) -> None:
    a, b = pair
    other = with_matrices(b, lambda name, own: own + 0.1 if name == "model.norm.weight" else own)
    sizes = {name: Stored("Q4_0", p.numel() * 18 // 32, p.numel()) for name, p in b.model.named_parameters()}
    assert atlas(a, other, TEXT, sizes, limit=3).others == ["model.norm.weight"]


def test_a_packed_model_has_the_errors_of_its_values(tmp_path: Path) -> None:
    path = tmp_path / "tq1_0.gguf"
    convert("pocket", path, type="tq1_0", progress=False)
    a = gemma2.load(device="cpu", dtype="float32")
    packed, plain = (gemma2.load(path, weights=form, device="cpu", dtype="float32") for form in ("packed", None))
    found = atlas(a, packed, TEXT, stored(open_checkpoint(path).weights), limit=2)
    theirs = dict(plain.model.named_parameters())
    for matrix in found.matrices:
        own, other = dict(a.model.named_parameters())[matrix.name].data, theirs[matrix.name].data
        assert matrix.error == pytest.approx(float((other - own).double().norm() / own.double().norm()), rel=1e-9)
        assert matrix.layer is None or (matrix.stored.type == "TQ1_0" and 0.7 < matrix.error < 0.9)
