"""What every refusal must look like, from Python and from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gemma2
from gemma2.cli import main
from gemma2.load import POCKET
from tests.conftest import raw_config

Complaint = Callable[..., str]
SMALL: dict[str, Any] = {  # the smallest model in which a local and a global layer still differ
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}


def shell(place: Path, **changes: Any) -> Path:
    """A folder with everything but weights, for the pocket tokenizer; a change to None leaves that key out."""
    place.mkdir(exist_ok=True)
    raw = raw_config(**{"vocab_size": 4096, **SMALL, **changes})
    (place / "config.json").write_text(
        json.dumps({key: value for key, value in raw.items() if value is not None}), encoding="utf-8"
    )
    (place / "tokenizer.model").write_bytes((POCKET / "tokenizer.model").read_bytes())
    return place


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Complaint:
    """Run the command line in this process: it must exit with `code` and say one line on stderr, which is returned."""

    def run(*argv: object, code: int) -> str:
        capsys.readouterr()
        try:
            found: object = main([str(word) for word in argv])
        except SystemExit as stop:
            found = stop.code
        out, err = capsys.readouterr()
        assert (found, out) == (code, ""), err
        assert err.startswith("gemma2: error: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert err[:-1].isprintable() and "Traceback" not in err
        return err

    return run


@pytest.fixture
def refused(complaint: Complaint) -> Callable[[Path, str], None]:
    """`source` is no model: BadModelFile from Python, exit 1 from the command line, both with these words."""

    def check(source: Path, words: str) -> None:
        with pytest.raises(gemma2.BadModelFile) as caught:
            gemma2.load(source, device="cpu", progress=False)
        assert words in str(caught.value)
        line = complaint("generate", "x", "--model", source, "--device", "cpu", code=1)
        assert " ".join(words.split()) in line

    return check
