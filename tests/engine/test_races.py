"""Races on purpose: whichever side is first, nothing is lost and nothing is doubled.

``ROMANCY_RACES`` says how many races of a send against a wait there are on each database; `just races` has 100,000.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Iterable
from typing import Any

import pytest

from romancy import (
    App,
    EventTimeoutError,
    Status,
    WorkflowCancelledError,
    WorkflowContext,
    WorkflowHandle,
    activity,
    workflow,
)
from tests.databases import Database, rows
from tests.engine.test_events import NOTHING, left
from tests.support import RESULT_TIMEOUT_S, wait_for_status

RACES = int(os.environ.get("ROMANCY_RACES", "400"))
WAITS = 20
"""How often each instance waits."""
AT_A_TIME = 64

dice = random.Random(4)


async def in_any_order(jobs: Iterable[Awaitable[Any]]) -> None:
    """Run them some at a time, as they come."""
    places = asyncio.Semaphore(AT_A_TIME)

    async def one(job: Awaitable[Any]) -> None:
        async with places:
            await job

    shuffled = list(jobs)
    dice.shuffle(shuffled)
    await asyncio.gather(*map(one, shuffled))


@pytest.mark.timeout(60 + RACES / 100)
async def test_sends_against_waits(database: Database) -> None:
    """Events are sent by another app while instances begin to wait for them, one after another."""

    @workflow
    async def waiter(ctx: WorkflowContext) -> int:
        total = 0
        for number in range(WAITS):
            total += (await ctx.wait_event("race", key=f"{ctx.instance_id}/{number}", type=int)).data
        return total

    async with App(database, max_hot_instances=50) as app, App(database, worker=False) as sender:
        names = [f"w{n}" for n in range(max(RACES // WAITS, 1))]
        starts = [app.start_workflow(waiter, id=name) for name in names]
        sends = [sender.send_event("race", number, key=f"{name}/{number}") for name in names for number in range(WAITS)]
        await in_any_order([*starts, *sends])
        for name in names:
            result = await (await app.get_handle(name)).result(RESULT_TIMEOUT_S + RACES / 100)
            assert result == sum(range(WAITS))
    assert left(database) == NOTHING


async def test_events_against_timeouts(database: Database) -> None:
    """Each event is received or is still there; a wait ends once, by one of them."""

    @workflow
    async def waiter(ctx: WorkflowContext) -> list[str]:
        found = []
        for number in range(10):
            try:
                event = await ctx.wait_event("race", key=f"{ctx.instance_id}/{number}", timeout=0.005 * number)
            except EventTimeoutError:
                found.append("late")
            else:
                found.append(event.data)
        return found

    async def send_late(app: App, name: str, number: int) -> None:
        await asyncio.sleep(dice.random() * 0.02 * number)
        await app.send_event("race", f"{name}/{number}", key=f"{name}/{number}")

    async with App(database) as app:
        names = [f"w{n}" for n in range(20)]
        handles = [await app.start_workflow(waiter, id=name) for name in names]
        await asyncio.gather(*[send_late(app, name, number) for name in names for number in range(10)])
        received: list[str] = []
        for name, handle in zip(names, handles, strict=True):
            found = await handle.result(RESULT_TIMEOUT_S)
            assert all(data == f"{name}/{n}" for n, data in enumerate(found) if data != "late")
            received += [data for data in found if data != "late"]
        histories = [await app.get_history(name) for name in names]
        kinds = Counter(event.kind for history in histories for event in history)
    kept = [subject for (subject,) in rows(database, "SELECT subject FROM romancy_mail")]
    assert sorted(received + kept) == sorted(f"{name}/{number}" for name in names for number in range(10))
    assert kinds["EventReceived"] == len(received)
    assert 0 < len(received) < 200, "no race at all"
    assert rows(database, "SELECT count(*) FROM romancy_waits") == [(0,)]
    assert rows(database, "SELECT count(*) FROM romancy_deliveries") == [(0,)]


async def test_cancellations_against_completions(database: Database) -> None:
    """One end, the same for everybody who asks, and no request is left behind."""

    @activity
    async def step(seconds: float) -> None:
        await asyncio.sleep(seconds)

    @workflow
    async def flow(ctx: WorkflowContext, seconds: float) -> str:
        await step(seconds)
        return "done"

    async def start_and_cancel(app: App, name: str) -> tuple[WorkflowHandle[str], bool]:
        handle = await app.start_workflow(flow, dice.random(), id=name)
        await asyncio.sleep(dice.random())
        return handle, await app.cancel(name)

    async with App(database) as app:
        names = [f"c{n}" for n in range(60)]
        cancelled = await asyncio.gather(*[start_and_cancel(app, name) for name in names])
        ends: Counter[Status] = Counter()
        for handle, was_open in cancelled:
            try:
                assert await handle.result(RESULT_TIMEOUT_S) == "done"
                expected = Status.COMPLETED
            except WorkflowCancelledError:
                expected = Status.CANCELLED
                assert was_open
            assert await handle.status() is expected
            last = [event.kind for event in await app.get_history(handle.instance_id)]
            assert ("WorkflowCancelled" in last) is (expected is Status.CANCELLED)
            ends[expected] += 1
        # A request that came in the very moment of the end is cleared away with what has expired.
        await asyncio.wrap_future(app._life.store.clear_expired(0, 1000))
    assert len(ends) == 2, "no race at all"
    assert left(database) == NOTHING


async def test_subscriptions_against_publications(database: Database) -> None:
    """Whoever subscribes while somebody publishes gets all from some message on, in order, and none before."""

    @workflow
    async def reader(ctx: WorkflowContext) -> list[int]:
        await ctx.subscribe("news")
        found: list[int] = []
        while not found or found[-1] != 60:
            found.append((await ctx.receive("news", type=int)).data)
        return found

    async with App(database) as app, App(database, worker=False) as publisher:

        async def publish() -> None:
            for number in range(1, 61):
                await publisher.publish("news", number)

        async def subscribe(name: str) -> None:
            await asyncio.sleep(dice.random() * 0.05)
            await app.start_workflow(reader, id=name)

        names = [f"r{n}" for n in range(20)]
        publishing = asyncio.create_task(publish())
        await asyncio.gather(*map(subscribe, names))
        await publishing
        await publisher.publish("news", 60)  # for those who came after the last
        for name in names:
            found = await (await app.get_handle(name)).result(RESULT_TIMEOUT_S)
            assert found in (list(range(found[0], 61)), [60])


async def test_two_senders_for_one_wait(database: Database) -> None:
    """One is taken and the other is kept for the next wait."""

    @workflow
    async def waiter(ctx: WorkflowContext) -> list[str]:
        first = await ctx.wait_event("race", key=ctx.instance_id, type=str)
        second = await ctx.wait_event("race", key=ctx.instance_id, type=str)
        return [first.data, second.data]

    async with App(database) as app, App(database, worker=False) as one, App(database, worker=False) as two:
        names = [f"w{n}" for n in range(40)]
        await in_any_order(
            [
                *(app.start_workflow(waiter, id=name) for name in names),
                *(one.send_event("race", "one", key=name) for name in names),
                *(two.send_event("race", "two", key=name) for name in names),
            ]
        )
        for name in names:
            found = await (await app.get_handle(name)).result(RESULT_TIMEOUT_S)
            assert sorted(found) == ["one", "two"]
    assert left(database) == NOTHING


async def test_two_workers_and_one_channel(database: Database) -> None:
    """Consumers on two workers, messages from a third app: each message has one consumer."""

    @workflow
    async def consumer(ctx: WorkflowContext) -> list[int]:
        await ctx.subscribe("jobs", mode="competing")
        found: list[int] = []
        while (number := (await ctx.receive("jobs", type=int)).data) >= 0:
            found.append(number)
        return found

    async with App(database) as one, App(database) as two, App(database, worker=False) as sender:
        handles = [await app.start_workflow(consumer) for app in (one, two) for _ in range(4)]
        await in_any_order(sender.publish("jobs", number) for number in range(100))
        for _ in handles:
            await sender.publish("jobs", -1)
        results = [await handle.result(RESULT_TIMEOUT_S) for handle in handles]
    assert sorted(number for result in results for number in result) == list(range(100))


async def test_evictions_against_wake_ups(database: Database) -> None:
    """With room for one, every instance is on its way out when its message comes."""

    @workflow
    async def waiter(ctx: WorkflowContext) -> int:
        total = 0
        for _ in range(5):
            total += (await ctx.receive("inbox", type=int)).data
        return total

    async with App(database, max_hot_instances=1) as app, App(database, worker=False) as sender:
        names = [f"w{n}" for n in range(20)]
        for name in names:
            await app.start_workflow(waiter, id=name)
        await wait_for_status(app, names[-1], Status.WAITING_FOR_MESSAGE)
        await in_any_order(sender.send_to(name, "inbox", 1) for name in names for _ in range(5))
        for name in names:
            assert await (await app.get_handle(name)).result(RESULT_TIMEOUT_S) == 5
    assert left(database) == NOTHING
