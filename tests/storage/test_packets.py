"""What is larger than the server takes at once: cut into pieces where it can be, and refused for one instance alone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text

from romancy import (
    App,
    PacketTooLargeError,
    RetryPolicy,
    Status,
    WorkflowContext,
    WorkflowFailedError,
    WorkflowSuspendedError,
    activity,
    current_activity,
    workflow,
)
from romancy.storage import postgresql_flush
from romancy.storage.statements import bytes_of, fitting
from tests.databases import clean, rows, server_with
from tests.ledger import INSERT, create_ledger
from tests.support import RESULT_TIMEOUT_S, wait_for_status

PACKET = 1024 * 1024
BIG = "b" * (PACKET // 3)
TOO_BIG = "t" * (PACKET + 1)
QUOTES = '"' * (PACKET // 3)
"""Each is escaped as JSON, and its backslash and quote again for the statement: four bytes."""


@pytest.fixture(scope="module")
def small_packets() -> Iterator[str]:
    with server_with("mysql", f"--max-allowed-packet={PACKET}") as url:
        yield url


@pytest.fixture
def small(small_packets: str) -> Iterator[str]:
    yield small_packets
    clean(small_packets)


def test_rows_are_grouped_by_what_fits() -> None:
    rows_of_ten = [("x" * 10, n) for n in range(5)]
    size = bytes_of(rows_of_ten[0])
    assert [list(group) for group in fitting(rows_of_ten, None)] == [rows_of_ten]
    assert [len(group) for group in fitting(rows_of_ten, 2 * size)] == [2, 2, 1]
    assert [len(group) for group in fitting(rows_of_ten, 1)] == [1] * 5
    assert [len(group) for group in fitting([], 1)] == [0]
    assert bytes_of(("'\\ä",)) - bytes_of(("",)) == 6


async def test_batch_larger_than_a_packet_is_cut(small: str) -> None:
    @activity
    async def echo(value: str) -> str:
        return value

    @workflow
    async def flow(ctx: WorkflowContext, value: str) -> int:
        found = await asyncio.gather(*[echo(value) for _ in range(5)])
        event = await ctx.wait_event("more", key=ctx.instance_id, type=str)
        return sum(map(len, found)) + len(event.data)

    async with App(small) as app:
        handles = await asyncio.gather(*[app.start_workflow(flow, BIG, id=f"number-{n}") for n in range(4)])
        handles += await asyncio.gather(*[app.start_workflow(flow, BIG) for _ in range(4)])
        await asyncio.gather(*[app.send_event("more", BIG, key=handle.instance_id) for handle in handles])
        for handle in handles:
            assert await handle.result(RESULT_TIMEOUT_S) == 6 * len(BIG)
    assert rows(small, "SELECT count(*) FROM romancy_history WHERE kind = 'ActivityCompleted'") == [(40,)]


@pytest.mark.parametrize("value", [TOO_BIG, QUOTES])
async def test_start_that_no_packet_holds_is_refused_alone(small: str, value: str) -> None:
    @workflow
    async def flow(ctx: WorkflowContext, value: str) -> int:
        return len(value)

    async with App(small) as app:
        *fine, refused = await asyncio.gather(
            *[app.start_workflow(flow, "small", id=f"fine-{n}") for n in range(5)],
            app.start_workflow(flow, value, id="refused"),
            return_exceptions=True,
        )
        assert isinstance(refused, PacketTooLargeError)
        size, most, setting = r"a row takes 1,\d{3},\d{3} bytes", "which takes 1,048,512 at once", "max_allowed_packet"
        assert re.search(f"{size} on its way to the server, {most}.*{setting}", str(refused))
        for handle in fine:
            assert not isinstance(handle, BaseException)
            assert await handle.result(RESULT_TIMEOUT_S) == 5
        with pytest.raises(PacketTooLargeError):
            await app.send_event("news", value, key="k")
    assert rows(small, "SELECT count(*) FROM romancy_instances") == [(5,)]


@pytest.mark.parametrize("how", ["plain", "async session", "session in a thread"])
async def test_result_that_no_packet_holds_parks_its_instance_alone(small: str, how: str) -> None:
    create_ledger(small)

    @activity
    async def plain(value: str) -> str:
        return TOO_BIG if value == "too big" else value

    @activity
    async def with_session(value: str) -> str:
        await current_activity().session.execute(INSERT, {"token": value})
        return TOO_BIG if value == "too big" else value

    @activity
    def in_thread(value: str) -> str:
        current_activity().sync_session.execute(INSERT, {"token": value})
        return TOO_BIG if value == "too big" else value

    answer: Any = {"plain": plain, "async session": with_session, "session in a thread": in_thread}[how]

    @workflow
    async def flow(ctx: WorkflowContext, value: str) -> str:
        found: str = await answer(value)
        return found

    async with App(small) as app:
        fine = [await app.start_workflow(flow, f"fine {n}") for n in range(3)]
        refused = await app.start_workflow(flow, "too big")
        with pytest.raises(WorkflowSuspendedError, match="max_allowed_packet"):
            await refused.result(RESULT_TIMEOUT_S)
        for n, handle in enumerate(fine):
            assert await handle.result(RESULT_TIMEOUT_S) == f"fine {n}"
        await wait_for_status(app, refused.instance_id, Status.SUSPENDED)
    booked = [] if how == "plain" else [(f"fine {n}",) for n in range(3)]
    assert sorted(rows(small, "SELECT token FROM ledger")) == booked


@pytest.mark.parametrize("is_async", [True, False])
async def test_users_own_statement_that_no_packet_holds_fails_its_activity(small: str, is_async: bool) -> None:
    @activity(retry=RetryPolicy.no_retry())
    async def ask() -> None:
        await current_activity().session.execute(text("SELECT :value"), {"value": TOO_BIG})

    @activity(retry=RetryPolicy.no_retry())
    def ask_in_thread() -> None:
        current_activity().sync_session.execute(text("SELECT :value"), {"value": TOO_BIG})

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await (ask() if is_async else ask_in_thread())

    async with App(small) as app:
        handle = await app.start_workflow(flow)
        with pytest.raises(WorkflowFailedError, match="max_allowed_packet"):
            await handle.result(RESULT_TIMEOUT_S)


async def test_postgresql_takes_large_batches_in_pieces(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql_flush, "MOST_TOGETHER", 100_000)
    monkeypatch.setattr(postgresql_flush, "MOST_ALONE", 500_000)

    @workflow
    async def flow(ctx: WorkflowContext, value: str) -> int:
        return len(value)

    async with App(postgresql_url) as app:
        *fine, refused = await asyncio.gather(
            *[app.start_workflow(flow, "x" * 60_000) for _ in range(10)],
            app.start_workflow(flow, "x" * 200_000),
            app.start_workflow(flow, "x" * 600_000),
            return_exceptions=True,
        )
        for handle in fine:
            assert not isinstance(handle, BaseException)
            assert await handle.result(RESULT_TIMEOUT_S) in (60_000, 200_000)
        assert isinstance(refused, PacketTooLargeError)
        assert "no values of more than 1 GB" in str(refused)
    clean(postgresql_url)


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
async def test_more_parameters_than_a_statement_takes(kind: str, request: pytest.FixtureRequest) -> None:
    """PostgreSQL's protocol and MySQL's prepared statements take 65,535; a full batch has many more values."""
    url: str = request.getfixturevalue(f"{kind}_url")

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        pass

    async with App(url, worker=False) as app:
        await asyncio.gather(*[app.start_workflow(flow) for _ in range(3_000)])
        await asyncio.gather(*[app.start_workflow(flow, id=f"keyed-{n}") for n in range(6_000)])
        await asyncio.gather(*[app.send_event("go", key=f"number {n}") for n in range(6_000)])
    assert rows(url, "SELECT count(*) FROM romancy_instances") == [(9_000,)]
    assert rows(url, "SELECT count(*) FROM romancy_mail") == [(6_000,)]
    clean(url)
