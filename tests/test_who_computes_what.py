"""The page about other implementations is what its script prints, and the script names what differs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import peer_changes
import peer_runs
import pytest
import torch
from peer_changes import EMPTY, HIDDEN, Fed, Rule, fed, with_cache
from peer_list import ALL, CACHED, LONG, PAST, PEERS, Finding, Peer
from peer_models import CAPACITY, MODELS, RUNS, TINY, random_model, write_model
from peer_runs import Found, Outcome, differing, explained, held, look_at, traces
from safetensors.torch import save_file
from torch import Tensor
from who_computes_what import anchor, page, shows

from gemma2 import Gemma2
from gemma2.config import GLOBAL

without_window = peer_changes.changed(layer_types=(GLOBAL,) * TINY["num_hidden_layers"])
ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "who-computes-what.md").read_text()


def run_here(tmp_path: Path, peer: Peer) -> tuple[Path, Gemma2]:
    """A peer's traces in float32, run with this Python."""
    model = write_model(tmp_path / "model", MODELS[peer.model], gguf=False)
    traces(Path(sys.executable), peer, tmp_path / "model", tmp_path / "out", "float32")
    return tmp_path / "out", model


def a_peer(runs: frozenset[str], what: str, change: peer_changes.Change) -> Peer:
    return Peer("p", "r", ("p",), finding=Finding(runs, "brief", what, change))


def test_every_command_on_the_page_names_a_peer_of_the_script() -> None:
    names = re.findall(r"--only '([^']+)'", PAGE)
    assert names and set(names) <= {peer.name for peer in PEERS}
    assert "scripts/who_computes_what.py" in PAGE


def test_every_peer_is_on_the_page_and_its_row_leads_to_its_section() -> None:
    headings = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)}
    rows = dict(re.findall(r"^\| \[(.*?)\]\(#(.*?)\) \|", PAGE, re.MULTILINE))
    for peer in PEERS:
        assert rows.get(peer.name) in headings or f"\n- {peer.name}: " in PAGE, peer.name
    assert len({peer.name for peer in PEERS}) == len(PEERS) == len({anchor(peer.name) for peer in PEERS})


def test_a_heading_is_named_as_github_names_it() -> None:
    assert anchor("litgpt 0.5.13, as its generate() calls it") == "litgpt-0513-as-its-generate-calls-it"
    assert anchor("transformers 5.23.0, flex_attention") == "transformers-5230-flex_attention"


def test_peers_with_other_requirements_are_installed_in_other_folders() -> None:
    folders: dict[str, set[tuple[str, ...]]] = {}
    for peer in PEERS:
        folders.setdefault(peer.environment, set()).add(peer.requires)
    assert all(len(requires) == 1 for requires in folders.values()), folders


def test_transformers_live_computes_gemma_2_as_published_and_a_planted_change_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out, model = run_here(tmp_path, PEERS[0])
    found = list(held(out, model))
    assert [one.run for one in found] == list(RUNS)
    assert differing(found) == set(), found
    # The same traces are those of a peer with its layers swapped to one whose model has them so.
    planted = peer_changes.swapped(model)
    found = list(held(out, planted))
    assert differing(found) == LONG, found
    assert next(one.first for one in found if one.run == "64") == "blocks.0.hook_attn_out"
    _, says = explained(a_peer(LONG, "Swapped.", peer_changes.swapped), found, out, planted)
    assert "Swapped. With this planted in our model, all 5 traces agree" in says
    _, says = explained(a_peer(LONG, "No window.", without_window), found, out, planted)
    assert "not explained" in says
    _, says = explained(a_peer(ALL, "Swapped.", peer_changes.swapped), found, out, planted)
    assert "not explained" in says


