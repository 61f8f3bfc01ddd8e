"""Skips that name the extra to install, and the pocket model with both faces: ours and transformers' own."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

import gemma2

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the hub, and some tools ask it all the same
SLOW = ("test_attach.py", "test_distributed.py", "test_export.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that need no package and many seconds run where this folder is named."""
    named = any("ecosystem" in str(arg) for arg in config.args)
    return True if collection_path.name in SLOW and not named else None


def needs(package: str) -> Any:
    """The imported package, or a skip: of the whole file if it is called at the top of one."""
    cure = "pip install -c constraints.txt -e '.[ecosystem]', or make test-ecosystem"
    return pytest.importorskip(package, reason=f"{package} is missing: {cure}")


@pytest.fixture(scope="session")
def written(pocket: gemma2.Gemma, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket model as a folder of transformers."""
    place = tmp_path_factory.mktemp("written") / "pocket"
    gemma2.convert(pocket, place)
    return place


@pytest.fixture
def face(pocket: gemma2.Gemma) -> Any:
    """A copy of the pocket model with transformers' face."""
    return gemma2.as_transformers(gemma2.Gemma(copy.deepcopy(pocket.model), pocket.tokenizer))


@pytest.fixture
def theirs(written: Path) -> Any:
    """transformers' own model with the same weights."""
    found = needs("transformers").AutoModelForCausalLM.from_pretrained(
        written, dtype="float32", attn_implementation="eager"
    )
    found.generation_config.eos_token_id = [1, 107]  # which the folder does not state
    return found


@pytest.fixture
def their_tokenizer(written: Path) -> Any:
    return needs("transformers").AutoTokenizer.from_pretrained(written)
