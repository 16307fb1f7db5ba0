"""Random workflow programs x random crash points = the uninterrupted run.

A program is a tree of activities, sleeps, gathers, task groups, races and timeouts. The test itself decides which
activity ends next, or whether time moves on, by a rule that depends on nothing but names; so a run that crashed and
was replayed must see exactly what an uninterrupted run sees: the same trace, the same result, the same history.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from romancy import App, RetryPolicy, TerminalError, Workflow, WorkflowContext, activity, current_activity, workflow
from romancy.testing import VirtualClock, isolated_catalogue
from tests.databases import Database, clean, rows
from tests.support import RESULT_TIMEOUT_S, CrashPlan, crash, until_quiet

Program = tuple[Any, ...]


def programs() -> st.SearchStrategy[Program]:
    act = st.tuples(st.just("act"), st.integers(0, 3), st.sampled_from(["ok", "ok", "fails", "flaky", "terminal"]))
    sleep = st.tuples(st.just("sleep"), st.integers(0, 5))
    return st.recursive(
        act | sleep,
        lambda inner: st.one_of(
            st.tuples(
                st.sampled_from(["seq", "gather", "group", "race", "completed"]),
                st.lists(inner, min_size=1, max_size=3),
            ),
            st.tuples(st.just("timeout"), st.integers(0, 6), inner),
            st.tuples(st.just("shield"), inner),
            st.tuples(st.just("cleanup"), inner),
        ),
        max_leaves=8,
    )


class Stage:
    """Holds every activity back until the test lets it end."""

    def __init__(self) -> None:
        self.held: dict[str, asyncio.Event] = {}

    async def hold(self, name: str) -> None:
        event = self.held[name] = asyncio.Event()
        try:
            await event.wait()
        finally:
            if self.held.get(name) is event:
                del self.held[name]

    def release_next(self) -> bool:
        """Let the activity end whose name's digest comes first."""
        if not self.held:
            return False
        name = min(self.held, key=digest)
        self.held.pop(name).set()
        return True


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


@dataclass
class World:
    stage: Stage
    flow: Workflow[..., Any]


def make_world(traces: list[list[str]]) -> World:
    stage = Stage()

    @activity(name="act", retry=RetryPolicy.fixed(3, 2))
    async def act(label: str, behaviour: str) -> str:
        current = current_activity()
        await stage.hold(f"{current.activity_id}/{current.attempt}")
        if behaviour == "fails" or (behaviour == "flaky" and current.attempt < 3):
            raise ValueError(label)
        if behaviour == "terminal":
            raise TerminalError(label)
        return f"{label}!"

    async def run(program: Program, trace: list[str], ctx: WorkflowContext) -> str:
        match program:
            case ("act", label, behaviour):
                result = await act(f"n{label}", behaviour)
                trace.append(f"act {result} at {ctx.now().timestamp()}")
                return result
            case ("sleep", seconds):
                await asyncio.sleep(seconds)
                trace.append(f"slept {seconds} {ctx.random().random()}")
                return f"z{seconds}"
            case ("seq", parts):
                return "".join([await guarded(part, trace, ctx) for part in parts])
            case ("gather", parts):
                found = await asyncio.gather(*[run(p, trace, ctx) for p in parts], return_exceptions=True)
                return "|".join(name_of(value) for value in found)
            case ("group", parts):
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(run(part, trace, ctx)) for part in parts]
                return "&".join(task.result() for task in tasks)
            case ("race", parts):
                tasks = [asyncio.create_task(run(part, trace, ctx)) for part in parts]
                done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)
                order = [n for n, task in enumerate(tasks) if task in done]
                trace.append(f"race won by {order}")
                return "".join(name_of(tasks[n].exception() or tasks[n].result()) for n in order)
            case ("completed", parts):
                tasks = [asyncio.create_task(run(part, trace, ctx)) for part in parts]
                found = []
                for task in asyncio.as_completed(tasks):
                    try:
                        found.append(await task)
                    except Exception as error:
                        found.append(name_of(error))
                return ">".join(found)
            case ("cleanup", inner):
                try:
                    return await run(inner, trace, ctx)
                finally:
                    trace.append(await act("clean", "ok"))
            case ("timeout", seconds, inner):
                async with asyncio.timeout(seconds):
                    return await run(inner, trace, ctx)
            case ("shield", inner):
                return await asyncio.shield(asyncio.ensure_future(run(inner, trace, ctx)))
        raise AssertionError(program)

    async def guarded(program: Program, trace: list[str], ctx: WorkflowContext) -> str:
        try:
            return await run(program, trace, ctx)
        except Exception as error:
            trace.append(f"caught {name_of(error)}")
            return name_of(error)

    @workflow(name="flow")
    async def flow(ctx: WorkflowContext, program: Any) -> dict[str, Any]:
        trace: list[str] = []
        traces.append(trace)
        result = await guarded(thaw(program), trace, ctx)
        trace.append(result)
        return {"result": result, "trace": trace}

    return World(stage, flow)


def name_of(value: object) -> str:
    if isinstance(value, BaseExceptionGroup):
        return f"group({','.join(sorted(name_of(error) for error in value.exceptions))})"
    return f"<{type(value).__name__}>" if isinstance(value, BaseException) else str(value)


