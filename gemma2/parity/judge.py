"""The verdict: whether another system computes this Gemma 2, where it parts from it, and by how much."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gemma2.checkpoints.checkpoint import Checkpoint
from gemma2.checkpoints.gguf_weights import GGUFWeights
from gemma2.errors import BadModelFile
from gemma2.parity.cases import DIFFERS, Case, run_cases
from gemma2.parity.compare import LogitsRow, Row, compare, compare_logits, first_to_part, observed, predicted_alone
from gemma2.parity.numerics import PROFILES, with_numerics
from gemma2.parity.references import Reference
from gemma2.parity.references.ourselves import Ourselves
from gemma2.research.sites import chosen

EQUAL, ROUNDING, DIFFERENCE = "equal to the bit", "rounding", "difference"
IDS = "ids"


@dataclass(frozen=True)
class Judgement:
    """What came of holding this model against another.

    Attributes:
        system, dtype: the other one.
        numerics: the profile that the yardstick computed with, if any.
        ids: how many.
        rows: a site each, in the order of computation.
        logits: what the difference means for predictions; None where the other system shows none.
        cases: what else was tried.
    """

    system: str
    dtype: str
    numerics: str | None
    ids: int
    rows: list[Row]
    logits: LogitsRow | None
    cases: list[Case]

    @property
    def first(self) -> str | None:
        """Where the systems part first: a site, or the ids themselves."""
        if any(case.name == "begins with <bos>" and case.outcome == DIFFERS for case in self.cases):
            return IDS
        parting = first_to_part(self.rows)
        return None if parting is None else parting.site

    @property
    def verdict(self) -> str:
        """ "equal to the bit", "rounding" or "difference"."""
        if self.first is not None or any(case.outcome == DIFFERS for case in self.cases):
            return DIFFERENCE
        return EQUAL if all(row.bitwise for row in self.rows) else ROUNDING

    def to_dict(self) -> dict[str, Any]:
        """For machines; infinite ratios are null."""
        rows = [dataclasses.asdict(row) | {"ratio": _plain(row.ratio), "parts": row.parts} for row in self.rows]
        return dataclasses.asdict(self) | {"rows": rows, "first": self.first, "verdict": self.verdict}


def judge(
    reference: Reference,
    opened: Checkpoint,
    ids: Sequence[int],
    sites: Iterable[str] | str = "*",
    *,
    numerics: str | None = None,
    cases: bool = True,
    tell: Callable[[str], object] = lambda what: None,
) -> Judgement:
    """Hold the model of a checkpoint against a reference with the same weights, on the same ids.

    Args:
        sites: patterns; of those that the reference shows, all are judged.
        numerics: take this profile's arithmetic as the yardstick, so that what is documented of the other system
            counts as rounding.
        cases: also run those of `cases.py`.
        tell: called with what is being done.
    Raises:
        BadModelFile: the reference shows none of the sites.
        ContextOverflow, ValueError: ids that the reference does not take.
    """
    wanted = [name for name in chosen(opened.config, sites) if name in reference.sites]
    if not wanted:
        raise BadModelFile(f"{reference.system} shows none of the sites asked for; it has {len(reference.sites)}")
    tell("ours")
    ours = Ourselves(opened, reference.dtype)
    kinds = _kinds(opened)
    theirs = with_numerics(ours.model, numerics, kinds=kinds) if numerics else None
    tell(reference.system)
    other = reference.run(ids, wanted)
    tell("comparing")
    rows = compare(ours.model, list(ids), other, theirs)
    logits = None
    if "logits" in other:
        logits = compare_logits(predicted_alone(ours.model, list(ids), "logits"), other["logits"])
    done: list[Case] = []
    if cases:
        for case in run_cases(reference, ours, ids, opened.tokenizer.special["bos"]):
            tell(case.name)
            done.append(case)
    dtype = str(reference.dtype).removeprefix("torch.")
    return Judgement(reference.system, dtype, numerics, len(ids), rows, logits, done)


@dataclass(frozen=True)
class Step:
    """One bit on the way from our arithmetic to another's.

    Attributes:
        bit, about: the bit that was added to all before it; "" at the start.
        distance: rms of our logits' distance to the other system's.
        closed: by how much of the first distance the gap became smaller with this bit.
        bitwise: sites, of so many, that have the other system's bits.
    """

    bit: str
    about: str
    distance: float
    closed: float
    bitwise: int
    sites: int


def explain(reference: Reference, opened: Checkpoint, ids: Sequence[int], profile: str) -> list[Step]:
    """Walk from our arithmetic to a profile's, a bit at a time, and see how much of the gap each closes.

    Raises:
        ValueError: an unknown profile.
        BadModelFile: the reference shows no logits.
    """
    if profile not in PROFILES:
        raise ValueError(f"numerics {profile!r} is not one of {', '.join(PROFILES)}")
    if "logits" not in reference.sites:
        raise BadModelFile(f"{reference.system} shows no logits, by which the gap is measured")
    ours = Ourselves(opened, reference.dtype)
    kinds = _kinds(opened)
    names = [name for name in chosen(opened.config) if name in reference.sites]
    other = reference.run(ids, names)
    steps: list[Step] = []
    applied: list[str] = []
    for bit in (None, *PROFILES[profile]):
        applied += [bit.name] if bit else []
        own = observed(with_numerics(ours.model, profile, applied, kinds), list(ids), names)
        apart = own["logits"][-len(other["logits"]) :].double() - other["logits"].double()
        distance = apart.square().mean().sqrt().item()
        same = sum(bool((own[name] == other[name]).all()) for name in names if own[name].shape == other[name].shape)
        start = steps[0].distance if steps else distance
        closed = (steps[-1].distance - distance) / start if steps and start else 0.0
        steps.append(Step(bit.name if bit else "", bit.about if bit else "", distance, closed, same, len(names)))
    return steps


def _kinds(opened: Checkpoint) -> dict[str, str] | None:
    """In which ggml type each tensor is stored, which llama.cpp's arithmetic depends on."""
    if not isinstance(opened.weights, GGUFWeights):
        return None
    return {name: opened.weights.stored(name).kind.name for name in opened.weights.tensors}


def _plain(number: float) -> float | None:
    return number if number < float("inf") else None
