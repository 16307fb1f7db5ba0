"""Ownership: leases, fences, takeover, handing back, capacity."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from romancy import (
    App,
    AppNotRunningError,
    FencedError,
    InstanceStateError,
    Status,
    UnknownWorkflowError,
    WorkflowContext,
    WorkflowSuspendedError,
    activity,
    workflow,
)
from romancy.engine import claims as claims_module
from romancy.engine import lease as lease_module
from romancy.engine import worker as worker_module
from romancy.engine.process import host_identity, is_gone, process_started
from romancy.storage.rows import WorkerRow
from romancy.testing import VirtualClock
from tests.databases import Database, connect, execute, rows
from tests.support import RESULT_TIMEOUT_S, crash, until_live, until_quiet


class Held:
    """A workflow whose second activity waits until it is let go."""

    def __init__(self) -> None:
        self.go, self.reached = asyncio.Event(), asyncio.Event()
        self.ran: list[str] = []

        @activity(name="first")
        async def first() -> None:
            self.ran.append("first")

        @activity(name="second")
        async def second() -> str:
            self.ran.append("second")
            self.reached.set()
            await self.go.wait()
            return "done"

        @workflow(name="held")
        async def flow(ctx: WorkflowContext) -> str:
            await first()
            return await second()

        self.flow = flow


async def test_restart_on_the_same_host_goes_on_at_once(database: Database) -> None:
    held = Held()
    app = App(database)
    await app.start()
    await app.start_workflow(held.flow, id="it")
    await held.reached.wait()
    await crash(app)
    held.go.set()
    began = time.monotonic()
    async with App(database) as app:
        assert await (await app.get_handle("it")).result(RESULT_TIMEOUT_S) == "done"
    assert time.monotonic() - began < 1.75
    assert held.ran == ["first", "second", "second"]


async def test_running_peer_notices_a_dead_process_long_before_the_lease_ends(database: Database) -> None:
    held = Held()
    async with App(database, worker_id="peer", lease_ttl=600) as peer:
        app = App(database, lease_ttl=600)
        await app.start()
        await app.start_workflow(held.flow, id="it")
        await held.reached.wait()
        assert peer._life.worker is not None
        await peer._life.worker._claims._scan()
        await crash(app)
        peer._life.worker._claims._others = [row._replace(pid=2**31 - 2) for row in peer._life.worker._claims._others]
        peer._life.worker._claims._hint.set()
        held.go.set()
        assert await (await peer.get_handle("it")).result(RESULT_TIMEOUT_S) == "done"


async def test_worker_of_another_host_is_taken_over_when_its_lease_ends_and_not_before(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "SCAN_INTERVAL_S", 0.5)
    held = Held()
    app = App(database)
    await app.start()
    await app.start_workflow(held.flow, id="it")
    await held.reached.wait()
    await crash(app)
    now_us = time.time_ns() // 1_000
    execute(database, "UPDATE romancy_workers SET host = 'elsewhere', lease_until = ?", now_us + 3_600_000_000)
    held.go.set()
    async with App(database) as app:
        assert app._life.worker is not None
        await app._life.worker._claims._scan()
        assert (await (await app.get_handle("it")).status()) is Status.RUNNING
        assert rows(database, "SELECT count(*) FROM romancy_workers WHERE host = 'elsewhere'") == [(1,)]
        execute(database, "UPDATE romancy_workers SET lease_until = ? WHERE host = 'elsewhere'", now_us - 1)
        await app._life.worker._claims._scan()
        assert await (await app.get_handle("it")).result(RESULT_TIMEOUT_S) == "done"
        assert rows(database, "SELECT count(*) FROM romancy_workers WHERE host = 'elsewhere'") == [(0,)]


async def test_zombie_writes_nothing_more_and_the_app_begins_a_new_life(database: Database) -> None:
    held = Held()
    async with App(database) as app:
        handle = await app.start_workflow(held.flow)
        await held.reached.wait()
        held.reached.clear()
        zombie = app._life.worker
        assert zombie is not None
        execute(database, "UPDATE romancy_workers SET state = 'dead'")
        held.go.set()
        assert await handle.result(RESULT_TIMEOUT_S) == "done"
        assert isinstance(zombie.writer.stopped_by, FencedError)
        assert app._life.worker is not zombie
    assert held.ran == ["first", "second", "second"]
    assert rows(database, "SELECT seq, operation_id FROM romancy_history ORDER BY seq") == [
        (1, "first:1"),
        (2, "second:1"),
    ]


async def test_history_written_by_another_owner_stops_only_that_instance(database: Database) -> None:
    held, fine = Held(), asyncio.Event()

    @workflow
    async def other(ctx: WorkflowContext) -> str:
        return "fine"

    async with App(database) as app:
        handle = await app.start_workflow(held.flow)
        await held.reached.wait()
        execute(
            database,
            "INSERT INTO romancy_history (instance_id, run, seq, kind, attempt, at) VALUES (?, 1, 2, 'x', 0, 0)",
            handle.instance_id,
        )
        execute(database, "UPDATE romancy_instances SET owner = 'somebody else'")
        held.go.set()
        assert await (await app.start_workflow(other)).result(RESULT_TIMEOUT_S) == "fine"
        assert app._life.worker is not None
        await app._life.worker.writer.drained()
        assert not app._life.worker.is_live(handle.instance_id)
        assert await handle.status() is Status.RUNNING
    fine.set()


async def test_shutdown_hands_instances_back_for_another_to_take_at_once(database: Database) -> None:
    held = Held()
    first = App(database, shutdown_grace=0)
    await first.start()
    await first.start_workflow(held.flow, id="it")
    await held.reached.wait()
    await first.shutdown()
    assert rows(database, "SELECT status, owner, ready_at, claims FROM romancy_instances") == [("pending", None, 0, 0)]
    assert rows(database, "SELECT count(*) FROM romancy_workers") == [(0,)]
    held.go.set()
    async with App(database) as second:
        assert await (await second.get_handle("it")).result(RESULT_TIMEOUT_S) == "done"
    assert held.ran == ["first", "second", "second"]


async def test_shutdown_lets_running_activities_end_and_records_them(database: Database) -> None:
    held = Held()
    app = App(database, shutdown_grace=RESULT_TIMEOUT_S)
    await app.start()
    await app.start_workflow(held.flow, id="it")
    await held.reached.wait()
    stopping = asyncio.ensure_future(app.shutdown())
    await asyncio.sleep(0)
    held.go.set()
    await stopping
    assert rows(database, "SELECT status FROM romancy_instances") == [("completed",)]
    assert held.ran == ["first", "second"]


async def test_waiting_result_hears_of_the_shutdown(database: Database) -> None:
    held = Held()
    app = App(database, shutdown_grace=0)
    await app.start()
    handle = await app.start_workflow(held.flow)
    waiting = asyncio.ensure_future(handle.result())
    await held.reached.wait()
    await app.shutdown()
    with pytest.raises(AppNotRunningError, match="goes on when an app starts again"):
        await waiting


async def test_client_without_worker_starts_and_another_app_runs_it(database: Database) -> None:
    @workflow
    async def flow(ctx: WorkflowContext, n: int) -> int:
        return n + 1

    async with App(database, worker=False) as client:
        handle = await client.start_workflow(flow, 1)
        assert await handle.status() is Status.PENDING
        async with App(database) as app:
            assert await handle.result(RESULT_TIMEOUT_S) == 2
            later = await client.start_workflow(flow, 5)
            assert await later.result(RESULT_TIMEOUT_S) == 6
            assert app._life.worker is not None


async def test_instances_of_unknown_workflows_do_not_starve_the_others(database: Database) -> None:
    @workflow
    async def known(ctx: WorkflowContext, n: int) -> int:
        return n

    async with App(database, worker=False) as client:
        handles = [await client.start_workflow(known, n) for n in range(5)]
    with closing(connect(database)) as connection:
        mark = "?" if isinstance(database, Path) else "%s"
        connection.cursor().executemany(
            f"INSERT INTO romancy_instances (instance_id, run, workflow_name, status, created_at, updated_at, "
            f"ready_at, claims, input) VALUES ({mark}, 1, 'unknown', 'pending', 0, 0, 0, 0, '{{}}')",
            [(f"u{n}",) for n in range(1000)],
        )
        connection.commit()
    async with App(database) as app:
        for n, handle in enumerate(handles):
            assert await (await app.get_handle(handle.instance_id)).result(RESULT_TIMEOUT_S) == n
    assert rows(database, "SELECT count(*) FROM romancy_instances WHERE status = 'pending'") == [(1000,)]


async def test_orphans_of_unknown_workflows_are_given_back_to_everybody(database: Database) -> None:
    held = Held()
    app = App(database)
    await app.start()
    await app.start_workflow(held.flow, id="it")
    await held.reached.wait()
    await crash(app)

    @workflow
    async def other(ctx: WorkflowContext) -> None: ...

    async with App(database, workflows=[other]) as app:
        assert app._life.worker is not None
        await app._life.worker._claims._scan()
        await app._life.worker._claims._bury_the_gone()
        await app._life.worker._claims._take_over()
        assert rows(database, "SELECT status, owner, ready_at FROM romancy_instances") == [("pending", None, 0)]
    held.go.set()
    async with App(database, workflows=[held.flow]) as app:
        assert await (await app.get_handle("it")).result(RESULT_TIMEOUT_S) == "done"


async def test_instance_that_kills_its_workers_is_parked(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "MAX_CLAIMS", 2)
    held = Held()
    for n in range(3):
        app = App(database)
        await app.start()
        if n == 0:
            await app.start_workflow(held.flow, id="it")
        else:
            await until_live(app, "it")
            await until_quiet(app, lambda: len(held.ran))
        execute(database, "UPDATE romancy_instances SET claims = ?", n)
        await crash(app)
    async with App(database) as app:
        with pytest.raises(WorkflowSuspendedError, match="died 2 times in a row"):
            await (await app.get_handle("it")).result(RESULT_TIMEOUT_S)
        held.go.set()
        await app.resume("it")
        assert await (await app.get_handle("it")).result(RESULT_TIMEOUT_S) == "done"


async def test_more_instances_than_there_is_room_for_wait_in_the_database(database: Database) -> None:
    running, most = 0, 0

    @activity
    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await work()

    async with App(database, max_instances=3) as app:
        handles = [await app.start_workflow(flow) for _ in range(30)]
        for handle in handles:
            await handle.result(RESULT_TIMEOUT_S)
    assert most <= 3


async def test_cold_sleepers_leave_memory_and_wake_by_the_database(database: Database, clock: VirtualClock) -> None:
    @workflow
    async def flow(ctx: WorkflowContext, n: int) -> int:
        try:
            await ctx.sleep(10 + n)
        finally:
            cleaned.append(n)
        return n

    cleaned: list[int] = []
    async with App(database, clock=clock, max_hot_instances=2) as app:
        handles = [await app.start_workflow(flow, n) for n in range(6)]
        await until_quiet(app, lambda: None)
        assert app._life.worker is not None
        assert len(app._life.worker._live) == 2
        states = rows(database, "SELECT status, owner IS NULL, ready_at IS NOT NULL FROM romancy_instances")
        assert states.count(("waiting_for_timer", 1, 1)) == 4
        cleaned.clear()
        await clock.advance(15)
        app._life.worker.hint()
        assert [await handle.result(RESULT_TIMEOUT_S) for handle in handles] == list(range(6))


async def test_resume_of_what_is_not_suspended_is_an_error(database: Database) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None: ...

    async with App(database) as app:
        handle = await app.start_workflow(flow)
        await handle.result(RESULT_TIMEOUT_S)
        with pytest.raises(InstanceStateError, match="completed, not suspended"):
            await app.resume(handle.instance_id)
        with pytest.raises(LookupError, match="no instance"):
            await app.resume("nobody")


async def test_blocking_activity_is_reported_by_name_and_keeps_the_lease(
    database: Database, romancy_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "LOOK_INTERVAL_S", 0.01)
    reported = threading.Event()
    real = lease_module.Lease._describe_stall

    def describe(self: Any, stalled_s: float) -> str:
        text = real(self, stalled_s)
        reported.set()
        return text

    monkeypatch.setattr(lease_module.Lease, "_describe_stall", describe)

    @activity
    async def rude() -> bool:
        return reported.wait(RESULT_TIMEOUT_S)

    @workflow
    async def flow(ctx: WorkflowContext) -> bool:
        return await rude()

    async with App(database, stall_warning=0.05, lease_ttl=0.2) as app:
        worker = app._life.worker
        assert await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
        assert app._life.worker is worker
    text = "\n".join(record.getMessage() for record in romancy_log.records)
    assert "activity 'rude' has blocked the event loop" in text
    assert "test_workers.py" in text


async def test_lease_is_renewed_while_the_loop_is_blocked(database: Database) -> None:
    def lease_until() -> int:
        return int(rows(database, "SELECT lease_until FROM romancy_workers")[0][0])

    @activity
    async def rude() -> bool:
        before = lease_until()
        deadline = time.monotonic() + RESULT_TIMEOUT_S
        while lease_until() == before and time.monotonic() < deadline:
            os.sched_yield()
        return lease_until() > before

    @workflow
    async def flow(ctx: WorkflowContext) -> bool:
        return await rude()

    async with App(database, lease_ttl=0.2, stall_warning=60) as app:
        assert await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)


async def test_workflow_of_another_app_or_defined_too_late_is_named(database: Database) -> None:
    @workflow
    async def mine(ctx: WorkflowContext) -> None: ...

    async with App(database, workflows=[mine]) as app:

        @workflow
        async def late(ctx: WorkflowContext) -> None: ...

        with pytest.raises(UnknownWorkflowError, match="it has: mine"):
            await app.start_workflow(late)
    async with App(database) as app:

        @workflow
        async def later(ctx: WorkflowContext) -> None: ...

        with pytest.raises(UnknownWorkflowError, match="after the app started"):
            await app.start_workflow(later)


def test_process_identity_tells_the_living_from_the_dead() -> None:
    me = WorkerRow("w", "n", "alive", host_identity(), os.getpid(), process_started(os.getpid()) or 0, 0)
    assert not is_gone(me)
    assert is_gone(me._replace(process_started=me.process_started + 1))
    assert is_gone(me._replace(pid=2**31 - 2))
    assert not is_gone(me._replace(pid=2**31 - 2, host="elsewhere"))


async def test_app_started_before_a_fork_refuses_to_work_in_the_child(database: Database) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None: ...

    async with App(database) as app:
        app._life.process_id = os.getpid() + 1
        with pytest.raises(AppNotRunningError, match="forked"):
            await app.start_workflow(flow)
        app._life.process_id = os.getpid()


class Crowd:
    """Workflows that are held back, and how many of them were active at a time."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.active = self.most = 0

        @activity(name="work")
        async def work() -> None:
            self.active += 1
            self.most = max(self.most, self.active)
            await self.go.wait()
            self.active -= 1

        @workflow(name="crowd")
        async def flow(ctx: WorkflowContext) -> None:
            await work()

        self.flow = flow


