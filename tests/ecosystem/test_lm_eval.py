"""lm-evaluation-harness: its class for transformers' models over the face, and this package's own beside it.

Every request has the answer of the harness's `hf` model on the same weights; where a BOS stands is said and shown.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma2
from gemma2.errors import ContextOverflow
from gemma2.research import capture
from tests.ecosystem.conftest import needs

huggingface, api = needs("lm_eval.models.huggingface"), needs("lm_eval.api.instance")
lm_eval = needs("lm_eval")
harness = importlib.import_module("gemma2.evaluate.harness")

TASKS = Path(__file__).parent / "tasks"
PAIRS = [("And God said", " unto him"), ("In the beginning", " God created the heaven"), ("And", " the king")]
VERSE = "In the beginning God created the heaven and the earth. And the earth was without form, and void."
TEMPLATE = (  # Google's, of gemma-2-2b-it
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


def answers(model: Any, tokenizer: Any) -> tuple[list[Any], list[str]]:
    found = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    scored = [api.Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
    options = {"until": ["."], "max_gen_toks": 12}
    written = [api.Instance("generate_until", {}, (prompt, options), n) for n, (prompt, _) in enumerate(PAIRS)]
    return found.loglikelihood(scored), found.generate_until(written)


def test_likelihoods_and_texts_are_those_over_transformers_own_model(
    face: Any, theirs: Any, their_tokenizer: Any
) -> None:
    scores, texts = answers(face, their_tokenizer)
    assert (scores, texts) == answers(theirs, their_tokenizer)
    assert len({score for score, _ in scores}) == 3 and all(texts)


@pytest.fixture(scope="module")
def saved(pocket: gemma2.Gemma, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved") / "pocket"
    gemma2.save(pocket, place)
    return place


def over_transformers(saved: Path, **options: Any) -> Any:
    found = huggingface.HFLM(
        str(saved), dtype="float32", device="cpu", batch_size=4, attn_implementation="eager", **options
    )
    found.model.generation_config.eos_token_id = [1, 107]  # as Google's checkpoints state it; the folder does not
    found.tokenizer.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def hf(saved: Path) -> Any:
    return over_transformers(saved)


@pytest.fixture(scope="module")
def hf_without_bos(saved: Path) -> Any:
    """The harness's own cure for the second BOS of its rolling windows, which takes it from all other texts too."""
    return over_transformers(saved, add_bos_token=False)


