"""Activities that last: heartbeats, what they tell later attempts, and what is seen of attempts from outside."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

import pytest

from romancy import (
    ActivityTimeoutError,
    App,
    ConfigurationError,
    PayloadTooLargeError,
    RetryPolicy,
    SerializationError,
    WorkflowContext,
    WorkflowFailedError,
    activity,
    current_activity,
    workflow,
)
from romancy.engine import attempt as attempt_module
from tests.databases import Database, rows
from tests.support import RESULT_TIMEOUT_S, crash

AT_ONCE = RetryPolicy.fixed(5, 0.0)


@dataclass
class Progress:
    page: int


@pytest.fixture
def without_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each heartbeat is recorded."""
    monkeypatch.setattr(attempt_module, "RECORD_INTERVAL_S", 0.0)


async def pending(app: App) -> Any:
    instance = await app.get_instance("it")
    assert instance is not None
    return instance.pending


async def test_later_attempt_goes_on_where_the_one_before_was(database: Database) -> None:
    pages: list[int] = []

    @activity(retry=AT_ONCE)
    async def export() -> int:
        context = current_activity()
        start = context.last_heartbeat(type=Progress)
        for page in range(start.page if start else 0, 6):
            pages.append(page)
            if page == 3 and context.attempt == 1:
                raise ConnectionError("the service is away")
            context.heartbeat(Progress(page + 1))
            # Its own, too, and in whatever form.
            assert context.last_heartbeat() == {"page": page + 1}
        return len(pages)

    @workflow
    async def flow(ctx: WorkflowContext) -> int:
        return await export()

    async with App(database) as app:
        handle = await app.start_workflow(flow, id="it")
        assert await handle.result(RESULT_TIMEOUT_S) == 7
        assert pages == [0, 1, 2, 3, 3, 4, 5]
        kinds = [event.kind for event in await app.get_history("it")]
        # However often it told of itself: one row.
        assert kinds == ["ActivityHeartbeat", "ActivityRetryScheduled", "ActivityCompleted"]
        assert await pending(app) == ()


@pytest.mark.usefixtures("without_pause")
async def test_progress_outlives_the_process(database: Database) -> None:
    reached, go = asyncio.Event(), asyncio.Event()
    starts: list[Any] = []

    @activity
    async def export() -> str:
        context = current_activity()
        starts.append(context.last_heartbeat())
        if len(starts) == 1:
            for page in (1, 2, 3):
                context.heartbeat({"page": page})
                await asyncio.sleep(0)
            reached.set()
            await go.wait()
        return "done"

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        return await export()

    app = App(database)
    await app.start()
    await app.start_workflow(flow, id="it")
    await reached.wait()
    while [told.heartbeat for told in await pending(app)] != [{"page": 3}]:
        await asyncio.sleep(0.005)
    (told,) = await pending(app)
    assert (told.activity_id, told.name, told.attempts, told.last_error) == ("export:1", "export", 0, None)
    assert told.heartbeat_at is not None
    await crash(app)
    async with App(database) as app:
        assert await (await app.get_handle("it")).result(RESULT_TIMEOUT_S) == "done"
    assert starts == [None, {"page": 3}]
    assert rows(database, "SELECT count(*) FROM romancy_history WHERE kind = 'ActivityHeartbeat'") == [(1,)]


@pytest.mark.parametrize("is_async", [True, False])
async def test_attempt_that_falls_silent_has_failed(database: Database, is_async: bool) -> None:
    attempts: list[int] = []
    go, told_off = threading.Event(), []

    async def silent() -> str:
        attempts.append(current_activity().attempt)
        if len(attempts) == 1:
            await asyncio.sleep(RESULT_TIMEOUT_S)
        return "done"

    def silent_in_a_thread() -> str:
        context = current_activity()
        attempts.append(context.attempt)
        if len(attempts) == 1:
            go.wait(RESULT_TIMEOUT_S)
            try:
                context.heartbeat()
            except ActivityTimeoutError as error:
                told_off.append(str(error))
            raise ValueError("of this nobody hears")
        return "done"

    step: Any = activity(name="step", retry=AT_ONCE, heartbeat_timeout=0.05)(silent if is_async else silent_in_a_thread)

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        result: str = await step()
        return result

    async with App(database) as app:
        handle = await app.start_workflow(flow, id="it")
        assert await handle.result(RESULT_TIMEOUT_S) == "done"
        go.set()
        (retry, _) = await app.get_history("it")
        assert retry.error is not None
        assert retry.error.type == "romancy.errors.ActivityTimeoutError"
        assert "attempt 1 of activity step:1 gave no heartbeat for 0.05 s" in retry.error.message
    if not is_async:
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while not told_off:
                await asyncio.sleep(0.005)
        assert "gave no heartbeat" in told_off[0]


