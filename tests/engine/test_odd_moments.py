"""What happens at the same time, in the wrong order, or for too long: nothing doubled, nobody stuck."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest

from romancy import (
    App,
    DatabaseReadOnlyError,
    DatabaseUnavailableError,
    InstanceConflictError,
    RetryPolicy,
    Status,
    WorkflowContext,
    WorkflowFailedError,
    WorkflowSuspendedError,
    activity,
    current_activity,
    workflow,
)
from romancy.engine import worker as worker_module
from romancy.engine.timers import MOST_CANCELLED, TimerQueue
from romancy.storage.store import Store
from romancy.testing import VirtualClock
from tests.databases import Database, connect, execute, kind_of, rows
from tests.ledger import INSERT, Entry, create_ledger
from tests.support import RESULT_TIMEOUT_S, crash, until_live, until_quiet


async def test_starts_of_one_id_in_one_batch_make_one_instance(database: Database) -> None:
    create_ledger(database)
    ran: list[int] = []

    @activity
    async def book(n: int) -> int:
        ran.append(n)
        await current_activity().session.execute(INSERT, {"token": str(n)})
        return n

    @workflow
    async def flow(ctx: WorkflowContext, n: int) -> int:
        return await book(n)

    async with App(database) as app:
        handles = await asyncio.gather(*[app.start_workflow(flow, 1, id="it") for _ in range(5)])
        assert [await handle.result(RESULT_TIMEOUT_S) for handle in handles] == [1] * 5
        outcomes = await asyncio.gather(
            *[app.start_workflow(flow, n, id="other") for n in (7, 8)], return_exceptions=True
        )
        assert [type(outcome) is InstanceConflictError for outcome in outcomes] == [False, True]
        await (await app.get_handle("other")).result(RESULT_TIMEOUT_S)
    assert ran == [1, 7]
    assert rows(database, "SELECT token FROM ledger ORDER BY id") == [("1",), ("7",)]


async def test_many_plain_functions_that_only_add_objects_do_not_block_each_other(database: Database) -> None:
    create_ledger(database)

    @activity
    def add(n: int) -> None:
        current_activity().sync_session.add(Entry(token=str(n)))

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await asyncio.gather(*[add(n) for n in range(12)])

    async with App(database) as app:
        await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
    assert Counter(token for (token,) in rows(database, "SELECT token FROM ledger")) == Counter(map(str, range(12)))


@pytest.mark.parametrize("is_replayed", [False, True])
async def test_callback_that_raises_harms_nobody(
    database: Database, is_replayed: bool, romancy_log: pytest.LogCaptureFixture
) -> None:
    go, reached = asyncio.Event(), asyncio.Event()

    @activity
    async def step() -> int:
        return 1

    @activity
    async def wait() -> int:
        reached.set()
        await go.wait()
        return 2

    def bad(*_arguments: Any) -> None:
        raise RuntimeError("a callback's own fault")

    @workflow
    async def faulty(ctx: WorkflowContext) -> int:
        task = asyncio.ensure_future(step())
        task.add_done_callback(bad)
        asyncio.get_running_loop().call_soon(bad)
        return await task + await wait()

    app = App(database)
    await app.start()
    handles = [(await app.start_workflow(faulty, id=f"i{n}")).instance_id for n in range(4)]
    await reached.wait()
    if is_replayed:
        await until_quiet(app, lambda: 0)
        await crash(app)
        app = App(database)
        await app.start()
    go.set()
    assert [await (await app.get_handle(i)).result(RESULT_TIMEOUT_S) for i in handles] == [3] * 4
    assert "a callback's own fault" in romancy_log.text
    await app.shutdown()


async def test_shutdown_does_not_wait_for_a_thread_that_holds_a_session(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "LONGEST_FAREWELL_S", 0.3)
    create_ledger(database)
    go, reached, left = threading.Event(), asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    @activity
    def stubborn() -> None:
        current_activity().sync_session.execute(INSERT, {"token": "stubborn"})
        loop.call_soon_threadsafe(reached.set)
        go.wait(RESULT_TIMEOUT_S)
        left.set()

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await stubborn()

    app = App(database, shutdown_grace=0.05)
    await app.start()
    await app.start_workflow(flow)
    await reached.wait()
    try:
        await asyncio.wait_for(app.shutdown(), RESULT_TIMEOUT_S)
        assert not left.is_set()
    finally:
        go.set()
    assert await asyncio.to_thread(left.wait, RESULT_TIMEOUT_S)


async def test_no_activity_begins_during_shutdown(database: Database) -> None:
    go, release, reached = asyncio.Event(), asyncio.Event(), asyncio.Event()
    began: list[int] = []

    @activity
    async def step(n: int) -> None:
        began.append(n)
        reached.set()
        await go.wait()

    @activity
    async def hold() -> None:
        await release.wait()

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        held = asyncio.ensure_future(hold())
        for n in range(100):
            await step(n)
        await held

    app = App(database, shutdown_grace=RESULT_TIMEOUT_S)
    await app.start()
    await app.start_workflow(flow)
    await reached.wait()
    worker = app._life.worker
    assert worker is not None
    stopping = asyncio.ensure_future(app.shutdown())
    while not worker._runner._is_stopping:
        await asyncio.sleep(0)
    go.set()
    await until_quiet(app, lambda: (worker.writer.committed, len(began)))
    assert worker._runner.running_count == 1
    release.set()
    await stopping
    assert began == [0]
    assert rows(database, "SELECT status, owner FROM romancy_instances") == [("pending", None)]
    assert rows(database, "SELECT count(*) FROM romancy_history") == [(2,)]


async def test_timeout_of_an_activity_that_waits_for_a_place(database: Database) -> None:
    go, reached = asyncio.Event(), asyncio.Event()

    @activity
    async def slow() -> int:
        reached.set()
        await go.wait()
        return 1

    @activity
    async def quick() -> int:
        return 2

    @workflow
    async def hog(ctx: WorkflowContext) -> int:
        return await slow()

    @workflow
    async def hasty(ctx: WorkflowContext) -> str:
        try:
            async with asyncio.timeout(0.01):
                await quick()
        except TimeoutError:
            await ctx.sleep(0.01)
            return "fallback"
        return "quick"

    async with App(database, max_activities=1) as app:
        first = await app.start_workflow(hog)
        await reached.wait()
        assert await (await app.start_workflow(hasty)).result(RESULT_TIMEOUT_S) == "fallback"
        go.set()
        assert await first.result(RESULT_TIMEOUT_S) == 1


@pytest.mark.parametrize("waits_for", ["timer", "nothing"])
async def test_activity_given_up_behind_the_barrier_leaves_the_instance_at_rest(
    database: Database, waits_for: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[threading.Event] = []
    real = Store.flush

    def flush(self: Store, *arguments: Any) -> Any:
        if held:
            event = held[0]
            self._write(lambda link: event.wait(RESULT_TIMEOUT_S))
        return real(self, *arguments)

    monkeypatch.setattr(Store, "flush", flush)
    given_up = asyncio.Event()

    @activity
    async def quick() -> int:
        held.append(threading.Event())
        return 1

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await quick()
        task = asyncio.create_task(quick())
        await asyncio.sleep(0.01)  # fires while the second call waits for the commit of the first
        task.cancel()
        given_up.set()
        await (ctx.sleep(3600) if waits_for == "timer" else asyncio.Event().wait())

    async with App(database) as app:
        handle = await app.start_workflow(flow)
        await given_up.wait()
        held.pop().set()
        if waits_for == "nothing":
            with pytest.raises(WorkflowSuspendedError):
                await handle.result(RESULT_TIMEOUT_S)
            return
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while await handle.status() is not Status.WAITING_FOR_TIMER:
                await asyncio.sleep(0)


async def test_sleepers_are_never_taken_for_poison(
    database: Database, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "MAX_CLAIMS", 2)

    @workflow
    async def sleeper(ctx: WorkflowContext) -> str:
        await ctx.sleep(3600)
        return "rested"

    app = App(database, clock=clock)
    await app.start()
    await app.start_workflow(sleeper, id="it")
    for _ in range(worker_module.MAX_CLAIMS + 2):
        await until_live(app, "it")
        await until_quiet(app, lambda: 0)
        await crash(app)
        app = App(database, clock=clock)
        await app.start()
    await until_live(app, "it")
    await clock.advance(3601)
    assert await (await app.get_handle("it")).result(RESULT_TIMEOUT_S) == "rested"
    await app.shutdown()


@pytest.mark.parametrize("wait", [timedelta(days=365 * 9000), timedelta.max, float("inf")])
async def test_sleep_beyond_all_dates(database: Database, wait: Any) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await ctx.sleep(wait)

    async with App(database) as app:
        handle = await app.start_workflow(flow)
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while await handle.status() is not Status.WAITING_FOR_TIMER:
                await asyncio.sleep(0)
        (instance,) = (await app.list_instances()).instances
        assert instance.next_wake_at is not None
        assert instance.next_wake_at.year == 9999


async def test_each_attempt_gets_arguments_of_its_own(database: Database) -> None:
    seen: list[list[int]] = []

    @activity(retry=RetryPolicy.fixed(3, 0))
    async def spoil(items: list[int]) -> int:
        seen.append(list(items))
        items.pop()
        if len(seen) < 3:
            raise ConnectionError
        return len(items)

    @workflow
    async def flow(ctx: WorkflowContext) -> int:
        return await spoil([1, 2, 3])

    async with App(database) as app:
        assert await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S) == 2
    assert seen == [[1, 2, 3]] * 3


async def test_time_that_a_plain_function_waits_for_its_thread_does_not_count(database: Database) -> None:
    go, reached = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    @activity
    def first() -> None:
        loop.call_soon_threadsafe(reached.set)
        go.wait(RESULT_TIMEOUT_S)

    @activity(timeout=0.05, retry=RetryPolicy.no_retry())
    def second() -> str:
        return "in time"

    @workflow
    async def one(ctx: WorkflowContext) -> None:
        await first()

    @workflow
    async def two(ctx: WorkflowContext) -> str:
        return await second()

    async with App(database, activity_threads=1) as app:
        await app.start_workflow(one)
        await reached.wait()
        handle = await app.start_workflow(two)
        with pytest.raises(TimeoutError):
            await handle.result(0.2)
        go.set()
        assert await handle.result(RESULT_TIMEOUT_S) == "in time"


async def test_worker_that_can_no_longer_write_leaves_its_work_to_others(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, reached = asyncio.Event(), asyncio.Event()

    @activity
    async def step() -> str:
        reached.set()
        await go.wait()
        return "done"

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        return await step()

    async with App(database) as broken:
        await broken.start_workflow(flow, id="it")
        await reached.wait()
        assert broken._life.worker is not None
        broken_id = broken._life.worker.worker_id

        store = type(broken._life.store)
        real = store._write_parties

        def write(self: Any, link: Any, batch: Any, parties: Any, worker_id: str | None, *rest: Any) -> Any:
            if worker_id == broken_id:
                raise DatabaseReadOnlyError("it can't be written")
            return real(self, link, batch, parties, worker_id, *rest)

        monkeypatch.setattr(store, "_write_parties", write)
        monkeypatch.setattr(store, "_flush_on_loop", lambda *_: None)
        go.set()
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while rows(database, "SELECT count(*) FROM romancy_workers WHERE worker_id = ?", broken_id) != [(0,)]:
                await asyncio.sleep(0.01)
    assert rows(database, "SELECT status, owner FROM romancy_instances") == [("pending", None)]


async def test_only_the_engine_ends_the_transaction_of_an_activity(database: Database) -> None:
    create_ledger(database)

    @activity(retry=RetryPolicy.no_retry())
    async def commits() -> None:
        session = current_activity().session
        await session.execute(INSERT, {"token": "commits"})
        await (await session.connection()).commit()

    @activity(retry=RetryPolicy.no_retry())
    async def closes() -> None:
        async with current_activity().session as session:
            await session.execute(INSERT, {"token": "closes"})

    @workflow
    async def flow(ctx: WorkflowContext, name: str) -> None:
        await (commits() if name == "commits" else closes())

    async with App(database) as app:
        for name, words in (("commits", "only Romancy commits"), ("closes", "is Romancy's to close")):
            with pytest.raises(WorkflowFailedError, match=words):
                await (await app.start_workflow(flow, name)).result(RESULT_TIMEOUT_S)
    assert rows(database, "SELECT token FROM ledger") == []


async def test_database_error_of_an_activitys_own_counts_as_its_failure(database: Database) -> None:
    attempts: list[int] = []

    @activity(retry=RetryPolicy.fixed(2, 0))
    async def asks_another_database() -> None:
        attempts.append(current_activity().attempt)
        raise DatabaseReadOnlyError("somebody else's database")

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await asks_another_database()

    async with App(database) as app:
        with pytest.raises(WorkflowFailedError, match="somebody else's database"):
            await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
    assert attempts == [1, 2]


async def test_event_that_somebody_else_has_recorded_ends_the_transaction_and_the_instance_here(
    database: Database, romancy_log: pytest.LogCaptureFixture
) -> None:
    create_ledger(database)
    attempts: list[int] = []

    @activity
    async def book() -> None:
        attempts.append(current_activity().attempt)
        execute(
            database,
            "INSERT INTO romancy_history (instance_id, run, seq, kind, attempt, at) VALUES ('it', 1, 1, 'x', 1, 0)",
        )
        await current_activity().session.execute(INSERT, {"token": "doubled"})

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await book()

    async with App(database) as app:
        await app.start_workflow(flow, id="it")
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while app._life.worker is None or app._life.worker.is_live("it"):
                await asyncio.sleep(0)
        await until_quiet(app, lambda: len(attempts))
    assert attempts == [1]
    assert rows(database, "SELECT token FROM ledger") == []
    assert "belongs to another worker now" in romancy_log.text


async def test_cancelled_deadlines_are_forgotten() -> None:
    queue = TimerQueue(VirtualClock())
    queue.add(1, lambda: None)
    for n in range(50 * MOST_CANCELLED):
        queue.add(n + 2, lambda: None).cancel()
    assert len(queue._heap) <= 2 * MOST_CANCELLED + 2
    queue.close()


async def test_what_was_claimed_is_run_also_when_the_database_fails_right_after(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        return "done"

    real, failures = Store.next_due, iter([DatabaseUnavailableError("gone for a moment")])

    def next_due(store: Store) -> Future[int | None]:
        error = next(failures, None)
        if error is None:
            return real(store)
        future: Future[int | None] = Future()
        future.set_exception(error)
        return future

    monkeypatch.setattr(Store, "next_due", next_due)
    async with App(database, worker=False) as client:
        await client.start_workflow(flow, id="it")
    async with App(database) as app:
        assert await (await app.get_handle("it")).result(RESULT_TIMEOUT_S) == "done"
        assert next(failures, None) is None


async def test_worker_does_not_ask_without_end_for_what_another_has_locked(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind_of(database) == "sqlite":
        pytest.skip("has one writer, and no locks of rows")

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        return "done"

    real, times = Store.claim_ready, []

    def claim_ready(store: Store, *arguments: Any) -> Future[Any]:
        times.append(time.monotonic())
        return real(store, *arguments)

    monkeypatch.setattr(Store, "claim_ready", claim_ready)
    async with App(database, worker=False) as client:
        await client.start_workflow(flow, id="it")
        # As a worker that was stopped in the middle of its claim.
        with closing(connect(database)) as other:
            cursor = other.cursor()
            cursor.execute("BEGIN")
            cursor.execute("SELECT * FROM romancy_instances FOR UPDATE")
            cursor.fetchall()
            async with App(database) as app:
                async with asyncio.timeout(RESULT_TIMEOUT_S):
                    while len(times) < 12:
                        await asyncio.sleep(0.01)
                # Not counted: the first one, and two that follow hints, which its listener gives as it begins.
                assert times[11] - times[1] >= 8 * 0.02
                other.rollback()
                assert await (await app.get_handle("it")).result(RESULT_TIMEOUT_S) == "done"
