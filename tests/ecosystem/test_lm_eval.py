"""lm-evaluation-harness: its class for transformers' models, over the face."""

from __future__ import annotations

from typing import Any

from tests.ecosystem.conftest import needs

huggingface, api = needs("lm_eval.models.huggingface"), needs("lm_eval.api.instance")

PAIRS = [("And God said", " unto him"), ("In the beginning", " God created the heaven"), ("And", " the king")]


def answers(model: Any, tokenizer: Any) -> tuple[list[Any], list[str]]:
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    scored = [api.Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
    options = {"until": ["."], "max_gen_toks": 12}
    written = [api.Instance("generate_until", {}, (prompt, options), n) for n, (prompt, _) in enumerate(PAIRS)]
    return harness.loglikelihood(scored), harness.generate_until(written)


def test_likelihoods_and_texts_are_those_over_transformers_own_model(
    face: Any, theirs: Any, their_tokenizer: Any
) -> None:
    scores, texts = answers(face, their_tokenizer)
    assert (scores, texts) == answers(theirs, their_tokenizer)
    assert len({score for score, _ in scores}) == 3 and all(texts)