def test_a_change_is_planted_as_it_is_for_the_chunks_of_each_run(tmp_path: Path) -> None:
    # A peer that forgets what it was fed, from nothing but our model run on each chunk alone.
    model = random_model(TINY)
    for run, (length, chunks) in RUNS.items():
        ids = torch.randint(TINY["vocab_size"], (length,), generator=torch.Generator().manual_seed(2))
        logits = torch.cat([model(part[None])[0] for part in ids.split(list(chunks) or length)])
        about = {"format": "gemma2-trace 1", "system": "forgetful", "dtype": "float32", "config": json.dumps(TINY)}
        save_file({"ids": ids, "logits": logits}, tmp_path / f"{run}.safetensors", metadata=about)
    found = list(held(tmp_path, model))
    assert differing(found) == CACHED, found
    brief, says = explained(a_peer(CACHED, "Forgets.", with_cache(peer_changes.own_chunk)), found, tmp_path, model)
    assert brief == "brief"
    assert says == "Forgets. With this planted in our model, all 5 traces agree to rounding."
    _, says = explained(a_peer(CACHED, "Early.", with_cache(peer_changes.early_shift)), found, tmp_path, model)
    assert says.startswith(
        "Early. With this planted in our model, 2 of 5 traces agree to rounding; not explained: 12 c"
    )


def test_what_a_cache_shows_of_the_published_model_is_the_published_model() -> None:
    model, ids = random_model(TINY), torch.arange(40)[None]
    planted = with_cache(Fed.as_published)(model, (20, *[1] * 20))
    torch.testing.assert_close(planted(ids), model(ids), atol=1e-4, rtol=0)
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
    rows = seen(peer_changes.early_shift, chunks, window)
    slots: list[int | None] = [*range(first)][-window:]
    slots += [None] * (window - len(slots))
    for query in range(first, sum(chunks)):
        if query >= window - 1:  # the last slot's number, as if all before it were taken and none free
            slots = [*slots[1:], slots[0]]
        slots[min(query, window - 1)] = query
        visible = slots if query >= window - 1 else slots[: query + 1]
        assert rows[query] == (dict.fromkeys(sorted(k for k in visible if k is not None), 0.0), visible.count(None))
    everything = seen(Fed.as_published, chunks, None)
    assert seen(peer_changes.early_shift, chunks, None) == everything


def test_a_window_that_counts_from_the_row_shows_the_first_keys() -> None:
    rows = [set(keys) for keys, _ in seen(peer_changes.first_keys, (2, 1, 1, 1), 3)]
    assert rows == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2}, {0, 1, 2}]
    rows = [set(keys) for keys, _ in seen(peer_changes.first_keys, (2, 3), 3)]
    assert rows[2:] == [{0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}]
    assert [set(keys) for keys, _ in seen(peer_changes.first_keys, (2, 1, 1), None)][3] == {0, 1, 2, 3}


def test_a_mask_that_is_added_hides_only_what_the_cache_does_not_hold() -> None:
    rows = seen(peer_changes.added_mask(empty=True), (2, 1), None)
    assert rows == [
        ({0: 1.0, 1: 0.0}, CAPACITY - 2),
        ({0: 1.0, 1: 1.0}, CAPACITY - 2),
        ({0: 1.0, 1: 1.0, 2: 1.0}, CAPACITY - 3),
    ]
    assert seen(peer_changes.added_mask(empty=False), (2, 1), None)[0] == ({0: 1.0, 1: 0.0}, 0)
    assert seen(peer_changes.added_mask(empty=True), (2, 1, 1), 3)[3] == ({1: 1.0, 2: 1.0, 3: 1.0}, 0)


def test_an_empty_slot_is_a_key_and_a_value_of_zeros_and_sums_are_on_capped_scores() -> None:
    def one_empty(run: Fed, window: int | None) -> Tensor:
        visible = run.as_published(window) | (run.slot == 0)
        return torch.where(run.key == 1, 2.0, 0.0).masked_fill(~visible, HIDDEN)

    model, ids = random_model(TINY), torch.arange(6)[None]
    planted = with_cache(one_empty)(model, (6,))
    attend = planted.model.layers[0].get_submodule("self_attn.attend")
    q, k, v = torch.randn(1, 6, 8, 16), torch.randn(1, 6, 4, 16), torch.randn(1, 6, 4, 16)
    z = attend(q, k, v, torch.ones(1, 1, 6, 6, dtype=torch.bool))
    scores = 50 * torch.tanh(q[0, 2, 5] @ k[0, :3, 2].T * 36**-0.5 / 50) + torch.tensor([0.0, 2.0, 0.0])
    weights = torch.cat((scores, torch.zeros(1))).softmax(-1)
    torch.testing.assert_close(z[0, 2, 5], weights[:3] @ v[0, :3, 2])
    assert not torch.allclose(planted(ids), model(ids), atol=1e-2)


