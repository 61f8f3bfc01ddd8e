"""The cases that catch real bugs and that a short prompt in one pass does not: windows, caches, chunks, ragged batches,
magnitudes, scales and the order of layers. A case that a system cannot run says why, and counts for nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gemma2.config import LOCAL
from gemma2.errors import first_line
from gemma2.ops import softcap
from gemma2.parity.compare import MASKED, Values, compare, compare_end, first_difference, predicted
from gemma2.parity.references import CannotDo, Reference
from gemma2.parity.references.ourselves import Ourselves
from gemma2.parity.references.trace import Recorded

AGREES, DIFFERS, NOT_RUN = "agrees", "differs", "not run"
BEGINS, CONFIG = "begins with <bos>", "config"
ASIDE = ("max_position_embeddings",)  # it changes no value of a pass over so few positions
CHUNK = 7  # token ids of a chunk: no divisor of usual windows
# The scale is measured to this: bfloat16 over a short prompt is off by 0.4 %, and the mistakes seen are 6 % and more
# (27B scales by 144 ** -0.5 and not by 128 ** -0.5; 9B by 256 ** -0.5 and not by 224 ** -0.5).
SCALE_WITHIN = 0.02
CAP_WITHIN = 1.001  # times the cap: bfloat16's nearest number may lie above it
FAINT = 1e-4  # a probability below it says little of its score
CLEARLY = 4.0  # times better one of two explanations must be, in squares


@dataclass(frozen=True)
class Case:
    """What came of one case.

    Attributes:
        name: in words.
        outcome: "agrees", "differs" or "not run".
        detail: what was seen, or why it could not be.
    """

    name: str
    outcome: str
    detail: str


def run_cases(reference: Reference, ours: Ourselves, ids: Sequence[int], bos: int) -> Iterator[Case]:
    """Each case in turn, as it is done. `ours` is this model in the reference's dtype, `bos` the token id that texts
    begin with."""
    both = _Both(_Theirs(reference), ours, list(ids))
    cases: dict[str, Callable[[], tuple[bool, str]]] = {
        BEGINS: lambda: _begins(reference, ids, bos),
        CONFIG: lambda: _same_config(reference, ours),
        "prompt longer than the window": both.window,
        "layer order": both.layers,
        "query scale": both.scale,
        "magnitude of capped values": both.caps,
        "cached against uncached": both.cached,
        "chunked prefill": both.chunked,
        "ragged against solo": both.ragged,
    }
    for name, case in cases.items():
        try:
            agrees, detail = case()
        except (CannotDo, _TheyFailed) as reason:  # what was compared so far is not lost; an error of ours is raised
            yield Case(name, NOT_RUN, str(reason))
        else:
            yield Case(name, AGREES if agrees else DIFFERS, detail)


def _begins(reference: Reference, ids: Sequence[int], bos: int) -> tuple[bool, str]:
    if ids[0] == bos:
        return True, f"the first token id is {bos}"
    if not isinstance(reference, Recorded):
        raise CannotDo(f"both systems were given these token ids, which begin with {ids[0]} and not with {bos}")
    return False, f"the first token id is {ids[0]} and not {bos}, without which Gemma 2's predictions are worthless"


def _same_config(reference: Reference, ours: Ourselves) -> tuple[bool, str]:
    """As each system states them: a number may differ before any value shows it, as a window in a short prompt."""
    if isinstance(reference, Recorded) and not reference.states_config:
        raise CannotDo(f"{reference.system} states no config")
    stated, own = dataclasses.asdict(reference.config), dataclasses.asdict(ours.config)
    differ = [name for name in stated if stated[name] != own[name] and name not in ASIDE]
    said = [f"{name}: theirs {_short(stated[name])}, ours {_short(own[name])}" for name in differ[:3]]
    return not differ, "; ".join(said) or "every number equals ours"


def _short(value: object) -> str:
    return str(value) if len(str(value)) < 40 else f"{str(value)[:40]}..."


class _TheyFailed(Exception):
    """The other system failed at what it was asked for; the message says with what."""


class _Theirs:
    """The other system, so that a RuntimeError of its own code is told from one of ours."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self.system, self.sites = reference.system, reference.sites

    def run(self, ids: Sequence[int], sites: Iterable[str]) -> dict[str, Tensor]:
        with self._asked():
            return self._reference.run(ids, sites)

    def with_window(self, window: int) -> _Theirs:
        with self._asked():
            return _Theirs(self._reference.with_window(window))

    def cached(self, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        with self._asked():
            return self._reference.cached(ids, chunks)

    def batched(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        with self._asked():
            return self._reference.batched(rows)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except CannotDo:
            raise
        except RuntimeError as error:  # say about shapes
            said = first_line(error)
            raise _TheyFailed(f"{self.system} failed: {said}") from error


class _Both:
    """The two systems on the same token ids. What a cache, a chunk or a batch gets wrong often shows only past the
    window, so they run with a window that the prompt exceeds several times, where the reference can change its own."""

    def __init__(self, reference: _Theirs, ours: Ourselves, ids: list[int]) -> None:
        self.reference, self.ours, self.ids, self.config = reference, ours, ids, ours.config

    def window(self) -> tuple[bool, str]:
        reference, ours = self._past_the_window()
        other = reference.run(self.ids, reference.sites)
        first = first_difference(compare(ours.model, self.ids, other, ours.computing, self._truth))
        said = f"window {ours.config.sliding_window}, {len(self.ids)} token ids"
        if first is None:
            return True, said
        why = first.why or f"{first.ratio:.3g} times what rounding explains"
        return False, f"{said}: differs at {first.site}, {why}"

    def layers(self) -> tuple[bool, str]:
        """Which layers see only a window, by the keys that each one weighs, whatever a config says."""
        reference, ours = self._past_the_window()
        window, t, wanted = ours.config.sliding_window, len(self.ids), ours.config.layer_types
        scores, patterns = (
            [f"blocks.{i}.attn.{site}" for i in range(len(wanted))] for site in ("hook_attn_scores", "hook_pattern")
        )
        if reference.sites.issuperset(scores):
            seen = reference.run(self.ids, scores)
            for i, (name, kind) in enumerate(zip(scores, wanted, strict=True)):
                count = int((seen[name][:, -1] > MASKED).any(0).sum())
                if count != (window if kind == LOCAL else t):
                    return False, f"layer {i} sees {count} of {t} keys with window {window}, and ours is {kind}"
            return True, f"of {t} keys the last query sees {window} in local layers and all in the others"
        if not reference.sites.issuperset(patterns):
            raise CannotDo(f"{reference.system} shows neither scores nor patterns")
        # A probability may round to 0, so that only what is seen says something: a key beyond the window.
        seen, own = reference.run(self.ids, patterns), ours.run(self.ids, patterns)
        for i, (name, kind) in enumerate(zip(patterns, wanted, strict=True)):
            beyond, ours_beyond = (_farthest(x[name]) >= window for x in (seen, own))
            if beyond != ours_beyond:
                sees = "beyond" if beyond else "nothing beyond"
                return False, f"layer {i} sees {sees} the window of {window}, and ours is {kind}"
        return True, f"of {t} keys, those more than {window} back are seen in the layers where ours are"

    def scale(self) -> tuple[bool, str]:
        """The factor between q·k and the scores, measured in block 0."""
        raw, pattern = "blocks.0.attn.hook_scores_raw", "blocks.0.attn.hook_pattern"
        number, wanted = self.config.query_pre_attn_scalar, self.config.query_pre_attn_scalar**-0.5
        shown = [name for name in (raw, pattern) if name in self.reference.sites]
        if not shown:
            raise CannotDo(f"{self.reference.system} does not show queries, keys and scores")
        products, seen = self._products(shown)
        if raw in seen:
            causal = torch.ones(products.shape[-2:], dtype=torch.bool).tril()
            measured = _slope(products[:, causal], seen[raw][:, causal])
        else:
            capped = softcap(products * wanted, self.config.attn_logit_softcapping)
            measured = wanted * _slope(*_centred(capped, seen[pattern]))
        if not math.isfinite(measured):
            raise CannotDo("its queries, keys or scores are not finite, or all 0: nothing to measure it by")
        detail = f"scores are q·k times {measured:.5g}; {number:g} ** -0.5 is {wanted:.5g}"
        return abs(measured / wanted - 1) < SCALE_WITHIN, detail

    def _products(self, shown: list[str]) -> tuple[Tensor, Values]:
        """Of block 0: its queries times its keys [h t s], and what is shown there, in float64. Raises CannotDo."""
        q, k = "blocks.0.attn.hook_rot_q", "blocks.0.attn.hook_rot_k"
        if not self.reference.sites.issuperset((q, k)):
            raise CannotDo(f"{self.reference.system} does not show queries, keys and scores")
        seen = {name: value.double() for name, value in self.reference.run(self.ids, [q, k, *shown]).items()}
        keys = seen[k].repeat_interleave(self.config.num_attention_heads // self.config.num_key_value_heads, dim=1)
        return torch.einsum("thc,shc->hts", seen[q], keys), seen

    def caps(self) -> tuple[bool, str]:
        """No value is above its cap; where scores are not shown, the pattern says whether they were capped."""
        scores, pattern = "blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"
        limits = {"logits": self.config.final_logit_softcapping, scores: self.config.attn_logit_softcapping}
        shown = [name for name in limits if name in self.reference.sites]
        seen = self.reference.run(self.ids, shown)
        # What is not finite stays among them, and is beyond any cap.
        largest = {name: value[~(value < MASKED)].abs().max().item() for name, value in seen.items()}
        said = [f"|{name}| up to {found:.4g} of {limits[name]:g}" for name, found in largest.items()]
        agrees = all(found <= limits[name] * CAP_WITHIN for name, found in largest.items())
        if scores not in shown and pattern in self.reference.sites:
            try:
                uncapped = self._uncapped(pattern, limits[scores])
            except CannotDo:
                uncapped = None
            if uncapped is not None:
                said.append(f"scores are {'not ' if uncapped else ''}capped, as the pattern shows")
                agrees = agrees and not uncapped
        if not said:
            raise CannotDo(f"{self.reference.system} shows neither logits nor scores")
        return agrees, ", ".join(said)

    def _uncapped(self, pattern: str, cap: float) -> bool | None:
        """Whether scores without the cap explain block 0's pattern better than those with it; None if none does."""
        products, seen = self._products([pattern])
        scores = products * self.config.query_pre_attn_scalar**-0.5
        with_cap, without = (
            (x - y).square().mean().item()
            for x, y in (_centred(some, seen[pattern]) for some in (softcap(scores, cap), scores))
        )
        clear = max(with_cap, without) > CLEARLY * min(with_cap, without)
        return with_cap > without if clear else None

    def cached(self) -> tuple[bool, str]:
        half = len(self.ids) // 2
        return self._fed([half, *[1] * (len(self.ids) - half)], "half of the token ids, then one at a time")

    def chunked(self) -> tuple[bool, str]:
        whole, rest = divmod(len(self.ids), CHUNK)
        return self._fed([CHUNK] * whole + [rest] * bool(rest), f"{CHUNK} token ids at a time")

    def ragged(self) -> tuple[bool, str]:
        t = len(self.ids)
        rows = [self.ids, self.ids[: max(1, t // 3)], self.ids[: max(1, 2 * t // 3)]]
        said = f"rows of {', '.join(str(len(row)) for row in rows)} token ids"
        found = self._narrow[0].batched(rows)
        outcomes = [self._judged(logits, f"{said}; the row of {len(logits)}") for logits in found]
        return min(outcomes, key=lambda outcome: outcome[0])  # one that differs, if any does

    def _fed(self, chunks: list[int], said: str) -> tuple[bool, str]:
        if len(chunks) < 2 or chunks[0] < 1:
            raise CannotDo(f"{len(self.ids)} token ids are one pass")
        return self._judged(self._narrow[0].cached(self.ids, chunks), said)

    def _judged(self, logits: Tensor, said: str) -> tuple[bool, str]:
        """Logits of the first token ids. Later ones do not change them, so one pass serves rows of every length."""
        row = compare_end(self._truth["logits"][: len(logits)], self._own[: len(logits)], logits)
        window = f"window {self._narrow[1].config.sliding_window}"
        detail = row.why or f"logits {row.relative:.2e} from float64, ours {row.own_relative:.2e}"
        return not row.differs, f"{said}, {window}: {detail}"

    def _past_the_window(self) -> tuple[_Theirs, Ourselves]:
        """Raises CannotDo where the prompt fits in the window and the window cannot be made narrower."""
        reference, ours = self._narrow
        if len(self.ids) <= ours.config.sliding_window:
            raise CannotDo(self._fixed or f"{len(self.ids)} token ids do not exceed any window")
        return reference, ours

    @cached_property
    def _narrow(self) -> tuple[_Theirs, Ourselves]:
        """Both with the narrow window, or as they are where the reference cannot have another."""
        window = min(max(2, len(self.ids) // 4), self.config.sliding_window)
        self._fixed = ""
        try:
            return self.reference.with_window(window), self.ours.with_window(window)
        except CannotDo as reason:
            self._fixed = str(reason)
            return self.reference, self.ours

    @cached_property
    def _truth(self) -> Values:
        return predicted(self._narrow[1].model, self.ids)

    @cached_property
    def _own(self) -> Tensor:
        return self._narrow[1].run(self.ids, ["logits"])["logits"]


def _slope(x: Tensor, y: Tensor) -> float:
    """The least-squares factor from x to y; NaN where x is 0."""
    return ((x * y).sum() / x.square().sum()).item()


def _centred(scores: Tensor, pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [h t s], and the logarithms of the pattern, which are equal if the pattern is their softmax: that leaves
    the mean of a row open, so both are taken about it, and faint probabilities left out."""
    seen = pattern > FAINT

    def centred(x: Tensor) -> Tensor:
        x = x.masked_fill(~seen, 0.0)
        return (x - x.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)).masked_fill(~seen, 0.0)

    return centred(scores), centred(pattern.clamp_min(FAINT).log())


def _farthest(pattern: Tensor) -> int:
    """How many positions back from its query the farthest key lies that any head weighs, in [h t s]."""
    query, key = (pattern > 0).any(0).nonzero(as_tuple=True)
    return int((query - key).max())
