"""Children, further runs of one instance, and changes of code under running instances."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from romancy import (
    App,
    ChildWorkflowError,
    InstanceConflictError,
    RetryPolicy,
    Status,
    WorkflowCancelledError,
    WorkflowContext,
    WorkflowFailedError,
    activity,
    current_activity,
    workflow,
)
from romancy.engine import worker as worker_module
from romancy.testing import isolated_catalogue
from tests.databases import Database, execute, rows
from tests.engine.test_events import NOTHING, left
from tests.ledger import INSERT, create_ledger
from tests.support import RESULT_TIMEOUT_S, CrashPlan, crash, wait_for_status


async def test_child_gives_its_result_to_its_parent(database: Database) -> None:
    @workflow
    async def double(ctx: WorkflowContext, number: int) -> int:
        return 2 * number

    @workflow
    async def parent(ctx: WorkflowContext) -> list[int]:
        first = await ctx.start_child(double, 1)
        second = await ctx.start_child(double, 2, id="second")
        third = await ctx.execute_child(double, number=3)
        return [await second.result(), await first.result(), third, await first.result()]

    async with App(database) as app:
        handle = await app.start_workflow(parent, id="p")
        assert await handle.result(RESULT_TIMEOUT_S) == [4, 2, 6, 2]
        page = await app.list_instances(workflow_name="double")
        assert sorted(child.instance_id for child in page.instances) == ["p/child:1", "p/child:3", "second"]
    assert left(database) == NOTHING


async def test_failure_of_a_child_reaches_its_parent(database: Database) -> None:
    @activity(retry=RetryPolicy.no_retry())
    async def fail() -> None:
        raise ValueError("too small")

    @workflow
    async def child(ctx: WorkflowContext) -> None:
        await fail()

    @workflow
    async def parent(ctx: WorkflowContext) -> list[str]:
        try:
            await ctx.execute_child(child)
        except ChildWorkflowError as error:
            return [error.instance_id, error.status, str(error)]
        return []

    async with App(database) as app:
        found = await (await app.start_workflow(parent, id="p")).result(RESULT_TIMEOUT_S)
        assert found[:2] == ["p/child:1", "failed"]
        assert "too small" in found[2]


async def test_fan_out_of_children(database: Database) -> None:
    @workflow
    async def square(ctx: WorkflowContext, number: int) -> int:
        return number * number

    @workflow
    async def parent(ctx: WorkflowContext, count: int) -> int:
        return sum(await asyncio.gather(*[ctx.execute_child(square, number) for number in range(count)]))

    async with App(database) as app:
        handle = await app.start_workflow(parent, 100)
        assert await handle.result(RESULT_TIMEOUT_S) == sum(n * n for n in range(100))
    assert left(database) == NOTHING


async def test_children_follow_a_cancelled_parent(database: Database) -> None:
    @workflow
    async def child(ctx: WorkflowContext) -> None:
        await ctx.wait_event("never", key="k")

    @workflow
    async def parent(ctx: WorkflowContext) -> None:
        await ctx.start_child(child, id="follows")
        await ctx.start_child(child, id="stays", on_parent_failure="abandon")
        await ctx.execute_child(child, id="awaited")

    async with App(database) as app:
        handle = await app.start_workflow(parent, id="p")
        for instance_id in ("follows", "stays", "awaited"):
            await wait_for_status(app, instance_id, Status.WAITING_FOR_EVENT)
        await wait_for_status(app, "p", Status.WAITING_FOR_CHILD)
        await handle.cancel()
        for instance_id in ("p", "follows", "awaited"):
            with pytest.raises(WorkflowCancelledError):
                await (await app.get_handle(instance_id)).result(RESULT_TIMEOUT_S)
        stays = await app.get_handle("stays")
        assert await stays.status() is Status.WAITING_FOR_EVENT
        await app.send_event("never", key="k")
        await stays.result(RESULT_TIMEOUT_S)
    assert left(database) == NOTHING


async def test_id_of_a_child_that_is_taken_is_an_error_in_the_parent(database: Database) -> None:
    @workflow
    async def child(ctx: WorkflowContext) -> None: ...

    @workflow
    async def parent(ctx: WorkflowContext) -> str:
        try:
            await ctx.execute_child(child, id="taken")
        except InstanceConflictError as error:
            return str(error)
        return "started"

    async with App(database) as app:
        await (await app.start_workflow(child, id="taken")).result(RESULT_TIMEOUT_S)
        assert "'taken'" in await (await app.start_workflow(parent)).result(RESULT_TIMEOUT_S)


async def test_parent_goes_on_after_a_restart_with_the_same_children(database: Database) -> None:
    @workflow
    async def child(ctx: WorkflowContext, number: int) -> int:
        await ctx.wait_event("go", key=str(number))
        return number

    @workflow
    async def parent(ctx: WorkflowContext) -> list[int]:
        children = [await ctx.start_child(child, number) for number in range(3)]
        return list(await asyncio.gather(*[one.result() for one in children]))

    async with App(database) as app:
        await app.start_workflow(parent, id="p")
        await wait_for_status(app, "p", Status.WAITING_FOR_CHILD)
        await wait_for_status(app, "p/child:3", Status.WAITING_FOR_EVENT)
        await app.send_event("go", key="1")
        await (await app.get_handle("p/child:2")).result(RESULT_TIMEOUT_S)
    async with App(database) as app:
        for number in (2, 0):
            await app.send_event("go", key=str(number))
        assert await (await app.get_handle("p", parent)).result(RESULT_TIMEOUT_S) == [0, 1, 2]
        assert len((await app.list_instances(workflow_name="child")).instances) == 3
    assert left(database) == NOTHING


async def test_recur_begins_the_next_run_with_its_own_history(database: Database) -> None:
    @activity
    async def work(number: int) -> int:
        return number + 1

    @workflow
    async def counter(ctx: WorkflowContext, number: int) -> list[int]:
        number = await work(number)
        if number < 5:
            await ctx.recur(number)
        return [number, ctx.run]

    async with App(database) as app:
        handle = await app.start_workflow(counter, 0, id="c")
        assert await handle.result(RESULT_TIMEOUT_S) == [5, 5]
        instance = await app.get_instance("c")
        assert instance is not None
        assert (instance.run, instance.input) == (5, {"number": 4})
        assert [event.kind for event in await app.get_history("c", run=2)] == ["ActivityCompleted", "WorkflowRecurred"]
        assert [event.kind for event in await app.get_history("c")] == ["ActivityCompleted"]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_crash_at_any_commit_loses_no_run(database: Database, when: Any) -> None:
    """Also between a transaction that commits an activity's outcome, and the swap of runs right after it."""
    create_ledger(database)

    @activity
    async def book(number: int) -> int:
        await current_activity().session.execute(INSERT, {"token": f"{current_activity().instance_id} {number}"})
        return number + 1

    @workflow
    async def counter(ctx: WorkflowContext, number: int) -> int:
        number = await book(number)
        if number < 3:
            await ctx.recur(number)
        return number

    at, was_crashed = 0, True
    while was_crashed:
        at += 1
        instance_id = f"counter-{at}"
        plan = CrashPlan(at, when)
        with plan.armed():
            app = App(database)
            await app.start()
            starting = asyncio.create_task(app.start_workflow(counter, 0, id=instance_id))
            was_crashed = await crashed_or_ended(app, plan, instance_id)
            if was_crashed:
                starting.cancel()
                await asyncio.wait([starting])
                await crash(app)
            else:
                await starting
                await app.shutdown()
        async with App(database) as app:
            handle = await app.start_workflow(counter, 0, id=instance_id)
            assert await handle.result(RESULT_TIMEOUT_S) == 3
        tokens = rows(database, "SELECT token FROM ledger WHERE token LIKE ? ORDER BY id", f"{instance_id} %")
        assert tokens == [(f"{instance_id} {number}",) for number in range(3)]
    assert at > 3


