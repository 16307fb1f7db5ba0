"""Connections whose bytes vanish: whoever waits for an answer is told in time, and all goes on."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from sqlalchemy import text

from romancy import (
    App,
    AppNotRunningError,
    DatabaseUnavailableError,
    FencedError,
    RetryPolicy,
    Workflow,
    WorkflowContext,
    activity,
    current_activity,
    workflow,
)
from romancy import lifecycle as lifecycle_module
from romancy.engine import activities as activities_module
from romancy.engine import worker as worker_module
from romancy.storage import database as database_module
from romancy.storage import mysql as mysql_module
from romancy.storage import server as server_module
from romancy.storage import stores
from tests.databases import Database, clean, kind_of, rows, server_database
from tests.ledger import INSERT, create_ledger
from tests.proxy import When
from tests.storage.test_lost_connections import behind_proxy, check
from tests.support import RESULT_TIMEOUT_S

LEASE_TTL_S = 1.0
PATIENCE_S = 1.0
REQUESTS = range(1, 24, 2)
LANES = 4
SLEEP = {"postgresql": "SELECT pg_sleep(:s)", "mysql": "SELECT SLEEP(:s)"}


@pytest.fixture(params=["postgresql", "mysql"])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    url: str = request.getfixturevalue(f"{request.param}_url")
    yield url
    clean(url)


@pytest.fixture(autouse=True)
def _haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "SHORTEST_PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr(activities_module, "LONGEST_ENDING_S", 0.3)
    monkeypatch.setattr(worker_module, "LONGEST_FAREWELL_S", 0.5)
    monkeypatch.setattr(lifecycle_module, "LONGEST_FAREWELL_S", 0.5)
    monkeypatch.setattr(database_module, "LONGEST_CLOSE_S", 1.0)
    monkeypatch.setattr(server_module, "LONGEST_READ_S", 1.0)
    monkeypatch.setattr(mysql_module, "LONGEST_PAUSE_S", 5.0)
    monkeypatch.setattr(mysql_module, "MOST_IDLE_S", 2.0)


def define() -> Workflow[..., Any]:
    """As in the tests of lost connections; the user's own statements are bounded by the user's own timeout."""
    retry = RetryPolicy(initial_interval=0.01)

    @activity
    async def plain(name: str) -> str:
        return name

    @activity(retry=retry, timeout=1.0)
    async def book(name: str) -> str:
        await current_activity().session.execute(INSERT, {"token": f"{current_activity().instance_id} {name}"})
        return name

    @activity(retry=retry, timeout=1.0)
    def book_in_thread(name: str) -> str:
        current_activity().sync_session.execute(INSERT, {"token": f"{current_activity().instance_id} {name}"})
        return name

    @workflow
    async def flow(ctx: WorkflowContext) -> list[str]:
        found = [await plain("a"), await book("b")]
        found += await asyncio.gather(book("c"), book_in_thread("d"), plain("e"))
        found += [await book("f"), await book("g"), await book("h"), await book("i")]
        return found

    return flow


async def start_until_it_works(app: App, flow: Workflow[..., Any], instance_id: str) -> Any:
    """A start with an id of one's own may be repeated, also when the worker has lost its lease meanwhile."""
    async with asyncio.timeout(RESULT_TIMEOUT_S):
        while True:
            try:
                return await app.start_workflow(flow, id=instance_id)
            except (DatabaseUnavailableError, FencedError, AppNotRunningError):
                await asyncio.sleep(0.05)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", sorted(SLEEP))
async def test_connection_that_stalls_at_any_request(kind: str, when: When) -> None:
    """Most of it is waiting; so some wait at the same time, each with a database and an app of its own."""
    flow = define()

    async def stall_at(requests: Sequence[int]) -> int:
        with server_database(kind) as server:
            create_ledger(server)
            with behind_proxy(server) as (proxy, url):
                async with App(url, lease_ttl=LEASE_TTL_S, shutdown_grace=0) as app:
                    for request in requests:
                        instance_id = f"{when}-{request:02}"
                        proxy.stall_at(request, when)
                        handle = await start_until_it_works(app, flow, instance_id)
                        assert await handle.result(RESULT_TIMEOUT_S) == list("abcdefghi")
                        check(server, instance_id)
                    proxy.spare()
                assert rows(server, "SELECT count(*) FROM romancy_instances WHERE status <> 'completed'") == [(0,)]
        return proxy.stalls

    stalls = await asyncio.gather(*[stall_at(REQUESTS[lane::LANES]) for lane in range(LANES)])
    assert sum(stalls) >= len(REQUESTS) - 4