async def test_starts_on_their_way_count_for_the_room(database: Database) -> None:
    crowd = Crowd()
    async with App(database, max_instances=4) as app:
        handles = await asyncio.gather(*[app.start_workflow(crowd.flow) for _ in range(40)])
        await until_quiet(app, lambda: crowd.active)
        crowd.go.set()
        for handle in handles:
            await handle.result(RESULT_TIMEOUT_S)
    assert crowd.most == 4


async def test_takeover_fills_the_room_and_goes_on_when_there_is_more(database: Database) -> None:
    crowd = Crowd()
    app = App(database)
    await app.start()
    handles = await asyncio.gather(*[app.start_workflow(crowd.flow) for _ in range(30)])
    await crash(app)
    crowd.active = crowd.most = 0
    crowd.go.set()
    began = time.monotonic()
    async with App(database, max_instances=4) as app:
        for handle in handles:
            await (await app.get_handle(handle.instance_id)).result(RESULT_TIMEOUT_S)
    assert crowd.most <= 4
    assert time.monotonic() - began < claims_module.SCAN_INTERVAL_S


async def test_going_to_sleep_makes_room_for_what_waits_in_the_database(
    database: Database, clock: VirtualClock
) -> None:
    @workflow
    async def sleeper(ctx: WorkflowContext) -> None:
        await ctx.sleep(1000)

    @workflow
    async def quick(ctx: WorkflowContext) -> str:
        return "done"

    async with App(database, worker=False) as client:
        for n in range(3):
            await client.start_workflow(sleeper, id=f"s{n}")
        handle = await client.start_workflow(quick, id="q")
    began = time.monotonic()
    async with App(database, clock=clock, max_instances=1) as app:
        handle = await app.get_handle("q", quick)
        assert await handle.result(RESULT_TIMEOUT_S) == "done"
    assert time.monotonic() - began < claims_module.SCAN_INTERVAL_S


async def test_app_without_any_workflow_starts(database: Database) -> None:
    async with App(database, workflows=[]) as app:
        assert (await app.list_instances()).instances == ()


async def test_start_by_another_process_is_noticed_soon(database: Database) -> None:
    @workflow
    async def flow(ctx: WorkflowContext, n: int) -> int:
        return n

    async with App(database) as app, App(database, worker=False) as client:
        # The worker has just written, and is idle: its next scan is seconds away.
        assert await (await app.start_workflow(flow, 0)).result(RESULT_TIMEOUT_S) == 0
        began = time.monotonic()
        for n in range(1, 4):
            assert await (await client.start_workflow(flow, n)).result(RESULT_TIMEOUT_S) == n
        assert time.monotonic() - began < claims_module.SCAN_INTERVAL_S / 2
