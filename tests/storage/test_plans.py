"""How PostgreSQL plans the statements of the engine: by indexes, also while its tables are young."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import count

import psycopg
import pytest

from romancy.storage import postgresql as postgresql_module
from romancy.storage.address import parse_address
from romancy.storage.postgresql import PostgresqlStore
from romancy.storage.stores import make_store
from tests.databases import clean, execute

NO_ROWS = "'[]'"
STATES = """'[{"instance_id": "none"}]'"""
PARAMETERS = {
    "client": [NO_ROWS, NO_ROWS, NO_ROWS, NO_ROWS, "NULL", "0"],
    "worker": ["'me'", NO_ROWS, NO_ROWS, NO_ROWS, STATES, "'me'", "0"],
}


@pytest.fixture
def store(postgresql_url: str) -> Iterator[PostgresqlStore]:
    store = make_store(parse_address(postgresql_url), [])
    assert isinstance(store, PostgresqlStore)
    store.open(migrate=True)
    yield store
    store.close()
    clean(postgresql_url)


@pytest.mark.parametrize("by", PARAMETERS)
@pytest.mark.parametrize("rows", [200, 5_000])
def test_flush_walks_through_no_instances(store: PostgresqlStore, postgresql_url: str, by: str, rows: int) -> None:
    """For some thousand of them, that took 3 ms each time: longer than all the rest."""
    execute(
        postgresql_url,
        "INSERT INTO romancy_instances (instance_id, run, workflow_name, status, claims, created_at, updated_at, input)"
        f" SELECT 'i' || n, 1, 'flow', 'running', 0, 0, 0, repeat('x', 200) FROM generate_series(1, {rows}) n",
    )
    statements = {"client": store._flush_as_client, "worker": store._flush_as_worker}
    number = count(1)
    parts = statements[by][0].split("%s")
    statement = "".join(f"{part}${next(number)}" for part in parts[:-1]) + parts[-1]
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        connection.execute("SET plan_cache_mode = force_generic_plan")
        connection.execute(f"PREPARE flush AS {statement}".encode())
        explained = connection.execute(f"EXPLAIN EXECUTE flush ({', '.join(PARAMETERS[by])})".encode()).fetchall()
    plan = "\n".join(line for (line,) in explained)
    assert "Index Scan using romancy_instances_pkey on romancy_instances i" in plan, plan
    assert "Seq Scan on romancy_instances" not in plan


def test_plans_are_made_anew_the_seldomer_the_older_they_are(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql_module, "PLANS_SERVE", 10)
    monkeypatch.setattr(postgresql_module, "PLANS_SERVE_AT_MOST", 40)
    monkeypatch.setattr(postgresql_module, "PLANS_SERVE_S", 0.0)
    executed: list[str] = []
    real = psycopg.Connection.execute

    def execute(self: psycopg.Connection, query: object, *arguments: object, **options: object) -> object:
        executed.append(str(query))
        return real(self, query, *arguments, **options)  # type: ignore[arg-type]

    with contextlib.closing(make_store(parse_address(postgresql_url), []).connect()) as link:
        monkeypatch.setattr(psycopg.Connection, "execute", execute)
        for _ in range(130):
            link.execute("SELECT 1")
    gaps = [len(part.split()) for part in " ".join(".." if "DISCARD" in sql else "1" for sql in executed).split("..")]
    # The connection's first look is one of the first ten.
    assert gaps == [8, 20, 40, 40, 22]
