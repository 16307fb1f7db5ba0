"""Through a pooler, which hands each transaction to another server connection: all is as without it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url

from romancy import (
    App,
    DatabaseLockedError,
    DatabaseURLError,
    Workflow,
    WorkflowContext,
    activity,
    current_activity,
    workflow,
)
from romancy.storage import postgresql
from romancy.storage.address import parse_address
from romancy.storage.postgresql import PostgresqlStore
from tests.databases import clean, execute, rows, server_database
from tests.ledger import INSERT, create_ledger
from tests.pgbouncer import pgbouncer
from tests.support import RESULT_TIMEOUT_S, crash

INSTANCES = 40
POOL_SIZE = 8


@pytest.fixture(scope="module")
def pooled_url(postgresql_url: str) -> Iterator[str]:
    """The tests' database on PostgreSQL, through PgBouncer in transaction mode."""
    with pgbouncer(postgresql_url, pool_size=POOL_SIZE) as url:
        yield url


@pytest.fixture
def pooled(pooled_url: str, postgresql_url: str) -> Iterator[str]:
    yield pooled_url
    clean(postgresql_url)


def define() -> Workflow[..., Any]:
    @activity
    async def plain(name: str) -> str:
        return name

    @activity
    async def book(name: str) -> str:
        session = current_activity().session
        await session.execute(INSERT, {"token": f"{current_activity().instance_id} {name}"})
        await session.commit()
        await session.execute(INSERT, {"token": f"{current_activity().instance_id} {name} again"})
        return name

    @activity
    def book_in_thread(name: str) -> str:
        current_activity().sync_session.execute(INSERT, {"token": f"{current_activity().instance_id} {name}"})
        return name

    @workflow
    async def flow(ctx: WorkflowContext) -> list[str]:
        found = [await plain("a"), await book("b")]
        await asyncio.sleep(0.01)
        found.append((await ctx.wait_event("go", key=ctx.instance_id, type=str)).data)
        return found + await asyncio.gather(book("d"), book_in_thread("e"), plain("f"))

    return flow


async def test_everything_works_through_a_pooler(
    pooled: str, postgresql_url: str, romancy_log: pytest.LogCaptureFixture
) -> None:
    create_ledger(postgresql_url)
    flow = define()
    async with App(pooled, max_activities=4) as app, App(pooled, worker=False) as client:
        handles = [await client.start_workflow(flow, id=f"client-{n:02}") for n in range(INSTANCES)]
        handles += [await app.start_workflow(flow, id=f"own-{n:02}") for n in range(INSTANCES)]
        for handle in handles:
            await client.send_event("go", "c", key=handle.instance_id)
        for handle in handles:
            assert await handle.result(RESULT_TIMEOUT_S) == ["a", "b", "c", "d", "e", "f"]
        assert len((await app.list_instances(status="completed", limit=1_000)).instances) == 2 * INSTANCES
    booked = sorted(
        f"{handle.instance_id} {name}" for handle in handles for name in ("b", "b again", "d", "d again", "e")
    )
    assert sorted(token for (token,) in rows(postgresql_url, "SELECT token FROM ledger")) == booked
    assert rows(postgresql_url, "SELECT count(*) FROM romancy_workers") == [(0,)]
    assert not [record for record in romancy_log.records if record.levelname == "ERROR"]


async def test_nothing_of_a_session_is_left_behind_in_the_pool(pooled: str, postgresql_url: str) -> None:
    create_ledger(postgresql_url)
    flow = define()
    with ExitStack() as stack:
        # All in a transaction at once, so that the pool is full from the start.
        connections = [stack.enter_context(closing(psycopg.connect(pooled))) for _ in range(POOL_SIZE)]
        for connection in connections:
            connection.execute("SELECT 1", prepare=False)
        for connection in connections:
            connection.rollback()
    async with App(pooled, max_activities=4) as app:
        for n in range(20):
            handle = await app.start_workflow(flow, id=f"number-{n}")
            await app.send_event("go", "c", key=handle.instance_id)
            assert await handle.result(RESULT_TIMEOUT_S)
    seen: set[int] = set()
    with closing(psycopg.connect(pooled, autocommit=True)) as connection:
        for _ in range(10 * POOL_SIZE):
            found: Any = connection.execute(
                "SELECT pg_backend_pid(), (SELECT count(*) FROM pg_prepared_statements), "
                "(SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'), "
                "current_setting('lock_timeout'), current_setting('idle_in_transaction_session_timeout')",
                prepare=False,
            ).fetchone()
            seen.add(found[0])
            assert found[1:] == (0, 0, "0", "0")
    assert len(seen) == POOL_SIZE


