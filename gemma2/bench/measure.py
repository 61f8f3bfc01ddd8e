"""The run: load every system, check that they agree, then time them in turn, round by round."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gemma2.bench.agreement import compare
from gemma2.bench.machine import BYTES
from gemma2.bench.process import Process, worker_of
from gemma2.bench.systems import System
from gemma2.checks import check_count
from gemma2.config import Gemma2Config
from gemma2.errors import ContextOverflow
from gemma2.parity.references import SHAPE

FORMAT = 1  # of a record
CHECKED, STEPS = 16, 4  # ids of the prompt on which logits are compared, and single ids after it
WARM = 2  # untimed tokens before the timed ones
FIRST_ID = 4  # the ids before it steer
MACHINE = "the machine"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        prompts: lengths of the prompts whose prefill is timed.
        contexts: columns in the cache when decoding begins; fewer where the decoded ones would not fit into the model's
            context.
        batches: rows. The first is used at every context, the others at the first context.
        rounds: turns that each system takes in decoding.
        tokens: that it decodes in a turn.
        prefill_rounds: turns that each system takes with each prompt.
        load_rounds: times that each system is loaded, each in a new process; the last one stays.
        threads: of every system; None leaves the choice to PyTorch, and llama.cpp gets PyTorch's.
        device: that PyTorch's systems are on.
        read: bytes that are read at once to measure the memory.
    """

    prompts: tuple[int, ...] = (512,)
    contexts: tuple[int, ...] = (128,)
    batches: tuple[int, ...] = (1,)
    rounds: int = 6
    tokens: int = 12
    prefill_rounds: int = 3
    load_rounds: int = 3
    threads: int | None = None
    device: str = "cpu"
    seed: int = 0
    read: int = BYTES

    def check(self, config: Gemma2Config) -> None:
        """Raises ValueError for a count below 1, ContextOverflow for more than the model's context."""
        for name in ("prompts", "contexts", "batches"):
            for number in getattr(self, name):
                check_count(name, number, least=1)
        for name in ("rounds", "tokens", "prefill_rounds", "load_rounds"):
            check_count(name, getattr(self, name), least=1)
        if self.threads is not None:
            check_count("threads", self.threads, least=1)
        longest, most = max((*self.prompts, *self.contexts, self.decoded + 1)), config.max_position_embeddings
        if longest > most:
            raise ContextOverflow(f"{longest:,} columns are more than the model's context of {most:,}")

    @property
    def decoded(self) -> int:
        return WARM + self.rounds * self.tokens

    @property
    def cases(self) -> list[tuple[int, int]]:
        """(context, batch) of every case of decoding."""
        return [(context, self.batches[0]) for context in self.contexts] + [
            (self.contexts[0], batch) for batch in self.batches[1:]
        ]

    def steps(self, systems: int) -> int:
        """Turns of the whole run, for a bar."""
        return systems * (
            1 + self.load_rounds + len(self.prompts) * self.prefill_rounds + len(self.cases) * (1 + self.rounds)
        )


