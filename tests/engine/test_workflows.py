"""What a workflow's code sees: results, ids, errors and plain asyncio."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from romancy import (
    App,
    HistoryKind,
    NotInActivityError,
    ResultTimeoutError,
    RetryExhaustedError,
    RetryPolicy,
    SerializationError,
    Status,
    TerminalError,
    WorkflowCancelledError,
    WorkflowContext,
    WorkflowFailedError,
    activity,
    current_activity,
    workflow,
)
from romancy.testing import VirtualClock
from tests.databases import Database, execute
from tests.support import RESULT_TIMEOUT_S, wait_for_status


@dataclass
class Order:
    id: str
    amounts: list[int]


@dataclass
class Receipt:
    order: Order
    total: int
    at: datetime


async def test_typed_values_come_back_as_the_annotation_says(database: Database) -> None:
    @activity
    async def charge(order: Order) -> Receipt:
        return Receipt(order, sum(order.amounts), datetime(2026, 1, 1, tzinfo=UTC))

    @workflow
    async def buy(ctx: WorkflowContext, order: Order) -> Receipt:
        receipt = await charge(order)
        assert type(receipt) is Receipt
        assert receipt.order == order
        return receipt

    async with App(database) as app:
        handle = await app.start_workflow(buy, Order("a", [1, 2]))
        receipt = await handle.result(RESULT_TIMEOUT_S)
        assert receipt == Receipt(Order("a", [1, 2]), 3, datetime(2026, 1, 1, tzinfo=UTC))
        instance = await app.get_instance(handle.instance_id)
        assert instance is not None
        assert instance.input == {"id": "a", "amounts": [1, 2]}
        assert instance.status is Status.COMPLETED
        assert await handle.status() is Status.COMPLETED


async def test_activity_gets_a_copy_so_that_it_cannot_change_the_workflows_value(database: Database) -> None:
    @activity
    async def spoil(values: list[int]) -> list[int]:
        values.append(99)
        return values

    @workflow
    async def check(ctx: WorkflowContext) -> list[int]:
        mine = [1]
        theirs = await spoil(mine)
        return [len(mine), len(theirs)]

    async with App(database) as app:
        assert await (await app.start_workflow(check)).result(RESULT_TIMEOUT_S) == [1, 2]


async def test_ids_count_by_name_and_are_stable_under_gather(database: Database) -> None:
    gates = {n: asyncio.Event() for n in range(3)}

    @activity
    async def fetch(n: int) -> str:
        await gates[n].wait()
        if n:
            gates[n - 1].set()
        return current_activity().activity_id

    @workflow
    async def all_of(ctx: WorkflowContext) -> list[str]:
        return list(await asyncio.gather(*[fetch(n) for n in range(3)]))

    async with App(database) as app:
        gates[2].set()
        handle = await app.start_workflow(all_of)
        assert await handle.result(RESULT_TIMEOUT_S) == ["fetch:1", "fetch:2", "fetch:3"]
        events = await app.get_history(handle.instance_id)
        assert [event.activity_id for event in events] == ["fetch:3", "fetch:2", "fetch:1"]


async def test_options_override_id_and_retry_for_one_call(database: Database) -> None:
    @activity
    async def act(fail: bool) -> str:
        if fail:
            raise ValueError("no")
        return current_activity().activity_id

    @workflow
    async def flow(ctx: WorkflowContext) -> list[str]:
        first = await act.options(id="mine")(False)
        second = await act(False)
        try:
            await act.options(retry=RetryPolicy.no_retry())(True)
        except RetryExhaustedError as error:
            return [first, second, error.activity_id, str(error.attempts)]
        return []

    async with App(database) as app:
        handle = await app.start_workflow(flow)
        assert await handle.result(RESULT_TIMEOUT_S) == ["mine", "act:1", "act:2", "1"]


async def test_reused_activity_id_is_refused_instead_of_returning_the_old_result(database: Database) -> None:
    @activity
    async def act(n: int) -> int:
        return n

    @workflow
    async def explicit(ctx: WorkflowContext) -> int:
        await act.options(id="x")(1)
        return await act.options(id="x")(2)

    @workflow
    async def shadow(ctx: WorkflowContext) -> int:
        await act.options(id="act:1")(1)
        return await act(2)

    @workflow
    async def after(ctx: WorkflowContext) -> int:
        await act(2)
        return await act.options(id="act:1")(1)

    async with App(database) as app:
        for flow in (explicit, shadow, after):
            with pytest.raises(WorkflowFailedError, match="used twice"):
                await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)


async def test_task_group_wait_and_queue_work_as_in_plain_asyncio(database: Database) -> None:
    slow = asyncio.Event()

    @activity
    async def work(n: int) -> int:
        if n == 1:
            await slow.wait()
        return n

    @workflow
    async def flow(ctx: WorkflowContext) -> list[int]:
        queue: asyncio.Queue[int] = asyncio.Queue()

        async def producer() -> None:
            for n in (10, 20):
                await queue.put(await work(n))

        seen: list[int] = []
        async with asyncio.TaskGroup() as group:
            group.create_task(producer())
            for _ in range(2):
                seen.append(await queue.get())
        first = asyncio.create_task(work(1))
        second = asyncio.create_task(work(2))
        done, pending = await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
        seen += [task.result() for task in done]
        assert pending == {first}
        await release()
        seen.append(await first)
        return seen

    @activity
    async def release() -> None:
        slow.set()

    async with App(database) as app:
        assert await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S) == [10, 20, 2, 1]


async def test_timeout_cancels_the_activity_and_leaves_nothing_behind(database: Database, clock: VirtualClock) -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    @activity
    async def stuck() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        try:
            async with asyncio.timeout(30):
                await stuck()
        except TimeoutError:
            return "timed out"
        return "done"

    async with App(database, clock=clock) as app:
        handle = await app.start_workflow(flow)
        await began.wait()
        await clock.wait_for_sleeper()
        await clock.advance(29.999)
        await asyncio.sleep(0)
        assert not cancelled.is_set()
        await clock.advance(0.001)
        assert await handle.result(RESULT_TIMEOUT_S) == "timed out"
        await cancelled.wait()
        kinds = [event.kind for event in await app.get_history(handle.instance_id)]
        assert kinds == [HistoryKind.TIMER_EXPIRED]


async def test_sleep_is_never_early_and_time_is_deterministic(database: Database, clock: VirtualClock) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> list[float]:
        start = ctx.now()
        await ctx.sleep(timedelta(days=30))
        middle = ctx.now()
        await ctx.sleep_until(middle + timedelta(seconds=5))
        await ctx.sleep_until(middle - timedelta(seconds=5))
        await ctx.sleep(-1)
        await asyncio.sleep(0.25)
        return [(middle - start).total_seconds(), (ctx.now() - middle).total_seconds()]

    async with App(database, clock=clock) as app:
        handle = await app.start_workflow(flow)
        for _ in range(3):
            await clock.wait_for_sleeper()
            assert app._life.worker is not None
            wake = app._life.worker._live[handle.instance_id].next_wake_us()
            assert wake is not None
            await clock.advance((wake - clock.now_us()) / 1_000_000)
        assert await handle.result(RESULT_TIMEOUT_S) == [30 * 86400.0, 5.25]


async def test_naive_datetime_is_refused(database: Database) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await ctx.sleep_until(datetime(2026, 1, 1))

    async with App(database) as app:
        with pytest.raises(WorkflowFailedError, match="no time zone"):
            await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)


async def test_random_and_uuid_depend_on_the_instance_only(database: Database) -> None:
    @activity
    async def act() -> None: ...

    @workflow
    async def flow(ctx: WorkflowContext) -> list[str]:
        first = str(ctx.uuid4())
        await act()
        assert UUID(first).version == 4
        return [first, str(ctx.uuid4()), str(ctx.random().random())]

    seen = []
    for _ in range(2):
        async with App(database) as app:
            seen.append(await (await app.start_workflow(flow, id="same")).result(RESULT_TIMEOUT_S))
        for table in ("history", "instances"):
            execute(database, f"DELETE FROM romancy_{table}")
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 3


async def test_workflow_failure_reaches_the_caller_with_its_cause(database: Database) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        raise LookupError("sku", 17)

    async with App(database) as app:
        handle = await app.start_workflow(flow)
        with pytest.raises(WorkflowFailedError, match="LookupError") as caught:
            await handle.result(RESULT_TIMEOUT_S)
        assert isinstance(caught.value.__cause__, LookupError)
        assert caught.value.__cause__.args == ("sku", 17)
        assert "test_workflows.py" in caught.value.error.traceback
        assert await handle.status() is Status.FAILED
        kinds = [event.kind for event in await app.get_history(handle.instance_id)]
        assert kinds == [HistoryKind.WORKFLOW_FAILED]


class Declined(TerminalError):
    pass


async def test_terminal_error_keeps_its_type_and_is_not_retried(database: Database) -> None:
    attempts = []

    @activity
    async def charge() -> None:
        attempts.append(current_activity().attempt)
        raise Declined("card 42") from ValueError("expired")

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        try:
            await charge()
        except Declined as error:
            assert isinstance(error.__cause__, ValueError)
            return str(error)
        return ""

    async with App(database) as app:
        assert await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S) == "card 42"
    assert attempts == [1]


async def test_except_exception_in_workflow_code_cannot_break_the_engine(
    database: Database, clock: VirtualClock
) -> None:
    @activity
    async def act(n: int) -> int:
        return n

    @workflow
    async def flow(ctx: WorkflowContext) -> int:
        total = 0
        for n in range(3):
            try:
                total += await act(n)
                await ctx.sleep(1)
            except Exception:
                continue
        return total

    async with App(database, clock=VirtualClock(auto_advance=True)) as app:
        assert await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S) == 3


async def test_cancelled_error_that_escapes_means_cancelled(database: Database) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        raise asyncio.CancelledError

    async with App(database) as app:
        handle = await app.start_workflow(flow)
        with pytest.raises(WorkflowCancelledError):
            await handle.result(RESULT_TIMEOUT_S)
        assert await handle.status() is Status.CANCELLED


async def test_cancelling_a_task_in_workflow_code_reaches_its_activity(database: Database) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    @activity
    async def stuck() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    @activity
    async def wait_until_it_runs() -> None:
        await began.wait()

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        task = asyncio.create_task(stuck())
        await wait_until_it_runs()
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "cancelled"
        return "not cancelled"

    async with App(database) as app:
        assert await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S) == "cancelled"
        await ended.wait()


async def test_sync_activity_runs_in_a_thread_with_its_context(database: Database) -> None:
    @activity
    def blocking(n: int) -> str:
        return f"{current_activity().activity_id} {current_activity().attempt} {n}"

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        return await blocking(5)

    async with App(database) as app:
        assert await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S) == "blocking:1 1 5"


def test_current_activity_outside_one_says_what_to_do() -> None:
    with pytest.raises(NotInActivityError, match="inside an @activity"):
        current_activity()


async def test_unstorable_argument_fails_at_the_call_site_and_can_be_caught(database: Database) -> None:
    @activity
    async def act(value: object) -> None: ...

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        try:
            await act({1, 2})
        except SerializationError as error:
            return str(error)
        return ""

    async with App(database) as app:
        message = await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
    assert "argument 'value'" in message
    assert "set" in message


async def test_unstorable_result_is_not_retried(database: Database) -> None:
    calls = []

    @activity
    async def act() -> object:
        calls.append(1)
        return object()

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        try:
            await act()
        except SerializationError as error:
            return str(error)
        return ""

    async with App(database) as app:
        message = await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
    assert "result of type object" in message
    assert len(calls) == 1


async def test_result_timeout_leaves_the_workflow_running(database: Database, clock: VirtualClock) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        await ctx.sleep(100)
        return "done"

    async with App(database, clock=clock) as app:
        handle = await app.start_workflow(flow)
        await clock.wait_for_sleeper()
        with pytest.raises(ResultTimeoutError, match="it goes on"):
            await handle.result(timeout=0.01)
        await wait_for_status(app, handle.instance_id, Status.WAITING_FOR_TIMER)
        await clock.advance(100)
        assert await handle.result(RESULT_TIMEOUT_S) == "done"


async def test_idempotency_key_is_the_same_for_all_attempts(database: Database) -> None:
    keys = []

    @activity(retry=RetryPolicy.fixed(3, 0))
    async def act() -> None:
        keys.append(current_activity().idempotency_key)
        if len(keys) < 3:
            raise ValueError

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await act()
        await act()

    async with App(database) as app:
        handle = await app.start_workflow(flow)
        await handle.result(RESULT_TIMEOUT_S)
    assert keys == [f"{handle.instance_id}/1/act:1"] * 3 + [f"{handle.instance_id}/1/act:2"]


async def test_thousand_activities_in_one_gather(database: Database) -> None:
    @activity
    async def act(n: int) -> int:
        return n

    @workflow
    async def flow(ctx: WorkflowContext) -> int:
        return sum(await asyncio.gather(*[act(n) for n in range(1000)]))

    async with App(database, max_activities=50) as app:
        assert await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S) == 499500


async def test_as_completed_over_activities_keeps_their_ids(database: Database) -> None:
    gates = [asyncio.Event() for _ in range(4)]

    @activity
    async def fetch(n: int) -> str:
        await gates[n].wait()
        if n:
            gates[n - 1].set()
        return f"{n} {current_activity().activity_id}"

    @workflow
    async def flow(ctx: WorkflowContext) -> list[str]:
        return [await found for found in asyncio.as_completed([fetch(n) for n in range(4)])]

    gates[3].set()
    async with App(database) as app:
        found = await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
    assert found == ["3 fetch:4", "2 fetch:3", "1 fetch:2", "0 fetch:1"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
async def test_as_completed_over_other_coroutines_is_refused_with_the_cure(database: Database) -> None:
    async def step(n: int) -> int:
        return n

    @workflow
    async def refused(ctx: WorkflowContext) -> str:
        from romancy import ForbiddenInWorkflowError

        try:
            return str([await found for found in asyncio.as_completed([step(n) for n in range(4)])])
        except ForbiddenInWorkflowError as error:
            return str(error)

    @workflow
    async def cured(ctx: WorkflowContext) -> list[int]:
        tasks = [asyncio.create_task(step(n)) for n in range(4)]
        return sorted([await found for found in asyncio.as_completed(tasks)])

    async with App(database) as app:
        assert "create_task" in await (await app.start_workflow(refused)).result(RESULT_TIMEOUT_S)
        assert await (await app.start_workflow(cured)).result(RESULT_TIMEOUT_S) == [0, 1, 2, 3]


async def test_task_group_cancels_its_tasks_in_the_same_order_every_time(database: Database) -> None:
    orders: list[list[int]] = []

    @activity(retry=RetryPolicy.no_retry())
    async def boom() -> None:
        raise ValueError

    @activity
    async def clean(n: int) -> None: ...

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        order: list[int] = []
        orders.append(order)

        async def part(n: int) -> None:
            try:
                await ctx.sleep(1000)
            finally:
                order.append(n)
                await clean(n)

        try:
            async with asyncio.TaskGroup() as group:
                for n in range(30):
                    group.create_task(part(n))
                await boom()
        except* RetryExhaustedError:
            pass

    async with App(database) as app:
        for _ in range(5):
            await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
    assert orders == [list(range(30))] * 5
