"""The verdict: whether another system computes this Gemma 2, and if not, where it first differs and by how much."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gemma2.checkpoints.checkpoint import Checkpoint
from gemma2.checkpoints.dtypes import dtype_name
from gemma2.errors import BadModelFile, ContextOverflow, NonFiniteError
from gemma2.numerics import PROFILES, with_numerics
from gemma2.parity.cases import BEGINS, DIFFERS, NOT_RUN, Case, run_cases
from gemma2.parity.compare import LogitsRow, Row, compare, compare_logits, first_difference, observed, predicted
from gemma2.parity.gradients import NAME, GradientRow, compare_gradients, gradient_case
from gemma2.parity.references import CannotDo, Reference
from gemma2.parity.references.ourselves import Ourselves
from gemma2.research.sites import chosen
from gemma2.strict_json import finite

EQUAL, ROUNDING, DIFFERENCE = "equal to the bit", "rounding", "difference"
IDS = "token ids"
OURS = "transformers"  # the profile without changes


@dataclass(frozen=True)
class Judgement:
    """What came of comparing this model with another system.

    Attributes:
        model: which one is ours.
        system, dtype: the other one.
        numerics: the profile that our side computed with, if any.
        text: where the token ids are from, as "of Genesis 1".
        tokens: how many token ids.
        sites: how many sites the model has; `rows` has those that were compared.
        rows: a site each, in the order of computation.
        logits: what the difference means for predictions; None where the other system shows none.
        cases: what else was tried.
        gradients: a weight each, in the order of the backward pass, where they were asked for.
    """

    model: str
    system: str
    dtype: str
    numerics: str | None
    text: str
    tokens: int
    sites: int
    rows: list[Row]
    logits: LogitsRow | None
    cases: list[Case]
    gradients: list[GradientRow] = dataclasses.field(default_factory=list)

    @property
    def first(self) -> str | None:
        """Where the systems first differ: a site, or the token ids themselves."""
        if any(case.name == BEGINS and case.outcome == DIFFERS for case in self.cases):
            return IDS
        first = first_difference(self.rows)
        return None if first is None else first.site

    @property
    def verdict(self) -> str:
        """ "equal to the bit", "rounding" or "difference"."""
        if self.first is not None or any(case.outcome == DIFFERS for case in self.cases):
            return DIFFERENCE
        return EQUAL if all(row.bitwise for row in self.rows) else ROUNDING

    def to_dict(self) -> dict[str, Any]:
        """For machines; what is not finite is None."""
        rows = [dataclasses.asdict(row) | {"ratio": row.ratio, "differs": row.differs} for row in self.rows]
        gradients = [dataclasses.asdict(row) | {"ratio": row.ratio, "differs": row.differs} for row in self.gradients]
        said = {"rows": rows, "gradients": gradients, "first": self.first, "verdict": self.verdict}
        plain: dict[str, Any] = finite(dataclasses.asdict(self) | said)
        return plain


def judge(
    reference: Reference,
    opened: Checkpoint,
    ids: Sequence[int],
    sites: Iterable[str] | str = "*",
    *,
    numerics: str | None = None,
    cases: bool = True,
    gradients: bool = False,
    model: str = "",
    text: str = "",
    tell: Callable[[str], object] = lambda what: None,
) -> Judgement:
    """Compare the model of a checkpoint with a reference that has the same weights, on the same token ids.

    Args:
        sites: patterns; of those that the reference shows, all are judged.
        numerics: compute our side with this profile's arithmetic, so that what is documented of the other system
            counts as rounding.
        cases: also run those of `cases.py`.
        gradients: also compare the gradient of every weight, as one more case.
        model, text: what to call the model and the text in the result; default the checkpoint's path, and nothing.
        tell: called with what is being done.
    Raises:
        BadModelFile: the reference shows none of the sites.
        ContextOverflow, ValueError: token ids that the reference does not take.
    """
    wanted = [name for name in chosen(opened.config, sites) if name in reference.sites]
    if not wanted:
        raise BadModelFile(f"{reference.system} shows none of the sites asked for; it has {len(reference.sites)}")
    given = _checked(ids, opened)
    tell(reference.system)
    other = reference.run(given, wanted)
    tell("comparing")
    ours = Ourselves(opened, reference.dtype, numerics=numerics, storage=reference.storage)
    truth = predicted(ours.model, given)
    rows = compare(ours.model, given, other, ours.computing, truth)
    logits = compare_logits(truth["logits"], other["logits"]) if "logits" in other else None
    done: list[Case] = []
    if cases:
        for case in run_cases(reference, ours, given, opened.tokenizer.special["bos"]):
            tell(f"{case.name}: {case.outcome}")
            done.append(case)
    by_weight: list[GradientRow] = []
    if gradients:
        tell(NAME)
        try:
            by_weight = compare_gradients(reference, ours, given)
            done.append(gradient_case(by_weight))
        except CannotDo as reason:
            done.append(Case(NAME, NOT_RUN, str(reason)))
    dtype = dtype_name(reference.dtype)
    count = len(chosen(opened.config))
    named = model or str(opened.path)
    return Judgement(named, reference.system, dtype, numerics, text, len(given), count, rows, logits, done, by_weight)


def _checked(ids: Sequence[int], opened: Checkpoint) -> list[int]:
    """Raises ContextOverflow for more token ids than the model's context. Each system checks the ids themselves."""
    context = opened.config.max_position_embeddings
    if len(ids) > context:
        raise ContextOverflow(f"{len(ids):,} token ids exceed the model's context of {context:,}")
    return list(ids)


