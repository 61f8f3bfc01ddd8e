"""The page about other implementations is what the study prints, and the study names what differs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gemma2 import Gemma2
from gemma2.config import GLOBAL
from studies.who_computes_what import changes, runs
from studies.who_computes_what.changes import EMPTY, HIDDEN, Fed, Rule, fed, with_cache
from studies.who_computes_what.findings import ALL, CACHED, LONG, PAST, Finding
from studies.who_computes_what.implementations import DTYPES, IMPLEMENTATIONS, Implementation
from studies.who_computes_what.models import CAPACITY, MODELS, RUNS, TINY, random_model, write_model
from studies.who_computes_what.outcomes import Again, Found, Outcome, differing, read, write
from studies.who_computes_what.page import anchor, page, shows, told
from studies.who_computes_what.runs import compared, compared_again, look_at, traces

without_window = changes.changed(layer_types=(GLOBAL,) * TINY["num_hidden_layers"])
ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "who-computes-what.md").read_text(encoding="utf-8")


def run_here(tmp_path: Path, one: Implementation) -> tuple[Path, Gemma2]:
    """An implementation's traces in float32, run with this Python."""
    model = write_model(tmp_path / "model", MODELS[one.model], gguf=False)
    traces(Path(sys.executable), one, tmp_path / "model", tmp_path / "out", "float32")
    return tmp_path / "out", model


def an_implementation(runs: frozenset[str], what: str, change: changes.Change) -> Implementation:
    return Implementation("p", "r", ("p",), finding=Finding("key", runs, "brief", what, change, "short", "cure"))


def says(one: Implementation, outcomes: list[Outcome], out: Path, model: Gemma2) -> tuple[str, str]:
    """What the page says of these traces, compared as the study compares them."""
    again = compared_again(one, outcomes, out, model)
    return told(one, Found(one.name, "system 1", "2026-01-01", "a machine", {"float32": outcomes}, again))


def test_the_page_is_what_the_recorded_runs_print() -> None:
    assert page(read()) == PAGE


def test_every_implementation_has_recorded_runs_in_each_of_its_dtypes_and_stands_on_the_page() -> None:
    found = read()
    assert list(found) == [one.name for one in IMPLEMENTATIONS]
    headings = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)}
    rows = dict(re.findall(r"^\| \[(.*?)\]\(#(.*?)\) \|", PAGE, re.MULTILINE))
    commands = re.findall(r"--only '([^']+)'", PAGE)
    for one in IMPLEMENTATIONS:
        assert tuple(found[one.name].outcomes) == one.dtypes
        assert all([it.run for it in them] == list(RUNS) for them in found[one.name].outcomes.values()), one.name
        assert rows[one.name] in headings and one.name in commands
    assert len({one.name for one in IMPLEMENTATIONS}) == len({anchor(one.name) for one in IMPLEMENTATIONS})


def test_links_within_the_page_lead_to_a_heading() -> None:
    headings = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) <= headings


def test_every_fault_says_what_a_user_can_do_and_whether_it_is_reported() -> None:
    sections = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE))
    found = read()
    for one in IMPLEMENTATIONS:
        if any(differing(them) for them in found[one.name].outcomes.values()):
            assert one.finding and one.finding.cure in sections[one.name], one.name
            assert f"**Reported.** {one.finding.report}" in sections[one.name]


def test_a_dtype_in_which_a_fault_does_not_show_is_not_said_to_show_it() -> None:
    rows = {row.split("](")[0][3:]: row for row in PAGE.split("\n## ")[0].splitlines() if row.startswith("| [")}
    for one in read().values():
        where = rows[one.name].split(" | ")[2]
        seen = {dtype: shows(them) for dtype, them in one.outcomes.items()}
        if len(set(seen.values())) == 1:
            assert where == next(iter(seen.values()))
        else:
            assert all(f"{dtype}: {text or 'hidden by rounding'}" in where for dtype, text in seen.items())


def test_what_was_found_comes_back_from_its_file_as_it_was_to_six_digits(tmp_path: Path) -> None:
    outcomes = {
        "float32": [Outcome("12", "differs", "logits", 1.2345678, 0.012345678, "why", 0), Outcome("64", "not run")]
    }
    one = Found("p", "s", "d", "m", outcomes, Again("key", 1, 2, ("12",)), {"bfloat16": {"12": "rounding"}})
    write([one], tmp_path / "outcomes.json")
    (back,) = read(tmp_path / "outcomes.json").values()
    assert back.outcomes["float32"][0] == Outcome("12", "differs", "logits", 1.23457, 0.0123457, "why", 0)
    assert back.outcomes["float32"][1] == outcomes["float32"][1]
    assert (back.again, back.arithmetic, back.system) == (one.again, one.arithmetic, "s")


