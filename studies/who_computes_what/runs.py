"""Implementations installed and run, and their traces compared with our model and with what a finding says they
compute."""

from __future__ import annotations

import datetime
import platform
import subprocess
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gemma2 import Gemma2
from gemma2.numerics import with_numerics
from gemma2.parity.compare import compare, first_difference, predicted
from gemma2.parity.trace import Trace
from studies.who_computes_what.changes import Change, changed
from studies.who_computes_what.findings import ONE_PASS
from studies.who_computes_what.implementations import BASE, Implementation
from studies.who_computes_what.models import MODELS, RUNS, random_model, write_model
from studies.who_computes_what.outcomes import LONGEST, Again, Found, Outcome, differing

ROOT = Path(__file__).resolve().parents[2]
VISIBLE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of the largest logit; page.py says so


def environment(folder: Path, one: Implementation) -> Path:
    """The Python of an implementation's environment, which is made if it is not there or has other versions.

    Raises:
        RuntimeError: it cannot be installed; says why in a line.
    """
    place = folder.resolve() / one.environment
    python, done = place / "bin" / "python", place / "installed"
    asked = "\n".join((*BASE, *one.requires))
    if not done.exists() or done.read_text(encoding="utf-8") != asked:
        venv.create(place, with_pip=True, clear=True)
        wanted = asked.split()
        _said(
            subprocess.run(
                [python, "-m", "pip", "install", "-q", *wanted], cwd=ROOT, capture_output=True, encoding="utf-8"
            )
        )
        done.write_text(asked, encoding="utf-8")
    return python


def traces(python: Path, one: Implementation, model: Path, out: Path, dtype: str) -> None:
    """Run an implementation; raises RuntimeError with its last line of error if it does not build its model."""
    out.mkdir(parents=True)
    module = "studies.who_computes_what.run_one"
    command: list[str | Path] = [python, "-m", module, one.recipe, model, out, dtype, *one.options]
    _said(subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600))


def _said(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1].strip()[:300] if lines else f"exit code {done.returncode}")


def compared(out: Path, model: Gemma2, profile: str | None = None, instead: Change | None = None) -> Iterator[Outcome]:
    """Each run's trace against a model of ours, in the trace's dtype, if a profile is named in its arithmetic, and with
    a change injected as it is for that run."""
    for run, (_, chunks) in RUNS.items():
        path, error = out / f"{run}.safetensors", out / f"{run}.txt"
        if path.exists():
            trace, ours = Trace(path), instead(model, chunks) if instead else model
            theirs = with_numerics(ours, profile) if profile else None
            yield judged(run, ours, trace.ids, {name: trace[name] for name in trace.names}, theirs)
        else:
            said = " ".join(error.read_text(encoding="utf-8").split())[:LONGEST] if error.exists() else ""
            yield Outcome(run, "fails" if said else "not run", said=said)


def judged(
    run: str, model: Gemma2, ids: list[int], values: Mapping[str, Tensor], theirs: Gemma2 | None = None
) -> Outcome:
    truth = predicted(model, ids)
    rows, logits = compare(model, ids, values, theirs, truth), truth["logits"]
    apart = (values["logits"].double() - logits).abs().amax(-1)
    first = first_difference(rows)
    if first is None:
        verdict = "equal bits" if all(row.bitwise for row in rows) else "rounding"
        return Outcome(run, verdict, apart=apart.max().item())
    off = (apart > VISIBLE[model.dtype] * logits.abs().max()).nonzero()
    position = int(off[0]) if len(off) else -1
    return Outcome(run, "differs", first.site, first.ratio, apart.max().item(), first.why, position)


def compared_again(one: Implementation, outcomes: list[Outcome], out: Path, model: Gemma2) -> Again | None:
    """Whether the finding explains what differs: the same traces against our model with its change injected."""
    runs, finding = differing(outcomes), one.finding
    if not runs or finding is None or not finding.runs <= runs or finding.instead is None:
        return None
    profile, change = (finding.instead, None) if isinstance(finding.instead, str) else (None, finding.instead)
    again = [it for it in compared(out, model, profile, change) if it.verdict not in ("fails", "not run")]
    left = differing(again)
    others = [it for it in again if it.run in left]
    told = tuple(f"`{it.run}`, {it.ratio:.3g} times what rounding explains at `{it.first}`" for it in others)
    ratio = max((it.ratio for it in others), default=0.0)
    return Again(finding.key, len(again) - len(left), len(again), told, ratio)


def look_at(one: Implementation, environments: Path, place: Path) -> Found:
    """Raises RuntimeError, in a line, if it cannot be installed, or does not build its model and is not known to refuse
    it."""
    python = environment(environments, one)
    folder = place / one.model
    if not folder.exists():
        write_model(folder, MODELS[one.model], gguf=one.model == "46 layers")
    model = random_model(MODELS[one.model])
    outcomes: dict[str, list[Outcome]] = {}
    system, again, arithmetic = one.name, None, {}
    for dtype in one.dtypes:
        out = place / one.name.replace("/", "-") / dtype
        ours = changed()(model).to(getattr(torch, dtype))
        try:
            traces(python, one, folder, out, dtype)
        except RuntimeError as refusal:
            if not one.refuses:
                raise
            outcomes[dtype] = [Outcome(run, "refuses", said=str(refusal)[:LONGEST]) for run in RUNS]
        else:
            outcomes[dtype] = list(compared(out, ours))
        if dtype == one.dtypes[0]:
            again = compared_again(one, outcomes[dtype], out, ours)
            system = next((Trace(path).about.system for path in sorted(out.glob("*.safetensors"))), system)
        elif one.numerics:
            held = [it for it in compared(out, ours, one.numerics) if it.run in ONE_PASS]
            arithmetic[dtype] = {it.run: it.verdict for it in held}
    date = datetime.date.today().isoformat()
    return Found(one.name, system, date, machine(), outcomes, again, arithmetic)


def machine() -> str:
    cpu = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__} and Python {platform.python_version()} on a CPU ({cpu})"