async def test_another_worker_takes_over_from_one_that_hears_nothing(server: str) -> None:
    create_ledger(server)
    ran_on: Counter[str] = Counter()
    is_running = asyncio.Event()

    @activity
    async def book(number: int) -> int:
        session = current_activity().session
        await session.execute(INSERT, {"token": f"{current_activity().instance_id} {number}"})
        return number

    @activity
    async def hold() -> None:
        ran_on["hold"] += 1
        if ran_on["hold"] == 1:
            is_running.set()
            await asyncio.Event().wait()

    @workflow
    async def flow(ctx: WorkflowContext) -> list[int]:
        found = await asyncio.gather(*[book(number) for number in range(5)])
        await hold()
        return [*found, await book(5)]

    with behind_proxy(server) as (proxy, url):
        async with App(url, lease_ttl=LEASE_TTL_S, shutdown_grace=0) as stalled:
            handle = await stalled.start_workflow(flow)
            await is_running.wait()
            async with App(server, lease_ttl=LEASE_TTL_S) as other:
                proxy.stall_all()
                stalled_at = time.monotonic()
                taken = await other.get_handle(handle.instance_id, flow)
                assert await taken.result(RESULT_TIMEOUT_S) == [0, 1, 2, 3, 4, 5]
                # The lease; a transaction that the server takes for idle; and two looks.
                assert time.monotonic() - stalled_at < LEASE_TTL_S + PATIENCE_S + 2
            proxy.pass_on()
            # The worker that lost its lease has made way for a new one, which works.
            again = await start_until_it_works(stalled, flow, "again")
            assert await again.result(RESULT_TIMEOUT_S) == [0, 1, 2, 3, 4, 5]
    tokens = Counter(token for (token,) in rows(server, "SELECT token FROM ledger"))
    assert tokens == {f"{name} {n}": 1 for name in (handle.instance_id, "again") for n in range(6)}


@pytest.mark.parametrize("is_async", [True, False])
async def test_shutdown_in_the_middle_of_a_stall_ends(server: str, is_async: bool) -> None:
    create_ledger(server)
    is_running = asyncio.Event()
    loop = asyncio.get_running_loop()
    sleep = text(SLEEP[kind_of(server)])

    @activity
    async def ask() -> None:
        await current_activity().session.execute(INSERT, {"token": "never"})
        loop.call_soon(is_running.set)
        await current_activity().session.execute(sleep, {"s": 1_000})

    @activity
    def ask_in_thread() -> None:
        current_activity().sync_session.execute(INSERT, {"token": "never"})
        loop.call_soon_threadsafe(is_running.set)
        current_activity().sync_session.execute(sleep, {"s": 1_000})

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await (ask() if is_async else ask_in_thread())

    with behind_proxy(server) as (proxy, url):
        app = App(url, lease_ttl=LEASE_TTL_S, shutdown_grace=0)
        await app.start()
        await app.start_workflow(flow)
        await is_running.wait()
        proxy.stall_all()
        starting = asyncio.create_task(app.start_workflow(flow))
        began_at = time.monotonic()
        await app.shutdown()
        assert time.monotonic() - began_at < 15
        with pytest.raises(Exception, match=r"shut down|can't be reached|closed"):
            await starting
    _end_sleepers(server)
    assert rows(server, "SELECT count(*) FROM ledger") == [(0,)]


def _end_sleepers(server: Database) -> None:
    if kind_of(server) == "postgresql":
        rows(
            server,
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() "
            "AND query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()",
        )
        return
    for (number,) in rows(
        server,
        "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND info LIKE 'SELECT SLEEP(%'",
    ):
        rows(server, f"KILL {number}")


@pytest.mark.parametrize("is_async", [True, False])
async def test_long_statement_of_the_users_own_is_left_alone(server: str, is_async: bool) -> None:
    sleep = text(SLEEP[kind_of(server)])
    long_s = 3 * PATIENCE_S

    @activity(retry=RetryPolicy.no_retry())
    async def ask() -> str:
        await current_activity().session.execute(sleep, {"s": long_s})
        return "done"

    @activity(retry=RetryPolicy.no_retry())
    def ask_in_thread() -> str:
        current_activity().sync_session.execute(sleep, {"s": long_s})
        return "done"

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        return await (ask() if is_async else ask_in_thread())

    async with App(server, lease_ttl=LEASE_TTL_S) as app:
        handle = await app.start_workflow(flow)
        assert await handle.result(RESULT_TIMEOUT_S) == "done"


async def test_query_that_is_never_answered_ends(server: str) -> None:
    with behind_proxy(server) as (proxy, url):
        async with App(url, lease_ttl=LEASE_TTL_S, shutdown_grace=0) as app:
            await app.get_instance("nobody")
            proxy.stall_all()
            began_at = time.monotonic()
            with pytest.raises(DatabaseUnavailableError, match="can't be reached"):
                await app.get_instance("nobody")
            assert time.monotonic() - began_at < 5 * PATIENCE_S
            proxy.pass_on()
            assert await app.get_instance("nobody") is None
