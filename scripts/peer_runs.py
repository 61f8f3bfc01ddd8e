"""Peers installed and run, and their traces held against our model and against what a finding says they compute."""

from __future__ import annotations

import subprocess
import venv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peer_changes import Change, changed
from peer_list import ONE_PASS, Peer
from peer_models import MODELS, RUNS, random_model, write_model
from torch import Tensor

from gemma2 import Gemma2
from gemma2.numerics import with_numerics
from gemma2.parity.compare import compare, first_difference, predicted
from gemma2.parity.trace import Trace

ROOT = Path(__file__).resolve().parents[1]
VISIBLE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of the largest logit
BASE = ("torch==2.13.0", "safetensors==0.8.0")


@dataclass(frozen=True)
class Outcome:
    """One run: what was found, by how much the largest logit is off, and where the two part, if they do."""

    run: str
    verdict: str  # "equal bits", "rounding", "differs", "fails", "refuses" (to build its model) or "not run"
    first: str = ""
    ratio: float = 0.0
    apart: float = 0.0
    said: str = ""
    position: int = -1  # the first whose logits are visibly off

    def cell(self) -> str:
        if self.verdict == "differs":
            return f"**differs**, {self.apart:.2g}"
        return f"**{self.verdict}**" if self.verdict in ("fails", "refuses") else self.verdict


@dataclass(frozen=True)
class Found:
    """Of one peer: outcomes by dtype, and what they come to, in a few words and in sentences."""

    peer: Peer
    system: str
    outcomes: dict[str, list[Outcome]]
    brief: str
    says: str


def environment(folder: Path, peer: Peer) -> Path:
    """The Python of a peer's environment, which is made if it is not there or has other versions.

    Raises:
        RuntimeError: it cannot be installed; says why in a line.
    """
    place = folder / peer.environment
    python, done = place / "bin" / "python", place / "installed"
    asked = "\n".join((*BASE, *peer.requires))
    if not done.exists() or done.read_text() != asked:
        venv.create(place, with_pip=True, clear=True)
        wanted = asked.split()
        _said(subprocess.run([python, "-m", "pip", "install", "-q", *wanted], cwd=ROOT, capture_output=True, text=True))
        done.write_text(asked)
    return python


def traces(python: Path, peer: Peer, model: Path, out: Path, dtype: str) -> None:
    """Run a peer; raises RuntimeError with what it said last if it does not build its model."""
    out.mkdir(parents=True)
    command: list[str | Path] = [python, ROOT / "scripts" / "peers.py", peer.recipe, model, out, dtype, *peer.options]
    _said(subprocess.run(command, capture_output=True, text=True, timeout=600))


def _said(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1].strip()[:300] if lines else f"exit code {done.returncode}")


def held(out: Path, model: Gemma2, profile: str | None = None, instead: Change | None = None) -> Iterator[Outcome]:
    """Each run's trace against a model of ours, in the trace's dtype, if a profile is named in its arithmetic, and with
    a change planted as it is for that run."""
    for run, (_, chunks) in RUNS.items():
        path, words = out / f"{run}.safetensors", out / f"{run}.txt"
        if path.exists():
            trace, ours = Trace(path), instead(model, chunks) if instead else model
            theirs = with_numerics(ours, profile) if profile else None
            yield judged(run, ours, trace.ids, {name: trace[name] for name in trace.names}, theirs)
        else:
            said = " ".join(words.read_text().split())[:120] if words.exists() else ""
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
    off = (apart > VISIBLE[model.model.embed_tokens.weight.dtype] * logits.abs().max()).nonzero()
    position = int(off[0]) if len(off) else -1
    return Outcome(run, "differs", first.site, first.ratio, apart.max().item(), first.why, position)


def differing(outcomes: Iterable[Outcome]) -> frozenset[str]:
    return frozenset(outcome.run for outcome in outcomes if outcome.verdict in ("differs", "fails"))


def explained(peer: Peer, outcomes: list[Outcome], out: Path, model: Gemma2) -> tuple[str, str]:
    """What the peer computes, as far as these runs show it: in a few words, and in sentences."""
    runs, finding = differing(outcomes), peer.finding
    unknown = "something else; not explained", "Something else; not explained."
    if all(one.verdict == "refuses" for one in outcomes):
        return "nothing: it refuses", "It refuses to build this model."
    if not runs and any(one.verdict == "not run" for one in outcomes):
        return "as published in one pass; with a cache not run", "Gemma 2 as published, in one pass."
    if not runs:
        return "as published", "Gemma 2 as published."
    if finding is None or finding.runs != runs:
        return unknown
    if finding.instead is None:
        return finding.brief, finding.what
    profile, change = (finding.instead, None) if isinstance(finding.instead, str) else (None, finding.instead)
    again = [one for one in held(out, model, profile, change) if one.verdict not in ("fails", "not run")]
    left = differing(again)
    if len(left) == len(again):
        return unknown
    agree = f"all {len(again)}" if not left else f"{len(again) - len(left)} of {len(again)}"
    others = [f"{one.run} from position {one.position} on" for one in again if one.run in left]
    rest = f"; not explained: {', '.join(others)}" if others else ""
    brief = f"{finding.brief}; and something that is not explained" if others else finding.brief
    return brief, f"{finding.what} With this planted in our model, {agree} traces agree to rounding{rest}."


def look_at(peer: Peer, environments: Path, place: Path) -> Found:
    """Raises RuntimeError, in a line, if the peer cannot be installed, or does not build its model and is not known to
    refuse it."""
    python = environment(environments, peer)
    folder = place / peer.model
    if not folder.exists():
        write_model(folder, MODELS[peer.model], gguf=peer.model == "46 layers")
    model = random_model(MODELS[peer.model])
    outcomes: dict[str, list[Outcome]] = {}
    brief, says, system = "", "", peer.name
    for dtype in peer.dtypes:
        out = place / peer.name.replace("/", "-") / dtype
        ours = changed()(model).to(getattr(torch, dtype))
        try:
            traces(python, peer, folder, out, dtype)
        except RuntimeError as refusal:
            if not peer.refuses:
                raise
            outcomes[dtype] = [Outcome(run, "refuses", said=str(refusal)[:120]) for run in RUNS]
        else:
            outcomes[dtype] = list(held(out, ours))
        if not says:
            brief, says = explained(peer, outcomes[dtype], out, ours)
            system = next((Trace(path).about.system for path in sorted(out.glob("*.safetensors"))), system)
        elif peer.numerics:
            again = ", ".join(f"{it.run}: {it.verdict}" for it in held(out, ours, peer.numerics) if it.run in ONE_PASS)
            says += f" In {dtype}, held against our model in `{peer.numerics}`'s arithmetic: {again}."
    return Found(peer, system, outcomes, brief, says)
