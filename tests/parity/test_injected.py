"""`parity` finds mistakes that were made in real ports, at their place, and does not take rounding for one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import gemma2
from gemma2.parity.compare import first_difference
from tests.conftest import LONG
from tests.parity.injected import BUGS, SHOWN, injected_rows, sound_rows


@pytest.fixture(scope="module")
def shipped() -> gemma2.Gemma:
    return gemma2.load(device="cpu", dtype="float32")


@pytest.mark.long
@pytest.mark.parametrize("name", BUGS)
def test_each_injected_mistake_is_found_first_at_its_place(name: str, shipped: gemma2.Gemma) -> None:
    first = first_difference(injected_rows(BUGS[name], shipped))
    assert first is not None and first.site == BUGS[name].first


HIDDEN = {"cap after mask": {*SHOWN}, "1 + w in the parameter's dtype": {"logits"}}


@pytest.mark.parametrize("name", BUGS if LONG else list(BUGS)[::4])
def test_each_is_found_of_systems_that_show_less_but_for_those_that_docs_parity_names(
    name: str, shipped: gemma2.Gemma
) -> None:
    missed = {what for what, shown in SHOWN.items() if not first_difference(injected_rows(BUGS[name], shipped, shown))}
    assert missed == HIDDEN.get(name, set())


def test_a_mistake_is_reported_at_its_own_places_and_nowhere_downstream(shipped: gemma2.Gemma) -> None:
    wrong = {row.site for row in injected_rows(BUGS["erf GELU"], shipped) if row.differs}
    assert wrong == {f"blocks.{i}.mlp.hook_post" for i in range(6)}
    wrong = {row.site for row in injected_rows(BUGS["window off by one"], shipped) if row.differs}
    assert wrong == {f"blocks.{i}.attn.hook_attn_scores" for i in (0, 2, 4)}


@pytest.mark.long
def test_rounding_is_no_difference_in_fifty_random_models() -> None:
    count = 0
    for name, rows in sound_rows(models=54):
        first = first_difference(rows)
        assert first is None, f"{name}: {first}"
        assert any(not row.bitwise for row in rows)
        count += 1
    assert count >= 50


def test_a_trace_without_a_bos_differs_in_the_token_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gemma2.cli import main

    ids = tmp_path / "ids.json"
    gemma = gemma2.load(device="cpu")
    ids.write_text(json.dumps(gemma.tokenizer.encode("In the beginning God created", bos=False)), encoding="utf-8")
    trace = tmp_path / "trace.safetensors"
    assert main(["trace", "pocket", "--ids", str(ids), "-o", str(trace), "--sites", "logits"]) == 0
    capsys.readouterr()
    assert main(["parity", "pocket", "--against", str(trace), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["first"]) == ("difference", "token ids")


def test_a_value_that_is_not_finite_is_named_where_it_arises(shipped: gemma2.Gemma) -> None:
    import copy

    from gemma2.parity.compare import compare, observed
    from gemma2.research.sites import sites

    broken = copy.deepcopy(shipped.model)
    with torch.no_grad():
        broken.get_parameter("model.layers.3.mlp.up_proj.weight")[0, 0] = torch.nan
    ids = shipped.tokenizer.encode("In the beginning")
    first = first_difference(compare(shipped.model, ids, observed(broken, ids, sites(shipped.config))))
    assert first is not None and first.site == "blocks.3.mlp.hook_pre_linear" and "not finite" in first.why
