"""Events: matched by type and key, consumed if and only if recorded, never lost."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from romancy import (
    App,
    Event,
    EventTimeoutError,
    SerializationError,
    Status,
    WorkflowContext,
    activity,
    current_activity,
    workflow,
)
from romancy.testing import VirtualClock
from tests.databases import Database, rows
from tests.support import RESULT_TIMEOUT_S, CrashPlan, crash, wait_for_status


@dataclass
class Payment:
    amount: int


def left(database: Database) -> dict[str, int]:
    """What is still there of the mail."""
    return {
        table: rows(database, f"SELECT count(*) FROM romancy_{table}")[0][0]
        for table in ("waits", "mail", "deliveries", "subscriptions")
    }


NOTHING = {"waits": 0, "mail": 0, "deliveries": 0, "subscriptions": 0}


async def test_event_reaches_the_workflow_that_waits_for_its_key(database: Database) -> None:
    @workflow
    async def order(ctx: WorkflowContext, order_id: str) -> int:
        event = await ctx.wait_event("payment.completed", key=order_id, type=Payment)
        assert isinstance(event, Event)
        assert (event.type, event.subject, event.source) == ("payment.completed", order_id, "bank")
        assert event.extensions == {"trace": "t1"}
        return event.data.amount

    async with App(database) as app:
        first = await app.start_workflow(order, "a")
        second = await app.start_workflow(order, "b")
        await wait_for_status(app, first.instance_id, Status.WAITING_FOR_EVENT)
        await app.send_event("payment.completed", Payment(2), key="b", source="bank", extensions={"trace": "t1"})
        assert await second.result(RESULT_TIMEOUT_S) == 2
        assert await first.status() is Status.WAITING_FOR_EVENT
        await app.send_event("payment.completed", {"amount": 1}, key="a", source="bank", extensions={"trace": "t1"})
        assert await first.result(RESULT_TIMEOUT_S) == 1
        kinds = [event.kind for event in await app.get_history(first.instance_id)]
        assert kinds == ["EventReceived"]
    assert left(database) == NOTHING


async def test_event_with_a_key_is_kept_until_somebody_waits(database: Database) -> None:
    @workflow
    async def order(ctx: WorkflowContext) -> list[int]:
        return [(await ctx.wait_event("paid", key="k", type=int)).data for _ in range(2)]

    async with App(database) as app:
        for number in range(3):
            await app.send_event("paid", number, key="k")
        handle = await app.start_workflow(order)
        assert await handle.result(RESULT_TIMEOUT_S) == [0, 1]
    assert left(database) == {**NOTHING, "mail": 1}


async def test_event_without_key_or_address_reaches_those_who_wait_now(database: Database) -> None:
    @workflow
    async def listen(ctx: WorkflowContext) -> str:
        return str((await ctx.wait_event("news")).data)

    async with App(database) as app:
        await app.send_event("news", "before")
        handles = [await app.start_workflow(listen) for _ in range(3)]
        for handle in handles:
            await wait_for_status(app, handle.instance_id, Status.WAITING_FOR_EVENT)
        await app.send_event("news", "now")
        assert [await handle.result(RESULT_TIMEOUT_S) for handle in handles] == ["now"] * 3
    assert left(database) == NOTHING


async def test_event_to_an_instance_waits_for_it(database: Database) -> None:
    @workflow
    async def approval(ctx: WorkflowContext) -> str:
        return str((await ctx.wait_event("approved")).data)

    async with App(database) as app:
        await app.send_event("approved", "by ann", instance_id="mine")
        await app.send_event("approved", "by bob", instance_id="another")
        handle = await app.start_workflow(approval, id="mine")
        assert await handle.result(RESULT_TIMEOUT_S) == "by ann"


async def test_same_source_and_id_count_once(database: Database) -> None:
    @workflow
    async def collect(ctx: WorkflowContext) -> list[str]:
        found = []
        try:
            while True:
                found.append(str((await ctx.wait_event("e", key="k", timeout=60)).data))
        except EventTimeoutError:
            return found

    async with App(database, clock=VirtualClock(auto_advance=True)) as app:
        assert await app.send_event("e", "first", key="k", source="s", id="1")
        assert not await app.send_event("e", "again", key="k", source="s", id="1")
        assert await app.send_event("e", "other source", key="k", source="t", id="1")
        handle = await app.start_workflow(collect)
        assert await handle.result(RESULT_TIMEOUT_S) == ["first", "other source"]


async def test_wait_times_out_and_the_late_event_stays_for_the_next_wait(database: Database) -> None:
    @activity
    async def note() -> None: ...

    @workflow
    async def patient(ctx: WorkflowContext) -> str:
        began = ctx.now()
        try:
            await ctx.wait_event("paid", key="k", timeout=timedelta(minutes=5))
        except EventTimeoutError as error:
            assert isinstance(error, TimeoutError)
            assert ctx.now() - began >= timedelta(minutes=5)
        await note()
        return str((await ctx.wait_event("paid", key="k")).data)

    clock = VirtualClock()
    async with App(database, clock=clock) as app:
        handle = await app.start_workflow(patient)
        await clock.wait_for_sleeper()
        await clock.advance(timedelta(minutes=5))
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while "note:1" not in [event.activity_id for event in await app.get_history(handle.instance_id)]:
                await asyncio.sleep(0)
        await app.send_event("paid", "late", key="k")
        assert await handle.result(RESULT_TIMEOUT_S) == "late"
        kinds = [event.kind for event in await app.get_history(handle.instance_id)]
        assert kinds == ["EventTimeout", "ActivityCompleted", "EventReceived"]
    assert left(database) == NOTHING


async def test_first_of_two_waits_wins_and_the_event_for_the_other_stays(database: Database) -> None:
    @workflow
    async def either(ctx: WorkflowContext) -> list[str]:
        tasks = [asyncio.create_task(ctx.wait_event(name, key="k"), name=name) for name in ("a", "b")]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        (first,) = done
        (other,) = pending
        other.cancel()
        again = await ctx.wait_event(other.get_name(), key="k")
        return [first.result().type, again.type]

    async with App(database) as app:
        handle = await app.start_workflow(either)
        await wait_for_status(app, handle.instance_id, Status.WAITING_FOR_EVENT)
        await app.send_event("b", key="k")
        await app.send_event("a", key="k")
        assert await handle.result(RESULT_TIMEOUT_S) == ["b", "a"]
    assert left(database) == NOTHING


async def test_wait_under_asyncio_timeout_is_withdrawn(database: Database) -> None:
    @workflow
    async def impatient(ctx: WorkflowContext) -> str:
        try:
            async with asyncio.timeout(30):
                await ctx.wait_event("paid", key="k")
        except TimeoutError:
            return "timeout"
        return "paid"

    async with App(database, clock=VirtualClock(auto_advance=True)) as app:
        handle = await app.start_workflow(impatient)
        assert await handle.result(RESULT_TIMEOUT_S) == "timeout"
    assert left(database) == NOTHING


async def test_waiting_instance_goes_on_after_a_restart(database: Database) -> None:
    @workflow
    async def order(ctx: WorkflowContext) -> list[str]:
        first = await ctx.wait_event("one", key="k")
        second = await ctx.wait_event("two", key="k")
        return [str(first.data), str(second.data)]

    async with App(database) as app:
        handle = await app.start_workflow(order, id="x")
        await wait_for_status(app, "x", Status.WAITING_FOR_EVENT)
        await app.send_event("one", 1, key="k")
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while not await app.get_history("x"):
                await asyncio.sleep(0.01)
    async with App(database, worker=False) as client:
        await client.send_event("two", 2, key="k")
        assert (await client.get_instance("x")).status is Status.WAITING_FOR_EVENT  # type: ignore[union-attr]
    async with App(database) as app:
        handle = await app.get_handle("x", order)
        assert await handle.result(RESULT_TIMEOUT_S) == ["1", "2"]
    assert left(database) == NOTHING


async def test_delivery_survives_a_crash_between_its_claim_and_its_record(database: Database) -> None:
    @workflow
    async def order(ctx: WorkflowContext) -> str:
        return str((await ctx.wait_event("paid", key="k")).data)

    async with App(database) as app:
        await app.start_workflow(order, id="x")
        await wait_for_status(app, "x", Status.WAITING_FOR_EVENT)
    async with App(database, worker=False) as client:
        await client.send_event("paid", "once", key="k")
    plan = CrashPlan(1, "before")
    with plan.armed():
        app = App(database)
        await app.start()
        await plan.happened.wait()  # it has claimed the instance, and was about to record what it found
        await crash(app)
    async with App(database) as app:
        assert await (await app.get_handle("x", order)).result(RESULT_TIMEOUT_S) == "once"
    assert left(database) == NOTHING


async def test_evicted_instance_wakes_for_its_event(database: Database) -> None:
    @workflow
    async def order(ctx: WorkflowContext, key: str) -> str:
        return str((await ctx.wait_event("paid", key=key)).data)

    async with App(database, max_hot_instances=1) as app:
        handles = [await app.start_workflow(order, str(number), id=f"i{number}") for number in range(5)]
        for handle in handles:
            await wait_for_status(app, handle.instance_id, Status.WAITING_FOR_EVENT)
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while len(app._life.worker._live) > 1:  # type: ignore[union-attr]
                await asyncio.sleep(0.01)
        for number in range(5):
            await app.send_event("paid", number, key=str(number))
        assert [await handle.result(RESULT_TIMEOUT_S) for handle in handles] == ["0", "1", "2", "3", "4"]


async def test_event_from_another_process_wakes_a_waiting_instance(database: Database) -> None:
    @workflow
    async def order(ctx: WorkflowContext) -> str:
        return str((await ctx.wait_event("paid", key="k")).data)

    async with App(database) as app, App(database, worker=False) as client:
        handle = await app.start_workflow(order)
        await wait_for_status(app, handle.instance_id, Status.WAITING_FOR_EVENT)
        await client.send_event("paid", "here", key="k")
        assert await handle.result(RESULT_TIMEOUT_S) == "here"


async def test_workflow_sends_an_event_once(database: Database) -> None:
    @activity
    async def step() -> None: ...

    @workflow
    async def sender(ctx: WorkflowContext) -> None:
        await ctx.send_event("ping", {"n": 1}, key="k")
        await step()
        await ctx.wait_event("go", key="sender")

    @workflow
    async def receiver(ctx: WorkflowContext) -> list[Any]:
        event = await ctx.wait_event("ping", key="k")
        return [event.source, event.data["n"]]

    async with App(database) as app:
        await app.start_workflow(sender, id="s")
        await wait_for_status(app, "s", Status.WAITING_FOR_EVENT)
    async with App(database) as app:
        handle = await app.start_workflow(receiver)
        assert await handle.result(RESULT_TIMEOUT_S) == ["romancy:sender/s", 1]
        await app.send_event("go", key="sender")
        await (await app.get_handle("s")).result(RESULT_TIMEOUT_S)
    assert left(database) == NOTHING


async def test_data_that_do_not_fit_the_type_are_an_error_in_the_workflow(database: Database) -> None:
    @workflow
    async def order(ctx: WorkflowContext) -> str:
        try:
            await ctx.wait_event("paid", key="k", type=Payment)
        except SerializationError as error:
            return str(error)
        return "fits"

    async with App(database) as app:
        await app.send_event("paid", {"amount": "much"}, key="k")
        text = await (await app.start_workflow(order)).result(RESULT_TIMEOUT_S)
        assert "'paid'" in text
        assert "Payment" in text


async def test_unserialisable_data_are_refused_at_the_call(database: Database) -> None:
    async with App(database) as app:
        with pytest.raises(SerializationError, match="the data of an event of type object"):
            await app.send_event("paid", object())


async def test_events_are_kept_as_long_as_the_app_says_whoever_sends_them(database: Database) -> None:
    @activity
    async def send() -> None:
        current_activity().send_event("paid", "from an activity", key="a")

    @workflow
    async def sender(ctx: WorkflowContext) -> None:
        await ctx.send_event("paid", "from a workflow", key="w")
        await send()

    @workflow
    async def late(ctx: WorkflowContext, key: str) -> Any:
        try:
            return (await ctx.wait_event("paid", key=key, timeout=0)).data
        except EventTimeoutError:
            return "gone"

    clock = VirtualClock(auto_advance=True)
    async with App(database, clock=clock, event_retention=timedelta(hours=1)) as app:
        await app.send_event("paid", "from outside", key="o")
        await (await app.start_workflow(sender)).result(RESULT_TIMEOUT_S)
        assert await (await app.start_workflow(late, "w")).result(RESULT_TIMEOUT_S) == "from a workflow"
        await clock.advance(timedelta(minutes=59))
        assert await (await app.start_workflow(late, "o")).result(RESULT_TIMEOUT_S) == "from outside"
        await (await app.start_workflow(sender)).result(RESULT_TIMEOUT_S)
        await clock.advance(timedelta(minutes=61))
        for key in ("a", "w"):
            assert await (await app.start_workflow(late, key)).result(RESULT_TIMEOUT_S) == "gone"
        await asyncio.wrap_future(app._life.store.clear_expired(clock.now_us(), 1000))
    assert left(database) == NOTHING
