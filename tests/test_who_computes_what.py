"""The page about other implementations is what its script prints, and the script names what differs."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma2 import Gemma2

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "who_computes_what.py"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("who_computes_what", SCRIPT)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["who_computes_what"] = loaded  # where its dataclasses look for their names
    spec.loader.exec_module(loaded)
    return loaded


script = load_script()
PAGE = (ROOT / "docs" / "who-computes-what.md").read_text()


def look(tmp_path: Path, peer: Any) -> tuple[Path, Gemma2]:
    """A peer's traces in float32, run with this Python."""
    model = script.write_model(tmp_path / "model", script.MODELS[peer.model], gguf=False)
    script.traces(Path(sys.executable), peer, tmp_path / "model", tmp_path / "out", "float32")
    return tmp_path / "out", model


def test_every_command_on_the_page_names_a_peer_of_the_script() -> None:
    names = re.findall(r"--only '([^']+)'", PAGE)
    assert names and set(names) <= {peer.name for peer in script.PEERS}
    assert str(SCRIPT.relative_to(ROOT)) in PAGE


def test_every_peer_is_on_the_page() -> None:
    assert all(f"\n## {peer.name}\n" in PAGE or f"\n- {peer.name}: " in PAGE for peer in script.PEERS)


def test_transformers_live_computes_gemma_2_as_published_and_a_planted_change_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out, model = look(tmp_path, script.PEERS[0])
    found = list(script.held(out, model))
    assert [one.run for one in found] == list(script.RUNS)
    assert script.differing(found) == set(), found
    # The same traces are those of a peer with its layers swapped to one whose model has them so.
    planted = script.swapped(model)
    found = list(script.held(out, planted))
    assert script.differing(found) == script.LONG, found
    assert next(one.first for one in found if one.run == "64") == "blocks.0.hook_attn_out"
    peer = script.Peer("p", "r", ("p",), finding=script.Finding(script.LONG, "Swapped.", script.swapped))
    assert "Swapped. With this planted in our model, all 5 traces agree" in script.explained(peer, found, out, planted)
    other = script.Peer("p", "r", ("p",), finding=script.Finding(script.LONG, "No window.", script.without_window))
    assert "not explained" in script.explained(other, found, out, planted)
    none = script.Peer("p", "r", ("p",), finding=script.Finding(script.ALL, "Swapped.", script.swapped))
    assert "not explained" in script.explained(none, found, out, planted)


def test_a_run_that_a_peer_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    (tmp_path / "64 cached.txt").write_text("ValueError: too long")
    found = {one.run: one for one in script.held(tmp_path, script.random_model(script.TINY))}
    assert (found["64 cached"].verdict, found["64 cached"].said) == ("fails", "ValueError: too long")
    assert found["64"].verdict == "not run"


def test_a_peer_that_does_not_build_its_model_is_told_in_a_line(tmp_path: Path) -> None:
    peer = script.Peer("nobody", "no such recipe", ("nobody",))
    with pytest.raises(RuntimeError, match=r"^KeyError: 'no such recipe'$"):
        look(tmp_path, peer)


def test_changes_leave_the_model_they_are_planted_in_alone() -> None:
    model, ids = script.random_model(script.TINY), torch.arange(20)[None]
    before = model(ids)
    for change in (script.swapped, script.without_score_cap, script.as_torchtune, script.without_window):
        assert not torch.equal(change(model)(ids), before)
        assert torch.equal(model(ids), before)
