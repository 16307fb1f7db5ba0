"""Transactional activities: the user's rows and the recorded outcome commit together, or neither does."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from romancy import (
    App,
    FencedError,
    RetryPolicy,
    SessionError,
    WorkflowContext,
    WorkflowFailedError,
    activity,
    current_activity,
    workflow,
)
from romancy.storage.rows import HistoryRow
from romancy.storage.sessions import ActivityTransaction
from romancy.testing import VirtualClock
from tests.databases import Database, execute, rows
from tests.ledger import INSERT, Entry, create_ledger
from tests.support import RESULT_TIMEOUT_S, crash


@pytest.fixture
def ledger(database: Database) -> Database:
    create_ledger(database)
    return database


@pytest.fixture
def sqlite_ledger(tmp_path: Path) -> Path:
    """For what is so on SQLite only, which has one writer."""
    path = tmp_path / "sqlite.db"
    create_ledger(path)
    return path


def tokens(database: Database) -> list[str]:
    return [token for (token,) in rows(database, "SELECT token FROM ledger ORDER BY id")]


def completed(database: Database) -> list[str]:
    return [
        i
        for (i,) in rows(
            database, "SELECT operation_id FROM romancy_history WHERE kind = 'ActivityCompleted' ORDER BY seq"
        )
    ]


async def run(database: Database, *activities: Any, clock: Any = None) -> Any:
    @workflow
    async def flow(ctx: WorkflowContext) -> Any:
        return [await act() for act in activities]

    async with App(database, clock=clock) as app:
        return await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)


async def test_async_session_commits_rows_with_the_outcome(ledger: Database) -> None:
    @activity
    async def book() -> int:
        session = current_activity().session
        await session.execute(INSERT, {"token": "a"})
        session.add(Entry(token="b"))
        found = await session.execute(text("SELECT count(*) FROM ledger"))
        return int(found.scalar_one())

    assert await run(ledger, book) == [2]
    assert tokens(ledger) == ["a", "b"]
    assert completed(ledger) == ["book:1"]


async def test_sync_session_commits_rows_with_the_outcome(ledger: Database) -> None:
    @activity
    def book() -> int:
        session = current_activity().sync_session
        assert session is current_activity().session
        session.execute(INSERT, {"token": "a"})
        session.add(Entry(token="b"))
        return 1

    assert await run(ledger, book) == [1]
    assert tokens(ledger) == ["a", "b"]


async def test_orm_objects_that_were_only_added_are_written_too(ledger: Database) -> None:
    @activity
    async def book() -> None:
        current_activity().session.add(Entry(token="only added"))

    await run(ledger, book)
    assert tokens(ledger) == ["only added"]


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_failed_attempt_keeps_no_row_and_each_retry_gets_a_fresh_transaction(ledger: Database, kind: str) -> None:
    @activity(name="async_book", retry=RetryPolicy.fixed(3, 0))
    async def async_book() -> None:
        await current_activity().session.execute(INSERT, {"token": f"attempt {current_activity().attempt}"})
        if current_activity().attempt < 3:
            raise ValueError

    @activity(name="sync_book", retry=RetryPolicy.fixed(3, 0))
    def sync_book() -> None:
        current_activity().sync_session.execute(INSERT, {"token": f"attempt {current_activity().attempt}"})
        if current_activity().attempt < 3:
            raise ValueError

    await run(ledger, async_book if kind == "async" else sync_book)
    assert tokens(ledger) == ["attempt 3"]


async def test_users_commit_and_rollback_touch_a_savepoint_only(ledger: Database) -> None:
    @activity(retry=RetryPolicy.fixed(2, 0))
    async def book() -> None:
        session = current_activity().session
        await session.execute(INSERT, {"token": f"kept {current_activity().attempt}"})
        await session.commit()
        await session.execute(INSERT, {"token": "dropped"})
        await session.rollback()
        async with session.begin():
            await session.execute(INSERT, {"token": f"also kept {current_activity().attempt}"})
        if current_activity().attempt == 1:
            raise ValueError("after a commit of the user's own")

    await run(ledger, book)
    assert tokens(ledger) == ["kept 2", "also kept 2"]


async def test_rollback_before_the_first_commit_drops_what_came_before(ledger: Database) -> None:
    @activity(retry=RetryPolicy.no_retry())
    async def book() -> None:
        session = current_activity().session
        await session.execute(INSERT, {"token": "dropped"})
        await session.rollback()
        await session.execute(INSERT, {"token": "kept"})
        await session.commit()
        await session.execute(INSERT, {"token": "dropped, too"})
        await session.rollback()

    await run(ledger, book)
    assert tokens(ledger) == ["kept"]


@pytest.mark.parametrize("commits", [True, False])
async def test_failed_statement_that_nobody_minds_fails_the_attempt_where_it_fails_the_transaction(
    ledger: Database, commits: bool
) -> None:
    @activity(retry=RetryPolicy.no_retry())
    async def book() -> None:
        session = current_activity().session
        await session.execute(INSERT, {"token": "before"})
        with contextlib.suppress(DBAPIError):
            await session.execute(text("SELECT nothing FROM nowhere"))
        if commits:
            await session.commit()

    if str(ledger).startswith("postgresql"):
        with pytest.raises(WorkflowFailedError, match=r"InternalError.*current transaction is aborted"):
            await run(ledger, book)
        assert tokens(ledger) == []
    else:
        await run(ledger, book)
        assert tokens(ledger) == ["before"]


async def test_statement_that_ends_the_transaction_fails_the_attempt(ledger: Database) -> None:
    @activity(retry=RetryPolicy.no_retry())
    async def book() -> None:
        session = current_activity().session
        await session.execute(INSERT, {"token": "before"})
        await session.execute(text("ROLLBACK"))

    with pytest.raises(WorkflowFailedError):
        await run(ledger, book)
    assert tokens(ledger) == []


async def test_flush_error_at_the_end_is_the_activitys_failure(ledger: Database) -> None:
    @activity(retry=RetryPolicy.no_retry())
    async def book() -> None:
        current_activity().session.add(Entry(token=None))

    with pytest.raises(WorkflowFailedError, match="IntegrityError"):
        await run(ledger, book)
    assert tokens(ledger) == []


async def test_unused_session_opens_nothing(ledger: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(ActivityTransaction, "connection", lambda self: opened.append(self))

    @activity
    async def looks_only() -> bool:
        current_activity().session  # noqa: B018
        return current_activity().has_open_transaction

    assert await run(ledger, looks_only) == [False]
    assert opened == []


async def test_activity_without_transaction_has_no_session(database: Database) -> None:
    @activity(transactional=False)
    async def act() -> str:
        try:
            current_activity().session  # noqa: B018
        except SessionError as error:
            return str(error)
        return ""

    (message,) = await run(database, act)
    assert "transactional=False" in message


async def test_session_outlives_its_activity_as_an_error(ledger: Database) -> None:
    kept: list[Any] = []

    @activity
    async def keeps() -> None:
        kept.append(current_activity().session)
        await kept[0].execute(text("SELECT 1"))

    @activity
    async def uses() -> str:
        try:
            await kept[0].execute(text("SELECT 1"))
        except SessionError as error:
            return str(error)
        return ""

    found = await run(ledger, keeps, uses)
    assert "closed" in found[1]


async def test_two_sessions_at_a_time_wait_in_line(sqlite_ledger: Path) -> None:
    @activity
    async def book(n: int) -> None:
        session = current_activity().session
        await session.execute(INSERT, {"token": f"{n}a"})
        await asyncio.sleep(0)
        await session.execute(INSERT, {"token": f"{n}b"})

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await asyncio.gather(*[book(n) for n in range(20)])

    async with App(sqlite_ledger) as app:
        await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
    found = tokens(sqlite_ledger)
    assert len(found) == 40
    assert all(a[:-1] == b[:-1] for a, b in zip(found[::2], found[1::2], strict=True))


async def test_starting_a_workflow_under_an_open_session_is_refused_instead_of_a_deadlock(
    sqlite_ledger: Path,
) -> None:
    apps: list[App] = []

    @workflow
    async def other(ctx: WorkflowContext) -> None: ...

    @activity
    async def book() -> str:
        await current_activity().session.execute(INSERT, {"token": "a"})
        try:
            await apps[0].start_workflow(other)
        except SessionError as error:
            return str(error)
        return ""

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        return await book()

    async with App(sqlite_ledger) as app:
        apps.append(app)
        assert "write lock" in await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)


async def test_timeout_in_the_workflow_leaves_no_transaction_open(ledger: Database, clock: VirtualClock) -> None:
    began = asyncio.Event()

    @activity
    async def stuck() -> None:
        await current_activity().session.execute(INSERT, {"token": "lost"})
        began.set()
        await asyncio.Event().wait()

    @activity
    async def after() -> None:
        await current_activity().session.execute(INSERT, {"token": "kept"})

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        try:
            async with asyncio.timeout(5):
                await stuck()
        except TimeoutError:
            await after()

    async with App(ledger, clock=clock) as app:
        handle = await app.start_workflow(flow)
        await began.wait()
        await clock.advance(5)
        await handle.result(RESULT_TIMEOUT_S)
    assert tokens(ledger) == ["kept"]


async def test_lost_lease_rolls_back_the_users_rows(ledger: Database) -> None:
    began, go = asyncio.Event(), asyncio.Event()
    runs = []

    @activity
    async def book() -> str:
        runs.append(1)
        began.set()
        await go.wait()
        await current_activity().session.execute(INSERT, {"token": f"run {len(runs)}"})
        return f"run {len(runs)}"

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        return await book()

    async with App(ledger) as app:
        handle = await app.start_workflow(flow)
        await began.wait()
        began.clear()
        assert app._life.worker is not None
        zombie = app._life.worker
        execute(ledger, "UPDATE romancy_workers SET state = 'dead'")
        go.set()
        assert await handle.result(RESULT_TIMEOUT_S) == "run 2"
        assert app._life.worker is not zombie
        assert isinstance(zombie.writer.stopped_by, FencedError)
    assert tokens(ledger) == ["run 2"]
    assert completed(ledger) == ["book:1"]


@pytest.mark.parametrize("is_async", [True, False], ids=["async def", "def"])
@pytest.mark.parametrize("who", ["dead", "unknown", "alive"])
async def test_only_a_living_worker_commits_a_session(ledger: Database, who: str, is_async: bool) -> None:
    async with App(ledger) as app:
        execute(
            ledger,
            "INSERT INTO romancy_workers (worker_id, name, state, host, pid, process_started, started_at, lease_until) "
            "SELECT 'dead', name, 'dead', host, pid, process_started, started_at, lease_until FROM romancy_workers",
        )
        assert app._life.worker is not None
        worker_id = app._life.worker.worker_id if who == "alive" else who
        row = HistoryRow("i", 1, 1, "ActivityCompleted", "book:1", "book", 1, 1, 1, None, "{}", '"it\'s 100 %"', None)
        lease_until = app._life.worker.lease_deadline_us()
        transaction = app._life.engines.transaction(is_async=is_async)
        insert_token = {"token": "kept"}
        refused = contextlib.nullcontext() if who == "alive" else pytest.raises(FencedError)
        if is_async:
            await cast("AsyncSession", transaction.session()).execute(INSERT, insert_token)
            await transaction.flush()
            with refused:
                await transaction.commit(worker_id, row, lease_until)
        else:
            cast("Session", transaction.session()).execute(INSERT, insert_token)
            transaction.flush_in_thread()
            with refused:
                transaction.commit_in_thread(worker_id, row, lease_until)
    found = rows(ledger, f"SELECT {', '.join(HistoryRow._fields)} FROM romancy_history")
    assert (tokens(ledger), found) == ((["kept"], [tuple(row)]) if who == "alive" else ([], []))


async def test_crash_between_the_users_rows_and_the_commit_loses_both(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = asyncio.Event()
    real = ActivityTransaction.commit

    async def never(self: Any, *arguments: Any) -> None:
        reached.set()
        try:
            await asyncio.Event().wait()
        finally:
            await self.close()  # as the database does when the process dies

    monkeypatch.setattr(ActivityTransaction, "commit", never)

    @activity
    async def book() -> None:
        await current_activity().session.execute(INSERT, {"token": "once"})

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await book()

    app = App(ledger)
    await app.start()
    await app.start_workflow(flow, id="it")
    await reached.wait()
    assert app._life.worker is not None
    endings = list(app._life.worker._runner._endings)
    for ending in endings:
        ending.cancel()
    await asyncio.wait(endings)
    await crash(app)
    assert tokens(ledger) == []
    assert completed(ledger) == []

    monkeypatch.setattr(ActivityTransaction, "commit", real)
    async with App(ledger) as app:
        await (await app.get_handle("it")).result(RESULT_TIMEOUT_S)
    assert tokens(ledger) == ["once"]


async def test_outcomes_are_delivered_in_the_order_of_history_while_a_transaction_commits(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_commit, go = asyncio.Event(), asyncio.Event()
    real = ActivityTransaction.commit

    async def slow(self: Any, *arguments: Any) -> None:
        in_commit.set()
        await go.wait()
        await real(self, *arguments)

    monkeypatch.setattr(ActivityTransaction, "commit", slow)

    @activity
    async def book() -> str:
        await current_activity().session.execute(INSERT, {"token": "a"})
        return "book"

    @activity
    async def plain() -> str:
        await in_commit.wait()
        return "plain"

    @workflow
    async def flow(ctx: WorkflowContext) -> list[str]:
        order: list[str] = []

        async def note(call: Any) -> None:
            order.append(await call)

        await asyncio.gather(note(book()), note(plain()))
        return order

    async with App(ledger) as app:
        handle = await app.start_workflow(flow)
        await in_commit.wait()
        # The other activity ends now, but must not be seen before the one that is being committed.
        for _ in range(20):
            await asyncio.sleep(0)
        go.set()
        assert await handle.result(RESULT_TIMEOUT_S) == ["book", "plain"]
        events = await app.get_history(handle.instance_id)
    assert [event.activity_id for event in events] == ["book:1", "plain:1"]
