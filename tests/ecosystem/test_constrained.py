"""Constrained decoding: a processor bans, with -inf, what a grammar does not allow next."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor

import gemma2
from gemma2.feed import Processor
from gemma2.generate import generate_ids
from gemma2.research import capture
from tests.ecosystem.conftest import needs

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
REGEX = "(king|queen) of [a-z]{3,8}, [0-9]{2,4} years"
PROMPT = "And the king said"


def pieces(tokenizer: gemma2.Tokenizer) -> list[str]:
    """The vocabulary in the order of ids, as SentencePiece spells it: a space is U+2581, a byte <0x0A>."""
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.to_proto())
    return [model.id_to_piece(i) for i in range(len(tokenizer))]


def constrained(accept: Callable[[int], object], mask: Callable[[Tensor], None]) -> Processor:
    """A processor of one row: `accept` is told of each new id, `mask` bans ids in logits [1 v] in place."""
    prompt = 0

    def process(ids: Tensor, logits: Tensor) -> Tensor:
        nonlocal prompt
        if prompt:
            accept(int(ids[0, -1]))
        prompt = prompt or ids.shape[1]
        mask(logits)
        return logits

    return process


def xgrammar_processor(tokenizer: gemma2.Tokenizer, schema: dict[str, Any]) -> Processor:
    xgrammar = needs("xgrammar")
    info = xgrammar.TokenizerInfo(
        pieces(tokenizer), xgrammar.VocabType.BYTE_FALLBACK, stop_token_ids=[tokenizer.special["eos"]]
    )
    grammar = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(schema), any_whitespace=False)
    matcher = xgrammar.GrammarMatcher(grammar)
    bits = xgrammar.allocate_token_bitmask(1, len(tokenizer))

    def mask(logits: Tensor) -> None:
        matcher.fill_next_token_bitmask(bits)
        xgrammar.apply_token_bitmask_inplace(logits, bits)

    return constrained(matcher.accept_token, mask)


class ForLLGuidance:
    """The tokenizer as llguidance asks for it: every id's bytes, and which ids have none."""

    def __init__(self, tokenizer: gemma2.Tokenizer) -> None:
        self.tokenizer, spelled = tokenizer, pieces(tokenizer)
        self.eos_token_id, self.bos_token_id = tokenizer.special["eos"], tokenizer.special["bos"]
        self.special_token_ids = [i for i, piece in enumerate(spelled) if re.fullmatch("<[a-z_]+>", piece)]
        self.tokens = [
            bytes([int(piece[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", piece) else piece.replace("▁", " ").encode()
            for piece in spelled
        ]

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False)


def llguidance_processor(tokenizer: gemma2.Tokenizer, regex: str) -> Processor:
    llguidance, numpy = needs("llguidance"), needs("llguidance.numpy")

    known = llguidance.LLTokenizer(llguidance.TokenizerWrapper(ForLLGuidance(tokenizer)))
    matcher = llguidance.LLMatcher(known, llguidance.LLMatcher.grammar_from_regex(regex))
    bits = numpy.allocate_token_bitmask(1, len(tokenizer))

    def mask(logits: Tensor) -> None:
        numpy.fill_next_token_bitmask(matcher, bits)
        numpy.apply_token_bitmask_inplace(logits.numpy(), bits)

    return constrained(matcher.consume_token, mask)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_xgrammar_makes_the_model_write_json_of_a_schema(temperature: float, pocket: gemma2.Gemma) -> None:
    processor = xgrammar_processor(pocket.tokenizer, SCHEMA)
    found = json.loads(pocket.generate(PROMPT, 60, temperature=temperature, seed=0, processors=[processor]))
    assert set(found) == {"name", "age"} and 0 <= found["age"] <= 99 and len(found["name"]) <= 12


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_llguidance_makes_the_model_obey_a_regular_expression(temperature: float, pocket: gemma2.Gemma) -> None:
    processor = llguidance_processor(pocket.tokenizer, REGEX)
    text = pocket.generate(PROMPT, 60, temperature=temperature, seed=0, processors=[processor])
    assert re.fullmatch(REGEX, text)


def test_a_grammar_bans_with_minus_infinity_and_that_is_no_fault(pocket: gemma2.Gemma) -> None:
    seen: list[Tensor] = []

    def see(ids: Tensor, logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits

    processor = xgrammar_processor(pocket.tokenizer, SCHEMA)
    prompt = pocket.tokenizer.encode(PROMPT)
    made = [row[0] for row in generate_ids(pocket.model, [prompt], 8, processors=[processor, see])]
    assert pocket.tokenizer.decode(made).startswith('{"name"')
    assert all(bool(torch.isneginf(logits).any()) for logits in seen)


def test_a_mask_written_in_place_leaves_the_logits_that_a_hook_has_seen(pocket: gemma2.Gemma) -> None:
    prompt = pocket.tokenizer.encode(PROMPT)
    with capture(pocket, "logits") as plain:
        list(generate_ids(pocket.model, [prompt], 1))
    with capture(pocket, "logits") as seen:
        list(generate_ids(pocket.model, [prompt], 1, processors=[xgrammar_processor(pocket.tokenizer, SCHEMA)]))
    assert torch.equal(seen["logits"], plain["logits"])