def test_runs_compared_with_another_change_than_the_findings_are_not_printed(tmp_path: Path) -> None:
    outcomes = [Outcome(run, "differs", "logits", 2.0, 1.0) for run in RUNS]
    one = next(it for it in IMPLEMENTATIONS if it.finding and it.finding.key == "no score cap")
    found = Found(one.name, "s", "d", "m", dict.fromkeys(DTYPES, outcomes), Again("early shift", 5, 5))
    with pytest.raises(ValueError, match="were not compared with 'no score cap'; run it again"):
        page({one.name: found})


def test_a_heading_is_named_as_github_names_it() -> None:
    assert anchor("litgpt 0.5.13, as its generate() calls it") == "litgpt-0513-as-its-generate-calls-it"
    assert anchor("transformers 5.23.0, flex_attention") == "transformers-5230-flex_attention"


def test_implementations_with_other_requirements_are_installed_in_other_folders() -> None:
    folders: dict[str, set[tuple[str, ...]]] = {}
    for one in IMPLEMENTATIONS:
        folders.setdefault(one.environment, set()).add(one.requires)
    assert all(len(requires) == 1 for requires in folders.values()), folders


@pytest.mark.long
def test_transformers_live_computes_gemma_2_as_published_and_an_injected_change_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out, model = run_here(tmp_path, IMPLEMENTATIONS[0])
    found = list(compared(out, model))
    assert [one.run for one in found] == list(RUNS)
    assert differing(found) == set(), found
    # To a model whose layers are swapped, the same traces are those of an implementation with swapped layers.
    injected = changes.swapped(model)
    found = list(compared(out, injected))
    assert differing(found) == LONG, found
    assert next(one.first for one in found if one.run == "64") == "blocks.0.hook_attn_out"
    _, text = says(an_implementation(LONG, "Swapped.", changes.swapped), found, out, injected)
    assert "Swapped. With this injected into our model, all 5 traces in float32 agree" in text
    _, text = says(an_implementation(LONG, "No window.", without_window), found, out, injected)
    assert "not explained" in text
    _, text = says(an_implementation(ALL, "Swapped.", changes.swapped), found, out, injected)
    assert "not explained" in text


@pytest.mark.long
def test_a_change_is_injected_as_it_is_for_the_chunks_of_each_run(tmp_path: Path) -> None:
    # An implementation that forgets what it was fed, from nothing but our model run on each chunk alone.
    model = random_model(TINY)
    for run, (length, chunks) in RUNS.items():
        ids = torch.randint(TINY["vocab_size"], (length,), generator=torch.Generator().manual_seed(2))
        logits = torch.cat([model(part[None])[0] for part in ids.split(list(chunks) or length)])
        about = {"format": "gemma2-trace 1", "system": "forgetful", "dtype": "float32", "config": json.dumps(TINY)}
        save_file({"ids": ids, "logits": logits}, tmp_path / f"{run}.safetensors", metadata=about)
    found = list(compared(tmp_path, model))
    assert differing(found) == CACHED, found
    brief, text = says(an_implementation(CACHED, "Forgets.", with_cache(changes.own_chunk)), found, tmp_path, model)
    assert brief == "brief"
    assert text == "Forgets. With this injected into our model, all 5 traces in float32 agree to rounding."
    _, text = says(an_implementation(CACHED, "Early.", with_cache(changes.early_shift)), found, tmp_path, model)
    assert text.startswith(
        "Early. With this injected into our model, 2 of 5 traces in float32 agree to rounding; not explained: `12, p"
    )


def test_what_a_cache_shows_of_the_published_model_is_the_published_model() -> None:
    model, ids = random_model(TINY), torch.arange(40)[None]
    injected = with_cache(Fed.as_published)(model, (20, *[1] * 20))
    torch.testing.assert_close(injected(ids), model(ids), atol=1e-4, rtol=0)
    assert torch.equal(with_cache(Fed.as_published)(model)(ids), model(ids))


def seen(rule: Rule, chunks: tuple[int, ...], window: int | None) -> list[tuple[dict[int, float], int]]:
    """Of each query: the keys that it sees, with what is added to their scores, and how many empty slots."""
    sums = rule(fed(chunks), window)
    if sums.dtype == torch.bool:
        sums = torch.zeros(sums.shape).masked_fill(~sums, HIDDEN)
    t = sum(chunks)
    assert sums.shape == (t, t + EMPTY)
    return [
        ({k: row[k] for k in range(t) if row[k] != HIDDEN}, sum(x != HIDDEN for x in row[t:])) for row in sums.tolist()
    ]


