"""Which implementations compute Gemma 2 as published, which compute something else, and at which length it shows.

    python scripts/who_computes_what.py --environments FOLDER > docs/who-computes-what.md
    python scripts/who_computes_what.py --environments FOLDER --only 'litgpt 0.5.13'

Each peer (`peer_list.py`) is installed in an environment of its own in FOLDER (made if it is not there: a torch each,
some GB in all), builds its own Gemma 2 with the weights of a small random model (`peers.py`), and writes traces, which
are held against this project's model (`peer_runs.py`). What a peer computes instead is not read from its code but
shown: with that one change planted in our model (`peer_changes.py`), the two must agree to rounding; if they do not,
the page says that it is unexplained.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from peer_list import DTYPES, LONG, PAST, PEERS, Peer
from peer_models import RUNS, TINY
from peer_runs import BASE, Found, Outcome, look_at

HEAD = """# Who computes what

Other implementations of Gemma 2, each built by its own code with the weights of a small random model, and held against
this project's. Printed on {date} by `scripts/who_computes_what.py` from runs, with torch {torch} and Python
{python} on a CPU ({machine}). Nothing here is taken from others' reports; a cause is stated where the same change,
planted in our model, makes the peer's traces agree, and not because code was read. Another version may compute
otherwise.

    python scripts/who_computes_what.py --environments FOLDER                           # this page; installs each peer
    python scripts/who_computes_what.py --environments FOLDER --only 'litgpt 0.5.13'    # one of them

"Where it shows" is told from the runs below in float32, and "farthest" is the largest distance of a logit to the exact
one in any of them (published logits are within +-{cap_logits:g}). Weights are random and large, so that caps bite: in a
trained model logits part less."""

RUN = """## The runs

The model is shaped like Gemma 2 27B, scaled down: {layers} layers, width {width}, {heads} query and {groups} key/value
heads of {head}, query scale {scale}^-0.5, caps {cap_scores:g} and {cap_logits:g}, and a window of {window}, where
the published models have 4096: what depends on the window shows here beyond {window} ids, and there beyond 4096.
Another model, where a peer was given one, is named in its section. A peer whose name says "default"
was asked for no attention and chose the one in brackets.

One pass over 12 ids, shorter than the window, and over 64, longer; with the peer's own cache, 12 ids as a
prefill of 6 and then one at a time, 64 as 32 and then one at a time, and 64 from a prefill of 8. A run's word is the
verdict of [`gemma2.parity`](parity.md): "rounding" is what the dtype explains, "equal bits" are ours, and where a peer
**differs** the number is the largest distance of a logit to the exact one. With a cache only logits are seen. A run
that **fails** has the peer's own words in its section, as has a peer that **refuses** to build the model; one "not run"
has no recipe here."""


def page(found: list[Found], absent: list[tuple[Peer, str]]) -> str:
    texts = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": torch.backends.cpu.get_cpu_capability(),
    }
    names = {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads"}
    names |= {"groups": "num_key_value_heads", "head": "head_dim", "scale": "query_pre_attn_scalar"}
    names |= {"cap_scores": "attn_logit_softcapping", "cap_logits": "final_logit_softcapping"}
    names |= {"window": "sliding_window"}
    numbers = {key: TINY[name] for key, name in names.items()}
    lines = [HEAD.format(**texts, **numbers), "", *summary(found), "", RUN.format(**numbers)]
    for dtype in DTYPES:
        lines += ["", f"### In {dtype}", "", f"| | {' | '.join(RUNS)} |", "|---" * (len(RUNS) + 1) + "|"]
        for one in found:
            if dtype in one.outcomes:
                lines.append(f"| {one.peer.name} | {' | '.join(it.cell() for it in one.outcomes[dtype])} |")
    for one in found:
        lines += ["", f"## {one.peer.name}", "", *details(one)]
    if absent:
        lines += ["", "## Not run", "", *(f"- {peer.name}: {reason}" for peer, reason in absent)]
    return "\n".join(lines)


def summary(found: list[Found]) -> Iterator[str]:
    yield "| implementation | computes | where it shows | farthest |"
    yield "|---|---|---|---|"
    for one in found:
        outcomes = one.outcomes[one.peer.dtypes[0]]
        farthest = max((it.apart for it in outcomes if it.verdict == "differs"), default=0.0)
        size = f"{farthest:.2g}" if farthest else ""
        yield f"| [{one.peer.name}](#{anchor(one.peer.name)}) | {one.brief} | {shows(outcomes)} | {size} |"


def anchor(heading: str) -> str:
    """The place of a heading in a page, as GitHub names it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def shows(outcomes: Iterable[Outcome]) -> str:
    """In which use the peer's results are others, or are refused."""
    by_verdict: dict[str, set[str]] = {"differs": set(), "fails": set(), "refuses": set()}
    for one in outcomes:
        by_verdict.get(one.verdict, set()).add(one.run)
    if by_verdict["refuses"]:
        return "when it is built"
    differs, fails = uses(by_verdict["differs"]), uses(by_verdict["fails"])
    return "; ".join(filter(None, (differs, fails and f"fails: {fails}")))


def uses(runs: set[str]) -> str:
    """What these runs have in common."""
    pieces = []
    if {"12", "12 cached"} <= runs:
        return "every token"
    if runs == LONG:
        return "beyond the window"
    if "12" in runs:
        pieces.append("one pass of any length")
    elif "64" in runs:
        pieces.append("one pass beyond the window")
    if "12 cached" in runs:
        pieces.append("any use of its cache")
    elif runs >= PAST:
        pieces.append("decoding beyond the window")
    elif "64 cached" in runs:
        pieces.append("a prefill longer than the window into its cache")
    elif "64 from 8" in runs:
        pieces.append("decoding beyond the window from a shorter prefill")
    return ", ".join(pieces)


def details(one: Found) -> Iterator[str]:
    """What was found, where it differs, and how to see it again."""
    peer = one.peer
    yield f"{one.says} ({one.system}; {peer.model}.)"
    yield ""
    lines = [f"- {dtype}, {line}" for dtype, outcomes in one.outcomes.items() for line in where(outcomes)]
    refusals = {it.said: None for outcomes in one.outcomes.values() for it in outcomes if it.verdict == "refuses"}
    lines += [f"- `{said}`" for said in refusals]
    if lines:
        yield from [*lines, ""]
    requires = " ".join(f"'{line}'" if "<" in line else line for line in (*BASE, *peer.requires))
    yield "```sh"
    yield f"pip install {requires}  # what the next line does"
    yield f"python scripts/who_computes_what.py --environments FOLDER --only '{peer.name}'\n```"


def where(outcomes: list[Outcome]) -> Iterator[str]:
    for it in outcomes:
        if it.verdict == "differs":
            size = it.said or f"{it.ratio:.3g} times what rounding explains"
            position = f", visible in logits from position {it.position}" if it.position >= 0 else ""
            yield f"{it.run}: first at `{it.first}`, {size}{position}"
        elif it.verdict == "fails":
            yield f"{it.run}: `{it.said}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="where the peers are or will be installed")
    parser.add_argument("--only", action="append", choices=[peer.name for peer in PEERS], metavar="PEER", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    found, absent = [], []
    with tempfile.TemporaryDirectory() as place:
        for peer in PEERS:
            if args.only and peer.name not in args.only:
                continue
            print(peer.name, file=sys.stderr, flush=True)
            try:
                found.append(look_at(peer, args.environments, Path(place)))
            except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as reason:
                absent.append((peer, str(reason)))
    print(page(found, absent))


if __name__ == "__main__":
    main()
