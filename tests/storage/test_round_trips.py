"""How often a server is asked for what happens all the time, and how many connections are made for it.

A round trip to PostgreSQL costs about what a small commit costs, and a connection more than ten of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from romancy import App, Status, WorkflowContext, activity, current_activity, workflow
from tests.databases import clean
from tests.ledger import INSERT, create_ledger
from tests.storage.test_lost_connections import behind_proxy, in_plain_text
from tests.support import RESULT_TIMEOUT_S, wait_for_status

TRIES = 15
"""What the worker asks by itself, to renew its lease or to find work, may come between in some of them."""


@pytest.fixture
def database(postgresql_url: str) -> Iterator[str]:
    yield postgresql_url
    clean(postgresql_url)


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
async def test_event_that_ends_a_workflow_takes_six(kind: str, request: pytest.FixtureRequest) -> None:
    database: str = request.getfixturevalue(f"{kind}_url")

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await ctx.wait_event("paid", key=ctx.instance_id)

    counts = []
    with behind_proxy(in_plain_text(database)) as (proxy, url):
        async with App(url) as app:
            for _ in range(TRIES):
                handle = await app.start_workflow(flow)
                await wait_for_status(app, handle.instance_id, Status.WAITING_FOR_EVENT)
                before = proxy.requests
                await app.send_event("paid", key=handle.instance_id)
                await handle.result(RESULT_TIMEOUT_S)
                counts.append(proxy.requests - before)
    clean(database)
    # PostgreSQL: begin and lock the topic, note the event, find who waits, deliver, commit; the end, in one.
    # MySQL: begin and lock the topic, note the event, find who waits, deliver with the commit; the end, its commit.
    assert min(counts) == 6, counts


async def test_activity_with_a_session_takes_three(database: str) -> None:
    create_ledger(database)

    @activity
    async def book() -> None:
        await current_activity().session.execute(INSERT, {"token": "one"})

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await book()

    counts = []
    with behind_proxy(database) as (proxy, url):
        async with App(url) as app:
            for _ in range(TRIES):
                before = proxy.requests
                await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
                counts.append(proxy.requests - before)
    # The start; begin, the user's row, the outcome with the commit; the end.
    assert min(counts) == 5, counts


async def test_commit_on_mysql_takes_two(mysql_url: str) -> None:
    @activity
    async def work() -> None:
        return

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await work()

    counts = []
    with behind_proxy(in_plain_text(mysql_url)) as (proxy, url):
        async with App(url) as app:
            for _ in range(TRIES):
                before = proxy.requests
                await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
                counts.append(proxy.requests - before)
    clean(mysql_url)
    # The start; the activity's outcome with the end.
    assert min(counts) == 4, counts


@pytest.mark.parametrize(("kind", "most"), [("postgresql", 3), ("mysql", 4)])
async def test_app_makes_a_connection_for_each_use_and_no_more(
    kind: str, most: int, request: pytest.FixtureRequest
) -> None:
    """One that writes, one that reads, one that listens; on MariaDB one that holds the lock it listens at."""

    @activity
    async def work() -> None:
        return

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await work()

    url: str = request.getfixturevalue(f"{kind}_url")
    async with App(url):
        pass  # the tables are made
    with behind_proxy(url) as (proxy, through):
        async with App(through) as app:
            await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
        assert proxy.connections <= most
    clean(url)
