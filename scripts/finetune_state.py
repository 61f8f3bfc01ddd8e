"""The state of a training run in one file: enough to go on after a kill as if there had been none."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma2.atomic import replacing
from gemma2.errors import first_line

FORMAT = "gemma2 finetune 1"
NAME = "state.pt"


@dataclass
class Progress:
    """What a run has done so far.

    Attributes:
        step: how many steps are done; with the seed it says which rows come next.
        losses: nats a target, of each step, before its change.
        held_out: [step, nats a target] of the held-out file.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions(device: torch.device) -> dict[str, str]:
    """What the last bits of a loss depend on beside the settings."""
    return {
        "gemma2": version("gemma2"),
        "torch": str(torch.__version__),
        "device": device.type,
        "threads": str(torch.get_num_threads()),
    }


def random_state(device: torch.device) -> dict[str, Tensor]:
    found = {"cpu": torch.get_rng_state()}
    return found | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def save(
    path: Path,
    about: dict[str, Any],
    progress: Progress,
    trained: Iterable[tuple[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    random: dict[str, Tensor],
) -> None:
    """Write the state, whole or not at all: the one before stays until this one is on the disk."""
    state = {
        "format": FORMAT,
        "about": about,
        "progress": asdict(progress),
        "weights": {name: values.detach() for name, values in trained},
        "optimizer": optimizer.state_dict(),
        "random": random,
    }
    with replacing(path) as (partial,):
        torch.save(state, partial)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote. Raises ValueError for anything else, OSError."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no state to go on from; leave --resume and --finish out to begin")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"{path}: not a state of a training run ({first_line(error)})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path}: not a state of a training run of this version ({FORMAT})")
    return state


def check_same(state: dict[str, Any], about: dict[str, Any], path: Path, free: Iterable[str] = ()) -> list[str]:
    """Raises ValueError where a state is of another model, other data or other settings. Returns what else differs."""
    then = state["about"]
    for kind, now in about.items():
        if kind == "versions":
            continue
        if not isinstance(now, dict):
            if then[kind] != now:
                raise ValueError(f"{path}: is a run of another {kind} ({then[kind]}, and this is {now}): not mixed")
            continue
        for name, value in now.items():
            if name not in free and then[kind].get(name) != value:
                raise ValueError(
                    f"{path}: is a run with {name} {then[kind].get(name)!r}, and this is {value!r}: not mixed; give "
                    "what it was begun with"
                )
    return [
        f"{name} was {then['versions'].get(name)} and is {value}: losses may differ in the last bits"
        for name, value in about["versions"].items()
        if then["versions"].get(name) != value
    ]


def restore(state: dict[str, Any], trained: Iterable[tuple[str, Tensor]], optimizer: torch.optim.Optimizer) -> Progress:
    """Put weights and optimiser back; the random state is put back by the caller, as the last thing."""
    with torch.no_grad():
        for name, values in trained:
            values.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    done = state["progress"]
    return Progress(done["step"], list(done["losses"]), [(step, loss) for step, loss in done["held_out"]])