@pytest.mark.parametrize("window", [4, 5])
@pytest.mark.parametrize("first", [1, 2, 3, 4, 7])
def test_a_shift_that_comes_early_is_a_ring_that_shifts_before_it_is_full(window: int, first: int) -> None:
    chunks = (first, *[1] * 12)
    rows = seen(changes.early_shift, chunks, window)
    slots: list[int | None] = [*range(first)][-window:]
    slots += [None] * (window - len(slots))
    for query in range(first, sum(chunks)):
        if query >= window - 1:  # the last slot's number, as if all before it were taken and none free
            slots = [*slots[1:], slots[0]]
        slots[min(query, window - 1)] = query
        visible = slots if query >= window - 1 else slots[: query + 1]
        assert rows[query] == (dict.fromkeys(sorted(k for k in visible if k is not None), 0.0), visible.count(None))
    everything = seen(Fed.as_published, chunks, None)
    assert seen(changes.early_shift, chunks, None) == everything


def test_a_window_that_counts_from_the_row_shows_the_first_keys() -> None:
    rows = [set(keys) for keys, _ in seen(changes.first_keys, (2, 1, 1, 1), 3)]
    assert rows == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2}, {0, 1, 2}]
    rows = [set(keys) for keys, _ in seen(changes.first_keys, (2, 3), 3)]
    assert rows[2:] == [{0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}]
    assert [set(keys) for keys, _ in seen(changes.first_keys, (2, 1, 1), None)][3] == {0, 1, 2, 3}


def test_a_mask_that_is_added_hides_only_what_the_cache_does_not_hold() -> None:
    rows = seen(changes.added_mask(empty=True), (2, 1), None)
    assert rows == [
        ({0: 1.0, 1: 0.0}, CAPACITY - 2),
        ({0: 1.0, 1: 1.0}, CAPACITY - 2),
        ({0: 1.0, 1: 1.0, 2: 1.0}, CAPACITY - 3),
    ]
    assert seen(changes.added_mask(empty=False), (2, 1), None)[0] == ({0: 1.0, 1: 0.0}, 0)
    assert seen(changes.added_mask(empty=True), (2, 1, 1), 3)[3] == ({1: 1.0, 2: 1.0, 3: 1.0}, 0)


def test_an_empty_slot_is_a_key_and_a_value_of_zeros_and_sums_are_on_capped_scores() -> None:
    def one_empty(run: Fed, window: int | None) -> Tensor:
        visible = run.as_published(window) | (run.slot == 0)
        return torch.where(run.key == 1, 2.0, 0.0).masked_fill(~visible, HIDDEN)

    model, ids = random_model(TINY), torch.arange(6)[None]
    injected = with_cache(one_empty)(model, (6,))
    attend = injected.model.layers[0].get_submodule("self_attn.attend")
    q, k, v = torch.randn(1, 6, 8, 16), torch.randn(1, 6, 4, 16), torch.randn(1, 6, 4, 16)
    positions = torch.arange(6)[None]
    z = attend(q, k, v, positions, positions)
    scores = 50 * torch.tanh(q[0, 2, 5] @ k[0, :3, 2].T * 36**-0.5 / 50) + torch.tensor([0.0, 2.0, 0.0])
    weights = torch.cat((scores, torch.zeros(1))).softmax(-1)
    torch.testing.assert_close(z[0, 2, 5], weights[:3] @ v[0, :3, 2])
    assert not torch.allclose(injected(ids), model(ids), atol=1e-2)


def test_a_run_that_fails_has_its_error(tmp_path: Path) -> None:
    (tmp_path / "64, prefill 32.txt").write_text("ValueError: too long", encoding="utf-8")
    found = {one.run: one for one in compared(tmp_path, random_model(TINY))}
    assert (found["64, prefill 32"].verdict, found["64, prefill 32"].said) == ("fails", "ValueError: too long")
    assert found["64"].verdict == "not run"


def test_an_implementation_is_not_said_to_be_right_where_it_was_not_run(tmp_path: Path) -> None:
    model = random_model(TINY)
    outcomes = [Outcome(run, "not run" if run in CACHED else "rounding") for run in RUNS]
    assert says(IMPLEMENTATIONS[0], outcomes, tmp_path, model)[0] == "as published in one pass; with a cache not run"
    outcomes = [Outcome(run, "rounding") for run in RUNS]
    assert says(IMPLEMENTATIONS[0], outcomes, tmp_path, model)[0] == "as published"


