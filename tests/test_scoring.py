"""Scores: every token once, behind the BOS, with the cap; equal to one plain pass however it is cut and batched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2 import ops
from gemma2.cache import HybridCache
from gemma2.errors import ContextOverflow
from gemma2.evaluate.perplexity import perplexity
from gemma2.research import capture, edit
from gemma2.scoring import hidden, score_ids, token_logprobs, windows
from tests.conftest import ids, tiny
from tests.test_readme import ROOT, check_code

TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void."


@pytest.fixture(scope="module")
def pocket() -> gemma2.Gemma:
    return gemma2.load(dtype="float64", device="cpu")


def test_the_page_on_scoring_runs_and_prints_what_it_shows() -> None:
    check_code((ROOT / "docs" / "scoring.md").read_text(encoding="utf-8"))


def plain(model: Any, row: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of row[1:] and which are the likeliest, out of one pass with all logits."""
    with torch.no_grad():
        logits = model(torch.tensor([row]))[0, :-1]
    after = torch.tensor(row[1:])
    return logits.log_softmax(dim=-1).gather(1, after[:, None])[:, 0], logits.argmax(dim=-1) == after


def test_a_text_has_the_log_probabilities_of_one_plain_pass(pocket: gemma2.Gemma) -> None:
    row = pocket.tokenizer.encode(TEXT)
    logprobs, greedy = plain(pocket.model, row)
    found = pocket.score(TEXT)
    torch.testing.assert_close(found.logprobs, logprobs, rtol=0, atol=1e-12)
    assert torch.equal(found.greedy, greedy) and not found.is_greedy
    assert found.ids == row[1:] and found.windows == 1 and found.bytes == len(TEXT)
    nats = -float(logprobs.sum())
    assert found.total == pytest.approx(-nats, abs=1e-10)
    assert found.perplexity == pytest.approx(math.exp(nats / (len(row) - 1)))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT))


def test_texts_in_a_list_score_as_each_alone(pocket: gemma2.Gemma) -> None:
    texts: list[Any] = [TEXT, "void", TEXT[:30], ("In the beginning", " God created"), [2, 700, 800], TEXT[40:]]
    together = pocket.score(texts, batch=3)
    for text, found in zip(texts, together, strict=True):
        alone = pocket.score(text)
        assert found.ids == alone.ids
        torch.testing.assert_close(found.logprobs, alone.logprobs, rtol=0, atol=1e-12)