async def crashed_or_ended(app: App, plan: CrashPlan, instance_id: str) -> bool:
    async with asyncio.timeout(RESULT_TIMEOUT_S):
        while not plan.happened.is_set():
            instance = await app.get_instance(instance_id)
            if instance is not None and instance.status.is_terminal:
                break
            await plan.happens_soon()
    return plan.happened.is_set()


async def test_repeated_start_is_compared_with_the_first_run(database: Database) -> None:
    @workflow
    async def countdown(ctx: WorkflowContext, number: int) -> int:
        if number:
            await ctx.recur(number - 1)
        return ctx.run

    @activity
    async def start_with_session(number: int) -> str:
        joined = await app.start_workflow(countdown, number, id="c", session=current_activity().session)
        return joined.instance_id

    @workflow
    async def starter(ctx: WorkflowContext, number: int) -> str:
        return await start_with_session(number)

    async with App(database, default_retry=RetryPolicy.no_retry()) as app:
        handle = await app.start_workflow(countdown, 3, id="c")
        assert await handle.result(RESULT_TIMEOUT_S) == 4
        again = await app.start_workflow(countdown, 3, id="c")
        assert await again.result(RESULT_TIMEOUT_S) == 4
        with pytest.raises(InstanceConflictError):
            await app.start_workflow(countdown, 0, id="c")
        assert await (await app.start_workflow(starter, 3)).result(RESULT_TIMEOUT_S) == "c"
        with pytest.raises(WorkflowFailedError):
            await (await app.start_workflow(starter, 0)).result(RESULT_TIMEOUT_S)


