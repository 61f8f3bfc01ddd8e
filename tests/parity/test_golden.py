"""transformers, live, on the prompts of the golden traces: every bit of ours is its, and so are the stored traces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gemma2
from gemma2.load import POCKET
from gemma2.parity.references import open_reference
from gemma2.parity.tolerances import TOLERANCES
from gemma2.parity.trace import Trace
from gemma2.research import capture
from tests.test_golden_pocket import DTYPES, TRACES, apart

pytest.importorskip("transformers", reason="the live comparison needs the extra gemma2[transformers]")


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_every_site_that_transformers_shows_is_met_to_the_bit_and_the_stored_ones_within_rounding(path: Path) -> None:
    trace = Trace(path)
    dtype = DTYPES[trace.about.dtype]
    external, model = open_reference("transformers", POCKET, dtype), gemma2.load(dtype=dtype, device="cpu").model
    theirs = external.run(trace.ids, external.sites)
    with torch.no_grad(), capture(model, external.sites) as ours:
        model(torch.tensor([trace.ids]))
    assert set(trace.names) < theirs.keys() and len(theirs) > 60
    unequal = [name for name, value in theirs.items() if not torch.equal(ours[name][0], value)]
    assert not unequal, unequal
    assert all(apart(theirs[name], trace[name]) <= TOLERANCES[dtype].bound for name in trace.names)
