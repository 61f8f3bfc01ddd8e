"""MaxText's golden logits: each line of such a file is a reference that shows logits alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma2
from gemma2.cli import main
from gemma2.load import POCKET
from gemma2.parity.references import open_reference

PROMPTS = ("In the beginning", "And God said, Let there be light")
DEAD = 128  # columns of Google's table that no token id has


def line(gemma: gemma2.Gemma, prompt: str, factor: float = 1.0) -> dict[str, Any]:
    """As generate_hf_golden_logits.py writes it, with the dead columns of the Flax table."""
    ids = gemma.tokenizer.encode(prompt)
    with torch.no_grad():
        logits = gemma.model(torch.tensor([ids]))[0].float() * factor
    return {"prompt": prompt, "tokens": ids, "logits": [[*row, *[0.25] * DEAD] for row in logits.tolist()]}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gemma = gemma2.load(device="cpu", dtype="float32")
    path = tmp_path_factory.mktemp("golden") / "golden_data_gemma2-2b.jsonl"
    lines = [line(gemma, PROMPTS[0]), line(gemma, PROMPTS[1], factor=1.001)]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    return path


def test_a_line_is_compared_on_its_own_token_ids_without_the_dead_columns(
    golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", "pocket", "--against", str(golden)]) == 0
    out = capsys.readouterr().out
    assert "REF    line 1 of MaxText's golden logits, computed in float32" in out
    assert "text   4 token ids from the trace" in out and "sites  1 of 180 compared" in out
    assert "config                         not run" in out and "states no config" in out
    assert out.splitlines()[-1] == "verdict: equal to the bit (1 of 1 sites equal ours in every bit)"


def test_another_line_is_named_by_its_number_and_judged(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "pocket", "--against", f"maxtext:{golden}:2", "--no-cases"]) == 1
    assert "verdict: difference, first at logits" in capsys.readouterr().out
    assert main(["parity", "pocket", "--against", f"maxtext:{golden}:2", "--dtype", "bfloat16", "--no-cases"]) == 0
    reference = open_reference(f"maxtext:{golden}:1", POCKET)
    assert reference.run([2, 1130, 475, 2759], ["logits"])["logits"].shape == (4, 4096)


BAD = {
    "is not valid JSON": b"{",
    "is no JSON object": b"[1]",
    "has no tokens": b'{"logits": [[1.0]]}',
    "has no logits": b'{"tokens": [2]}',
    "tokens must be a list of token ids in [0, 4096)": b'{"tokens": [5000], "logits": [[1.0]]}',
    "must be [1, 4096] or wider": b'{"tokens": [2], "logits": [[1.0]]}',
    "must be 2 lists of numbers, all of one length": b'{"tokens": [2, 3], "logits": [[1.0], [1.0, 2.0]]}',
    "must be 1 lists of numbers": b'{"tokens": [2], "logits": [[' + b"1" * 400 + b"]]}",
    "has 0 lines": b"",
    "is not valid": b'{"tokens": "\xff"}',
}


@pytest.mark.parametrize("said", BAD)
def test_a_line_that_is_none_is_refused_and_named(said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(BAD[said])
    with pytest.raises(gemma2.BadModelFile) as caught:
        open_reference(str(path), POCKET)
    assert said in str(caught.value) and str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(gemma2.BadModelFile, match="cannot be read"):
        open_reference(str(tmp_path / "none.jsonl"), POCKET)