def test_a_run_that_a_peer_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    (tmp_path / "64 cached.txt").write_text("ValueError: too long")
    found = {one.run: one for one in held(tmp_path, random_model(TINY))}
    assert (found["64 cached"].verdict, found["64 cached"].said) == ("fails", "ValueError: too long")
    assert found["64"].verdict == "not run"


def test_a_peer_is_not_said_to_be_right_where_it_was_not_run(tmp_path: Path) -> None:
    model = random_model(TINY)
    outcomes = [Outcome(run, "not run" if run in CACHED else "rounding") for run in RUNS]
    assert explained(PEERS[0], outcomes, tmp_path, model)[0] == "as published in one pass; with a cache not run"
    outcomes = [Outcome(run, "rounding") for run in RUNS]
    assert explained(PEERS[0], outcomes, tmp_path, model)[0] == "as published"


def test_a_peer_that_does_not_build_its_model_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^KeyError: 'no such recipe'$"):
        run_here(tmp_path, Peer("nobody", "no such recipe", ("nobody",)))


def test_only_a_peer_that_is_known_to_refuse_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_runs, "environment", lambda folder, peer: Path(sys.executable))
    peer = Peer("nobody", "no such recipe", ("nobody",), refuses=True)
    found = look_at(peer, tmp_path, tmp_path)
    assert found.brief == "nothing: it refuses"
    printed = page([found], [])
    assert printed.count("`KeyError: 'no such recipe'`") == 1
    assert "| nothing: it refuses | when it is built |  |" in printed
    with pytest.raises(RuntimeError, match="no such recipe"):
        look_at(Peer("other", "no such recipe", ("nobody",)), tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("differs", "fails", "words"),
    [
        (set(), set(), ""),
        (ALL, set(), "every token"),
        (LONG, set(), "beyond the window"),
        (CACHED, set(), "any use of its cache"),
        ({"64"}, PAST, "one pass beyond the window; fails: decoding beyond the window"),
        ({"12", "64", "12 cached"}, PAST, "every token; fails: decoding beyond the window"),
        ({"64 from 8"}, set(), "decoding beyond the window from a shorter prefill"),
        (
            {"12 cached", "64 from 8"},
            {"64 cached"},
            "any use of its cache; fails: a prefill longer than the window into its cache",
        ),
    ],
)
def test_the_use_in_which_it_shows_is_told_from_the_runs(differs: set[str], fails: set[str], words: str) -> None:
    verdicts = {run: "differs" if run in differs else "fails" if run in fails else "rounding" for run in RUNS}
    assert shows([Outcome(run, verdict) for run, verdict in verdicts.items()]) == words


def test_a_peer_without_a_difference_has_a_short_section() -> None:
    outcomes = {"float32": [Outcome(run, "equal bits", apart=1e-5) for run in RUNS]}
    printed = page([Found(PEERS[0], "system 1", outcomes, "as published", "Gemma 2 as published.")], [])
    assert "| as published |  |  |" in printed
    section = printed.split(f"\n## {PEERS[0].name}\n")[1]
    assert section.startswith("\nGemma 2 as published. (system 1; 4 layers.)\n\n```sh\npip")
    assert len(section.splitlines()) == 7
    assert "\n\n\n" not in printed


def test_the_page_has_no_stray_blank_lines() -> None:
    assert "\n\n\n" not in PAGE


def test_changes_leave_the_model_they_are_planted_in_alone() -> None:
    model, ids, chunks = random_model(TINY), torch.arange(20)[None], (8, *[1] * 12)
    before = model(ids)
    rules = (peer_changes.first_keys, peer_changes.own_chunk, peer_changes.early_shift, peer_changes.added_mask(True))
    changes = (peer_changes.swapped, peer_changes.without_score_cap, without_window)
    for change in (*changes, peer_changes.as_torchtune, *map(with_cache, rules)):
        assert not torch.equal(change(model, chunks)(ids), before)
        assert torch.equal(model(ids), before)
