"""A model measured against what was published of the real one: what the machine can hold is run, and for the rest the
reason is said."""

from __future__ import annotations

import gc
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma2.checkpoints.checkpoint import Checkpoint, open_checkpoint
from gemma2.checkpoints.dtypes import RUNNABLE
from gemma2.checkpoints.gguf import read_parts
from gemma2.evaluate.figures import Check, Figures, spelled
from gemma2.evaluate.perplexity import LLAMA_CPP, perplexity
from gemma2.gemma import Gemma
from gemma2.load import load, locate
from gemma2.research import capture
from gemma2.scoring import hidden, logits_in_parts

PASS, NEAR, FAIL, NOTED, UNTRIED = "pass", "near-tie", "FAIL", "differs", "not tried"
TUNED = re.compile("-it(?![a-z0-9])")  # in the name of a checkpoint that is tuned for chat; "-items" is another word
FLOATS = {"F32", "F16", "BF16", "F64"}
# llama.cpp's numbers of file types (include/llama.h, enum llama_ftype).
GGUF_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16",
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What came of one figure.

    Attributes:
        outcome: "pass"; "near-tie": another choice between two that are as good as equal; "FAIL"; "differs": from a
            figure whose run is not wholly known, so it is no failure; "not tried".
        detail: the margin, or why it was not tried.
    """

    name: str
    outcome: str
    detail: str
    source: str


class Untried(Exception):
    """The message says why a figure cannot be tried here."""


def which_model(figures: Figures, opened: Checkpoint, source: str, asked: str | None = None) -> str:
    """Which published model a checkpoint is, by its numbers and by whether it is tuned for chat, which its name or its
    chat template says. Raises ValueError where none fits, or not the one that is asked for."""
    found = figures.candidates(opened.config)
    if asked is not None:
        if asked not in found:
            raise ValueError(f"{source}: has not the numbers of {asked!r}; it could be {', '.join(found) or 'none'}")
        return asked
    chat = opened.chat_tuned or TUNED.search(source.lower()) is not None
    fits = [name for name in found if bool(figures.models[name].get("chat")) == chat]
    if not fits:
        known = ", ".join(figures.models)
        raise ValueError(f"{source}: no figure was published of a model of its shape; there are figures of {known}")
    return fits[0]


def accept(
    source: str,
    opened: Checkpoint,
    checks: Sequence[Check],
    *,
    text: str | None = None,
    device: str | None = None,
    tell: Callable[[str], object] = lambda what: None,
) -> Iterator[Result]:
    """Each figure in turn, as it is done; those of the same dtype together, so that the model is loaded once for each.

    Args:
        source: of the model, for `load`; `opened` is the same.
        text: of which perplexities are measured.
        tell: called with what is being done.
    """
    run = _Run(source, opened, text, device, tell)
    for check in sorted(checks, key=lambda check: (check.kind not in run.without_weights, check.dtypes)):
        tell(check.name)
        try:
            yield from run(check)
        except Untried as reason:
            yield Result(check.name, UNTRIED, str(reason), check.source)


class _Run:
    """The model, loaded in one dtype at a time."""

    without_weights = ("parameters", "tokens", "untried")

    def __init__(
        self, source: str, opened: Checkpoint, text: str | None, device: str | None, tell: Callable[[str], object]
    ) -> None:
        self.source, self.opened, self.text, self.device, self.tell = source, opened, text, device, tell
        self.type = stored_type(opened)
        self._gemma: Gemma | None = None
        self._dtype, self._refused = "", dict[str, str]()

    def __call__(self, check: Check) -> Iterator[Result]:
        kinds: dict[str, Callable[[Check], Iterator[Result]]] = {
            "parameters": self._parameters,
            "tokens": self._tokens,
            "top": self._top,
            "values": self._values,
            "text": self._text,
            "perplexity": self._perplexity,
            "untried": self._untried,
        }
        return kinds[check.kind](check)

    def _untried(self, check: Check) -> Iterator[Result]:
        raise Untried(check.given["why"])

    def _parameters(self, check: Check) -> Iterator[Result]:
        shapes = [shape for shape, _ in self.opened.weights.tensors.values()]
        found = sum(math.prod(shape) for shape in shapes)
        for what, number in (("parameters", found), ("tensors", len(shapes))):
            wanted = check.given[what]
            yield _result(check, number == wanted, f"{number:,} {what} of {wanted:,}")

    def _tokens(self, check: Check) -> Iterator[Result]:
        for text, wanted in check.given["texts"]:
            found = self.opened.tokenizer.encode(text)
            detail = f"{len(wanted)} token ids" if found == wanted else f"{found} and not {wanted}"
            yield _result(check, found == wanted, detail, text)

    def _top(self, check: Check) -> Iterator[Result]:
        """The likeliest next tokens: their order, and their logits."""
        seen, dtype = self._seen(check, ["logits"], [int(number) for number, _ in check.given["top"]])
        logits, within = seen["logits"][-1].double(), float(check.given["within"])
        published = {int(number): float(logit) for number, logit in check.given["top"]}
        wanted, found = list(published), logits.topk(len(published)).indices.tolist()
        farthest = (logits[wanted] - torch.tensor([*published.values()], dtype=torch.float64)).abs().max().item()
        detail = f"logits up to {farthest:.2g} apart, {within:g} allowed{dtype}"
        if found == wanted or not farthest <= within:
            order = "" if found == wanted else f"order {found} and not {wanted}; "
            yield _result(check, farthest <= within and not order, order + detail)
            return
        # Those in another order: as good as equal, if the published logits of both are.
        gaps = [
            abs(published.get(ours, logits[ours].item()) - published[theirs])
            for ours, theirs in zip(found, wanted, strict=True)
        ]
        said = f"order {found} and not {wanted}, which are up to {max(gaps):.2g} apart; {detail}"
        yield _result(check, False, said, near=max(gaps) <= 2 * within)

    def _values(self, check: Check) -> Iterator[Result]:
        """Some values at a site. Without `within` they must be equal once rounded to the dtype."""
        site, within = check.given["site"], check.given.get("within")
        seen, dtype = self._seen(check, [site])
        value = seen[site].reshape(len(seen[site]), -1)
        for row in check.given["rows"]:
            found, wanted = value[row["position"]], torch.tensor([*row.get("first", []), *row.get("last", [])])
            if max(len(row.get("first", [])), len(row.get("last", []))) > len(found):
                raise Untried(f"it states more values than the {len(found):,} at {site}")
            ours = torch.cat((found[: len(row.get("first", []))], found[len(found) - len(row.get("last", [])) :]))
            count, where = len(wanted), f"position {row['position']}"
            if within is None:
                same = int((ours == wanted.to(ours.dtype)).sum())
                yield _result(check, same == count, f"{same} of {count} values are equal{dtype}", where)
                continue
            apart = (ours.double() - wanted.double()).abs()
            if "norm" in row:
                apart = torch.cat((apart, (found.double().norm() - row["norm"]).abs()[None]))
            wrong = ~(apart <= within)
            beyond = (
                f", {int(wrong.sum())} of them beyond, first number {int(wrong.nonzero()[0])}" if wrong.any() else ""
            )
            detail = f"{len(apart)} values up to {apart.max().item():.2g} apart, {within:g} allowed{beyond}{dtype}"
            yield _result(check, not wrong.any(), detail, where)

    def _text(self, check: Check) -> Iterator[Result]:
        """Greedy continuations of prompts in one batch, padded on the left as they were published."""
        gemma, dtype = self._loaded(check, quantized=False)
        prompts, wanted = [spelled(prompt) for prompt in check.given["prompts"]], check.given["texts"]
        found = gemma.generate(prompts, max_new_tokens=check.given["new_tokens"])
        for prompt, ours, theirs in zip(prompts, found, wanted, strict=True):
            shown = prompt if len(prompt) < 40 else f"...{prompt[-30:]}"
            if ours == theirs:
                yield _result(check, True, f"{len(theirs)} characters equal{dtype}", shown)
                continue
            said, gap = self._first_other(gemma, prompt, theirs)
            detail = f"{ours[:60]!r} and not {theirs[:60]!r}: {said}{dtype}"
            yield _result(check, False, detail, shown, near=gap is not None and gap <= check.given["tie"])

    @torch.no_grad()
    def _first_other(self, gemma: Gemma, prompt: str, theirs: str) -> tuple[str, float | None]:
        """Behind the published text itself: where our likeliest token first is another, and by how much."""
        start, ids = len(gemma.tokenizer.encode(prompt)), gemma.tokenizer.encode(prompt + theirs)
        tokens = torch.tensor([ids[:-1]], device=gemma.model.device)
        states = hidden(gemma.model, tokens)[0, start - 1 :]
        logits = torch.cat([part.cpu() for _, part in logits_in_parts(gemma.model, states)]).double()
        for place, (row, number) in enumerate(zip(logits, ids[start:], strict=True)):
            if (best := int(row.argmax())) != number:
                gap = (row[best] - row[number]).item()
                pieces = gemma.tokenizer.decode([best]), gemma.tokenizer.decode([number])
                return f"{pieces[0]!r} leads {pieces[1]!r} by {gap:.3g} at new token {place + 1}", gap
        return "behind the published text every token of it is the likeliest, so a tie fell the other way", 0.0

    def _perplexity(self, check: Check) -> Iterator[Result]:
        wanted, kind = float(check.given["value"]), check.given["type"]
        if self.type != kind and not (kind in FLOATS and self.type in FLOATS):
            raise Untried(f"it is of a {kind} file, and MODEL is {self.type}")
        if self.text is None:
            raise Untried("give its text by --text FILE (wikitext-2's wiki.test.raw)")
        gemma, dtype = self._loaded(check, quantized=True)
        try:
            found = perplexity(gemma, self.text, LLAMA_CPP, context=check.given["context"]).value
        except ValueError as error:  # too short a text, or a context beyond the model's
            raise Untried(str(error)) from None
        apart, within = found / wanted - 1, float(check.given["within"])
        detail = f"{found:.4f} and {wanted:.4f}: {apart:+.2%}, {within:.1%} allowed{dtype}"
        yield _result(check, abs(apart) <= within, detail)

    @torch.no_grad()
    def _seen(self, check: Check, sites: list[str], others: Sequence[int] = ()) -> tuple[dict[str, Tensor], str]:
        """Sites in a pass over the ids of a check, and what to say of the dtype; `others` are further ids of it."""
        gemma, dtype = self._loaded(check, quantized=False)
        ids = check.given["ids"]
        wrong = [number for number in (*ids, *others) if not 0 <= number < gemma.config.vocab_size]
        if wrong:
            raise Untried(f"token id {wrong[0]} is outside the vocabulary")
        with capture(gemma.model, sites) as seen:
            gemma.model(torch.tensor([ids], device=gemma.model.device))
        return {name: seen[name][0].cpu() for name in sites}, dtype

    def _loaded(self, check: Check, quantized: bool) -> tuple[Gemma, str]:
        """The model in the first of a check's dtypes that memory holds, and what to say if it is not the nearest.

        Args:
            quantized: whether the figure may be of quantized weights.
        """
        if not quantized and self.type not in FLOATS:
            raise Untried(f"it is of weights that are not quantized, and MODEL is {self.type}")
        for dtype in check.dtypes:
            if dtype in self._refused:
                continue
            if self._gemma is None or self._dtype != dtype:
                self._gemma = None
                gc.collect()
                self.tell(f"loading in {dtype}")
                try:
                    self._gemma = load(self.source, dtype=RUNNABLE[dtype], device=self.device, force_float16=True)
                except MemoryError as error:
                    self._refused[dtype] = str(error).partition(". What fits")[0]
                    continue
                self._dtype = dtype
            return self._gemma, "" if dtype == check.dtypes[0] else f" (in {dtype}: {self._refused[check.dtypes[0]]})"
        raise Untried("; ".join(self._refused[dtype] for dtype in check.dtypes))


def stored_type(opened: Checkpoint) -> str:
    """The type of the weights, as "BF16" or "Q4_K_M": what a GGUF says of itself, else that of most matrices."""
    weights = opened.weights
    if opened.form == "gguf":
        stated = read_parts(opened.path).metadata.get("general.file_type")
        if stated is not None and stated.value in GGUF_TYPES:
            return GGUF_TYPES[stated.value]
    kinds = Counter(weights.stored(name) for name, (shape, _) in weights.tensors.items() if len(shape) > 1)
    return kinds.most_common(1)[0][0]


def _result(check: Check, right: bool, detail: str, what: str = "", near: bool = False) -> Result:
    wrong = NEAR if near else FAIL if check.gate else NOTED
    return Result(f"{check.name}: {what!r}" if what else check.name, PASS if right else wrong, detail, check.source)


def open_model(source: str, revision: str | None = None) -> tuple[Path, Checkpoint]:
    """Where a model is, and what it is. Raises as `gemma2.load`."""
    path: Any = locate(source, revision)
    return path, open_checkpoint(path)
