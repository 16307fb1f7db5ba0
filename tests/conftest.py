"""Fixtures for all tests: a fresh database each, and definitions that vanish with the test."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from romancy.testing import VirtualClock, isolated_catalogue

# Many tests start processes; each module is compiled once for all of them, not once for each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(__file__).parents[1] / "build" / "pycache"))


@pytest.fixture(autouse=True)
def _own_definitions() -> Iterator[None]:
    with isolated_catalogue():
        yield


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database file of this test's own."""
    return tmp_path / "romancy.db"


@pytest.fixture
async def clock() -> VirtualClock:
    """A clock that the test moves."""
    return VirtualClock()


@pytest.fixture
def romancy_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What Romancy logs, from debug on."""
    caplog.set_level(logging.DEBUG, "romancy")
    return caplog