def test_choices_of_one_question_are_computed_once(pocket: gemma2.Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = pocket.model, list[tuple[int, ...]]()

    def watched(model: Any, tokens: Tensor, positions: Tensor) -> Tensor:
        read.append(tuple(tokens.shape))
        return hidden(model, tokens, positions)

    monkeypatch.setattr("gemma2.scoring.hidden", watched)
    question, other = pocket.tokenizer.encode("And God said"), pocket.tokenizer.encode("Thou")
    pairs = [(question, [n]) for n in (500, 900, 700)] + [(question, [500, 600]), (other, [7, 9]), (question, [300])]
    found = score_ids(model, pairs)
    assert read == [(3, len(question) + 1)]  # the question, the question and 500, the other with 7
    for (before, after), one in zip(pairs, found, strict=True):
        logprobs, greedy = plain(model, [*before, *after])
        torch.testing.assert_close(one.logprobs, logprobs[-len(after) :], rtol=0, atol=1e-12)
        assert torch.equal(one.greedy, greedy[-len(after) :])
    with capture(model, ["ln_final.*"]):  # a pass that is watched takes another way
        watched_scores = score_ids(model, pairs)
    for one, again in zip(found, watched_scores, strict=True):
        torch.testing.assert_close(one.logprobs, again.logprobs, rtol=0, atol=1e-12)


def test_a_continuation_is_scored_behind_its_context(pocket: gemma2.Gemma) -> None:
    row = pocket.tokenizer.encode("In the beginning God created")
    logprobs, _ = plain(pocket.model, row)
    for context, more in (("In the beginning", " God created"), ("In the beginning ", "God created")):
        found = pocket.score((context, more))
        assert found.ids == row[-len(found.ids) :] and pocket.tokenizer.decode(found.ids) == " God created"
        torch.testing.assert_close(found.logprobs, logprobs[-len(found.ids) :], rtol=0, atol=1e-12)
    assert pocket.score(("", TEXT)).total == pytest.approx(pocket.score(TEXT).total, abs=1e-10)


def test_greedy_text_is_said_to_be_greedy(pocket: gemma2.Gemma) -> None:
    ids = pocket.tokenizer.encode("And God said")
    written = next(iter([pocket.generate([ids], 12)]))[0]
    more = pocket.tokenizer.encode(written, bos=False)
    found = pocket.score((ids, more))
    assert found.is_greedy
    more[-1] = (more[-1] + 1) % 4096
    assert not pocket.score((ids, more)).is_greedy


@pytest.mark.parametrize(
    ("n", "first", "window", "stride"), [(1, 0, 2, 1), (50, 0, 16, 8), (50, 30, 16, 5), (9, 3, 9, 9)]
)
def test_windows_score_each_token_once_and_hold_no_more_than_they_may(
    n: int, first: int, window: int, stride: int
) -> None:
    found = list(windows(n, first, window, stride))
    assert [i for _, scored, end in found for i in range(scored, end)] == list(range(first, n))
    assert all(end - start <= window and start <= scored < end for start, scored, end in found)
    assert all(end - scored <= stride for _, scored, end in found[1:])


def test_a_long_text_is_scored_in_windows_that_each_begin_with_the_bos(pocket: gemma2.Gemma) -> None:
    row = pocket.tokenizer.encode(TEXT)
    found = pocket.score(TEXT, window=12, stride=5)
    wanted = []
    text = row[1:]
    for start, scored, end in windows(len(text), 0, 12, 5):
        logprobs, _ = plain(pocket.model, [2, *text[start:end]])
        wanted.append(logprobs[scored - start :])
    torch.testing.assert_close(found.logprobs, torch.cat(wanted), rtol=0, atol=1e-12)
    assert found.windows == len(wanted) > 3
    assert pocket.score(TEXT, window=12).total != found.total  # stride 6


@pytest.mark.parametrize("size", ["2b", "9b", "27b"])
def test_pieces_of_a_long_pass_equal_one_pass(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma2.scoring.PIECE", 10)
    model = tiny(size).double()
    tokens = ids(3, 40)
    positions = torch.arange(40) - torch.tensor([[0], [3], [17]])
    real = positions >= 0
    with torch.no_grad():
        whole = model.model(tokens, positions)
    torch.testing.assert_close(hidden(model, tokens, positions)[real], whole[real], rtol=0, atol=1e-12)
    with capture(model, "blocks.1.hook_resid_post"):
        torch.testing.assert_close(hidden(model, tokens, positions)[real], whole[real], rtol=0, atol=1e-12)


def test_keys_and_values_of_a_layer_are_let_go_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[HybridCache] = []

    def watched(*args: Any) -> HybridCache:
        made.append(HybridCache(*args))
        return made[-1]

    monkeypatch.setattr("gemma2.scoring.HybridCache", watched)
    monkeypatch.setattr("gemma2.scoring.PIECE", 10)
    hidden(tiny("2b"), ids(1, 40))
    (store,) = made
    assert not any(layer.keys.numel() or layer.values.numel() for layer in store.layers)


@pytest.mark.parametrize("plain_head", [True, False])
def test_no_part_of_the_logits_is_larger_than_stated(plain_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = tiny("2b"), list[list[int]]()
    monkeypatch.setattr("gemma2.scoring.LOGITS", 5 * model.config.vocab_size)
    monkeypatch.setattr("gemma2.head.AT_ONCE", 39 * 100)
    monkeypatch.setattr("gemma2.scoring.is_plain", lambda _: plain_head)
    for module in ("gemma2.head", "gemma2.ops"):

        def counted(x: Tensor, cap: float, real: Any = ops.softcap) -> Tensor:
            if x.ndim == 2:  # and not scores
                sizes.append(list(x.shape))
            return real(x, cap)

        monkeypatch.setattr(f"{module}.softcap", counted)
    (row,) = ids(1, 40).tolist()
    (found,) = score_ids(model, [(row[:1], row[1:])])
    assert sizes == ([[39, 100]] * 5 + [[39, 12]] if plain_head else [[5, 512]] * 7 + [[4, 512]])
    torch.testing.assert_close(found.logprobs, plain(model, row)[0], rtol=0, atol=1e-5)


def test_hooks_see_all_sites_of_a_scored_text(pocket: gemma2.Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma2.scoring.PIECE", 8)
    row = pocket.tokenizer.encode(TEXT)
    plainly = pocket.score(TEXT)
    with capture(pocket, ["blocks.2.hook_resid_post", "logits"]) as seen:
        found = pocket.score(TEXT)
    torch.testing.assert_close(found.logprobs, plainly.logprobs, rtol=0, atol=1e-12)
    assert len(seen.passes) > 2
    with torch.no_grad():
        torch.testing.assert_close(seen.stacked("logits"), pocket.model(torch.tensor([row[:-1]])), rtol=0, atol=1e-12)
    with edit(pocket, {"blocks.2.hook_mlp_out": lambda value, hook: value * 0}):
        assert pocket.score([TEXT, "void"])[0].total < plainly.total


@pytest.mark.parametrize("form", ["packed", None])
def test_quantized_and_fast_forms_score_as_their_logits_say(form: str | None) -> None:
    options: Any = {"weights": form} if form else {"compile": False}
    gemma = gemma2.load("pocket:pocket-q8_0.gguf", fast=True, device="cpu", dtype="float32", **options)
    logprobs, _ = plain(gemma.model, gemma.tokenizer.encode(TEXT))
    torch.testing.assert_close(gemma.score(TEXT).logprobs, logprobs, rtol=0, atol=1e-4)


def test_what_cannot_be_scored_is_refused(pocket: gemma2.Gemma) -> None:
    cases: list[tuple[Any, dict[str, Any], str | None]] = [
        ("", {}, "the text is empty: there is no token to score"),
        ([TEXT, ""], {}, "text 1 is empty"),
        ([], {}, "there is no text to score"),
        (("a", "b", "c"), {}, "a tuple of 3"),
        (("a ", ""), {}, None),
        (("a", ""), {}, "the text is empty"),
        ([700, 800], {}, r"does not begin with the BOS \(2\)"),
        ([2, 5000], {}, "token id 5000 at 1"),
        (TEXT, {"window": 1}, "window must be an integer of at least 2"),
        (TEXT, {"window": 2000}, r"window 2,000 is longer than the model's context of 1,024"),
        (TEXT, {"window": 8, "stride": 9}, "stride 9 is longer than the window of 8"),
        (TEXT, {"stride": 0}, "stride must be a positive integer"),
        (TEXT, {"batch": 0}, "batch must be a positive integer"),
        ([None], {}, "must be text or a list of token ids"),
        (None, {}, "give a text, a list of token ids, .* not NoneType"),
        (torch.tensor([2, 700]), {}, "give a text, a list of token ids, .* not Tensor"),
        (("a", None), {}, "must be text or a list of token ids, not None"),
        (([2, 700], 5), {}, "must be text or a list of token ids, not 5"),
    ]
    for text, options, message in cases:
        if message is None:
            assert pocket.score(text).ids
            continue
        with pytest.raises(ValueError, match=message):
            pocket.score(text, **options)
    with pytest.raises(ContextOverflow, match=r"pair 1 has .* and the context is"):
        score_ids(pocket.model, [([2], [5]), ([2], [5] * 9000)])
    with pytest.raises(ValueError, match="pair 0 has no context"):
        score_ids(pocket.model, [([], [5])])
    assert not len(score_ids(pocket.model, [([2], [])])[0].logprobs)


def test_of_equal_logits_the_one_of_the_least_id_is_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma2.head.AT_ONCE", 3 * 100)  # six slices of the vocabulary
    model = tiny("2b")
    found = token_logprobs(model, torch.zeros(3, model.config.hidden_size), torch.tensor([0, 1, 511]))
    assert found.greedy.tolist() == [True, False, False]
    torch.testing.assert_close(found.logprobs, torch.full((3,), -math.log(512)))


def test_the_bos_that_a_text_spells_is_no_byte_of_it(pocket: gemma2.Gemma) -> None:
    spelled, plainly = pocket.score(f"<bos>{TEXT}", special=True), pocket.score(TEXT)
    assert spelled.ids == plainly.ids and spelled.bits_per_byte == pytest.approx(plainly.bits_per_byte)
    control = pocket.score([2, 1])  # <eos> alone spells nothing
    assert control.bytes == 0 and control.bits_per_byte == math.inf and math.isfinite(control.perplexity)


def test_a_model_that_computes_nan_has_no_perplexity() -> None:
    broken = gemma2.load(dtype="float32", device="cpu")
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(math.nan)
    assert math.isnan(broken.score(TEXT).perplexity)
    assert math.isnan(perplexity(broken, TEXT, context=8).value)


def test_one_token_is_scored(pocket: gemma2.Gemma) -> None:
    logprobs, _ = plain(pocket.model, [2, 700])
    torch.testing.assert_close(pocket.score([2, 700]).logprobs, logprobs, rtol=0, atol=1e-12)
