"""All tests of this folder run on every database."""

from __future__ import annotations

import pytest

from tests.databases import Database


@pytest.fixture
def database(any_database: Database) -> Database:
    """An empty database, on each kind in turn."""
    return any_database
