"""Channels: to all, to one of many, to one; in order, and nothing twice."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from romancy import (
    App,
    ChannelModeConflictError,
    Message,
    MessageTimeoutError,
    RetryPolicy,
    Status,
    WorkflowContext,
    activity,
    current_activity,
    workflow,
)
from romancy.testing import VirtualClock
from tests.databases import Database, execute, rows
from tests.engine.test_events import NOTHING, left
from tests.ledger import INSERT, create_ledger
from tests.support import RESULT_TIMEOUT_S, wait_for_status


async def waiting(app: App, *ids: str) -> None:
    for instance_id in ids:
        await wait_for_status(app, instance_id, Status.WAITING_FOR_MESSAGE)


async def test_broadcast_reaches_every_subscriber_in_order(database: Database) -> None:
    @workflow
    async def reader(ctx: WorkflowContext) -> list[int]:
        await ctx.subscribe("news")
        return [(await ctx.receive("news", type=int)).data for _ in range(3)]

    async with App(database) as app:
        await app.publish("news", 0)  # nobody has subscribed yet
        handles = [await app.start_workflow(reader, id=f"r{n}") for n in range(3)]
        await waiting(app, "r0", "r1", "r2")
        for number in (1, 2, 3):
            await app.publish("news", number)
        assert [await handle.result(RESULT_TIMEOUT_S) for handle in handles] == [[1, 2, 3]] * 3
    assert left(database) == NOTHING


async def test_each_message_of_a_competing_channel_has_one_consumer(database: Database) -> None:
    @workflow
    async def consumer(ctx: WorkflowContext, count: int) -> list[int]:
        await ctx.subscribe("jobs", mode="competing")
        return [(await ctx.receive("jobs", type=int)).data for _ in range(count)]

    async with App(database) as app:
        for number in range(4):
            await app.publish("jobs", number)  # kept for the first consumer
        handles = [await app.start_workflow(consumer, 5) for _ in range(4)]
        for number in range(4, 20):
            await app.publish("jobs", number)
        results = [await handle.result(RESULT_TIMEOUT_S) for handle in handles]
        assert sorted(number for result in results for number in result) == list(range(20))
        assert all(result == sorted(result) for result in results)
    assert left(database) == NOTHING


async def test_direct_message_waits_in_the_mailbox(database: Database) -> None:
    @workflow
    async def worker(ctx: WorkflowContext) -> list[Any]:
        first: Message[str] = await ctx.receive("inbox", type=str)
        second: Message[str] = await ctx.receive("inbox", type=str)
        return [first.data, first.sender, first.metadata, second.data, second.sender]

    @workflow
    async def boss(ctx: WorkflowContext) -> None:
        await ctx.send_to("w", "inbox", "do it", metadata={"urgent": True})

    async with App(database) as app:
        await (await app.start_workflow(boss, id="b")).result(RESULT_TIMEOUT_S)
        handle = await app.start_workflow(worker, id="w")
        await app.send_to("w", "inbox", "faster")
        await app.send_to("someone else", "inbox", "not yours")
        assert await handle.result(RESULT_TIMEOUT_S) == ["do it", "b", {"urgent": True}, "faster", None]


async def test_one_channel_has_one_mode(database: Database) -> None:
    @workflow
    async def confused(ctx: WorkflowContext, mode: str) -> str:
        try:
            await ctx.subscribe("c", mode)
        except ChannelModeConflictError as error:
            return str(error)
        return "subscribed"

    @workflow
    async def sender(ctx: WorkflowContext) -> list[str]:
        found = []
        for send in (lambda: ctx.send_to("x", "c"), lambda: ctx.publish("d")):
            try:
                await send()
            except ChannelModeConflictError as error:
                found.append(str(error))
        return found

    async with App(database) as app:
        assert await (await app.start_workflow(confused, "competing")).result(RESULT_TIMEOUT_S) == "subscribed"
        refused = await app.start_workflow(confused, "broadcast")
        assert "mode 'competing', not 'broadcast'" in await refused.result(RESULT_TIMEOUT_S)
        assert [event.kind for event in await app.get_history(refused.instance_id)] == ["ChannelRefused"]
        await app.send_to("x", "d")
        errors = await (await app.start_workflow(sender)).result(RESULT_TIMEOUT_S)
        assert "'c' has the mode 'competing', not 'direct'" in errors[0]
        assert "'d' has the mode 'direct'" in errors[1]
        with pytest.raises(ChannelModeConflictError, match="send_to"):
            await app.publish("d")
        with pytest.raises(ChannelModeConflictError, match="publish on it"):
            await app.send_to("x", "c")


async def test_receive_times_out(database: Database) -> None:
    @workflow
    async def patient(ctx: WorkflowContext) -> str:
        try:
            await ctx.receive("inbox", timeout=60)
        except MessageTimeoutError as error:
            return str(error)
        return "received"

    async with App(database, clock=VirtualClock(auto_advance=True)) as app:
        text = await (await app.start_workflow(patient)).result(RESULT_TIMEOUT_S)
        assert "channel 'inbox'" in text
    assert left(database) == NOTHING


async def test_unsubscribed_instance_gets_nothing_more(database: Database) -> None:
    @workflow
    async def reader(ctx: WorkflowContext) -> list[Any]:
        await ctx.subscribe("news")
        first = (await ctx.receive("news")).data
        await ctx.unsubscribe("news")
        await ctx.wait_event("go", key="reader")
        try:
            return [first, (await ctx.receive("news", timeout=0.05)).data]
        except MessageTimeoutError:
            return [first]

    async with App(database) as app:
        handle = await app.start_workflow(reader, id="r")
        await waiting(app, "r")
        await app.publish("news", 1)
        await wait_for_status(app, "r", Status.WAITING_FOR_EVENT)
        await app.publish("news", 2)
        await app.send_event("go", key="reader")
        assert await handle.result(RESULT_TIMEOUT_S) == [1]
    assert left(database) == NOTHING


async def test_consumer_that_gives_up_leaves_the_message_to_others(database: Database) -> None:
    """The message comes to the first consumer while its code is giving up."""

    @workflow
    async def fickle(ctx: WorkflowContext) -> str:
        await ctx.subscribe("jobs", mode="competing")
        receiving = asyncio.create_task(ctx.receive("jobs"))
        await ctx.wait_event("stop", key="fickle")
        receiving.cancel()
        await asyncio.wait([receiving])
        await ctx.wait_event("end", key="fickle")
        return "cancelled" if receiving.cancelled() else "received"

    @workflow
    async def steady(ctx: WorkflowContext) -> Any:
        await ctx.subscribe("jobs", mode="competing")
        return (await ctx.receive("jobs")).data

    async with App(database) as app:
        first = await app.start_workflow(fickle, id="f")
        await wait_for_status(app, "f", Status.WAITING_FOR_EVENT)
        second = await app.start_workflow(steady, id="s")
        await waiting(app, "s")
        await app.send_event("stop", key="fickle")
        await app.publish("jobs", "the job")
        await app.send_event("end", key="fickle")
        outcome = await first.result(RESULT_TIMEOUT_S)
        if outcome == "received":
            await app.publish("jobs", "the job")
        assert await second.result(RESULT_TIMEOUT_S) == "the job"
    assert left(database) == NOTHING


async def test_publishing_workflow_publishes_once(database: Database) -> None:
    @activity
    async def step() -> None: ...

    @workflow
    async def source(ctx: WorkflowContext) -> None:
        for number in range(3):
            await ctx.publish("news", number)
        await step()
        await ctx.wait_event("go", key="source")
        await ctx.publish("news", 3)

    @workflow
    async def reader(ctx: WorkflowContext) -> list[Any]:
        await ctx.subscribe("news")
        messages = [await ctx.receive("news") for _ in range(4)]
        assert {message.sender for message in messages} == {"s"}
        return [message.data for message in messages]

    async with App(database) as app:
        handle = await app.start_workflow(reader, id="r")
        await waiting(app, "r")
        await app.start_workflow(source, id="s")
        await wait_for_status(app, "s", Status.WAITING_FOR_EVENT)
    async with App(database) as app:
        handle = await app.get_handle("r", reader)
        await app.send_event("go", key="source")
        assert await handle.result(RESULT_TIMEOUT_S) == [0, 1, 2, 3]
    assert left(database) == NOTHING


@pytest.mark.parametrize("way", ["plain", "session", "thread"])
async def test_activity_sends_with_its_outcome_and_nothing_when_it_fails(database: Database, way: str) -> None:
    create_ledger(database)
    attempts: list[int] = []

    def tell() -> None:
        me = current_activity()
        attempts.append(me.attempt)
        me.publish("news", f"attempt {me.attempt}")
        me.send_event("told", me.attempt, key="k")
        me.send_to("r", "inbox", "direct")
        if me.attempt == 1:
            raise RuntimeError("once more")

    @activity(retry=RetryPolicy.fixed(3, 0.001))
    async def plain() -> None:
        tell()

    @activity(retry=RetryPolicy.fixed(3, 0.001))
    async def session() -> None:
        await current_activity().session.execute(INSERT, {"token": f"attempt {current_activity().attempt}"})
        tell()

    @activity(retry=RetryPolicy.fixed(3, 0.001))
    def thread() -> None:
        current_activity().sync_session.execute(INSERT, {"token": f"attempt {current_activity().attempt}"})
        tell()

    @workflow
    async def source(ctx: WorkflowContext) -> None:
        await {"plain": plain, "session": session, "thread": thread}[way]()

    @workflow
    async def reader(ctx: WorkflowContext) -> list[Any]:
        await ctx.subscribe("news")
        return [
            (await ctx.receive("news")).data,
            (await ctx.wait_event("told", key="k")).data,
            (await ctx.receive("inbox")).data,
        ]

    async with App(database) as app:
        handle = await app.start_workflow(reader, id="r")
        await waiting(app, "r")
        await (await app.start_workflow(source)).result(RESULT_TIMEOUT_S)
        assert await handle.result(RESULT_TIMEOUT_S) == ["attempt 2", 2, "direct"]
    assert attempts == [1, 2]
    expected = [] if way == "plain" else [("attempt 2",)]
    assert rows(database, "SELECT token FROM ledger") == expected
    assert left(database) == NOTHING


async def test_lost_lease_leaves_no_answer_of_the_database_unheard(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    began, go = asyncio.Event(), asyncio.Event()

    @activity
    async def work() -> None:
        began.set()
        await go.wait()

    @workflow
    async def reader(ctx: WorkflowContext) -> None:
        await work()
        await ctx.subscribe("news")

    async with App(database) as app:
        handle = await app.start_workflow(reader)
        await began.wait()
        execute(database, "UPDATE romancy_workers SET state = 'dead'")
        go.set()
        await handle.result(RESULT_TIMEOUT_S)
    gc.collect()
    assert "never retrieved" not in caplog.text
