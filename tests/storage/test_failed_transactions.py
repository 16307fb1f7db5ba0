"""Transactions that PostgreSQL has given up: the engine's connections get out of them, whatever comes between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psycopg
import pytest

from romancy import DatabaseError
from romancy.storage import postgresql as postgresql_module
from romancy.storage.address import parse_address
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
    monkeypatch.setattr(postgresql_module, "PLANS_SERVE", 0)
    monkeypatch.setattr(postgresql_module, "PLANS_SERVE_S", 0.0)

    def fail(link: Link) -> None:
        with pytest.raises(psycopg.errors.UndefinedTable), store._transaction(link):
            link.execute("SELECT * FROM of_nobody")
        assert link.execute("SELECT 1").fetchone() == (1,)

    store._write(fail).result()


def test_plans_are_made_anew(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql_module, "PLANS_SERVE", 10)
    monkeypatch.setattr(postgresql_module, "PLANS_SERVE_S", 0.0)
    discarded: list[str] = []
    real = psycopg.Connection.execute

    def execute(self: psycopg.Connection, query: str, *arguments: object, **options: object) -> object:
        discarded.extend([query] if query == "DISCARD PLANS" else [])
        return real(self, query, *arguments, **options)

    monkeypatch.setattr(psycopg.Connection, "execute", execute)

    def work(link: Link) -> None:
        for _ in range(40):
            link.execute("SELECT 1")

    store._read(work).result()
    assert len(discarded) in (3, 4)


def test_connection_that_is_stuck_in_a_failed_transaction_is_replaced(store: Store) -> None:
    def leave_it_failed(link: Link) -> None:
        link.execute("BEGIN")
        with contextlib.suppress(psycopg.Error):
            link.execute("SELECT * FROM of_nobody")

    def work(link: Link) -> int:
        with store._transaction(link):
            number: int = link.execute("SELECT 1").fetchone()[0]
        return number

    store._write(leave_it_failed).result()
    with pytest.raises(DatabaseError):
        store._write(work).result()
    assert store._write(work).result() == 1
