"""How PostgreSQL plans the statements of the engine: by indexes, also while its tables are young."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import psycopg
import pytest

from romancy import App, WorkflowContext, activity, workflow
from romancy.storage import postgresql_link
from romancy.storage.address import parse_address
from romancy.storage.postgresql import PostgresqlStore
from romancy.storage.postgresql_flush import Fence, Rows, flush_statement
from romancy.storage.postgresql_link import PLANNING, PostgresqlLink
from romancy.storage.rows import StateRow
from romancy.storage.stores import make_store
from tests.databases import clean, execute, server_database
from tests.support import RESULT_TIMEOUT_S

STATE = StateRow("none", "running", None, None, 0, None, None, None)
GENERIC = PLANNING[:1]
"""As behind a pooler, where nothing can be set for good, but for any values."""


@pytest.fixture
def store(postgresql_url: str) -> Iterator[PostgresqlStore]:
    store = make_store(parse_address(postgresql_url), [])
    assert isinstance(store, PostgresqlStore)
    store.open(migrate=True)
    yield store
    store.close()
    clean(postgresql_url)


@pytest.mark.parametrize("states", [1, 3, 4])
@pytest.mark.parametrize(("rows", "settings"), [(200, PLANNING), (5_000, PLANNING), (5_000, GENERIC)])
def test_flush_walks_through_no_instances(
    store: PostgresqlStore, postgresql_url: str, states: int, rows: int, settings: tuple[str, ...]
) -> None:
    """For some thousand of them, that took 3 ms each time: longer than all the rest."""
    execute(
        postgresql_url,
        "INSERT INTO romancy_instances (instance_id, run, workflow_name, status, claims, created_at, updated_at, input)"
        f" SELECT 'i' || n, 1, 'flow', 'running', 0, 0, 0, repeat('x', 200) FROM generate_series(1, {rows}) n",
    )
    few_or_many = Rows([], [], [], [STATE] * states, [], [])
    sql, values = flush_statement(Fence(store._worker_fence, "me"), few_or_many, states)
    number = count(1)
    parts = sql.split("%s")
    statement = "".join(f"{part}${next(number)}" for part in parts[:-1]) + parts[-1]
    given = ", ".join("NULL" if value is None else f"'{value}'" for value in values)
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        for setting in settings:
            connection.execute(setting.encode())
        connection.execute(f"PREPARE flush AS {statement}".encode())
        explained = connection.execute(f"EXPLAIN EXECUTE flush ({given})".encode()).fetchall()
    plan = "\n".join(line for (line,) in explained)
    assert "Index Scan using romancy_instances_pkey on romancy_instances i" in plan, plan
    assert "Seq Scan on romancy_instances" not in plan


async def test_statements_planned_while_tables_are_empty_serve_when_they_are_large(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that walks through a table would be kept until the server has new statistics, for a minute."""
    seen: dict[str, Sequence[Any]] = {}
    real = PostgresqlLink._execute

    def execute_and_note(link: PostgresqlLink, sql: str, parameters: Sequence[Any]) -> Any:
        seen.setdefault(sql, parameters)
        return real(link, sql, parameters)

    @activity
    async def work() -> None:
        return

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await work()
        await ctx.wait_event("paid", key=ctx.instance_id)
        await ctx.subscribe("jobs", mode="competing")
        await ctx.receive("jobs")
        await ctx.sleep(0.01)

    monkeypatch.setattr(PostgresqlLink, "_execute", execute_and_note)
    async with App(postgresql_url) as app:
        handle = await app.start_workflow(flow)
        await app.send_event("paid", key=handle.instance_id)
        await app.publish("jobs", 1)
        await handle.result(RESULT_TIMEOUT_S)
        await app.send_event("paid", key="nobody")
    clean(postgresql_url)
    for table in ("instances", "history", "mail", "deliveries", "waits", "subscriptions", "seen"):
        execute(postgresql_url, f"VACUUM ANALYZE romancy_{table}")
    walks = set()
    with contextlib.closing(make_store(parse_address(postgresql_url), []).connect()) as link:
        assert isinstance(link, PostgresqlLink)
        explainable = [sql for sql in seen if sql.split()[0] in ("WITH", "SELECT", "INSERT", "UPDATE", "DELETE")]
        for sql in explainable:
            plan = link.connection.execute(f"EXPLAIN {sql}".encode(), seen[sql], prepare=False).fetchall()
            walks |= {
                (line.strip(), sql) for (line,) in plan if "Seq Scan on romancy_" in line and "worker" not in line
            }
    assert len(explainable) > 15
    assert not walks


async def test_mail_is_found_by_its_subject_before_there_are_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an index that leads through all events of a name, each wait took 20 ms after 100,000 of them."""
    asked: dict[str, Sequence[Any]] = {}
    real = PostgresqlLink._execute

    def execute_and_note(link: PostgresqlLink, sql: str, parameters: Sequence[Any]) -> Any:
        if "AND m.subject = s.subject" in sql:
            asked.setdefault(sql, parameters)
        return real(link, sql, parameters)

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await ctx.wait_event("paid", key=ctx.instance_id)

    monkeypatch.setattr(PostgresqlLink, "_execute", execute_and_note)
    with server_database("postgresql") as url:
        async with App(url) as app:
            handle = await app.start_workflow(flow)
            await app.send_event("paid", key=handle.instance_id)
            await handle.result(RESULT_TIMEOUT_S)
        ((sql, parameters),) = asked.items()
        new = "SELECT '', 'm' || n, 'event', 'paid', 's' || n, '{}', 9 FROM generate_series(1, %d) n"
        with contextlib.closing(make_store(parse_address(url), []).connect()) as link:
            assert isinstance(link, PostgresqlLink)
            for rows in (0, 5_000):
                link.execute(f"INSERT INTO romancy_mail {new}" % rows)
                plan = link.connection.execute(f"EXPLAIN {sql}".encode(), parameters, prepare=False).fetchall()
                assert "romancy_mail_subject" in "\n".join(line for (line,) in plan)


def test_plans_are_made_anew_the_seldomer_the_more_there_is(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql_link, "PLANS_SERVE", 10)
    monkeypatch.setattr(postgresql_link, "PLANS_SERVE_AT_MOST", 40)
    monkeypatch.setattr(postgresql_link, "PLANS_SERVE_S", 0.0)
    executed: list[str] = []
    real = psycopg.Connection.execute

    def execute(self: psycopg.Connection, query: Any, *arguments: Any, **options: Any) -> object:
        executed.append(query if isinstance(query, str) else query.decode())
        return real(self, query, *arguments, **options)

    with contextlib.closing(make_store(parse_address(postgresql_url), []).connect()) as link:
        link.execute("CREATE TEMPORARY TABLE grown (n INT)")
        monkeypatch.setattr(psycopg.Connection, "execute", execute)
        for _ in range(50):
            link.execute("SELECT 1")
        assert "DISCARD PLANS" not in executed
        executed.clear()
        for _ in range(60):
            link.execute("INSERT INTO grown VALUES (1), (2)")
    rows_between = [2 * part.count("INSERT") for part in "".join(executed).split("DISCARD PLANS")]
    assert rows_between == [10, 20, 40, 40, 10]
