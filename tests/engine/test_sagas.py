"""Sagas and cancellation: what was done is undone, last in, first out, whatever happens in the middle."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from romancy import (
    App,
    DefinitionError,
    InstanceNotFoundError,
    RetryPolicy,
    Status,
    TerminalError,
    Workflow,
    WorkflowCancelledError,
    WorkflowContext,
    WorkflowFailedError,
    activity,
    workflow,
)
from romancy.storage.mail import CANCEL
from romancy.storage.posting import request_mail
from romancy.testing import isolated_catalogue
from tests.databases import Database, rows
from tests.support import RESULT_TIMEOUT_S, CrashPlan, crash, wait_for_status


class Trip:
    """A workflow that books and fails, with a diary of what really happened."""

    def __init__(self, failing_undo: str | None = None) -> None:
        self.diary: list[str] = []
        diary = self.diary

        @activity(retry=RetryPolicy.no_retry())
        async def cancel_flight(city: str, result: str) -> None:
            if failing_undo == "flight":
                raise RuntimeError("the airline does not answer")
            diary.append(f"cancelled {result} to {city}")

        @activity(retry=RetryPolicy.no_retry())
        def cancel_hotel(result: dict[str, Any], nights: int = 0) -> None:
            diary.append(f"cancelled {result['room']} of {nights} nights")

        @activity
        async def return_car(car: str) -> None:
            diary.append(f"returned {car}")

        @activity(compensate=cancel_flight)
        async def book_flight(city: str) -> str:
            diary.append("booked flight")
            return f"flight {city[0]}1"

        @activity(compensate=cancel_hotel)
        def book_hotel(city: str, nights: int) -> dict[str, Any]:
            diary.append("booked hotel")
            return {"room": f"room in {city}"}

        @activity(retry=RetryPolicy.no_retry())
        async def pay() -> None:
            raise TerminalError("the card is refused")

        @workflow
        async def trip(ctx: WorkflowContext, city: str) -> None:
            await book_flight(city)
            ctx.on_failure(return_car, "car 7")
            await book_hotel(city, nights=3)
            await pay()

        self.workflow: Workflow[[str], None] = trip


UNDONE = ["cancelled room in Rome of 3 nights", "returned car 7", "cancelled flight R1 to Rome"]


async def test_failed_workflow_undoes_what_it_did_last_in_first_out(database: Database) -> None:
    trip = Trip()
    async with App(database) as app:
        handle = await app.start_workflow(trip.workflow, "Rome")
        with pytest.raises(WorkflowFailedError, match="the card is refused"):
            await handle.result(RESULT_TIMEOUT_S)
        assert trip.diary == ["booked flight", "booked hotel", *UNDONE]
        kinds = [event.kind for event in await app.get_history(handle.instance_id)]
        assert kinds == [
            "ActivityCompleted", "ActivityCompleted", "ActivityFailed",
            "CompensationExecuted", "CompensationExecuted", "CompensationExecuted", "WorkflowFailed",
        ]  # fmt: skip
        assert await handle.status() is Status.FAILED


async def test_compensation_that_fails_does_not_stop_the_others(database: Database) -> None:
    trip = Trip(failing_undo="flight")
    async with App(database) as app:
        handle = await app.start_workflow(trip.workflow, "Rome")
        with pytest.raises(WorkflowFailedError, match="the card is refused"):
            await handle.result(RESULT_TIMEOUT_S)
        assert trip.diary == ["booked flight", "booked hotel", *UNDONE[:2]]
        last = (await app.get_history(handle.instance_id))[-2]
        assert last.kind == "CompensationFailed"
        assert last.error is not None
        assert "the airline does not answer" in last.error.message


@pytest.mark.parametrize("when", ["before", "after"])
async def test_crash_at_any_commit_undoes_each_thing_once_recorded(any_database: Database, when: Any) -> None:
    """After a crash an undo may run again, if its outcome was not recorded: never be left out, never out of order."""
    at, was_crashed = 0, True
    while was_crashed:
        at += 1
        with isolated_catalogue():
            was_crashed = await run_and_crash(any_database, CrashPlan(at, when), f"trip-{when}-{at}")
    assert at > 6


async def run_and_crash(database: Database, plan: CrashPlan, instance_id: str) -> bool:
    trip = Trip()
    with plan.armed():
        app = App(database)
        await app.start()
        starting = asyncio.create_task(app.start_workflow(trip.workflow, "Rome", id=instance_id))
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while not plan.happened.is_set() and not await has_ended(app, instance_id):
                await plan.happens_soon()
        was_crashed = plan.happened.is_set()
        if was_crashed:
            starting.cancel()
            await asyncio.wait([starting])
            await crash(app)
        else:
            await starting
            await app.shutdown()
    async with App(database) as app:
        handle = await app.start_workflow(trip.workflow, "Rome", id=instance_id)
        with pytest.raises(WorkflowFailedError):
            await handle.result(RESULT_TIMEOUT_S)
        history = await app.get_history(instance_id)
    undone = [event.name for event in history if event.kind == "CompensationExecuted"]
    assert undone == ["cancel_hotel", "return_car", "cancel_flight"]
    undos = [line for line in trip.diary if not line.startswith("booked")]
    assert list(dict.fromkeys(undos)) == UNDONE
    assert was_crashed or undos == UNDONE
    return was_crashed


async def has_ended(app: App, instance_id: str) -> bool:
    instance = await app.get_instance(instance_id)
    return instance is not None and instance.status.is_terminal


async def test_cancelled_workflow_cleans_up_and_compensates(database: Database) -> None:
    diary: list[str] = []

    @activity
    async def undo(name: str) -> None:
        diary.append(f"undo {name}")

    @activity(compensate=undo)
    async def do(name: str) -> None:
        diary.append(f"do {name}")

    @activity
    async def tidy() -> None:
        diary.append("tidy")

    @workflow
    async def long(ctx: WorkflowContext) -> None:
        await do("a")
        try:
            await ctx.wait_event("never", key="k")
        finally:
            await tidy()

    async with App(database) as app:
        handle = await app.start_workflow(long)
        await wait_for_status(app, handle.instance_id, Status.WAITING_FOR_EVENT)
        assert await handle.cancel("the customer left")
        with pytest.raises(WorkflowCancelledError, match="the customer left"):
            await handle.result(RESULT_TIMEOUT_S)
        assert diary == ["do a", "tidy", "undo a"]
        assert await handle.status() is Status.CANCELLED
        assert not await handle.cancel("again")
        kinds = [event.kind for event in await app.get_history(handle.instance_id)]
        assert kinds == [
            "ActivityCompleted", "CancellationRequested", "ActivityCompleted", "CompensationExecuted",
            "WorkflowCancelled",
        ]  # fmt: skip


async def test_cancellation_replays(database: Database) -> None:
    """The clean-up waits when the app goes down: the next one brings the instance to the same place."""
    diary: list[str] = []

    @activity
    async def undo(name: str) -> None:
        diary.append(f"undo {name}")

    @activity(compensate=undo)
    async def do(name: str) -> None:
        diary.append(f"do {name}")

    @workflow
    async def long(ctx: WorkflowContext) -> None:
        await do("a")
        try:
            await ctx.wait_event("never", key="k")
        finally:
            await ctx.wait_event("tidied", key="k")
            await do("b")

    async with App(database) as app:
        handle = await app.start_workflow(long, id="x")
        await wait_for_status(app, "x", Status.WAITING_FOR_EVENT)
        await handle.cancel("enough")
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while len(await app.get_history("x")) < 2:
                await asyncio.sleep(0.005)
    async with App(database) as app:
        await app.send_event("tidied", key="k")
        with pytest.raises(WorkflowCancelledError, match="enough"):
            await (await app.get_handle("x")).result(RESULT_TIMEOUT_S)
    assert diary == ["do a", "do b", "undo b", "undo a"]


async def test_running_async_activity_is_cancelled_and_a_sync_one_is_left_to_finish(database: Database) -> None:
    diary: list[str] = []
    begun, may_end = threading.Event(), threading.Event()

    @activity
    async def undo(result: str) -> None:
        diary.append(f"undo {result}")

    @activity
    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            diary.append("async cancelled")
            raise

    @activity(compensate=undo)
    def stubborn() -> str:
        begun.set()
        may_end.wait(RESULT_TIMEOUT_S)
        return "what was done in the thread"

    @workflow
    async def both(ctx: WorkflowContext) -> None:
        await asyncio.gather(endless(), stubborn())

    async with App(database) as app:
        handle = await app.start_workflow(both)
        await asyncio.to_thread(begun.wait, RESULT_TIMEOUT_S)
        await handle.cancel()
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while "async cancelled" not in diary:
                await asyncio.sleep(0.001)
        may_end.set()
        with pytest.raises(WorkflowCancelledError):
            await handle.result(RESULT_TIMEOUT_S)
        assert diary == ["async cancelled", "undo what was done in the thread"]


async def test_cancel_reaches_an_instance_that_nobody_runs(database: Database) -> None:
    diary: list[str] = []

    @activity
    async def step() -> None:
        diary.append("step")

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await step()

    async with App(database, worker=False) as client:
        handle = await client.start_workflow(flow)
        assert await handle.cancel()
        assert await handle.cancel()
    async with App(database) as app:
        handle = await app.get_handle(handle.instance_id, flow)
        with pytest.raises(WorkflowCancelledError):
            await handle.result(RESULT_TIMEOUT_S)
    assert diary == []


async def test_cancelled_sleeper_does_not_rise_again(database: Database) -> None:
    @workflow
    async def sleeper(ctx: WorkflowContext) -> None:
        await ctx.sleep(0.4)
        await ctx.sleep(3600)

    async with App(database, max_hot_instances=1) as app:
        handles = [await app.start_workflow(sleeper) for _ in range(3)]
        for handle in handles:
            await handle.cancel()
        for handle in handles:
            with pytest.raises(WorkflowCancelledError):
                await handle.result(RESULT_TIMEOUT_S)
        await asyncio.sleep(0.5)
        assert [await handle.status() for handle in handles] == [Status.CANCELLED] * 3


async def test_workflow_that_shields_itself_may_complete(database: Database) -> None:
    @workflow
    async def stubborn(ctx: WorkflowContext) -> str:
        try:
            await ctx.sleep(3600)
        except asyncio.CancelledError:
            return "finished anyway"
        return "slept"

    async with App(database) as app:
        handle = await app.start_workflow(stubborn)
        await wait_for_status(app, handle.instance_id, Status.WAITING_FOR_TIMER)
        await handle.cancel()
        assert await handle.result(RESULT_TIMEOUT_S) == "finished anyway"


async def test_suspended_instance_rests_until_it_is_resumed(database: Database) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> Any:
        return (await ctx.wait_event("go", key="k")).data

    async with App(database) as app:
        handle = await app.start_workflow(flow)
        await wait_for_status(app, handle.instance_id, Status.WAITING_FOR_EVENT)
        await app.suspend(handle.instance_id)
        await wait_for_status(app, handle.instance_id, Status.SUSPENDED)
        await app.send_event("go", "kept", key="k")
        assert await handle.status() is Status.SUSPENDED
        await app.resume(handle.instance_id)
        handle = await app.get_handle(handle.instance_id, flow)
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while await handle.status() is not Status.COMPLETED:
                await asyncio.sleep(0.005)
        assert await handle.result(RESULT_TIMEOUT_S) == "kept"


async def test_cancel_of_nobody_is_an_error(database: Database) -> None:
    async with App(database) as app:
        with pytest.raises(InstanceNotFoundError, match="nobody"):
            await app.cancel("nobody")


def test_compensation_that_can_not_get_its_arguments_is_refused() -> None:
    @activity
    async def undo(ticket: str) -> None: ...

    with pytest.raises(DefinitionError, match="needs 'ticket'"):

        @activity(compensate=undo)
        async def do(order: str) -> None: ...

    with pytest.raises(DefinitionError, match="is no activity"):

        @activity(compensate=print)  # type: ignore[arg-type]
        async def do_too() -> None: ...


async def test_instance_that_was_suspended_twice_goes_on_after_one_resume(database: Database) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> Any:
        return (await ctx.wait_event("go", key="k")).data

    async with App(database) as app:
        handle = await app.start_workflow(flow)
        await app.suspend(handle.instance_id)
        await wait_for_status(app, handle.instance_id, Status.SUSPENDED)
        await app.suspend(handle.instance_id)
        await app.resume(handle.instance_id)
        await wait_for_status(app, handle.instance_id, Status.WAITING_FOR_EVENT)
        await app.send_event("go", "on", key="k")
        assert await handle.result(RESULT_TIMEOUT_S) == "on"


@pytest.mark.parametrize("is_alone", [True, False])
async def test_end_that_is_asked_for_while_a_rest_is_on_its_way_comes(database: Database, is_alone: bool) -> None:
    """Who asks for the end sees the instance running, yet it is set aside before it hears of that."""

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await ctx.wait_event("go", key="k")

    async with App(database, worker=False) as client:
        await client.start_workflow(flow, id="it")
        await client.suspend("it")
        if is_alone:
            async with App(database) as app:
                await wait_for_status(app, "it", Status.SUSPENDED)
        # As App.cancel does once it has seen that the instance runs.
        await client._life.writer.post(request_mail("late", "it", CANCEL, "{}"))
        async with App(database) as app:
            await wait_for_status(app, "it", Status.CANCELLED)
    assert rows(database, "SELECT count(*) FROM romancy_deliveries") == [(0,)]


@pytest.mark.parametrize("is_end_first", [True, False])
async def test_rest_and_end_that_come_together_count_in_their_order(database: Database, is_end_first: bool) -> None:
    """A rest that was asked for after the end keeps the undoing; one that was asked for before it does not."""
    diary: list[str] = []

    @activity
    async def undo() -> None:
        diary.append("undone")

    @activity(compensate=undo)
    async def do() -> None: ...

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await do()
        await ctx.wait_event("go", key="k")

    async with App(database) as app:
        await app.start_workflow(flow, id="it")
        await wait_for_status(app, "it", Status.WAITING_FOR_EVENT)
    async with App(database, worker=False) as client:
        for ask in (client.cancel, client.suspend) if is_end_first else (client.suspend, client.cancel):
            await ask("it")
    async with App(database) as app:
        if is_end_first:
            await wait_for_status(app, "it", Status.SUSPENDED)
            assert diary == []
            await app.resume("it")
        await wait_for_status(app, "it", Status.CANCELLED)
    assert diary == ["undone"]
