"""A folder of results, one file a task, written whole or not at all; what was measured otherwise is never mixed in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2.atomic import check_target, replacing

FORMAT = "gemma2 eval 1"
REPORTS = ("report.md", "report.html")
BELONGS = ("model", "settings", "versions")  # what two results of one folder have in common


class NotRun(Exception):
    """A task was not measured. The message says why in one line."""


@dataclass(frozen=True)
class Result:
    """What one run of a task found; see `Tasks.run`.

    Attributes:
        seconds: that it took.
    """

    task: str
    shots: int | None
    found: Mapping[str, Any]
    about: Mapping[str, Any]
    seconds: float

    def value(self, metric: str, filter: str) -> tuple[float | None, float | None]:
        """A metric of the task and its standard error, as the harness has them; None for what is not there."""
        numbers = self.found["results"].get(self.task, {})
        return numbers.get(f"{metric},{filter}"), numbers.get(f"{metric}_stderr,{filter}")

    @property
    def metrics(self) -> list[tuple[str, str]]:
        """Each metric and its filter."""
        names = [name.split(",", 1) for name in self.found["results"].get(self.task, {})]
        return [(metric, filter) for metric, filter in names if not metric.endswith("_stderr")]

    @property
    def documents(self) -> int:
        """How many were used, of all parts of a group together."""
        return sum(self.found["documents"].values())


class Folder:
    """Where results are kept.

    Args:
        path: of the folder.
    Raises:
        OSError: it cannot be written to, or is no folder. A new one is made with its first file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{path}: is a file; results need a folder")
        if path.exists():
            check_target(path / REPORTS[0], force=True)
        else:
            check_target(path, folder=True)

    def file(self, task: str, shots: int | None) -> Path:
        safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in task).lstrip(".")
        return self.path / (f"{safe}.json" if shots is None else f"{safe}.{shots}-shot.json")

    def answers(self, task: str, shots: int | None, about: Mapping[str, Any]) -> Path:
        """Where the answers of an unfinished task are, of this model and these settings alone."""
        self.path.mkdir(exist_ok=True)
        belongs = json.dumps({group: about.get(group) for group in BELONGS}, sort_keys=True)
        mark = hashlib.sha256(belongs.encode()).hexdigest()[:16]
        return self.path / f".{self.file(task, shots).stem}.{mark}"

    def check(self, keys: Sequence[tuple[str, int | None]], about: Mapping[str, Any]) -> None:
        """Raises ValueError where a result of these tasks was measured otherwise. `about` may know a part only."""
        for task, shots in keys:
            self.read(task, shots, about)

    def read(self, task: str, shots: int | None, about: Mapping[str, Any]) -> Result | None:
        """The result of a task that was measured as `about` says; None if there is none.

        Raises:
            ValueError: the file is no result, or one of another model, version or setting; says which.
        """
        path = self.file(task, shots)
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            given = None
        if not _is_result(given):
            raise ValueError(f"{path}: not a result of gemma2 eval; name another folder, or --force replaces it")
        parts = {"task": (task, given.get("task")), "shots": (shots, given.get("shots"))}
        for group in BELONGS:
            there = given.get(group, {})
            parts |= {f"{group} {name}": (value, there.get(name)) for name, value in about.get(group, {}).items()}
        for name, (now, then) in parts.items():
            if now != then:
                raise ValueError(
                    f"{path}: a result with {name} {then!r}, and now it is {now!r}: the two are not mixed; name "
                    "another folder with -o, or --force measures it again"
                )
        return Result(task, shots, given["found"], {group: given.get(group, {}) for group in BELONGS}, given["seconds"])

    def write(self, result: Result, machine: Mapping[str, Any]) -> None:
        """Keep a result, in the place of one that is there."""
        whole = {"format": FORMAT, "task": result.task, "shots": result.shots, **result.about}
        whole |= {"machine": dict(machine), "seconds": round(result.seconds, 3), "found": result.found}
        self.put(self.file(result.task, result.shots), json.dumps(whole, indent=2, allow_nan=False) + "\n")

    def put(self, path: Path, text: str) -> None:
        self.path.mkdir(exist_ok=True)
        check_target(path, force=True)
        with replacing(path) as (partial,):
            partial.write_text(text, encoding="utf-8")


def _is_result(given: Any) -> bool:
    """Whether a file's content has the form that `Folder.write` gives it."""
    if (
        not isinstance(given, dict)
        or given.get("format") != FORMAT
        or not isinstance(given.get("seconds"), int | float)
    ):
        return False
    found = given.get("found")
    parts = [given.get(group, {}) for group in BELONGS]
    if not isinstance(found, dict) or not all(isinstance(part, dict) for part in parts):
        return False
    results, documents = found.get("results"), found.get("documents")
    if not isinstance(results, dict) or not isinstance(documents, dict):
        return False
    return all(isinstance(count, int) for count in documents.values()) and all(map(_are_numbers, results.values()))


def _are_numbers(numbers: Any) -> bool:
    """Whether they are those of one task: "metric,filter" -> number."""
    if not isinstance(numbers, dict):
        return False
    return all("," in name and isinstance(value, int | float | None) for name, value in numbers.items())
