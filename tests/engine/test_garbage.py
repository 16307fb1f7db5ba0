"""What has ended is gone at once: nothing waits for the garbage collector, which looks rarely where it is tuned."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from romancy import App, RetryPolicy, WorkflowContext, activity, current_activity, workflow
from romancy.testing import VirtualClock
from tests.databases import Database
from tests.ledger import INSERT, create_ledger
from tests.support import RESULT_TIMEOUT_S

RUNS = 20


@contextmanager
def cycles() -> Iterator[Counter[str]]:
    """Counts the objects that formed cycles meanwhile, by type."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found.update(type(garbage).__qualname__ for garbage in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


OURS = {
    "ActivityContext", "ActivityOperation", "Attempt", "Batch", "HistoryRow", "LiveInstance", "Messaging", "Party",
    "StateRow", "Task", "WaitOperation", "WorkflowLoop", "WorkflowTask", "coroutine",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["activities", "threads", "events", "children", "runs"])
async def test_ended_instances_form_no_cycles(database: Database, kind: str) -> None:
    @activity
    async def double(number: int) -> int:
        return 2 * number

    @activity(retry=RetryPolicy.fixed(2, 0))
    async def at_second_go() -> int:
        if current_activity().attempt == 1:
            raise ValueError("not yet")
        return current_activity().attempt

    @activity
    def in_thread(number: int) -> int:
        return 2 * number

    @workflow
    async def activities(ctx: WorkflowContext) -> None:
        await double(1)
        await asyncio.gather(double(2), at_second_go())

    @workflow
    async def threads(ctx: WorkflowContext) -> None:
        await in_thread(1)

    @workflow
    async def events(ctx: WorkflowContext) -> None:
        await ctx.send_event("paid", key=ctx.instance_id)
        await ctx.wait_event("paid", key=ctx.instance_id)

    @workflow
    async def child(ctx: WorkflowContext) -> None:
        await double(1)

    @workflow
    async def children(ctx: WorkflowContext) -> None:
        await ctx.execute_child(child)

    @workflow
    async def runs(ctx: WorkflowContext, number: int = 0) -> None:
        await double(number)
        if number < 3:
            await ctx.recur(number + 1)

    flow = {flow.name: flow for flow in (activities, threads, events, children, runs)}[kind]

    async def run() -> None:
        handle = await app.start_workflow(flow)
        await asyncio.gather(handle.result(RESULT_TIMEOUT_S), return_exceptions=True)

    async with App(database) as app:
        await run()
        with cycles() as found:
            for _ in range(RUNS):
                await run()
    assert not {name: count for name, count in found.items() if name in OURS and count >= RUNS}, found


async def test_evicted_sleepers_form_no_cycles(database: Database, clock: VirtualClock) -> None:
    @workflow
    async def sleeper(ctx: WorkflowContext) -> None:
        await ctx.sleep(3600)

    async with App(database, max_hot_instances=1, clock=clock) as app:
        assert app._life.worker is not None
        with cycles() as found:
            for _ in range(RUNS):
                await app.start_workflow(sleeper)
            async with asyncio.timeout(RESULT_TIMEOUT_S):
                while len(app._life.worker._live) > 1:
                    await asyncio.sleep(0.002)
    assert not {name: count for name, count in found.items() if name in OURS and count >= RUNS}, found


async def test_sessions_form_no_cycles_of_ours(database: Database) -> None:
    create_ledger(database)

    @activity
    async def book() -> None:
        await current_activity().session.execute(INSERT, {"token": "one"})

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await book()

    async with App(database) as app:
        await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
        with cycles() as found:
            for _ in range(RUNS):
                await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
    assert not {name: count for name, count in found.items() if name in OURS and count >= RUNS}, found
