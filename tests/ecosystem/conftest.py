"""Skips that name the extra to install."""

from __future__ import annotations

from typing import Any

import pytest


def needs(package: str) -> Any:
    """The imported package, or a skip: of the whole file if it is called at the top of one."""
    cure = "pip install -c constraints.txt -e '.[ecosystem]', or make test-ecosystem"
    return pytest.importorskip(package, reason=f"{package} is missing: {cure}")
