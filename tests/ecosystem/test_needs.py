"""A package that is missing skips its tests, and the skip says what to install."""

from __future__ import annotations

import json

import pytest

from tests.ecosystem.conftest import needs


def test_a_missing_package_skips_and_names_the_extra() -> None:
    with pytest.raises(pytest.skip.Exception, match=r"no_such_package is missing: pip install .*\[ecosystem\]"):
        needs("no_such_package")


def test_a_package_that_is_there_is_given() -> None:
    assert needs("json") is json
