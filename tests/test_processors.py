"""Processors change the logits before an id is chosen: transformers' own give here what they give there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2.feed import Processor
from gemma2.generate import generate_ids

transformers = pytest.importorskip("transformers")

PROMPTS = ["In the beginning", "And the king said unto him, Behold, I"]
NEW = 40
EOS = 1


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pocket model in transformers, from a folder that `convert` wrote."""
    folder = gemma2.convert("pocket", tmp_path_factory.mktemp("pocket") / "folder", type="f32", progress=False).path
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    model.generation_config.eos_token_id = None  # nothing ends a row, unless a test says what does
    return model.eval()


def written(gemma: gemma2.Gemma, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    steps = list(generate_ids(gemma.model, prompts, NEW, **options))
    return [list(row) for row in zip(*steps, strict=True)]


def written_there(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """The new ids of transformers' own greedy `generate`; rows that ended are filled up with id 0."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    out: Tensor = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=0, **options
    )
    return out[:, width:].tolist()


def cases(often: list[int]) -> dict[str, tuple[list[Processor], dict[str, Any]]]:
    """Processors by hand, and the options from which transformers makes its own; `often` are ids that would be used."""
    ngram, suppress = transformers.NoRepeatNGramLogitsProcessor, transformers.SuppressTokensLogitsProcessor
    bias = [[[token], -3.0] for token in often[:2]] + [[often[2:4], 4.0]]
    return {
        "no n-gram twice": ([ngram(2)], {"no_repeat_ngram_size": 2}),
        "ids suppressed": ([suppress(often)], {"suppress_tokens": often}),
        "sequences biased": ([transformers.SequenceBiasLogitsProcessor(bias)], {"sequence_bias": bias}),
        "two in turn": ([ngram(3), suppress(often)], {"no_repeat_ngram_size": 3, "suppress_tokens": often}),
    }


@pytest.mark.long
@pytest.mark.parametrize("case", cases([1, 2, 3, 4]))
def test_processors_of_transformers_give_the_ids_of_its_own_generate(
    case: str, pocket: gemma2.Gemma, theirs: Any
) -> None:
    prompts = [pocket.tokenizer.encode(text) for text in PROMPTS]  # of unequal length: one is padded
    plain = written(pocket, prompts)
    assert written_there(theirs, prompts) == plain
    processors, options = cases([row[step] for step in (2, 3) for row in plain])[case]
    found = written(pocket, prompts, processors=processors)
    assert found == written_there(theirs, prompts, **options)
    assert all(row != before for row, before in zip(found, plain, strict=True)), "the processors change every row"


def test_a_least_length_bans_the_end_for_as_many_tokens_as_there(pocket: gemma2.Gemma, theirs: Any) -> None:
    prompt = pocket.tokenizer.encode(PROMPTS[0])
    end = written(pocket, [prompt])[0][4]  # taken for the id that ends a text, so that there is one early on
    ban = transformers.MinNewTokensLengthLogitsProcessor(len(prompt), 20, end, device=torch.device("cpu"))
    (found,) = written(pocket, [prompt], processors=[ban])
    (expected,) = written_there(theirs, [prompt], eos_token_id=end, min_new_tokens=20)
    assert end not in found[:20] and len(expected) >= 20
    assert found[: len(expected)] == expected


def test_a_text_takes_processors_too(pocket: gemma2.Gemma, theirs: Any) -> None:
    prompt = pocket.tokenizer.encode(PROMPTS[0])
    ban = transformers.NoRepeatNGramLogitsProcessor(2)
    text = pocket.generate(PROMPTS[0], NEW, processors=[ban])
    (expected,) = written_there(theirs, [prompt], no_repeat_ngram_size=2, eos_token_id=EOS)
    assert text == pocket.tokenizer.decode(expected)