async def test_child_that_has_recurred_before_its_start_was_recorded_is_still_the_same(database: Database) -> None:
    @workflow
    async def countdown(ctx: WorkflowContext, number: int) -> int:
        if number:
            await ctx.recur(number - 1)
        return ctx.run

    @workflow
    async def parent(ctx: WorkflowContext) -> int:
        child = await ctx.start_child(countdown, 3, id="kid")
        return await child.result()

    async with App(database) as app:
        # As after a crash between the child's start and its record: the child is there, and has gone on.
        await (await app.start_workflow(countdown, 3, id="kid")).result(RESULT_TIMEOUT_S)
        execute(database, "UPDATE romancy_instances SET parent_id = ? WHERE instance_id = ?", "p", "kid")
        await app.start_workflow(parent, id="p")
        await wait_for_status(app, "p", Status.WAITING_FOR_CHILD)
        assert [event.kind for event in await app.get_history("p")] == ["ChildStarted"]


async def test_mailbox_and_subscriptions_stay_across_runs(database: Database) -> None:
    @workflow
    async def reader(ctx: WorkflowContext, found: list[int]) -> list[int]:
        if ctx.run == 1:
            await ctx.subscribe("news")
        found = [*found, (await ctx.receive("news", type=int)).data]
        if len(found) < 4:
            await ctx.recur(found)
        return found

    async with App(database) as app:
        handle = await app.start_workflow(reader, [], id="r")
        await wait_for_status(app, "r", Status.WAITING_FOR_MESSAGE)
        for number in range(4):
            await app.publish("news", number)
        assert await handle.result(RESULT_TIMEOUT_S) == [0, 1, 2, 3]
    assert left(database) == NOTHING


async def test_many_runs_in_a_row_do_not_nest(database: Database) -> None:
    @workflow
    async def spin(ctx: WorkflowContext, left_over: int) -> int:
        if left_over:
            await ctx.recur(left_over - 1)
        return ctx.run

    async with App(database) as app:
        assert await (await app.start_workflow(spin, 1_500)).result(RESULT_TIMEOUT_S) == 1_501


async def test_recurring_instance_goes_on_after_a_restart(database: Database) -> None:
    @workflow
    async def step_by_step(ctx: WorkflowContext, seen: list[Any]) -> list[Any]:
        seen = [*seen, (await ctx.wait_event("go", key="k")).data]
        if len(seen) < 3:
            await ctx.recur(seen)
        return seen

    for number in range(3):
        async with App(database) as app:
            handle = await app.start_workflow(step_by_step, [], id="x") if not number else await app.get_handle("x")
            await wait_for_status(app, "x", Status.WAITING_FOR_EVENT)
            await app.send_event("go", number, key="k")
            if number == 2:
                assert await handle.result(RESULT_TIMEOUT_S) == [0, 1, 2]
            else:
                async with asyncio.timeout(RESULT_TIMEOUT_S):
                    while (await app.get_instance("x")).run < number + 2:  # type: ignore[union-attr]
                        await asyncio.sleep(0.005)


