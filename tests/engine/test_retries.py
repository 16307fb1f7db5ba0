"""Retries: the documented schedule, durable counts and waits, and what ends them."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from itertools import pairwise

import pytest

from romancy import (
    ActivityTimeoutError,
    App,
    HistoryKind,
    RetryExhaustedError,
    RetryPolicy,
    WorkflowContext,
    WorkflowFailedError,
    activity,
    current_activity,
    workflow,
)
from romancy.testing import VirtualClock
from tests.databases import Database
from tests.support import RESULT_TIMEOUT_S, crash, until_live, until_quiet


async def test_default_schedule_waits_1_2_4_8_seconds_then_gives_up(database: Database) -> None:
    clock = VirtualClock(auto_advance=True)
    times: list[int] = []

    @activity
    async def fails() -> None:
        times.append(clock.now_us())
        raise ConnectionError("down")

    @workflow
    async def flow(ctx: WorkflowContext) -> tuple[str, int, str]:
        try:
            await fails()
        except RetryExhaustedError as error:
            assert error.__cause__ is error.last_error
            return error.activity_id, error.attempts, repr(error.last_error)
        raise AssertionError

    async with App(database, clock=clock) as app:
        handle = await app.start_workflow(flow)
        assert await handle.result(RESULT_TIMEOUT_S) == ("fails:1", 5, "ConnectionError('down')")
        kinds = [event.kind for event in await app.get_history(handle.instance_id)]
    assert [(b - a) / 1e6 for a, b in pairwise(times)] == [1, 2, 4, 8]
    assert kinds == [HistoryKind.ACTIVITY_RETRY_SCHEDULED] * 4 + [HistoryKind.ACTIVITY_FAILED]


async def test_policy_order_is_call_then_activity_then_app(database: Database) -> None:
    attempts: dict[str, int] = {}

    def count() -> None:
        name = current_activity().activity_id.split(":")[0]
        attempts[name] = attempts.get(name, 0) + 1
        raise ValueError

    @activity(name="own", retry=RetryPolicy.fixed(2, 0))
    async def own() -> None:
        count()

    @activity(name="plain")
    async def plain() -> None:
        count()

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        calls = [own(), plain(), plain.options(id="call:1", retry=RetryPolicy.fixed(4, 0))()]
        await asyncio.gather(*calls, return_exceptions=True)

    async with App(database, default_retry=RetryPolicy.fixed(3, 0)) as app:
        await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
    assert attempts == {"own": 2, "plain": 3, "call": 4}


async def test_crash_during_backoff_neither_restarts_the_count_nor_forgets_the_wait(
    database: Database, clock: VirtualClock
) -> None:
    attempts: list[tuple[int, int]] = []
    begin = clock.now_us()

    @activity(retry=RetryPolicy(max_attempts=3, initial_interval=10, multiplier=3))
    async def fails() -> None:
        attempts.append((current_activity().attempt, (clock.now_us() - begin) // 1_000_000))
        raise ValueError

    @workflow
    async def flow(ctx: WorkflowContext) -> int:
        try:
            await fails()
        except RetryExhaustedError as error:
            return error.attempts
        return 0

    app = App(database, clock=clock)
    await app.start()
    await app.start_workflow(flow, id="it")
    await clock.wait_for_sleeper()
    await until_quiet(app, lambda: len(attempts))
    await crash(app)

    await clock.advance(4)
    app = App(database, clock=clock)
    await app.start()
    await until_live(app, "it")
    await until_quiet(app, lambda: len(attempts))
    assert attempts == [(1, 0)]
    await clock.advance(6)
    await until_quiet(app, lambda: len(attempts))
    assert attempts == [(1, 0), (2, 10)]
    await crash(app)

    await clock.advance(1_000)
    async with App(database, clock=clock) as app:
        assert await (await app.get_handle("it")).result(RESULT_TIMEOUT_S) == 3
    assert attempts == [(1, 0), (2, 10), (3, 1010)]


async def test_max_duration_counts_from_the_first_attempt_also_after_a_crash(
    database: Database, clock: VirtualClock
) -> None:
    @activity(retry=RetryPolicy(max_attempts=0, initial_interval=10, multiplier=1, max_duration=25))
    async def fails() -> None:
        raise ValueError

    @workflow
    async def flow(ctx: WorkflowContext) -> int:
        try:
            await fails()
        except RetryExhaustedError as error:
            return error.attempts
        return 0

    app = App(database, clock=clock)
    await app.start()
    await app.start_workflow(flow, id="it")
    await clock.wait_for_sleeper()
    await until_quiet(app, lambda: None)
    await crash(app)
    async with App(database, clock=clock) as app:
        handle = await app.get_handle("it")
        result = asyncio.ensure_future(handle.result(RESULT_TIMEOUT_S))
        await until_live(app, "it")
        for _ in range(2):
            await until_quiet(app, lambda: None)
            await clock.advance(10)
        assert await result == 3


async def test_timeout_of_an_async_attempt_cancels_it_and_counts(database: Database) -> None:
    cancelled = []

    @activity(timeout=timedelta(milliseconds=20), retry=RetryPolicy.fixed(2, 0))
    async def stuck() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(current_activity().attempt)
            raise

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        try:
            await stuck()
        except RetryExhaustedError as error:
            assert isinstance(error.last_error, ActivityTimeoutError)
            assert isinstance(error.last_error, TimeoutError)
            return str(error.last_error)
        return ""

    async with App(database) as app:
        message = await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
    assert cancelled == [1, 2]
    assert "longer than its timeout of 0.02 s" in message


async def test_timeout_of_a_sync_attempt_fails_it_while_its_thread_runs_on(database: Database) -> None:
    import threading

    go, ended = threading.Event(), threading.Event()

    @activity(timeout=0.02, retry=RetryPolicy.no_retry())
    def stuck() -> str:
        go.wait(RESULT_TIMEOUT_S)
        ended.set()
        return "too late"

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        try:
            return await stuck()
        except RetryExhaustedError as error:
            return type(error.last_error).__name__

    async with App(database) as app:
        handle = await app.start_workflow(flow)
        assert await handle.result(RESULT_TIMEOUT_S) == "ActivityTimeoutError"
        go.set()
        assert ended.wait(RESULT_TIMEOUT_S)
        kinds = [event.kind for event in await app.get_history(handle.instance_id)]
    assert kinds == [HistoryKind.ACTIVITY_FAILED]


async def test_errors_that_are_not_to_be_retried_fail_at_once(database: Database) -> None:
    calls = []

    @activity(retry=RetryPolicy(dont_retry_on=(KeyError,)))
    async def lookup() -> None:
        calls.append(1)
        raise KeyError("k")

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await lookup()

    async with App(database) as app:
        with pytest.raises(WorkflowFailedError, match="after 1 attempt") as caught:
            await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
    cause = caught.value.__cause__
    assert isinstance(cause, RetryExhaustedError)
    assert isinstance(cause.last_error, KeyError)
    assert calls == [1]


async def test_stop_iteration_from_a_sync_activity_does_not_break_the_workflow(database: Database) -> None:
    @activity(retry=RetryPolicy.no_retry())
    def stops() -> None:
        next(iter(()))

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        try:
            await stops()
        except RetryExhaustedError as error:
            return type(error.last_error).__name__
        return ""

    async with App(database) as app:
        assert await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S) == "StopIteration"


async def test_activity_that_cancels_itself_is_a_failed_attempt(database: Database) -> None:
    @activity(retry=RetryPolicy.fixed(2, 0))
    async def cancels() -> None:
        raise asyncio.CancelledError

    @workflow
    async def flow(ctx: WorkflowContext) -> int:
        try:
            await cancels()
        except RetryExhaustedError as error:
            return error.attempts
        return 0

    async with App(database) as app:
        assert await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S) == 2