def measure(
    systems: Sequence[System],
    config: Gemma2Config,
    plan: Plan,
    allowed: float,
    tell: Callable[[str], object] = lambda what: None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure all systems; the first is the one that the others are compared with.

    Args:
        config: of the model that all of them run.
        allowed: how far their logits may be apart, see `gemma2.bench.agreement`.
        tell: called before each turn with what it is.
        about: what the record says besides, as which model and command.
    Returns:
        The record: what can be written as JSON. Seconds are wall-clock, memory is in bytes.
    Raises:
        Disagreement: a system does not compute what the first does.
        ImportError, BadModelFile, ValueError, RuntimeError, MemoryError: from a system's own process, with its name.
    """
    plan.check(config)
    record: dict[str, Any] = {"gemma2 bench": FORMAT, "date": time.strftime("%Y-%m-%d"), **(about or {})}
    with ExitStack() as stack:
        running = [(system, _started(stack, system.name, system.python)) for system in systems]
        for system, process in running:  # a missing package is said before anything loads
            process.ask("hello", kind=system.kind, threads=plan.threads)
        record["load_before"] = _load_average()
        record["plan"], record["model"] = asdict(plan), _sizes(config)
        ids = _ids(config, plan, 1, CHECKED + STEPS)[0]
        before = _load_often(systems, plan, ids, tell)
        found = [_loaded(system, process, tell) for system, process in running]
        record["systems"] = found
        record["agreement"] = _agreed(running, found, ids, allowed, tell)
        for row, (loads, firsts) in zip(found, before, strict=True):
            row["seconds"], row["first_token"] = [*loads, row["seconds"]], [*firsts, row["first_token"]]
        machine = _started(stack, MACHINE)
        threads = machine.ask("hello", kind=MACHINE, threads=plan.threads)["threads"]
        record["machine"] = {**machine.ask("describe", device=plan.device), "threads": str(threads)}
        limits: list[dict[str, float]] = []

        def look_at_the_machine() -> None:
            limits.append(machine.ask("limits", size=plan.read, device=plan.device))

        record["prefill"] = list(_prefill(running, config, plan, tell, look_at_the_machine))
        record["decode"] = list(_decode(running, config, plan, tell, look_at_the_machine))
        record["limits"] = {name: [round(one[name], 3) for one in limits] for name in limits[0]}
        for row, (_, process) in zip(found, running, strict=True):
            row["memory"] = {**row["memory"], **process.ask("memory")}
        record["load_after"] = _load_average()
    return record


@contextmanager
def _running(name: str, python: str | None) -> Iterator[Process]:
    process = Process(name, worker_of(python or sys.executable))
    try:
        yield process
    finally:
        process.close()


def _started(stack: ExitStack, name: str, python: str | None = None) -> Process:
    return stack.enter_context(_running(name, python))


def _load_often(
    systems: Sequence[System], plan: Plan, ids: list[int], tell: Callable[[str], object]
) -> list[tuple[list[float], list[float]]]:
    """Seconds to load and to the first token, of each system in all rounds but the last, in processes that then end."""
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in systems]
    with tempfile.TemporaryDirectory(prefix="gemma2-") as folder:
        for _ in range(plan.load_rounds - 1):
            for system, (loads, firsts) in zip(systems, found, strict=True):
                with _running(system.name, system.python) as process:
                    process.ask("hello", kind=system.kind, threads=plan.threads)
                    loads.append(_loaded(system, process, tell)["seconds"])
                    file = str(Path(folder) / "logits.safetensors")
                    firsts.append(loads[-1] + process.ask("check", ids=ids, prompt=CHECKED, file=file)["seconds"][0])
    return found


def _loaded(system: System, process: Process, tell: Callable[[str], object]) -> dict[str, Any]:
    tell(f"loading {system.name}")
    read_once(system.path)
    answer = process.ask("load", path=str(system.path), options=dict(system.options))
    said = {key: value for key, value in system.options.items() if key != "folder"}  # which is of this machine
    return {"name": system.name, "kind": system.kind, "options": said, **answer}


def read_once(path: Path) -> None:
    """Bring files into the page cache, so that no system's time to load is that of the disk."""
    for file in [path] if path.is_file() else path.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(2**24):
                pass


def _agreed(
    running: list[tuple[System, Process]],
    found: list[dict[str, Any]],
    ids: list[int],
    allowed: float,
    tell: Callable[[str], object],
) -> list[dict[str, Any]]:
    said, ours = [], torch.empty(0, device="cpu")
    with tempfile.TemporaryDirectory(prefix="gemma2-") as folder:
        for (system, process), row in zip(running, found, strict=True):
            tell(f"comparing {system.name}")
            file = Path(folder) / "logits.safetensors"
            times = process.ask("check", ids=ids, prompt=CHECKED, file=str(file))["seconds"]
            # What the first call of each kind costs beyond loading: pages that are touched, kernels that are compiled.
            row["first_token"], row["first_step"] = row["seconds"] + times[0], times[1]
            logits = load_file(file)["logits"]
            if system is running[0][0]:
                ours = logits
            else:
                said.append(compare(system.name, ours, logits, allowed, running[0][0].name).to_dict())
    return said


def _prefill(
    running: list[tuple[System, Process]],
    config: Gemma2Config,
    plan: Plan,
    tell: Callable[[str], object],
    look_at_the_machine: Callable[[], None],
) -> Iterator[dict[str, Any]]:
    for length in plan.prompts:
        ids = _ids(config, plan, 1, length)
        seconds: dict[str, list[float]] = {system.name: [] for system, _ in running}
        for _ in range(plan.prefill_rounds):
            look_at_the_machine()
            for system, process in running:
                tell(f"prefill of {length:,}: {system.name}")
                answer = process.ask("fill", ids=ids, capacity=length + 1)
                seconds[system.name].append(round(answer["seconds"], 6))
        yield {"tokens": length, "seconds": seconds}


def _decode(
    running: list[tuple[System, Process]],
    config: Gemma2Config,
    plan: Plan,
    tell: Callable[[str], object],
    look_at_the_machine: Callable[[], None],
) -> Iterator[dict[str, Any]]:
    for asked, batch in plan.cases:
        context = min(asked, config.max_position_embeddings - plan.decoded)
        rows = _ids(config, plan, batch, context + plan.decoded)
        where = f"{context:,}" + (f" in a batch of {batch}" if batch > 1 else "")
        filling: dict[str, float] = {}
        for system, process in running:
            tell(f"filling a context of {where}: {system.name}")
            prompt = [row[:context] for row in rows]
            filling[system.name] = round(process.ask("fill", ids=prompt, capacity=len(rows[0]))["seconds"], 6)
            process.ask("decode", ids=[row[context : context + WARM] for row in rows])
        seconds: dict[str, list[list[float]]] = {system.name: [] for system, _ in running}
        for start in range(context + WARM, len(rows[0]), plan.tokens):
            look_at_the_machine()
            for system, process in running:
                tell(f"decoding at {where}: {system.name}")
                answer = process.ask("decode", ids=[row[start : start + plan.tokens] for row in rows])
                seconds[system.name].append([round(one, 6) for one in answer["seconds"]])
        yield {"context": asked, "filled": context, "batch": batch, "filling": filling, "seconds": seconds}


def _ids(config: Gemma2Config, plan: Plan, batch: int, length: int) -> list[list[int]]:
    generator = torch.Generator("cpu").manual_seed(plan.seed)
    return torch.randint(FIRST_ID, config.vocab_size, (batch, length), generator=generator, device="cpu").tolist()


def _sizes(config: Gemma2Config) -> dict[str, Any]:
    """The numbers of the model from which limits are computed."""
    fields = (*SHAPE, "sliding_window")
    local = sum(config.window(i) is not None for i in range(config.num_hidden_layers))
    return {
        "parameters": config.parameter_count,
        "local_layers": local,
        **{key: getattr(config, key) for key in fields},
    }


def _load_average() -> list[float] | None:
    """Of the system, which other programs raise; None where it does not say."""
    return [round(one, 2) for one in os.getloadavg()] if hasattr(os, "getloadavg") else None