@dataclass(frozen=True)
class Step:
    """One change on the way from one arithmetic to another.

    Attributes:
        change: the one that was added to all before it, "gemma_pytorch rope_mul=float32", or after a "-" taken away; ""
            at the start.
        about: in words.
        distance: rms of our logits' distance to the other system's.
        closed: by how much of the first distance the gap became smaller with this change.
        bitwise: how many of the `sites` equal the other system's in every bit.
    """

    change: str
    about: str
    distance: float
    closed: float
    bitwise: int
    sites: int


def explain(
    reference: Reference, opened: Checkpoint, ids: Sequence[int], profile: str, start: str = OURS
) -> list[Step]:
    """Walk from one profile's arithmetic to another's, a change at a time, and measure how much of the distance to a
    reference each explains. The changes of `start` are taken away first, the last one first, until none is left.

    Raises:
        ValueError: an unknown profile, or one that does not compute in the reference's dtype.
        BadModelFile: the reference shows no logits.
        ContextOverflow: more token ids than a context.
        NonFiniteError: logits that are not finite, from which nothing has a distance.
    """
    for name in (profile, start):
        if name not in PROFILES:
            raise ValueError(f"numerics {name!r} is not one of {', '.join(PROFILES)}")
    if "logits" not in reference.sites:
        raise BadModelFile(f"{reference.system} shows no logits, by which the gap is measured")
    given = _checked(ids, opened)
    names = [name for name in chosen(opened.config) if name in reference.sites]
    other = reference.run(given, names)
    ours = Ourselves(opened, reference.dtype, storage=reference.storage)
    steps: list[Step] = []
    for label, about, way, changes in _walk(start, profile):
        own = observed(with_numerics(ours.model, way, changes, ours.storage), given, names)
        apart = own["logits"][-len(other["logits"]) :].double() - other["logits"].double()
        distance = apart.square().mean().sqrt().item()
        if not math.isfinite(distance):
            raise NonFiniteError(f"logits of {reference.system} or of ours are not finite: run without --explain")
        first = steps[0].distance if steps else distance
        closed = (steps[-1].distance - distance) / first if steps and first else 0.0
        same = sum(_same(own[name], other[name]) for name in names)
        steps.append(Step(label, about, distance, closed, same, len(names)))
    return steps


def _walk(start: str, end: str) -> Iterator[tuple[str, str, str, list[str]]]:
    """Each step: the change, in words, and the profile and changes to compute with then."""
    first, last = PROFILES[start], PROFILES[end]
    yield "", "", start, [change.name for change in first]
    for count in reversed(range(len(first))):
        yield f"- {start} {first[count].name}", first[count].about, start, [change.name for change in first[:count]]
    for count, change in enumerate(last, 1):
        yield f"{end} {change.name}", change.about, end, [change.name for change in last[:count]]


def _same(own: Tensor, other: Tensor) -> bool:
    return own.shape == other.shape and bool((own == other).all())
