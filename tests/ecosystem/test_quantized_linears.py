"""bitsandbytes on the CPU and optimum-quanto: linears of fewer bits in the places of ours."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gemma2
from gemma2.research import capture
from gemma2.research.sites import chosen
from gemma2.twins import on, replaced
from tests.ecosystem.conftest import needs

TEXT = "And it came to pass in those days, that the king sent unto him, and said, Behold, I am here before thee."


def bitsandbytes_linear(kind: str) -> Any:
    """A function from a linear to its twin with 8 or 4 bits. The weights are copied: bitsandbytes' own replacement is
    made for a model that is still to be loaded."""
    bnb = needs("bitsandbytes")

    def twin(linear: nn.Linear) -> nn.Module:
        weight = linear.weight.detach().clone()
        sizes = (linear.in_features, linear.out_features)
        if kind == "int8":
            made = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(*sizes, bias=False, quant_type=kind, compute_dtype=torch.float32)
            made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind)
        return made.to("cpu")

    return twin


def nats(model: gemma2.Gemma2, tokens: torch.Tensor) -> float:
    return F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:]).item()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("nf4", 0.2), ("fp4", 0.3)])
@torch.no_grad()
def test_linears_of_bitsandbytes_cost_little_and_show_every_site(kind: str, most: float, pocket: gemma2.Gemma) -> None:
    tokens = torch.tensor([pocket.tokenizer.encode(TEXT)])
    plain = nats(pocket.model, tokens)
    with replaced(copy.deepcopy(pocket.model), on(nn.Linear, bitsandbytes_linear(kind))) as model:
        assert 0 < abs(nats(model, tokens) - plain) < most
        with capture(model) as seen:
            model(tokens)
        assert seen.keys() == chosen(pocket.config).keys()
        assert len(gemma2.Gemma(model, pocket.tokenizer).generate("And God said", 8)) > 0


@torch.no_grad()
def test_linears_of_quanto_cost_little_and_show_every_site(pocket: gemma2.Gemma) -> None:
    quanto = needs("optimum.quanto")
    tokens = torch.tensor([pocket.tokenizer.encode(TEXT)])
    model = copy.deepcopy(pocket.model)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    assert 0 < abs(nats(model, tokens) - nats(pocket.model, tokens)) < 0.02
    with capture(model) as seen:
        model(tokens)
    assert seen.keys() == chosen(pocket.config).keys()
