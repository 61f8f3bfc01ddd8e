"""Published figures of real weights: the file that holds them, read and checked. docs/acceptance.md has the format."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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


def _is_count(x: Any) -> bool:
    return type(x) is int and x > 0


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _is_allowance(x: Any) -> bool:
    return _is_number(x) and x >= 0


def _are_ids(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(type(one) is int and one >= 0 for one in x)


def _is_pair(x: Any, first: Callable[[Any], bool], second: Callable[[Any], bool]) -> bool:
    return isinstance(x, list) and len(x) == 2 and first(x[0]) and second(x[1])


def _is_text(x: Any) -> bool:
    return isinstance(x, str) and bool(x)


def _is_prompt(x: Any) -> bool:
    if not isinstance(x, dict):
        return _is_text(x)
    return (
        x.keys() == {"repeat", "times", "then"}
        and _is_text(x["repeat"])
        and isinstance(x["then"], str)
        and _is_count(x["times"])
    )


def _are_top(x: Any) -> bool:
    pairs = _list_of(x, lambda one: _is_pair(one, lambda id: type(id) is int and id >= 0, _is_number))
    return pairs and len({id for id, _ in x}) == len(x)


def _list_of(x: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(x, list) and bool(x) and all(map(holds, x))


def _is_row(x: Any) -> bool:
    if not isinstance(x, dict) or not x.keys() <= {"position", "first", "last", "norm"}:
        return False
    given = [x[key] for key in ("first", "last") if key in x]
    position, norm = x.get("position"), x.get("norm", 0)
    return (
        type(position) is int
        and position >= 0
        and _is_number(norm)
        and len(x) > 1
        and all(_list_of(values, _is_number) for values in given)
    )


# What each statement must be, in words, and whether it is.
STATED: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "parameters": ("a positive integer", _is_count),
    "tensors": ("a positive integer", _is_count),
    "ids": ("a list of token ids", _are_ids),
    "top": ("a list of [token id, logit], each id once", _are_top),
    "within": ("a number of at least 0", _is_allowance),
    "site": ("a text", _is_text),
    "rows": (
        "a list of objects with a position, and first, last (lists of numbers) or norm",
        lambda x: _list_of(x, _is_row),
    ),
    "prompts": ('a list of texts or {"repeat": TEXT, "times": N, "then": TEXT}', lambda x: _list_of(x, _is_prompt)),
    "new_tokens": ("a positive integer", _is_count),
    "tie": ("a number of at least 0", _is_allowance),
    "type": ("a text", _is_text),
    "context": ("a positive integer", _is_count),
    "value": ("a positive number", lambda x: _is_number(x) and x > 0),
    "why": ("a text", _is_text),
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
    _check_statements(where, stated)
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


def _check_statements(where: str, stated: Mapping[str, Any]) -> None:
    """Raises BadModelFile for a statement that is not what its kind of check needs."""
    kind = stated["kind"]
    for key in (*KINDS[kind], *(("within",) if kind == "values" and "within" in stated else ())):
        if key == "texts" and kind == "tokens":
            words, right = (
                "a list of [text, token ids]",
                _list_of(stated[key], lambda x: _is_pair(x, lambda text: isinstance(text, str), _are_ids)),
            )
        elif key == "texts":
            words, right = "a list of texts, one for each prompt", _list_of(stated[key], _is_text)
            right = right and len(stated[key]) == len(stated["prompts"])
        else:
            words, right = STATED[key][0], STATED[key][1](stated[key])
        if not right:
            raise BadModelFile(f"{where}: {key} must be {words}")
    if kind == "values":
        beyond = [row["position"] for row in stated["rows"] if row["position"] >= len(stated["ids"])]
        if beyond:
            raise BadModelFile(f"{where}: position {beyond[0]} is beyond its {len(stated['ids'])} ids")
        if "within" not in stated and any("norm" in row for row in stated["rows"]):
            raise BadModelFile(f"{where}: a norm is compared within a tolerance: state within")


def spelled(prompt: Any) -> str:
    """A prompt: a text, or {"repeat": TEXT, "times": N, "then": TEXT} for a long one."""
    if isinstance(prompt, str):
        return prompt
    return str(prompt["repeat"]) * int(prompt["times"]) + str(prompt["then"])