async def test_patched_code_runs_where_the_run_has_not_gone_past(database: Database) -> None:
    diary: list[str] = []

    def define(*, is_new: bool) -> Any:
        @activity
        async def old_way() -> None:
            diary.append("old")

        @activity
        async def new_way() -> None:
            diary.append("new")

        @workflow
        async def flow(ctx: WorkflowContext) -> None:
            if is_new and ctx.patched("better"):
                await new_way()
            else:
                await old_way()
            await ctx.wait_event("go", key=ctx.instance_id)
            if is_new and ctx.patched("better"):
                await new_way()
            else:
                await old_way()

        return flow

    with isolated_catalogue():
        flow = define(is_new=False)
        async with App(database) as app:
            await app.start_workflow(flow, id="old")
            await wait_for_status(app, "old", Status.WAITING_FOR_EVENT)
        async with App(database, worker=False) as app:
            await app.start_workflow(flow, id="untouched")
    assert diary == ["old"]
    for _ in range(2):
        with isolated_catalogue():
            flow = define(is_new=True)
            async with App(database) as app:
                if not await app.get_instance("fresh"):
                    await app.start_workflow(flow, id="fresh")
                for instance_id in ("old", "untouched", "fresh"):
                    await wait_for_status(app, instance_id, Status.WAITING_FOR_EVENT)
    assert diary == ["old", "new", "new"]
    with isolated_catalogue():
        flow = define(is_new=True)
        async with App(database) as app:
            for instance_id in ("old", "untouched", "fresh"):
                await app.send_event("go", key=instance_id)
                await (await app.get_handle(instance_id)).result(RESULT_TIMEOUT_S)
    assert diary == ["old", "new", "new", "old", "new", "new"]
    assert rows(database, "SELECT patches FROM romancy_instances WHERE instance_id = ?", "old") == [(None,)]


async def test_runs_do_not_pile_up_before_the_commits(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without activities they are quicker: what waits for a commit stays bounded, however many there are."""
    monkeypatch.setattr(worker_module, "MOST_ROWS_AHEAD", 20)
    waiting: list[int] = []

    @workflow
    async def spin(ctx: WorkflowContext, left_over: int) -> int:
        assert app._life.worker is not None
        waiting.append(app._life.worker.writer.waiting_rows)
        if left_over:
            await ctx.recur(left_over - 1)
        return ctx.run

    app = App(database)
    async with app:
        assert await (await app.start_workflow(spin, 500)).result(RESULT_TIMEOUT_S) == 501
    assert max(waiting) <= 20


async def test_patch_that_is_met_last_goes_with_the_end_of_the_run(database: Database) -> None:
    """What gives the instance away, its end or a rest, shares a commit with the note of the patch."""

    @workflow
    async def flow(ctx: WorkflowContext, left_over: int) -> bool:
        is_new = ctx.patched("better")
        if left_over:
            await ctx.recur(left_over - 1)
        return is_new

    async with App(database) as app:
        for left_over in range(3):
            handle = await app.start_workflow(flow, left_over, id=f"it{left_over}")
            assert await handle.result(RESULT_TIMEOUT_S) is True
    assert set(rows(database, "SELECT status, owner, patches FROM romancy_instances")) == {
        ("completed", None, '["better"]')
    }


async def test_run_that_follows_another_at_once_shows_what_it_waits_for(database: Database) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        if ctx.run < 3:
            await ctx.recur()
        await ctx.wait_event("go", key="k")

    async with App(database) as app:
        await app.start_workflow(flow, id="it")
        await wait_for_status(app, "it", Status.WAITING_FOR_EVENT)
