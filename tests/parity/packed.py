"""The mistakes and the sound models of `injected.py`, judged by packs.

python -m tests.parity.packed     # prints the table in docs/packs.md
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

import gemma2
from gemma2.checkpoints.dtypes import dtype_name
from gemma2.load import POCKET
from gemma2.parity.compare import observed
from gemma2.parity.judge_pack import PackJudgement, judge_pack
from gemma2.parity.pack import Pack, dumped, make_pack, parse_port, port_of, read_pack
from gemma2.parity.summary import KEYED
from gemma2.parity.trace import About
from gemma2.research.sites import sites
from gemma2.twins import sharing
from tests.parity.injected import BUGS, Bug, sound_models

PACK = POCKET / "pack.json"


@cache
def shipped() -> Pack:
    return read_pack(PACK)


def judged(model: gemma2.Gemma2, pack: Pack, names: list[str]) -> PackJudgement:
    """What a pack says of a model of which these sites are shown."""
    values = observed(model, pack.ids, names)
    return judge_pack(
        pack, parse_port(Path("port.json"), port_of("a port", dtype_name(model.dtype), pack.ids, values.items()), pack)
    )


def injected_by_pack(bug: Bug, gemma: gemma2.Gemma, names: list[str]) -> PackJudgement:
    """What the shipped pack says of the pocket model with a mistake in it."""
    broken = sharing(copy.deepcopy(gemma.model).to(bug.dtype))
    bug.inject(broken)
    return judged(broken, shipped(), names)


def shown(bug: Bug, gemma: gemma2.Gemma) -> list[str]:
    """The sites of the block in which a mistake must be found, up to there; scores and patterns only if it is there."""
    names = list(sites(gemma.config))
    block = re.match(r"blocks\.\d+\.|logits|ln_final|hook_embed", bug.first)
    assert block
    beside = [name for name in names[: names.index(bug.first)] if name.startswith((block[0], "ln_final"))]
    return [*(name for name in beside if not name.endswith(KEYED)), bug.first]


def pack_of(model: gemma2.Gemma2, ids: list[int], place: Path) -> Pack:
    about = About("ours", dtype_name(model.dtype), model.config)
    place.write_text(dumped(make_pack(model, ids, about)), encoding="utf-8")
    return read_pack(place)


def sound_by_pack(place: Path, models: int = 54) -> Iterator[tuple[str, PackJudgement]]:
    """What packs say of random bfloat16 models that are computed otherwise, and rightly."""
    for name, model, other, ids in sound_models(models):
        yield name, judged(other, pack_of(model, ids, place), list(sites(model.config)))


def main() -> None:
    import tempfile

    gemma = gemma2.load(device="cpu")
    print("| injected | dtype | first site by the pack | times what is allowed |\n|---|---|---|---|")
    for name, bug in BUGS.items():
        found = injected_by_pack(bug, gemma, list(sites(gemma.config)))
        row = next((row for row in found.rows if row.differs), None)
        said = (row.why or f"{row.ratio:.3g}") if row else ""
        print(f"| {name} | {dtype_name(bug.dtype)} | {f'`{row.site}`' if row else ''} | {said} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        highest = [max(row.ratio for row in found.rows) for _, found in sound_by_pack(Path(folder) / "pack.json")]
    wrong = sum(ratio > 1 for ratio in highest)
    print(
        f"\n{wrong} of {len(highest)} sound models differ; the highest site is {max(highest):.2f} times what is allowed"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
