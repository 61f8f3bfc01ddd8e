"""The harness's tasks: which there are, and one of them measured."""

from __future__ import annotations

import difflib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api import task
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from packaging.version import Version
from tqdm import tqdm

from gemma2.errors import first_line
from gemma2.evaluate.results import NotRun

LEAST, NEAR = "0.4.13", 4
SEED = 1234  # of samples and of the choice of examples: the harness's own


class Tasks:
    """The tasks in folders and, where a name is not there, the harness's own.

    Args:
        folders: with the YAML files of tasks; these come before the harness's.
    Raises:
        ImportError: the harness is too old.
    """

    def __init__(self, folders: Sequence[Path] = ()) -> None:
        if Version(version("lm-eval")) < Version(LEAST):
            raise ImportError(f"lm-eval is {version('lm-eval')}, and {LEAST} is needed: pip install -U lm-eval")
        self._folders = [str(folder) for folder in folders]
        self._manager = self._index(False) if folders else None

    def check(self, names: Sequence[str]) -> list[str]:
        """The names, with the tasks of a tag in its place. Reading the harness's own takes seconds.

        Raises:
            ValueError: a name that no task, group or tag has; says which are near.
        """
        if self._manager is None or not set(names) <= set(self._manager.all_tasks):
            self._manager = self._index(True)
        known = self._manager.all_tasks
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, NEAR, 0.5)
                folders = f" or in {', '.join(self._folders)}" if self._folders else ""
                hint = f"near: {', '.join(near)}" if near else "lm-eval ls tasks shows all"
                raise ValueError(f"no task {name!r} in lm-eval {version('lm-eval')}{folders}; {hint}")
        index = self._manager.task_index
        tagged = [
            [one for one, entry in index.items() if name in entry.tags] if name in self._manager.all_tags else [name]
            for name in names
        ]
        return list(dict.fromkeys(one for group in tagged for one in group))

    def run(
        self, model: LM, name: str, shots: int | None, limit: int | None, *, chat: bool, run_code: bool
    ) -> dict[str, Any]:
        """Measure one task or group: what the harness found, in JSON's types.

        Returns:
            results: task -> "metric,filter" -> number; of a group, its own and its parts'.
            documents: task -> how many were used.
            versions, shots: task -> the task's own.
        Raises:
            NotRun: the data cannot be had, or the task failed.
        """
        assert self._manager is not None, "check() comes first"
        with _quiet():
            try:
                loaded = self._manager.load([name])
            except Exception as error:  # of the network, of a package that a task needs, of the task's own code
                raise NotRun(f"it cannot be loaded: {_said(error)}") from error
            groups = loaded.get("groups", {})
            whole = [groups[name]] if name in groups else list(loaded["tasks"].values())
            try:
                found = lm_eval.simple_evaluate(
                    model,
                    tasks=whole,
                    num_fewshot=shots,
                    limit=limit,
                    log_samples=False,
                    apply_chat_template=chat,
                    task_manager=self._manager,
                    random_seed=SEED,
                    numpy_random_seed=SEED,
                    torch_random_seed=SEED,
                    fewshot_random_seed=SEED,
                    confirm_run_unsafe_code=run_code,
                )
            except Exception as error:
                raise NotRun(f"it failed: {_said(error)}") from error
        return {
            "results": {name: _numbers(numbers) for name, numbers in found["results"].items()},
            "documents": {name: counts["effective"] for name, counts in found["n-samples"].items()},
            "versions": dict(found["versions"]),
            "shots": {name: count for name, count in found["n-shot"].items() if isinstance(count, int)},
        }

    def _index(self, defaults: bool) -> Any:
        with _quiet():
            return TaskManager(include_path=self._folders or None, include_defaults=defaults)


def _numbers(given: dict[str, Any]) -> dict[str, float | None]:
    """A task's numbers; one that is not finite becomes None, since JSON has no such."""
    there = {name: value for name, value in given.items() if isinstance(value, int | float) and "," in name}
    return {name: value if math.isfinite(value) else None for name, value in there.items()}


def _said(error: BaseException) -> str:
    kind = type(error).__name__
    line = json.dumps(first_line(error), ensure_ascii=False)[1:-1]
    return line if line.startswith(kind) else f"{kind}: {line}"


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness and its tasks say much that is no news here; errors are still said, and bars shown on a terminal."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bars, task.tqdm = task.tqdm, partial(tqdm, disable=None, leave=False, delay=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        task.tqdm = bars
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