def thaw(program: Any) -> Any:
    """JSON lists back to the tuples that ``match`` tells apart from lists of parts."""
    if program[0] in ("act", "sleep"):
        return tuple(program)
    if program[0] in ("timeout", "shield", "cleanup"):
        return (*program[:-1], thaw(program[-1]))
    return (program[0], [thaw(part) for part in program[1]])


async def play(
    path: Database, program: Program, crashes: list[tuple[int, Literal["before", "after"]]], clock: VirtualClock
) -> tuple[Any, list[tuple[Any, ...]], list[list[str]]]:
    """Run a program, crashing the app at the given flushes; returns result, history and all traces."""
    traces: list[list[str]] = []
    world = make_world(traces)
    plans = [CrashPlan(at, when) for at, when in crashes]
    while True:
        plan = plans.pop(0) if plans else CrashPlan(1_000_000, "before")
        with plan.armed():
            app = App(path, workflows=[world.flow], clock=clock, stall_warning=60)
            await app.start()
            done = await drive(app, world, program, plan, clock)
            if done is not None:
                await app.shutdown()
                break
            await crash(app)
    history = rows(
        path,
        "SELECT kind, operation_id, name, position, attempt, at, result FROM romancy_history ORDER BY seq",
    )
    return done, history, traces


async def drive(app: App, world: World, program: Program, plan: CrashPlan, clock: VirtualClock) -> Any:
    start = asyncio.ensure_future(app.start_workflow(world.flow, program, id="the-one"))
    crashed = asyncio.ensure_future(plan.happened.wait())
    await asyncio.wait({start, crashed}, return_when=asyncio.FIRST_COMPLETED, timeout=RESULT_TIMEOUT_S)
    if crashed.done():
        start.cancel()
        return None
    result = asyncio.ensure_future(start.result().result(RESULT_TIMEOUT_S))
    try:
        while not result.done() and not crashed.done():
            quiet = asyncio.ensure_future(until_quiet(app, lambda: (sorted(world.stage.held), live_events(app))))
            await asyncio.wait({quiet, crashed, result}, return_when=asyncio.FIRST_COMPLETED)
            quiet.cancel()
            if crashed.done() or result.done():
                break
            if not world.stage.release_next():
                await step_to_next_deadline(app, clock)
        return None if crashed.done() else await result
    finally:
        crashed.cancel()
        result.cancel()
        await asyncio.gather(crashed, result, return_exceptions=True)


def live_events(app: App) -> list[int]:
    return [] if app._life.worker is None else [instance._seq for instance in app._life.worker._live.values()]


async def step_to_next_deadline(app: App, clock: VirtualClock) -> None:
    assert app._life.worker is not None
    wakes = [instance.next_wake_us() for instance in app._life.worker._live.values()]
    wake = min((wake for wake in wakes if wake is not None), default=clock.now_us())
    await clock.advance(max(0, wake - clock.now_us()) / 1_000_000)


crash_points = st.lists(st.tuples(st.integers(1, 7), st.sampled_from(["before", "after"])), min_size=1, max_size=3)


EXAMPLES = int(os.environ.get("ROMANCY_EXAMPLES", "80"))
"""On SQLite; an eighth of them on each server, for what is shown here is the engine's."""

Crashes = list[tuple[int, Literal["before", "after"]]]
Fresh = Callable[[], AbstractContextManager[Database]]


def equal_to_the_uninterrupted(program: Program, crashes: Crashes, fresh: Fresh) -> None:
    async def both() -> None:
        with fresh() as database, isolated_catalogue():
            clock = VirtualClock()
            begin_us = clock.now_us()
            whole = await play(database, program, [], clock)
        with fresh() as database, isolated_catalogue():
            clock = VirtualClock()
            clock._now_us = begin_us
            broken = await play(database, program, crashes, clock)
        assert broken[0] == whole[0]
        assert broken[1] == whole[1]
        for trace in broken[2]:
            assert trace == whole[0]["trace"][: len(trace)]

    asyncio.run(asyncio.wait_for(both(), 60))


@contextmanager
def fresh_file() -> Iterator[Database]:
    # Where pytest keeps its own: in memory, if it can; see tests/conftest.py.
    with TemporaryDirectory(dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")) as folder:
        yield Path(folder) / "romancy.db"


def emptied(url: str) -> Fresh:
    @contextmanager
    def fresh() -> Iterator[Database]:
        yield url
        clean(url)

    return fresh


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(), crash_points)
def test_crashed_and_replayed_run_equals_the_uninterrupted_one(program: Program, crashes: Crashes) -> None:
    equal_to_the_uninterrupted(program, crashes, fresh_file)


@settings(max_examples=EXAMPLES // 8, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(), crash_points)
def test_so_it_is_on_postgresql(postgresql_url: str, program: Program, crashes: Crashes) -> None:
    equal_to_the_uninterrupted(program, crashes, emptied(postgresql_url))


@settings(max_examples=EXAMPLES // 8, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(), crash_points)
def test_so_it_is_on_mysql(mysql_url: str, program: Program, crashes: Crashes) -> None:
    equal_to_the_uninterrupted(program, crashes, emptied(mysql_url))