def test_an_implementation_that_does_not_build_its_model_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^KeyError: 'no such recipe'$"):
        run_here(tmp_path, Implementation("nobody", "no such recipe", ("nobody",)))


@pytest.mark.long
def test_only_an_implementation_that_is_known_to_refuse_is_said_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "environment", lambda folder, one: Path(sys.executable))
    one = Implementation("nobody", "no such recipe", ("nobody",), refuses=True)
    found = look_at(one, tmp_path, tmp_path)
    assert told(one, found)[0] == "nothing: it refuses"
    monkeypatch.setattr("studies.who_computes_what.page.IMPLEMENTATIONS", [one])
    printed = page({"nobody": found})
    assert printed.count("`KeyError: 'no such recipe'`") == 1
    assert "| nothing: it refuses | when the model is built |  |" in printed
    with pytest.raises(RuntimeError, match="no such recipe"):
        look_at(Implementation("other", "no such recipe", ("nobody",)), tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("differs", "fails", "words"),
    [
        (set(), set(), ""),
        (ALL, set(), "every use"),
        (LONG, set(), "any use beyond the window"),
        (CACHED, set(), "any use of its cache"),
        ({"64"}, PAST, "one pass beyond the window; fails: decoding beyond the window"),
        ({"12", "64", "12, prefill 6"}, PAST, "every use; fails: decoding beyond the window"),
        ({"64, prefill 8"}, set(), "decoding beyond the window after a shorter prompt"),
        (
            {"12, prefill 6", "64, prefill 8"},
            {"64, prefill 32"},
            "any use of its cache; fails: a prompt longer than the window, with its cache",
        ),
    ],
)
def test_the_use_in_which_it_shows_is_told_from_the_runs(differs: set[str], fails: set[str], words: str) -> None:
    verdicts = {run: "differs" if run in differs else "fails" if run in fails else "rounding" for run in RUNS}
    assert shows([Outcome(run, verdict, position=0) for run, verdict in verdicts.items()]) == words


def test_a_difference_that_shows_in_no_logit_is_called_small() -> None:
    small = Outcome("12", "differs", "logits", 1.1, 1e-5)
    assert shows([small]) == "small: one pass within the window"
    assert shows([small, Outcome("12, prefill 6", "differs", position=3)]) == (
        "any use of its cache; small: one pass within the window"
    )


def test_what_an_injected_change_leaves_over_is_named_with_its_size() -> None:
    one = next(it for it in IMPLEMENTATIONS if it.finding and it.finding.runs == LONG)
    outcomes = {"float32": [Outcome(run, "differs", "logits", 2.0, 1.0) for run in RUNS]}
    again = Again(one.finding.key if one.finding else "", 4, 5, ("`12`, 1.09 times what rounding explains",), 1.09)
    brief, text = told(one, Found(one.name, "s", "d", "m", outcomes, again))
    assert brief.endswith("; and something that is not explained, at most 1.1 times what rounding explains")
    assert text.endswith(
        "4 of 5 traces in float32 agree to rounding; not explained: `12`, 1.09 times what rounding explains."
    )


def test_implementations_without_a_difference_share_one_section() -> None:
    outcomes = {"float32": [Outcome(run, "equal bits", apart=1e-5) for run in RUNS]}
    one = IMPLEMENTATIONS[0]
    printed = page({one.name: Found(one.name, "system 1", "2026-01-01", "a machine", outcomes)})
    assert f"| [{one.name}](#as-published) | as published |  |  |  |" in printed
    section = printed.split("\n## As published\n")[1].split("\n## ")[0]
    assert f"- {one.name} (system 1; run on 2026-01-01): `python -m studies" in section
    assert "\n\n\n" not in printed


def test_the_page_has_no_stray_blank_lines() -> None:
    assert "\n\n\n" not in PAGE


def test_changes_leave_the_model_they_are_injected_in_alone() -> None:
    model, ids, chunks = random_model(TINY), torch.arange(20)[None], (8, *[1] * 12)
    before = model(ids)
    rules = (changes.first_keys, changes.own_chunk, changes.early_shift, changes.added_mask(True))
    simple = (changes.swapped, changes.without_score_cap, without_window)
    for change in (*simple, changes.as_torchtune, *map(with_cache, rules)):
        assert not torch.equal(change(model, chunks)(ids), before)
        assert torch.equal(model(ids), before)
