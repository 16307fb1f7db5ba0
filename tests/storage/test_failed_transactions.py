"""Transactions that PostgreSQL has given up: the engine's connections get out of them, whatever comes between."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from romancy.storage import postgresql_link
from romancy.storage.address import parse_address
from romancy.storage.postgresql_link import PostgresqlLink
from romancy.storage.store import Store
from romancy.storage.stores import make_store
from romancy.storage.threads import Link
from tests.databases import clean


@pytest.fixture
def store(postgresql_url: str) -> Iterator[Store]:
    store = make_store(parse_address(postgresql_url), [])
    store.open(migrate=True)
    yield store
    store.close()
    clean(postgresql_url)


def test_plans_are_left_alone_in_a_failed_transaction(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its end would never be reached."""
    monkeypatch.setattr(postgresql_link, "PLANS_SERVE_S", 0.0)

    def fail(link: Link) -> None:
        assert isinstance(link, PostgresqlLink)
        link._plans_serve = 0
        with pytest.raises(psycopg.errors.UndefinedTable), store._transaction(link):
            link.execute("SELECT * FROM of_nobody")
        assert link.execute("SELECT 1").fetchone() == (1,)

    store._write(fail).result()
