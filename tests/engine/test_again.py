"""Runs that go on again: ``app.retry`` and ``app.fork``."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

import pytest

from romancy import (
    App,
    ChildWorkflowError,
    DatabaseUnavailableError,
    InstanceConflictError,
    InstanceNotFoundError,
    InstanceStateError,
    RetryPolicy,
    Status,
    TerminalError,
    WorkflowContext,
    WorkflowFailedError,
    activity,
    current_activity,
    workflow,
)
from romancy.testing import VirtualClock, isolated_catalogue
from tests.databases import Database, rows
from tests.support import RESULT_TIMEOUT_S, wait_for_status


class Shop:
    """Activities that fail as long as they are told to, and a diary of what was done."""

    def __init__(self) -> None:
        self.diary: list[str] = []
        self.keys: list[str] = []
        self.failing: set[str] = set()

        @activity
        async def do(what: str) -> str:
            self.diary.append(what)
            self.keys.append(current_activity().idempotency_key)
            if what in self.failing:
                raise TerminalError(f"{what} does not work")
            return f"{what} done"

        self.do = do


async def failed(app: App, flow: Any, *args: Any, id: str = "it") -> str:
    handle = await app.start_workflow(flow, *args, id=id)
    with pytest.raises(WorkflowFailedError) as caught:
        await handle.result(RESULT_TIMEOUT_S)
    return caught.value.error.message


async def test_retry_goes_on_from_the_failed_activity(database: Database) -> None:
    shop = Shop()

    @workflow
    async def flow(ctx: WorkflowContext) -> list[str]:
        return [await shop.do("reserve"), await shop.do("charge"), await shop.do("ship")]

    shop.failing = {"charge"}
    async with App(database) as app:
        handle = await app.start_workflow(flow, id="it")
        with pytest.raises(WorkflowFailedError):
            await handle.result(RESULT_TIMEOUT_S)
        shop.failing = set()
        again = await app.retry("it")
        assert await again.result(RESULT_TIMEOUT_S) == ["reserve done", "charge done", "ship done"]
        assert shop.diary == ["reserve", "charge", "charge", "ship"]
        # The same call as before: a service that knows the key does not charge twice.
        assert shop.keys[1] == shop.keys[2]
        events = await app.get_history("it")
        assert [event.kind for event in events] == [
            "ActivityCompleted", "Superseded", "Superseded", "WorkflowRetried", "ActivityCompleted",
            "ActivityCompleted",
        ]  # fmt: skip
        superseded = events[1].error
        assert superseded is not None
        assert superseded.message == "charge does not work"
        instance = await app.get_instance("it")
        assert instance is not None
        assert (instance.status, instance.error, instance.run) == (Status.COMPLETED, None, 1)


async def test_retry_replays_in_a_process_that_knows_nothing(database: Database) -> None:
    shop = Shop()

    @workflow
    async def flow(ctx: WorkflowContext) -> list[str]:
        results = [await shop.do("reserve")]
        await asyncio.sleep(0.01)
        try:
            results.append(await shop.do("charge"))
        except TerminalError:
            await shop.do("complain")
            raise
        return [*results, await shop.do("ship")]

    shop.failing = {"charge"}
    async with App(database) as app:
        await failed(app, flow)
    async with App(database, worker=False) as client:
        await client.retry("it")
        assert rows(database, "SELECT status, owner, completed_at FROM romancy_instances") == [("pending", None, None)]
    async with App(database) as app:
        # Fails again, and complains again: what it complained of was taken back.
        with pytest.raises(WorkflowFailedError):
            await (await app.get_handle("it")).result(RESULT_TIMEOUT_S)
        shop.failing = set()
        assert await (await app.retry("it")).result(RESULT_TIMEOUT_S) == ["reserve done", "charge done", "ship done"]
        kinds = [event.kind for event in await app.get_history("it")]
    assert shop.diary == ["reserve", "charge", "complain", "charge", "complain", "charge", "ship"]
    assert kinds == [
        "ActivityCompleted", "TimerExpired", "Superseded", "Superseded", "Superseded", "WorkflowRetried",
        "Superseded", "Superseded", "Superseded", "WorkflowRetried", "ActivityCompleted", "ActivityCompleted",
    ]  # fmt: skip


async def test_retry_keeps_what_was_recorded_beside_the_failure(database: Database) -> None:
    """In a gather one fails, and another ends after it: that one is not done again."""
    shop, go = Shop(), asyncio.Event()

    @activity
    async def slow() -> str:
        shop.diary.append("slow")
        try:
            await go.wait()
        except asyncio.CancelledError:
            shop.diary.append("slow cancelled")
            raise
        return "slow done"

    @activity
    def blocking() -> str:
        shop.diary.append("blocking")
        asyncio.run(asyncio.sleep(0.05))
        return "blocking done"

    @workflow
    async def flow(ctx: WorkflowContext) -> list[str]:
        return list(await asyncio.gather(shop.do("charge"), blocking(), slow()))

    shop.failing = {"charge"}
    async with App(database) as app:
        await failed(app, flow)
        shop.failing = set()
        go.set()
        result = await (await app.retry("it")).result(RESULT_TIMEOUT_S)
    assert result == ["charge done", "blocking done", "slow done"]
    assert shop.diary.count("blocking") == 1
    assert shop.diary.count("slow") == 2  # it had been cancelled, with no outcome


async def test_retry_takes_back_failures_that_came_after_the_first(database: Database) -> None:
    shop, attempts = Shop(), []

    @activity
    def late() -> str:
        attempts.append(1)
        if len(attempts) == 1:
            asyncio.run(asyncio.sleep(0.05))
            raise TerminalError("late, and in vain")
        return "late done"

    @workflow
    async def flow(ctx: WorkflowContext) -> list[str]:
        return list(await asyncio.gather(shop.do("charge"), late()))

    shop.failing = {"charge"}
    async with App(database) as app:
        assert await failed(app, flow) == "charge does not work"
        kinds = [event.kind for event in await app.get_history("it")]
        assert kinds == ["ActivityFailed", "ActivityFailed", "WorkflowFailed"]
        shop.failing = set()
        assert await (await app.retry("it")).result(RESULT_TIMEOUT_S) == ["charge done", "late done"]


async def test_retry_leaves_failures_alone_that_the_code_coped_with(database: Database) -> None:
    shop = Shop()

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        try:
            await shop.do("fast way")
        except TerminalError:
            await shop.do("slow way")
        return await shop.do("ship")

    shop.failing = {"fast way", "ship"}
    async with App(database) as app:
        await failed(app, flow)
        shop.failing = set()
        assert await (await app.retry("it")).result(RESULT_TIMEOUT_S) == "ship done"
    assert shop.diary == ["fast way", "slow way", "ship", "ship"]


async def test_retry_begins_the_attempts_anew(database: Database) -> None:
    attempts: list[int] = []

    @activity(retry=RetryPolicy.fixed(3, 10.0))
    async def flaky() -> str:
        attempts.append(current_activity().attempt)
        if len(attempts) < 6:
            raise ValueError("not yet")
        return "at last"

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        return await flaky()

    async with App(database, clock=VirtualClock(auto_advance=True)) as app:
        assert "not yet" in await failed(app, flow)
        assert attempts == [1, 2, 3]
        assert await (await app.retry("it")).result(RESULT_TIMEOUT_S) == "at last"
    assert attempts == [1, 2, 3, 1, 2, 3]


async def test_retry_after_a_fault_of_the_code_goes_on_with_the_code_as_it_is_now(database: Database) -> None:
    shop = Shop()
    with isolated_catalogue():

        @workflow(name="flow")
        async def old(ctx: WorkflowContext) -> str:
            await shop.do("reserve")
            raise KeyError("a fault of the code")

        async with App(database, workflows=[old]) as app:
            await failed(app, old)
    with isolated_catalogue():

        @workflow(name="flow")
        async def new(ctx: WorkflowContext) -> str:
            await shop.do("reserve")
            return await shop.do("ship")

        async with App(database, workflows=[new]) as app:
            assert await (await app.retry("it")).result(RESULT_TIMEOUT_S) == "ship done"
    assert shop.diary == ["reserve", "ship"]


async def test_retry_retries_the_child_that_failed(database: Database) -> None:
    shop = Shop()

    @workflow
    async def child(ctx: WorkflowContext) -> str:
        await shop.do("pack")
        return await shop.do("label")

    @workflow
    async def parent(ctx: WorkflowContext) -> str:
        await shop.do("reserve")
        return await ctx.execute_child(child)

    shop.failing = {"label"}
    async with App(database) as app:
        handle = await app.start_workflow(parent, id="it")
        with pytest.raises(WorkflowFailedError) as caught:
            await handle.result(RESULT_TIMEOUT_S)
        assert isinstance(caught.value.__cause__, ChildWorkflowError)
        shop.failing = set()
        assert await (await app.retry("it")).result(RESULT_TIMEOUT_S) == "label done"
    assert shop.diary == ["reserve", "pack", "label", "label"]


async def test_retry_subscribes_again(database: Database) -> None:
    shop = Shop()

    @workflow
    async def flow(ctx: WorkflowContext) -> Any:
        await ctx.subscribe("news")
        await shop.do("listen")
        return (await ctx.receive("news")).data

    shop.failing = {"listen"}
    async with App(database) as app:
        await failed(app, flow)
        assert rows(database, "SELECT channel FROM romancy_subscriptions") == []
        shop.failing = set()
        handle = await app.retry("it")
        await app.publish("news", "heard")
        assert await handle.result(RESULT_TIMEOUT_S) == "heard"


async def test_what_can_not_be_retried_says_why(database: Database) -> None:
    shop = Shop()

    @activity(compensate=shop.do)
    async def book(what: str) -> None: ...

    @workflow
    async def saga(ctx: WorkflowContext) -> None:
        await book("room")
        await shop.do("pay")

    @workflow
    async def fine(ctx: WorkflowContext) -> None: ...

    shop.failing = {"pay"}
    async with App(database) as app:
        with pytest.raises(InstanceNotFoundError, match="nobody"):
            await app.retry("nobody")
        await failed(app, saga)
        with pytest.raises(InstanceStateError, match=r"compensated \(1 activities, 'do' first"):
            await app.retry("it")
        await (await app.start_workflow(fine, id="fine")).result(RESULT_TIMEOUT_S)
        with pytest.raises(InstanceStateError, match="is completed, not failed"):
            await app.retry("fine")
        # Nothing of it was changed.
        assert [event.kind for event in await app.get_history("it")][-1] == "WorkflowFailed"


async def test_fork_goes_its_own_way_from_there(database: Database) -> None:
    shop = Shop()

    @workflow
    async def flow(ctx: WorkflowContext, order: str) -> list[Any]:
        first = await shop.do(f"reserve {order}")
        chance = str(ctx.uuid4())
        await shop.do(f"note {chance}")
        return [first, chance, await shop.do("charge"), await shop.do(ctx.instance_id)]

    async with App(database) as app:
        source = await (await app.start_workflow(flow, "A", id="it")).result(RESULT_TIMEOUT_S)
        done = len(shop.diary)
        handle = await app.fork("it", from_activity="do:3", id="other")
        assert handle.instance_id == "other"
        result = await handle.result(RESULT_TIMEOUT_S)
        assert result == [*source[:3], "other done"]
        assert shop.diary[done:] == ["charge", "other"]
        assert shop.keys[-2] != shop.keys[2]
        events = await app.get_history("other")
        assert [event.kind for event in events] == [
            "ActivityCompleted", "ActivityCompleted", "WorkflowForked", "ActivityCompleted", "ActivityCompleted",
        ]  # fmt: skip
        assert events[2].input == {"from": "it", "run": 1, "activity": "do:3"}
        assert len(await app.get_history("it")) == 4
        # The same call again is the same instance; another one may not have its id.
        assert (await app.fork("it", from_activity="do:3", id="other")).instance_id == "other"
        with pytest.raises(InstanceConflictError, match="'other'"):
            await app.fork("it", from_activity="do:2", id="other")
        with pytest.raises(InstanceConflictError, match="'it'"):
            await app.fork("it", from_activity="do:2", id="it")
        # A fork of a fork has the same chances, too.
        third = await (await app.fork("other", from_activity="do:4", id="third")).result(RESULT_TIMEOUT_S)
        assert third == [*source[:3], "third done"]
        assert (await app.fork("other", from_activity="do:4", id="third")).instance_id == "third"
        with pytest.raises(InstanceConflictError, match="'third'"):
            await app.fork("it", from_activity="do:3", id="third")


async def test_fork_passes_inputs_that_name_the_instance(database: Database) -> None:
    shop = Shop()

    @workflow
    async def flow(ctx: WorkflowContext) -> list[str]:
        return [await shop.do(ctx.instance_id), await shop.do("last")]

    async with App(database) as app:
        await (await app.start_workflow(flow, id="it")).result(RESULT_TIMEOUT_S)
        handle = await app.fork("it", from_activity="do:2")
        assert await handle.result(RESULT_TIMEOUT_S) == ["it done", "last done"]


async def test_fork_of_a_compensated_instance_from_its_first_activity(database: Database) -> None:
    shop = Shop()

    @activity(compensate=shop.do)
    async def book(what: str) -> str:
        shop.diary.append(f"book {what}")
        return what

    @workflow
    async def saga(ctx: WorkflowContext) -> str:
        await book("room")
        return await shop.do("pay")

    shop.failing = {"pay"}
    async with App(database) as app:
        await failed(app, saga)
        shop.failing = set()
        assert await (await app.fork("it", from_activity="book:1")).result(RESULT_TIMEOUT_S) == "pay done"
    assert shop.diary == ["book room", "pay", "room", "book room", "pay"]


async def test_fork_hears_of_the_children_of_its_source(database: Database) -> None:
    shop, go = Shop(), asyncio.Event()

    @activity
    async def wait() -> None:
        await go.wait()

    @workflow
    async def child(ctx: WorkflowContext) -> str:
        await wait()
        return "child done"

    @workflow
    async def parent(ctx: WorkflowContext) -> list[str]:
        handle = await ctx.start_child(child)
        first = await shop.do("meanwhile")
        return [first, await handle.result(), await shop.do("last")]

    async with App(database) as app:
        handle = await app.start_workflow(parent, id="it")
        await wait_for_status(app, "it", Status.WAITING_FOR_CHILD)
        with pytest.raises(InstanceStateError, match="child 'it/child:1' runs"):
            await app.fork("it", from_activity="do:1")
        go.set()
        expected = ["meanwhile done", "child done", "last done"]
        assert await handle.result(RESULT_TIMEOUT_S) == expected
        assert await (await app.fork("it", from_activity="do:1")).result(RESULT_TIMEOUT_S) == expected
        assert await (await app.fork("it", from_activity="do:2")).result(RESULT_TIMEOUT_S) == expected
    assert shop.diary == ["meanwhile", "last", "meanwhile", "last", "last"]
    assert rows(database, "SELECT count(*) FROM romancy_mail") == [(0,)]


async def test_what_can_not_be_forked_says_why(database: Database) -> None:
    shop = Shop()

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await shop.do("a")

    async with App(database) as app:
        with pytest.raises(InstanceNotFoundError, match="nobody"):
            await app.fork("nobody", from_activity="do:1")
        await (await app.start_workflow(flow, id="it")).result(RESULT_TIMEOUT_S)
        with pytest.raises(InstanceStateError, match="recorded nothing of 'ship:1'; it has: do:1"):
            await app.fork("it", from_activity="ship:1")
        assert rows(database, "SELECT count(*) FROM romancy_instances") == [(1,)]


async def test_retry_whose_answer_was_lost_is_not_hidden_by_the_outcome_before_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Shop()

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        return await shop.do("charge")

    shop.failing = {"charge"}
    async with App(database) as app, App(database, worker=False) as client:
        old_handle = await client.start_workflow(flow, id="it")
        with pytest.raises(WorkflowFailedError):
            await old_handle.result(RESULT_TIMEOUT_S)
        shop.failing = set()
        retry = client._life.store.retry

        def commit_and_lose(instance_id: str, now: int) -> Future[None]:
            retry(instance_id, now).result()
            lost: Future[None] = Future()
            lost.set_exception(DatabaseUnavailableError("the answer was lost"))
            return lost

        monkeypatch.setattr(client._life.store, "retry", commit_and_lose)
        with pytest.raises(DatabaseUnavailableError):
            await client.retry("it")
        # It is not failed any more, but the old handle, which is still held, keeps what it has told.
        assert await (await client.get_handle("it")).result(RESULT_TIMEOUT_S) == "charge done"
        with pytest.raises(WorkflowFailedError):
            await old_handle.result(RESULT_TIMEOUT_S)
        assert await (await app.get_handle("it")).result(RESULT_TIMEOUT_S) == "charge done"
