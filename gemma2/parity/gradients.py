"""Gradients of another system: those of the mean next-token loss, by each weight, in the order of the backward pass.

They are judged as sites are: this model's gradients in float64 are the truth, and its own in the other system's dtype
say what rounding costs. A mistake in the backward pass of a part is in the gradients of that part's weights and of all
that the backward pass reaches later, so the first weight that differs says where to look. Where the forward pass
differs already, all of them do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma2.checkpoints.weights import shapes_of
from gemma2.config import Gemma2Config
from gemma2.parity.cases import AGREES, DIFFERS, Case
from gemma2.parity.compare import CHANCE, FLOOR, SIZE_FACTOR
from gemma2.parity.references import CannotDo, Reference
from gemma2.parity.references.gradients import gradients_of
from gemma2.parity.references.ourselves import Ourselves
from gemma2.tied import EMBEDDING

NAME = "gradients of the weights"
# The weights of a layer, last used first.
LAYER = (
    "post_feedforward_layernorm",
    "mlp.down_proj",
    "mlp.up_proj",
    "mlp.gate_proj",
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "self_attn.o_proj",
    "self_attn.v_proj",
    "self_attn.k_proj",
    "self_attn.q_proj",
    "input_layernorm",
)


@dataclass(frozen=True)
class GradientRow:
    """One weight.

    Attributes:
        relative: rms of the distance of the other system's gradient to the truth, by the truth's rms.
        own_relative: the same of ours in the other system's dtype; at least what one rounding leaves.
        bitwise: whether every bit equals ours.
        why: what is wrong beyond size: no gradient, one of another shape, or one that is not finite; else empty.
    """

    name: str
    relative: float
    own_relative: float
    bitwise: bool
    why: str = ""

    @property
    def ratio(self) -> float:
        """How many times the error that rounding explains: above 1 it is something else."""
        return math.inf if self.why else self.relative / self.own_relative / SIZE_FACTOR

    @property
    def differs(self) -> bool:
        return not self.ratio <= 1


def backward_order(config: Gemma2Config) -> list[str]:
    """Every weight in the order in which the backward pass reaches it; the embedding, which it reaches twice, last."""
    layers = reversed(range(config.num_hidden_layers))
    names = [f"model.layers.{i}.{part}.weight" for i in layers for part in LAYER]
    assert {"model.norm.weight", *names, EMBEDDING} == set(shapes_of(config))
    return ["model.norm.weight", *names, EMBEDDING]


def gradient_case(rows: Sequence[GradientRow]) -> Case:
    """What came of the comparison, in a line: the first weight that differs is named."""
    differing = [row for row in rows if row.differs]
    if not differing:
        same = sum(row.bitwise for row in rows)
        worst = max(rows, key=lambda row: row.ratio)
        return Case(NAME, AGREES, f"{len(rows)} weights, {same} of them with equal bits; at most {_said(worst)}")
    first = differing[0]
    return Case(NAME, DIFFERS, f"first at {first.name}: {_said(first)}; {len(differing)} of {len(rows)} weights differ")


def _said(row: GradientRow) -> str:
    return row.why or f"{row.ratio:.3g} times what rounding explains"


def compare_gradients(reference: Reference, ours: Ourselves, ids: Sequence[int]) -> list[GradientRow]:
    """A row for every weight, in the order of the backward pass.

    Raises:
        CannotDo: the reference shows no gradients, or there is no next token.
    """
    ask: Callable[[Sequence[int]], Mapping[str, Tensor | None]] | None = getattr(reference, "gradients", None)
    if ask is None:
        raise CannotDo(f"{reference.system} shows no gradients")
    if len(ids) < 2:
        raise CannotDo("one token id has no next one, and so no loss")
    other = ask(ids)
    tokens = torch.tensor([list(ids)], device=ours.model.device)
    truth = gradients_of(ours.model, tokens, dtype=torch.float64)
    own = gradients_of(ours.computing, tokens)
    floor = FLOOR[ours.dtype]
    return [_row(name, truth[name], own[name], other.get(name), floor) for name in backward_order(ours.config)]


def _row(name: str, truth: Tensor | None, own: Tensor | None, other: Tensor | None, floor: float) -> GradientRow:
    assert truth is not None and own is not None  # ours reaches every weight
    why = ""
    if other is None:
        why = "no gradient"
    elif other.shape != truth.shape:
        why = f"its gradient is {list(other.shape)}, ours {list(truth.shape)}"
    elif not other.isfinite().all():
        why = "its gradient is not finite"
    if other is None or why:
        return GradientRow(name, math.inf, math.nan, False, why)
    by_chance = 1 + CHANCE / math.sqrt(truth.numel())
    own_relative = max(_relative(own, truth), floor) * by_chance
    return GradientRow(name, _relative(other, truth), own_relative, torch.equal(own, other))


def _relative(one: Tensor, truth: Tensor) -> float:
    error, size = (x.double().square().mean().sqrt().item() for x in (one.double() - truth, truth))
    return error / (size or 1.0)
