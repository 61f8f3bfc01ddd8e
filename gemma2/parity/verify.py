"""One model computed in pairs of ways that must agree, measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemma2.cache import HybridCache
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile, ContextOverflow, first_line
from gemma2.fast.static import StaticCache
from gemma2.fast.step import compiled_step
from gemma2.model import Gemma2
from gemma2.parity.invariance import NothingSeen, fed_and_whole, slot_and_alone
from gemma2.parity.tolerances import TOLERANCES
from gemma2.tokens import left_padded
from gemma2.twins import sharing

LENGTH, SHORTEST = 192, 16  # token ids of the prompt
Saved = Mapping[str, Callable[[], Gemma2]]  # how it was saved -> saves the model there, and loads it


class CannotRun(Exception):
    """A check that this machine or model does not allow; the message says why."""


@dataclass(frozen=True)
class Check:
    """One pair of ways.

    Attributes:
        name, what: in words.
        distance: largest absolute difference of a logit; None where it could not run, NaN where one was computed.
        allowed: the most it may be.
        bitwise: whether every bit was equal.
        why_not: why it could not run, else "".
    """

    name: str
    what: str
    distance: float | None
    allowed: float
    bitwise: bool
    seconds: float
    why_not: str = ""

    @property
    def passed(self) -> bool | None:
        """None where it could not run."""
        return None if self.distance is None else self.distance <= self.allowed

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        found = {name: None if value != value else value for name, value in asdict(self).items()}
        return {**found, "passed": self.passed}


def narrowed(model: Gemma2, length: int) -> Gemma2:
    """A model with the same parameters whose window is at most two thirds of a prompt, so that the prompt leaves it."""
    window = min(model.config.sliding_window, 2 * length // 3)
    return sharing(model, replace(model.config, sliding_window=window)).eval()


def check_length(config: Gemma2Config, length: int) -> None:
    """Raises ContextOverflow or ValueError for a prompt that `verify` does not take."""
    if length > config.max_position_embeddings:
        raise ContextOverflow(f"{length:,} token ids exceed the context of {config.max_position_embeddings:,}")
    if length < SHORTEST:
        raise ValueError(f"a prompt of {length} token ids is too short to leave a window: give at least {SHORTEST}")


def verify(
    model: Gemma2, saved: Saved | None = None, *, compiled: bool = True, length: int = LENGTH
) -> Iterator[Check]:
    """Run the checks, one by one.

    Args:
        model: in the dtype and on the device to be certified.
        saved: ways to save and load it.
        compiled: whether to run the two that compile.
        length: of the prompt; the window is narrowed to leave some of it outside.
    Raises:
        ContextOverflow, ValueError: as `check_length`.
    """
    check_length(model.config, length)
    subject = _Subject(narrowed(model, length), length)
    yield subject.check("batch = solo", "three rows of unequal length, padded on the left", subject.batched)
    yield subject.check("cached = uncached", "token by token as the ring of the local layers fills", subject.cached)
    yield subject.check("chunked = whole", "a cache fed a quarter of the prompt at a time", subject.chunked)
    run = subject.compiled if compiled else _refusing("left out, as asked")
    yield subject.check("compiled = eager", "torch.compile", run)
    run = subject.decoded if compiled else _refusing("left out, as asked")
    yield subject.check("compiled decoding", "one graph for every token as the ring fills and wraps", run)
    yield subject.check("device = CPU", "an accelerator and the CPU", subject.elsewhere)
    for how, load in (saved or {}).items():
        yield subject.check("save = load", how, lambda load=load: subject.reloaded(load), exact=True)  # type: ignore[misc]
    what = 'numerics="batch-invariant", two layers'
    yield subject.check("slot 7 = alone", f"{what}: a row in a batch of 32", subject.slot, exact=True)
    yield subject.check("decode = prefill", f"{what}: token by token through the ring's wrap", subject.same, exact=True)


class _Subject:
    """A model, a prompt and the logits of one plain pass over it; each method computes a pair that must agree."""

    def __init__(self, model: Gemma2, length: int) -> None:
        self.model, self.length = model, length
        self.device, self.dtype = model.device, model.dtype
        ids = torch.randint(
            model.config.vocab_size, (length,), device="cpu", generator=torch.Generator().manual_seed(0)
        )
        self.ids = ids.to(self.device)
        self.whole = self._logits(model, self.ids)
        largest = self.whole.abs().max().item()
        self.allowed = TOLERANCES[self.dtype].allowed(largest)

    def check(self, name: str, what: str, pair: Callable[[], tuple[Tensor, Tensor]], exact: bool = False) -> Check:
        started, allowed = time.perf_counter(), 0.0 if exact else self.allowed
        try:
            found, expected = pair()
        except CannotRun as error:
            return Check(name, what, None, allowed, False, time.perf_counter() - started, str(error))
        distance = (found.double() - expected.double()).abs().max().item()
        return Check(name, what, distance, allowed, torch.equal(found, expected), time.perf_counter() - started)

    def batched(self) -> tuple[Tensor, Tensor]:
        ids = self.ids.tolist()
        rows = [ids, ids[: 3 * self.length // 4], ids[-self.length // 8 :]]
        tokens, positions = left_padded(rows, self.device)
        with torch.no_grad():
            batch = self.model(tokens, positions)
        found = [logits[-len(row) :] for logits, row in zip(batch, rows, strict=True)]
        solo = [self._logits(self.model, torch.tensor(row, device=self.device)) for row in rows]
        return torch.cat(found).cpu(), torch.cat(solo).cpu()

    def cached(self) -> tuple[Tensor, Tensor]:
        return self._fed(self._through_the_wrap())

    def chunked(self) -> tuple[Tensor, Tensor]:
        part = self.length // 4 - 1
        return self._fed([part] * (self.length // part) + [self.length % part])

    def compiled(self) -> tuple[Tensor, Tensor]:
        twin = narrowed(self.model, self.length)  # what is compiled keeps traces of it
        try:
            return self._logits(torch.compile(twin, dynamic=False), self.ids), self.whole
        except Exception as error:  # whatever a compiler fails with
            raise CannotRun(f"torch.compile failed ({_said(error)})") from None
        finally:
            torch.compiler.reset()

    def decoded(self) -> tuple[Tensor, Tensor]:
        twin = narrowed(self.model, self.length)
        sizes = self._through_the_wrap()[:-1]
        cache, first = StaticCache(twin, 1, self.length), sizes[0]
        try:
            feed, found, done = compiled_step(twin, cache), [], 0
            with torch.no_grad():
                for part in self.ids[None, : sum(sizes)].split(sizes, dim=1):
                    positions = torch.arange(done, done + part.shape[1], device=self.device)[None]
                    found.append(feed(part, positions).cpu().clone())
                    done += part.shape[1]
            return torch.cat(found[1:]), self.whole[first:done]
        except Exception as error:  # whatever a compiler fails with
            raise CannotRun(f"torch.compile failed ({_said(error)})") from None
        finally:
            torch.compiler.reset()

    def slot(self) -> tuple[Tensor, Tensor]:
        return self._invariant(lambda: slot_and_alone(self.model, self.ids))

    def same(self) -> tuple[Tensor, Tensor]:
        sizes = [size for size in self._through_the_wrap() if size]
        return self._invariant(lambda: fed_and_whole(self.model, self.ids, sizes))

    def _invariant(self, pair: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if self.dtype == torch.float64:
            raise CannotRun("the profile computes no float64")
        try:
            return pair()
        except NothingSeen as reason:
            raise CannotRun(str(reason)) from None

    def _through_the_wrap(self) -> list[int]:
        """Sizes of the parts to feed: nearly a window, then one at a time, then the rest (perhaps 0)."""
        first = max(1, self.model.config.sliding_window - 8)
        steps = min(16, self.length - first)
        return [first, *[1] * steps, self.length - first - steps]

    def elsewhere(self) -> tuple[Tensor, Tensor]:
        best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        other = best if self.device.type == "cpu" else torch.device("cpu")
        if other is None:
            raise CannotRun("no accelerator here")
        try:
            twin = deepcopy(self.model).to(other)
            return self._logits(twin, self.ids.to(other)), self.whole
        except (RuntimeError, TypeError) as error:  # no memory, or a dtype that the device has not
            raise CannotRun(f"{other} cannot ({_said(error)})") from None

    def reloaded(self, load: Callable[[], Gemma2]) -> tuple[Tensor, Tensor]:
        try:
            again = narrowed(load(), self.length)
        except (BadModelFile, OSError) as error:
            raise CannotRun(_said(error)) from None
        mine, theirs = dict(self.model.named_parameters()), dict(again.named_parameters())
        unequal = [name for name in mine if not torch.equal(mine[name], theirs[name])]
        if unequal:  # also where no logit shows it
            return (theirs[unequal[0]].detach().cpu(), mine[unequal[0]].detach().cpu())
        return self._logits(again, self.ids), self.whole

    def _fed(self, sizes: list[int]) -> tuple[Tensor, Tensor]:
        cache = HybridCache(self.model.config, 1, self.length)
        parts = [size for size in sizes if size]
        with torch.no_grad():
            logits = [self.model(part, cache=cache)[0].cpu() for part in self.ids[None].split(parts, dim=1)]
        return torch.cat(logits), self.whole

    @torch.no_grad()
    def _logits(self, model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        return model(ids[None])[0].cpu()


def _refusing(why: str) -> Callable[[], tuple[Tensor, Tensor]]:
    def run() -> tuple[Tensor, Tensor]:
        raise CannotRun(why)

    return run


def _said(error: Exception) -> str:
    line = first_line(error)
    return line if isinstance(error, BadModelFile | OSError) else f"{type(error).__name__}: {line}"
