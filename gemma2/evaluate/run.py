"""The benchmarks of a card, one after the other: what is there already is kept, what cannot be measured is named."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma2.evaluate.card import Card, Row, Section
from gemma2.evaluate.page import in_page
from gemma2.evaluate.report import Report, markdown
from gemma2.evaluate.results import REPORTS, Folder, NotRun, Result

Key = tuple[str, int | None]
RUNS_CODE = "scoring runs code that the model wrote: --run-code allows it; use a machine that has nothing to lose"


@dataclass
class Run:
    """A card being measured.

    Args:
        report: without results; the card, the model's name, the size.
        tasks: a `Tasks`, with names that were checked.
        folder: where results are kept, or None.
        about: what a result belongs to: model, settings, versions; see `Folder.read`.
        machine: noted beside each result, and not compared.
        chat: write prompts as a conversation's turns.
        run_code: measure also what runs the model's code.
        force: measure again what was measured otherwise.
        said: called with a line for each task that was measured or not.
    Attributes:
        failed: tasks that were tried in vain, with the reason.
    """

    report: Report
    tasks: Any
    folder: Folder | None
    about: Mapping[str, Any]
    machine: Mapping[str, Any]
    chat: bool = False
    run_code: bool = False
    force: bool = False
    said: Callable[[str], object] = print
    failed: dict[Key, str] = field(default_factory=dict)

    def kept(self) -> dict[Key, Result]:
        """Results in the folder that belong here. Raises ValueError for others, unless `force`."""
        found = {}
        for key in keys(self.report.card):
            try:
                result = self.folder.read(*key, self.about) if self.folder else None
            except ValueError:
                if not self.force:
                    raise
                result = None
            if result is not None:
                found[key] = result
        return found

    def all(self, model: Any) -> Report:
        """Measure what is not in the folder, by a `GemmaLM`. After each task the folder has its result and the report
        so far."""
        results, reasons = self.kept(), refused(self.report.card, self.run_code)
        for key in results:
            self.said(f"{label(key)}: measured before")
        left = [key for key in keys(self.report.card) if key not in results and key not in reasons]
        report = self._reported(results, reasons)
        for place, key in enumerate(left, start=1):
            model.title = f"{place}/{len(left)} {label(key)}"
            started = time.perf_counter()
            try:
                found = self.tasks.run(model, *key, self.report.limit, chat=self.chat, run_code=self.run_code)
            except NotRun as error:
                self.failed[key] = reasons[key] = str(error)
                self.said(f"{label(key)}: not measured: {error}")
            else:
                results[key] = Result(*key, found, self.about, time.perf_counter() - started)
                if self.folder:
                    self.folder.write(results[key], self.machine)
                self.said(f"{label(key)}: {results[key].documents:,} documents in {results[key].seconds:.1f} s")
            report = self._reported(results, reasons)
        return report

    def _reported(self, results: Mapping[Key, Result], reasons: Mapping[Key | str, str]) -> Report:
        given = self.report
        report = Report(
            given.card, given.model, given.size, dict(results), dict(reasons), given.limit, given.notes, given.about
        )
        if self.folder:
            for name, text in zip(REPORTS, (markdown(report), in_page(report)), strict=True):
                self.folder.put(self.folder.path / name, text)
        return report


def keys(card: Card) -> list[Key]:
    """What is run for a card, in its order, each once."""
    return list(dict.fromkeys(row.key for row in card.rows if row.task))


def refused(card: Card, run_code: bool) -> dict[Key | str, str]:
    """What is not tried, with the reason."""
    found: dict[Key | str, str] = {}
    for row in card.rows:
        why = _refusal(row, run_code)
        if why:
            found[row.key] = why
    return found


def _refusal(row: Row, run_code: bool) -> str:
    if row.needs and not os.environ.get(row.needs):
        return f"needs the environment variable {row.needs}, which is not set"
    return RUNS_CODE if row.runs_code and not run_code else ""


def label(key: Key) -> str:
    task, shots = key
    return task if shots is None else f"{task}, {shots}-shot"


def of_tasks(names: Sequence[str], shots: int | None) -> Card:
    """A card of tasks without published values: every number of each."""
    return Card("Tasks", [Section("tasks", [Row(name, name, shots) for name in names])])
