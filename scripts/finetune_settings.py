"""The settings of `finetune.py`: a JSON file in configs/train, each of which an option may change."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from finetune_data import LONG

from gemma2.checkpoints.dtypes import RUNNABLE
from gemma2.checkpoints.hf_config import configs
from gemma2.errors import first_line
from gemma2.fast.forms import FORMS

METHODS, SCHEDULES = ("lora", "full"), ("linear", "constant")
ONLY_LORA = ("rank", "alpha", "dropout", "targets")


@dataclass(frozen=True)
class Settings:
    """How to train; `HELP` says what each is."""

    method: str
    rank: int | None
    alpha: float | None
    dropout: float | None
    targets: list[str] | None
    weights: str | None
    dtype: str | None
    autocast: bool
    recompute: bool
    length: int
    long: str
    system: str | None
    batch: int
    accumulate: int
    epochs: int
    steps: int | None
    rate: float
    warmup: int
    schedule: str
    decay: float
    clip: float
    seed: int
    save_every: int
    evaluate_every: int


HELP = {
    "method": "lora, by PEFT, or full",
    "rank": "LoRA: rank of each change",
    "alpha": "LoRA: the change is multiplied by alpha / rank",
    "dropout": "LoRA: of what goes into each change",
    "targets": "LoRA: the linears to change, as q_proj,v_proj",
    "weights": f"LoRA: hold the model's own weights as {', '.join(FORMS)}; none: as floats",
    "dtype": f"of the model: {', '.join(RUNNABLE)}; none: the checkpoint's",
    "autocast": "multiply in bfloat16",
    "recompute": "keep the inputs of layers only, and compute the layers again for the gradient",
    "length": "most token ids of a row",
    "long": "what becomes of a longer text: refuse, cut (its end is left out) or split (into rows; texts only)",
    "system": "merge puts system messages before the user message that follows; none refuses them",
    "batch": "rows of a pass",
    "accumulate": "passes of a step",
    "epochs": "how often every row is seen",
    "steps": "end after so many steps; none: after the epochs",
    "rate": "learning rate of AdamW at its highest",
    "warmup": "steps over which the rate rises",
    "schedule": "the rate after that: linear (to 0 at the end) or constant",
    "decay": "weight decay of matrices",
    "clip": "largest norm of all gradients; 0: any",
    "seed": "of the order of rows, LoRA's beginning and dropout",
    "save_every": "steps between two states, from which --resume goes on",
    "evaluate_every": "steps between two losses of --held-out",
}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text == "none" else kind(text)

    parse.__name__ = kind.__name__  # which argparse names in its errors
    return parse


KINDS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "str | None": _or_none(str),
    "int | None": _or_none(int),
    "float | None": _or_none(float),
    "list[str] | None": _or_none(_names),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--settings",
        default="lora",
        metavar="NAME",
        help="lora or full (in configs/train), or a JSON file; default: lora",
    )
    group = parser.add_argument_group("settings (each default is in the file)")
    for one in fields(Settings):
        option, kind = f"--{one.name.replace('_', '-')}", str(one.type)
        if kind == "bool":
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=HELP[one.name])
        else:
            group.add_argument(option, type=KINDS[kind], metavar="X", default=argparse.SUPPRESS, help=HELP[one.name])


def read_settings(args: argparse.Namespace) -> Settings:
    """The file's settings with what the command line changes. Raises ValueError, OSError."""
    path = Path(args.settings)
    if not path.suffix:
        path = configs() / "train" / f"{args.settings}.json"
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({first_line(error)})") from None
    names = [one.name for one in fields(Settings)]
    if not isinstance(stated, dict) or set(stated) != set(names):
        odd = sorted(set(stated) ^ set(names)) if isinstance(stated, dict) else ["no object"]
        raise ValueError(f"{path}: must have every setting of finetune.py and no other: {', '.join(odd[:5])}")
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    given = {name: value for name, value in given.items() if not (name in ("autocast", "recompute") and value is None)}
    if given.get("method") == "full" != stated["method"]:
        given = dict.fromkeys(ONLY_LORA) | given
    settings = Settings(**stated | given)
    check(settings, path)
    return settings


def check(settings: Settings, path: Path) -> None:
    """Raises ValueError for the first setting that cannot be."""

    def need(name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {what}, not {getattr(settings, name)!r} ({path} or --{name})")

    def among(name: str, known: Any, none: bool = False) -> None:
        value = getattr(settings, name)
        listed = ", ".join(known) + (" or none" if none else "")
        need(name, (none and value is None) or value in list(known), f"one of {listed}")

    def number(name: str, least: float, whole: bool = True) -> None:
        value = getattr(settings, name)
        right = type(value) is int or (not whole and type(value) is float)
        need(name, right and least <= value < float("inf"), f"a {'whole ' if whole else ''}number from {least} on")

    among("method", METHODS)
    among("long", LONG)
    among("schedule", SCHEDULES)
    among("dtype", RUNNABLE, none=True)
    among("system", ("merge",), none=True)
    among("weights", FORMS, none=True)
    for name in ("length", "batch", "accumulate", "epochs", "save_every", "evaluate_every"):
        number(name, 1)
    for name in ("warmup", "seed"):
        number(name, 0)
    need("seed", settings.seed < 2**32, "below 2^32")
    for name in ("rate", "decay", "clip"):
        number(name, 0, whole=False)
    if settings.steps is not None:
        number("steps", 1)
    for name in ("autocast", "recompute"):
        need(name, isinstance(getattr(settings, name), bool), "true or false")
    if settings.method == "full":
        for name in (*ONLY_LORA, "weights"):
            need(name, getattr(settings, name) is None, "none where the method is full: it is for lora")
        return
    number("rank", 1)
    number("alpha", 0, whole=False)
    number("dropout", 0, whole=False)
    need("dropout", settings.dropout is not None and settings.dropout < 1, "below 1")
    names = settings.targets
    need("targets", isinstance(names, list) and names != [] and all(isinstance(name, str) for name in names), "names")