async def test_attempt_that_tells_of_itself_may_last(database: Database) -> None:
    @activity(retry=RetryPolicy.no_retry())
    async def lasts() -> str:
        deadline = asyncio.get_running_loop().time() + 0.4
        while asyncio.get_running_loop().time() < deadline:
            current_activity().heartbeat()
            await asyncio.sleep(0.005)
        return "done"

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        return await lasts.options(heartbeat_timeout=0.2)()

    async with App(database) as app:
        assert await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S) == "done"


async def test_details_that_can_not_be_stored(database: Database) -> None:
    refused: list[Exception] = []

    @activity(retry=RetryPolicy.no_retry())
    async def step() -> None:
        for details in (object(), "x" * 2000):
            try:
                current_activity().heartbeat(details)
            except (SerializationError, PayloadTooLargeError) as error:
                refused.append(error)

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await step()

    async with App(database, max_payload_bytes=1000) as app:
        await (await app.start_workflow(flow, id="it")).result(RESULT_TIMEOUT_S)
        assert [event.kind for event in await app.get_history("it")] == ["ActivityCompleted"]
    assert "the details of a heartbeat of type object" in str(refused[0])
    assert isinstance(refused[1], PayloadTooLargeError)


async def test_retries_are_seen_from_outside(database: Database) -> None:
    @activity(retry=RetryPolicy.fixed(3, 60.0))
    async def flaky(what: str) -> None:
        current_activity().heartbeat(what)
        raise ConnectionError(f"{what} is away")

    @activity
    async def fine() -> None: ...

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await fine()
        await asyncio.gather(flaky("one"), flaky("two"))

    async with App(database) as app:
        await app.start_workflow(flow, id="it")
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while sum(told.attempts for told in await pending(app)) < 2:
                await asyncio.sleep(0.005)
        one, two = await pending(app)
        assert (one.activity_id, one.name, one.attempts, one.heartbeat) == ("flaky:1", "flaky", 1, "one")
        assert one.last_error is not None
        assert one.last_error.message == "one is away"
        instance = await app.get_instance("it")
        assert instance is not None
        assert 50 < (one.next_attempt_at - instance.started_at).total_seconds() <= 65
        assert two.heartbeat == "two"
        # A list is read by the hundred: it has no such details.
        assert (await app.list_instances()).instances[0].pending == ()
        await app.cancel("it")


@pytest.mark.parametrize("value", [0, -1, "soon"])
def test_a_heartbeat_timeout_that_is_none(value: Any) -> None:
    async def step() -> None: ...

    with pytest.raises(ConfigurationError, match="heartbeat_timeout"):
        activity(heartbeat_timeout=value)(step)


async def test_failed_activity_keeps_its_history(database: Database) -> None:
    @activity(retry=RetryPolicy.no_retry())
    async def step() -> None:
        current_activity().heartbeat(1)
        await asyncio.sleep(0)
        raise ValueError("no")

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await step()

    async with App(database) as app:
        handle = await app.start_workflow(flow, id="it")
        with pytest.raises(WorkflowFailedError):
            await handle.result(RESULT_TIMEOUT_S)
        assert await pending(app) == ()
        kinds = [event.kind for event in await app.get_history("it")]
        assert kinds == ["ActivityHeartbeat", "ActivityFailed", "WorkflowFailed"]