async def test_takeover_through_a_pooler(pooled: str, postgresql_url: str) -> None:
    is_first = asyncio.Event()

    @activity
    async def hold() -> str:
        if not is_first.is_set():
            is_first.set()
            await asyncio.Event().wait()
        return "done"

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        return await hold()

    first = App(pooled, lease_ttl=1)
    await first.start()
    handle = await first.start_workflow(flow)
    await is_first.wait()
    await crash(first)
    async with App(pooled, lease_ttl=1) as second:
        taken = await second.get_handle(handle.instance_id, flow)
        assert await taken.result(RESULT_TIMEOUT_S) == "done"


async def test_lease_is_kept_and_lost_through_a_pooler(pooled: str, postgresql_url: str) -> None:
    is_running = asyncio.Event()

    @activity
    async def wait_for_ever() -> None:
        is_running.set()
        await asyncio.Event().wait()

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await wait_for_ever()

    async with App(pooled, lease_ttl=0.5, shutdown_grace=0) as app:
        await app.start_workflow(flow)
        await is_running.wait()
        worker = app._life.worker
        assert worker is not None
        ((before,),) = rows(postgresql_url, "SELECT lease_until FROM romancy_workers")
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while rows(postgresql_url, "SELECT lease_until FROM romancy_workers") == [(before,)]:
                await asyncio.sleep(0.01)
        is_running.clear()
        execute(postgresql_url, "UPDATE romancy_workers SET state = 'dead'")
        await asyncio.wait_for(is_running.wait(), RESULT_TIMEOUT_S)
        assert app._life.worker is not None
        assert app._life.worker.worker_id != worker.worker_id


@pytest.mark.parametrize("is_pooled", [True, False])
def test_statements_are_prepared_on_direct_connections_only(
    postgresql_url: str, pooled_url: str, is_pooled: bool
) -> None:
    store = PostgresqlStore(parse_address(pooled_url if is_pooled else postgresql_url), [])  # type: ignore[arg-type]
    with closing(store.connect()) as link:
        assert link.connection.prepare_threshold == (None if is_pooled else postgresql.PREPARE_AFTER)


@pytest.mark.parametrize(("given", "threshold"), [("none", None), ("0", 0), ("7", 7)])
def test_the_address_may_say_whether_to_prepare(postgresql_url: str, given: str, threshold: int | None) -> None:
    url = make_url(postgresql_url).update_query_dict({"prepare_threshold": given})
    store = PostgresqlStore(parse_address(url.render_as_string(hide_password=False)), [])  # type: ignore[arg-type]
    with closing(store.connect()) as link:
        assert link.connection.prepare_threshold == threshold


async def test_prepare_threshold_that_is_none_of_these(postgresql_url: str) -> None:
    url = make_url(postgresql_url).update_query_dict({"prepare_threshold": "often"})
    with pytest.raises(DatabaseURLError, match="'often': give a number of executions, or 'none'"):
        await App(url.render_as_string(hide_password=False)).start()


@pytest.mark.parametrize("is_pooled", [True, False])
async def test_locks_are_not_waited_for_for_ever(
    postgresql_url: str, pooled_url: str, is_pooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "MOST_LOCK_WAIT_S", 0.05)
    async with App(pooled_url if is_pooled else postgresql_url) as app:
        assert app._life.worker is not None
        worker_id = app._life.worker.worker_id
        with closing(psycopg.connect(postgresql_url)) as connection:
            connection.execute("SELECT 1 FROM romancy_workers FOR UPDATE")
            for attempt in (
                lambda: app._life.store.renew(worker_id, 2**62),
                lambda: app._life.store.leave(worker_id, 0),
                lambda: app._life.store.bury(worker_id, 2**62, is_gone=True),
            ):
                with pytest.raises(DatabaseLockedError):
                    await asyncio.wait_for(asyncio.wrap_future(attempt()), RESULT_TIMEOUT_S)


async def test_database_whose_default_isolation_is_another_one() -> None:
    with server_database("postgresql") as url:
        with closing(psycopg.connect(url, autocommit=True)) as connection:
            name = make_url(url).database
            connection.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")  # type: ignore[arg-type]
        create_ledger(url)
        flow = define()
        async with App(url) as app:
            handles = [await app.start_workflow(flow, id=f"number-{n}") for n in range(10)]
            for handle in handles:
                await app.send_event("go", "c", key=handle.instance_id)
            for handle in handles:
                assert await handle.result(RESULT_TIMEOUT_S) == ["a", "b", "c", "d", "e", "f"]