@pytest.fixture
def ours(pocket: gemma2.Gemma) -> Any:
    return harness.GemmaLM(pocket)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [api.Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def rolling(model: Any, *texts: str) -> Any:
    found = model.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    return pytest.approx(found, abs=1e-4) if isinstance(model, huggingface.HFLM) else found


@contextlib.contextmanager
def all_read(pocket: gemma2.Gemma) -> Iterator[list[list[int]]]:
    """Every row of ids that the model reads, without padding."""
    seen: list[list[int]] = []

    def see(module: Any, arguments: tuple[Any, ...], result: Any) -> None:
        tokens, positions = arguments[0], arguments[1]
        seen.extend(row[at >= 0].tolist() for row, at in zip(tokens, positions, strict=True))

    handle = pocket.model.register_forward_hook(see)
    try:
        yield seen
    finally:
        handle.remove()


def test_each_task_gives_the_metrics_and_answers_of_the_hf_model(ours: Any, hf: Any, hf_without_bos: Any) -> None:
    manager = needs("lm_eval.tasks").TaskManager(include_path=str(TASKS), include_defaults=False)
    compared = 0
    for names, other, chat in (
        (["pocket_choice", "pocket_letter", "pocket_write"], hf, False),
        (["pocket_chat"], hf, True),
        (["pocket_rolling"], hf_without_bos, False),
    ):
        options: Any = {"tasks": names, "task_manager": manager, "bootstrap_iters": 0, "apply_chat_template": chat}
        if names != ["pocket_rolling"]:
            options["num_fewshot"] = 1
        found, expected = (lm_eval.simple_evaluate(model=model, **options) for model in (ours, other))
        for name in names:
            for one, same in zip(found["samples"][name], expected["samples"][name], strict=True):
                assert (
                    one["arguments"] == same["arguments"]
                )  # with --chat, the turns as transformers' template has them
                compared += len(same["resps"])
                for mine, theirs in zip(one["resps"], same["resps"], strict=True):
                    check_equal(mine[0], theirs[0])
            numbers, others = (
                {key: value for key, value in run["results"][name].items() if isinstance(value, float)}
                for run in (found, expected)
            )
            assert numbers and numbers == pytest.approx(others, rel=1e-5)
    assert compared > 120


def check_equal(mine: Any, theirs: Any) -> None:
    if isinstance(theirs, tuple):
        assert near(mine[0], theirs[0]) and mine[1] == theirs[1]
    elif isinstance(theirs, str):
        assert mine == theirs
    else:
        assert near(mine, theirs)


def near(mine: float, theirs: float) -> bool:
    """Within 1e-4, or what hf's own sum in float32 can hold: of 1,500 tokens that is near 4,000, in steps of 2.4e-4."""
    return bool(mine == pytest.approx(theirs, abs=1e-4, rel=1.2e-7))


@pytest.mark.parametrize("form", ["packed", "float"])
def test_a_gguf_with_faster_twins_answers_as_the_hf_model_does_on_its_values(
    form: str, saved: Path, tmp_path: Path
) -> None:
    options: Any = {"weights": "packed"} if form == "packed" else {}
    gemma = gemma2.load("pocket:pocket-q8_0.gguf", fast=True, device="cpu", dtype="float32", **options)
    place = tmp_path / "values"
    gemma2.save(gemma2.load("pocket:pocket-q8_0.gguf", device="cpu", dtype="float32"), place)
    mine, theirs = harness.GemmaLM(gemma), over_transformers(place)
    asked = requests("loglikelihood", *PAIRS, (VERSE, " And darkness"))
    wrote = requests("generate_until", *((context, {"until": ["."], "max_gen_toks": 8}) for context, _ in PAIRS))
    for one, other in zip(mine.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        # Packed products round what they multiply, as llama.cpp's do: near, and not equal.
        assert one[0] == pytest.approx(other[0], abs=0.2 if form == "packed" else 1e-4) and one[1] == other[1]
    assert mine.generate_until(wrote) == theirs.generate_until(wrote)


def test_an_adapter_answers_as_the_hf_model_does_with_peft(saved: Path, tmp_path: Path) -> None:
    peft = needs("peft")
    base = huggingface.transformers.AutoModelForCausalLM.from_pretrained(saved, dtype="float32")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(3)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    mine = harness.GemmaLM(gemma2.load(saved, adapter=tmp_path / "adapter", device="cpu", dtype="float32"))
    theirs = over_transformers(saved, peft=str(tmp_path / "adapter"))
    asked, plain = requests("loglikelihood", *PAIRS), harness.GemmaLM(gemma2.load("pocket", device="cpu"))
    found = mine.loglikelihood(asked)
    for one, other, without in zip(found, theirs.loglikelihood(asked), plain.loglikelihood(asked), strict=True):
        check_equal(one, other)
        assert abs(one[0] - without[0]) > 0.01


def test_a_bos_that_a_text_spells_is_neither_lost_nor_doubled(pocket: gemma2.Gemma, ours: Any, hf: Any) -> None:
    plain = [("And God said", " unto him"), ("", "And God said"), ("<bos>And God said", " unto him")]
    spelled = [("<bos>And God said", " unto him"), ("", "<bos>And God said"), ("<bos>", "And God said unto him")]
    with all_read(pocket) as read:
        found = ours.loglikelihood(requests("loglikelihood", *plain, *spelled))
    # Of six requests two are different ids, and what is alike is read once.
    assert len(read) == 2 and all(row[0] == 2 and row.count(2) == 1 for row in read)
    # One at a time: where one text is cut at two places, hf (0.4.13) takes the logits of one cut for the other's.
    for mine, pair in zip(found, [*plain, *spelled], strict=True):
        check_equal(mine, hf.loglikelihood(requests("loglikelihood", pair))[0])
    assert found[0] == found[3] and found[1] == found[4]
    with all_read(pocket) as read:
        wrote = ours.generate_until(
            requests("generate_until", *((text, {"max_gen_toks": 4}) for text in ("And God", "<bos>And God", "")))
        )
    assert [row for row in read if len(row) > 1] == [pocket.tokenizer.encode("And God")] * 2
    assert wrote[0] == wrote[1]
    # One at a time: of a batch, hf asks its first text alone whether it has a BOS.
    assert wrote == [
        hf.generate_until(requests("generate_until", (text, {"max_gen_toks": 4})))[0]
        for text in ("And God", "<bos>And God", "")
    ]


def test_rolling_windows_have_one_bos_and_the_hf_models_second_one_only_where_asked(
    pocket: gemma2.Gemma, ours: Any, hf: Any, hf_without_bos: Any
) -> None:
    alone = pocket.score(VERSE).total
    assert rolling(ours, VERSE, "<bos>" + VERSE) == [pytest.approx(alone, abs=1e-4)] * 2
    assert rolling(ours, VERSE) == rolling(hf_without_bos, VERSE)
    twice = harness.GemmaLM(pocket, bos="hf")
    assert rolling(twice, VERSE, "", "O") == rolling(hf, VERSE, "", "O")
    assert rolling(twice, VERSE)[0] < alone - 1  # a BOS behind a BOS counts as a token, and nothing predicts it
    with all_read(pocket) as read:
        rolling(ours, VERSE)
        rolling(twice, VERSE)
    assert [row[:3].count(2) for row in read] == [1, 2]


def test_later_windows_have_a_bos_where_that_is_asked_for(
    pocket: gemma2.Gemma, saved: Path, ours: Any, hf_without_bos: Any
) -> None:
    ids = pocket.tokenizer.encode(VERSE, bos=False)
    short = harness.GemmaLM(pocket, max_length=12)
    assert rolling(short, VERSE) == rolling(over_transformers(saved, add_bos_token=False, max_length=12), VERSE)
    every = harness.GemmaLM(pocket, max_length=12, bos="every")
    with all_read(pocket) as read:
        (total,) = rolling(every, VERSE)
    assert len(read) == 3 and all(row[0] == 2 and row.count(2) == 1 and len(row) <= 12 for row in read)
    by_hand = pocket.score([[2, *ids[:11]], [2, *ids[10:22]], [2, *ids[len(ids) - 12 :]]])
    counted = [11, 11, len(ids) - 22]
    assert total == pytest.approx(
        sum(float(one.logprobs[-n:].sum()) for one, n in zip(by_hand, counted, strict=True)), abs=1e-3
    )
    assert every.get_model_info()["bos"] == "every"


def test_texts_beyond_the_context_lose_their_beginning_with_a_warning(
    pocket: gemma2.Gemma, saved: Path, ours: Any
) -> None:
    theirs, short = over_transformers(saved, max_length=16), harness.GemmaLM(pocket, max_length=16)
    asked = requests("loglikelihood", (VERSE, " And darkness"), ("And", " the king"))
    with pytest.warns(UserWarning, match=r"1 texts are too long for the 16 tokens .* loses its beginning, .* BOS too"):
        found = short.loglikelihood(asked)
    for mine, other in zip(found, theirs.loglikelihood(asked), strict=True):
        check_equal(mine, other)
    wrote = requests("generate_until", (VERSE, {"max_gen_toks": 6}), ("And", {"max_gen_toks": 4}))
    with pytest.warns(UserWarning, match="too long"), all_read(pocket) as read:
        assert short.generate_until(wrote) == theirs.generate_until(wrote)
    assert pocket.tokenizer.encode(VERSE)[-10:] in read  # room for 6 new tokens is left of 16, and no more
    every = harness.GemmaLM(pocket, max_length=16, bos="every")
    with pytest.warns(UserWarning, match="the BOS stays"), all_read(pocket) as read:
        every.loglikelihood(asked)
    assert [len(row) for row in read] == [16, 3] and all(row[0] == 2 for row in read)
    with pytest.raises(ContextOverflow, match=r"a continuation of .* the model reads 16 at once"):
        short.loglikelihood(requests("loglikelihood", ("And", VERSE)))


def test_empty_and_one_token_texts_have_answers(ours: Any, hf: Any) -> None:
    one = requests("loglikelihood", ("", "O"), ("And", " the"), ("  ", "O"), ("\n", "O"))
    for mine, theirs in zip(ours.loglikelihood(one), hf.loglikelihood(one), strict=True):
        check_equal(mine, theirs)
    with pytest.warns(UserWarning, match="no token"):  # which the hf model ends with an assertion
        assert ours.loglikelihood(requests("loglikelihood", ("", ""), ("And", ""), ("", "<bos>"))) == [(0.0, True)] * 3
    assert rolling(ours, "", "<bos>") == [0, 0]
    assert ours.loglikelihood([]) == ours.loglikelihood_rolling([]) == ours.generate_until([]) == []


def test_a_conversation_is_the_text_of_googles_template(ours: Any, hf: Any) -> None:
    talk = [{"role": "user", "content": " Who built the ark?\n"}, {"role": "assistant", "content": "Noah "}]
    more = [*talk, {"role": "user", "content": "Who slew Goliath?"}]
    assert ours.apply_chat_template(more) == hf.apply_chat_template(more)
    assert ours.apply_chat_template(talk, False) == hf.apply_chat_template(talk, False)
    with pytest.warns(UserWarning, match="no system role"):
        told = ours.apply_chat_template([{"role": "system", "content": "Be brief."}, *more])
    assert told == hf.apply_chat_template([{"role": "system", "content": "Be brief."}, *more])
    assert ours.tok_encode(told) == hf.tok_encode(told)
    assert ours.tok_encode(told).count(2) == 1
    assert ours.chat_template(True) and ours.chat_template(False) is None and ours.tokenizer_name


def test_batches_of_any_size_give_the_same_answers(pocket: gemma2.Gemma) -> None:
    asked = requests("loglikelihood", *PAIRS, *((a + " then", b) for a, b in PAIRS))
    wrote = requests("generate_until", *((a, {"until": "."}) for a, _ in PAIRS), ("Thus", {"max_gen_toks": 3}))
    found = [
        (model.loglikelihood(asked), model.generate_until(wrote))
        for model in (harness.GemmaLM(pocket, size) for size in ("auto", 1, 4))
    ]
    for scores, texts in found[1:]:
        assert texts == found[0][1]
        for mine, other in zip(scores, found[0][0], strict=True):
            check_equal(mine, other)


def test_the_batch_is_smaller_for_longer_texts_and_never_empty(pocket: gemma2.Gemma) -> None:
    model = harness.GemmaLM(pocket)
    rows = [model._rows(length) for length in (16, 1024)]
    assert rows[0] == harness.ROWS and 1 <= rows[1] <= rows[0]
    shape: Any = Shape("2b")
    real = harness.GemmaLM(gemma2.Gemma(shape, pocket.tokenizer))
    assert real._rows(8192) < real._rows(2048) < real._rows(256)
    assert real._rows(8192) >= 1


class Shape:
    """A model of which only the shape matters."""

    def __init__(self, size: str) -> None:
        self.config, self.device = gemma2.published_config(f"gemma-2-{size}"), torch.device("cpu")
        self.dtype = torch.bfloat16


def test_samples_follow_the_seed_and_the_options(ours: Any) -> None:
    options = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "max_gen_toks": 12, "num_beams": 1}

    def wrote(seed: int, **more: Any) -> Any:
        torch.manual_seed(seed)
        return ours.generate_until(requests("generate_until", ("And God said", options | more)))

    assert wrote(1) == wrote(1) != wrote(2)
    greedy = ours.generate_until(requests("generate_until", ("And God said", {"max_gen_toks": 12})))
    assert wrote(1, do_sample=False) == wrote(2, temperature=0.0) == greedy
    with pytest.raises(ValueError, match="no option num_beams"):
        wrote(1, num_beams=4)
    with pytest.raises(ValueError, match="max_gen_toks is 4000"):
        wrote(1, max_gen_toks=4000)


def test_a_question_asked_often_has_another_sample_each_time_in_any_batches(pocket: gemma2.Gemma) -> None:
    options = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    asked = requests("generate_until", *[("And God said", options)] * 6)
    for size in (1, 2, "auto"):
        torch.manual_seed(0)
        written = harness.GemmaLM(pocket, size).generate_until(asked)
        torch.manual_seed(0)
        assert len(set(written)) > 4 and harness.GemmaLM(pocket, size).generate_until(asked) == written


def test_arguments_that_cannot_be_are_refused(pocket: gemma2.Gemma) -> None:
    for options, said in (
        ({"bos": "twice"}, "bos must be once, every, hf"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_length": 1}, "max_length"),
        ({"max_length": 9999}, "more than the model's context of 1024"),
    ):
        with pytest.raises(ValueError, match=said):
            harness.GemmaLM(pocket, **options)


def test_answers_reach_the_harnesss_cache(ours: Any, tmp_path: Path) -> None:
    cached = needs("lm_eval.api.model").CachingLM(ours, str(tmp_path / "answers.db"))
    asked = requests("loglikelihood", *PAIRS)
    found = cached.loglikelihood(asked)
    with capture(ours.gemma, "blocks.0.hook_resid_pre") as seen:
        assert cached.loglikelihood(asked) == found
    assert not seen.passes
    ours.cache_hook.dbdict.close()


def test_each_answer_is_kept_as_soon_as_it_is_there(ours: Any) -> None:
    kept: list[tuple[str, Any, Any]] = []

    class Hook:
        def add_partial(self, kind: str, asked: Any, answer: Any) -> None:
            kept.append((kind, asked, answer))

    ours.set_cache_hook(Hook())
    for kind, arguments in (
        ("loglikelihood", PAIRS[0]),
        ("loglikelihood_rolling", ("And God said",)),
        ("generate_until", ("And God said", {"max_gen_toks": 3})),
    ):
        kept.clear()
        found = getattr(ours, kind)(requests(kind, arguments))
        assert kept == [(kind, arguments, found[0])]


assert os.environ["HF_HUB_OFFLINE"] == "1"
