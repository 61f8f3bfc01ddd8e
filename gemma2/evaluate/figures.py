"""Published figures of real weights: the file that holds them, read and checked. docs/acceptance.md has the format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2.checkpoints.dtypes import RUNNABLE
from gemma2.checkpoints.hf_config import read_json
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile

FORMAT = "gemma2-figures 1"
# Each kind of check, and what must be stated for it.
KINDS: Mapping[str, tuple[str, ...]] = {
    "parameters": ("parameters", "tensors"),
    "tokens": ("texts",),
    "top": ("ids", "top", "within"),
    "values": ("ids", "site", "rows"),
    "text": ("prompts", "texts", "new_tokens", "tie"),
    "perplexity": ("type", "context", "value", "within"),
    "untried": ("why",),
}


@dataclass(frozen=True)
class Check:
    """One published figure, or a few of the same run.

    Attributes:
        name: in words.
        kind: one of `KINDS`; `given` has what it states.
        models: of which it was published.
        source: who published it, and where.
        dtypes: to compute in, the first that memory holds; the first is the nearest to the published run.
        gate: whether a difference is a failure. Where the published run is not wholly known, it is shown and no more.
    """

    name: str
    kind: str
    models: tuple[str, ...]
    source: str
    dtypes: tuple[str, ...]
    gate: bool
    given: Mapping[str, Any]


@dataclass(frozen=True)
class Figures:
    """A file of published figures.

    Attributes:
        models: name -> numbers of its config, and `chat`: whether it was tuned for chat.
    """

    path: str
    models: Mapping[str, Mapping[str, Any]]
    checks: tuple[Check, ...]

    def candidates(self, config: Gemma2Config) -> list[str]:
        """The models that have these numbers."""
        return [
            name
            for name, stated in self.models.items()
            if all(getattr(config, key) == value for key, value in stated.items() if key != "chat")
        ]


def read_figures(path: Path) -> Figures:
    """Raises BadModelFile for a file that is none, and says what is wrong and where."""
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise BadModelFile(f"{path}: no published figures: it does not say format {FORMAT!r}")
    models, sources, checks = found.get("models"), found.get("sources"), found.get("checks")
    if not isinstance(models, dict) or not isinstance(sources, dict) or not isinstance(checks, list) or not checks:
        raise BadModelFile(f"{path}: needs models and sources, each an object, and a list of checks")
    known = set(Gemma2Config.__dataclass_fields__) | {"chat"}
    for name, numbers in models.items():
        if not isinstance(numbers, dict) or not numbers.keys() <= known:
            raise BadModelFile(f"{path}: model {name!r} must state numbers of a config, and chat")
    return Figures(str(path), models, tuple(_check(path, check, models, sources) for check in checks))


def _check(path: Path, stated: Any, models: Mapping[str, Any], sources: Mapping[str, Any]) -> Check:
    where = f"{path}: check {stated.get('name') if isinstance(stated, dict) else stated!r}"
    if not isinstance(stated, dict):
        raise BadModelFile(f"{where}: must be a JSON object")
    missing = [key for key in ("name", "kind", "models", "source") if key not in stated]
    kinds = {"name": str, "kind": str, "models": list, "source": str, "dtypes": list}
    wrong = [key for key, kind in kinds.items() if key in stated and not isinstance(stated[key], kind)]
    if wrong or not all(isinstance(name, str) for key in ("models", "dtypes") for name in stated.get(key, [])):
        raise BadModelFile(f"{where}: name, kind and source must be texts, models and dtypes lists of texts")
    if missing or stated["kind"] not in KINDS:
        said = f"does not state {', '.join(missing)}" if missing else f"kind is none of {', '.join(KINDS)}"
        raise BadModelFile(f"{where}: {said}")
    missing = [key for key in KINDS[stated["kind"]] if key not in stated]
    if missing:
        raise BadModelFile(f"{where}: a check of {stated['kind']} must state {', '.join(missing)}")
    if stated["source"] not in sources or not set(stated["models"]) <= models.keys():
        raise BadModelFile(f"{where}: its source or one of its models is not among those in the file")
    dtypes = tuple(stated.get("dtypes", ("float32",)))
    if not dtypes or not set(dtypes) <= RUNNABLE.keys():
        raise BadModelFile(f"{where}: dtypes must be of {', '.join(RUNNABLE)}")
    return Check(
        stated["name"],
        stated["kind"],
        tuple(stated["models"]),
        sources[stated["source"]],
        dtypes,
        bool(stated.get("gate", True)),
        stated,
    )


def spelled(prompt: Any) -> str:
    """A prompt: a text, or {"repeat": TEXT, "times": N, "then": TEXT} for a long one."""
    if isinstance(prompt, str):
        return prompt
    return str(prompt["repeat"]) * int(prompt["times"]) + str(prompt["then"])
