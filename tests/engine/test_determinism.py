"""Changed code over an old history: noticed, named, parked; and mended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from romancy import (
    App,
    NonDeterminismError,
    Status,
    Workflow,
    WorkflowContext,
    WorkflowFailedError,
    WorkflowSuspendedError,
    activity,
    workflow,
)
from romancy.engine.loop import make_loop
from romancy.engine.replay import Request, compare
from romancy.failures import decode_error
from romancy.storage.rows import HistoryRow
from romancy.testing import VirtualClock, isolated_catalogue
from tests.databases import Database, rows
from tests.support import RESULT_TIMEOUT_S, crash, until_quiet

Body = Callable[[WorkflowContext, "Acts"], Any]


class Acts:
    """Three activities, of which ``last`` never ends until it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.calls: list[str] = []

        @activity(name="one")
        async def one(n: int = 0) -> int:
            self.calls.append("one")
            return n

        @activity(name="two")
        async def two(n: int = 0) -> int:
            self.calls.append("two")
            return n

        @activity(name="last")
        async def last() -> str:
            self.calls.append("last")
            await self.go.wait()
            return "end"

        self.one, self.two, self.last = one, two, last


def flow_of(body: Body, acts: Acts, *, compare_inputs: bool = True) -> Workflow[[], Any]:
    @workflow(name="flow", compare_inputs=compare_inputs)
    async def flow(ctx: WorkflowContext) -> Any:
        return await body(ctx, acts)

    return flow


async def run_until_last_then_crash(path: Path, body: Body) -> None:
    with isolated_catalogue():
        acts = Acts()
        app = App(path, workflows=[flow_of(body, acts)], clock=VirtualClock(auto_advance=True))
        await app.start()
        await app.start_workflow("flow", id="it")
        await until_quiet(app, lambda: len(acts.calls))
        assert acts.calls[-1] == "last"
        await crash(app)


async def resume_with(path: Path, body: Body, *, compare_inputs: bool = True) -> tuple[str | None, list[str]]:
    """The recorded error of the instance once it rests, and which activities ran."""
    with isolated_catalogue():
        acts = Acts()
        flow = flow_of(body, acts, compare_inputs=compare_inputs)
        async with App(path, workflows=[flow], clock=VirtualClock(auto_advance=True)) as app:
            acts.go.set()
            handle = await app.get_handle("it")
            try:
                await handle.result(RESULT_TIMEOUT_S)
            except WorkflowSuspendedError:
                assert await handle.status() is Status.SUSPENDED
    (error,) = rows(path, "SELECT error FROM romancy_instances WHERE instance_id = 'it'")[0]
    return error, acts.calls


async def old(ctx: WorkflowContext, acts: Acts) -> Any:
    await acts.one(1)
    await ctx.sleep(5)
    await acts.two(2)
    return await acts.last()


async def inserted(ctx: WorkflowContext, acts: Acts) -> Any:
    await acts.one(1)
    await acts.two(7)
    await ctx.sleep(5)
    await acts.two(2)
    return await acts.last()


async def removed(ctx: WorkflowContext, acts: Acts) -> Any:
    await ctx.sleep(5)
    await acts.two(2)
    return await acts.last()


async def renamed(ctx: WorkflowContext, acts: Acts) -> Any:
    await acts.two(1)
    await ctx.sleep(5)
    await acts.two(2)
    return await acts.last()


async def ends_early(ctx: WorkflowContext, acts: Acts) -> Any:
    await acts.one(1)
    return "short"


async def fails_early(ctx: WorkflowContext, acts: Acts) -> Any:
    await acts.one(1)
    raise ValueError("short")


async def other_arguments(ctx: WorkflowContext, acts: Acts) -> Any:
    await acts.one(1)
    await ctx.sleep(5)
    await acts.two(3)
    return await acts.last()


async def inserted_into_gather(ctx: WorkflowContext, acts: Acts) -> Any:
    await acts.one(1)
    await asyncio.gather(ctx.sleep(5), acts.one(2))
    await acts.two(2)
    return await acts.last()


@pytest.mark.parametrize(
    ("changed", "expected", "found"),
    [
        (inserted, "timer as timer:1", "activity 'two' as two:1"),
        (removed, "activity 'one' as one:1", "timer as timer:1"),
        (renamed, "activity 'one' as one:1", "activity 'two' as two:1"),
        (ends_early, "timer as timer:1", "the end of the workflow"),
        (fails_early, "timer as timer:1", "the end of the workflow"),
        (other_arguments, 'arguments {"n":2}', 'arguments {"n":3}'),
        (inserted_into_gather, "timer as timer:1 (request 2)", "timer as timer:1 (request 3)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_changed_code_is_parked_with_history_untouched_and_runs_on_once_right(
    database: Database, changed: Body, expected: str, found: str
) -> None:
    await run_until_last_then_crash(database, old)
    before = rows(database, "SELECT * FROM romancy_history ORDER BY seq")
    error, calls = await resume_with(database, changed)
    assert error is not None
    mismatch = decode_error(error)
    assert isinstance(mismatch, NonDeterminismError)
    assert expected in mismatch.expected
    assert found in mismatch.found
    assert mismatch.location is not None
    assert mismatch.location.startswith(__file__)
    assert calls == []
    assert rows(database, "SELECT * FROM romancy_history ORDER BY seq") == before

    with isolated_catalogue():
        acts = Acts()
        async with App(database, workflows=[flow_of(old, acts)], clock=VirtualClock(auto_advance=True)) as app:
            acts.go.set()
            await app.resume("it")
            assert await (await app.get_handle("it")).result(RESULT_TIMEOUT_S) == "end"
            assert acts.calls == ["last"]


async def test_the_place_in_the_message_is_the_line_of_the_request(database: Database) -> None:
    await run_until_last_then_crash(database, old)
    error, _ = await resume_with(database, renamed)
    assert error is not None
    mismatch = decode_error(error)
    assert isinstance(mismatch, NonDeterminismError)
    line = renamed.__code__.co_firstlineno + 1
    assert mismatch.location == f"{__file__}:{line}"


async def test_argument_comparison_can_be_turned_off(database: Database) -> None:
    await run_until_last_then_crash(database, old)
    error, calls = await resume_with(database, other_arguments, compare_inputs=False)
    assert error is None
    assert calls == ["last"]


async def swapped_old(ctx: WorkflowContext, acts: Acts) -> Any:
    found = await asyncio.gather(acts.one(1), acts.one(2))
    await acts.last()
    return found


async def swapped_new(ctx: WorkflowContext, acts: Acts) -> Any:
    found = await asyncio.gather(acts.one(2), acts.one(1))
    await acts.last()
    return found


async def test_swapped_calls_under_gather_do_not_swap_results_silently(database: Database) -> None:
    await run_until_last_then_crash(database, swapped_old)
    error, _ = await resume_with(database, swapped_new)
    assert error is not None
    assert "arguments" in str(decode_error(error))


async def test_except_exception_in_workflow_code_does_not_swallow_the_mismatch(database: Database) -> None:
    async def swallowing(ctx: WorkflowContext, acts: Acts) -> Any:
        while True:
            try:
                return await renamed(ctx, acts)
            except Exception:
                continue

    await run_until_last_then_crash(database, old)
    error, _ = await resume_with(database, swallowing)
    assert error is not None
    assert isinstance(decode_error(error), NonDeterminismError)


async def test_finally_blocks_of_a_parked_workflow_start_nothing(database: Database) -> None:
    async def with_finally(ctx: WorkflowContext, acts: Acts) -> Any:
        try:
            return await renamed(ctx, acts)
        finally:
            await acts.one(9)

    await run_until_last_then_crash(database, old)
    error, calls = await resume_with(database, with_finally)
    assert error is not None
    assert calls == []


async def test_typed_result_that_no_longer_fits_parks_instead_of_failing(database: Database) -> None:
    with isolated_catalogue():
        go = asyncio.Event()

        @activity(name="read")
        async def read() -> str:
            return "not a number"

        @activity(name="hold")
        async def hold() -> None:
            go.set()
            await asyncio.Event().wait()

        @workflow(name="flow")
        async def flow(ctx: WorkflowContext) -> Any:
            found = await read()
            await hold()
            return found

        app = App(database, workflows=[flow])
        await app.start()
        await app.start_workflow(flow, id="it")
        await go.wait()
        await crash(app)
    with isolated_catalogue():

        @activity(name="read")
        async def read_number() -> int:
            return 1

        @workflow(name="flow")
        async def flow_two(ctx: WorkflowContext) -> Any:
            return await read_number()

        async with App(database, workflows=[flow_two]) as app:
            with pytest.raises(WorkflowSuspendedError, match="does not fit"):
                await (await app.get_handle("it")).result(RESULT_TIMEOUT_S)


async def test_activity_failure_is_the_same_exception_live_and_on_replay(database: Database) -> None:
    seen: list[tuple[Any, ...]] = []

    async def body(ctx: WorkflowContext, acts: Acts) -> Any:
        try:
            await broken()
        except OSError as error:
            seen.append((type(error), error.args, error.errno, str(error)))
        except Exception as error:
            cause = error.__cause__
            assert cause is not None
            seen.append((type(error), str(error), type(cause), cause.args))
        return await acts.last()

    with isolated_catalogue():
        from romancy import RetryPolicy

        @activity(name="broken", retry=RetryPolicy.no_retry())
        async def broken() -> None:
            raise FileNotFoundError(2, "gone", "a.txt")

        acts = Acts()
        app = App(database, workflows=[flow_of(body, acts)])
        await app.start()
        await app.start_workflow("flow", id="it")
        await until_quiet(app, lambda: len(acts.calls))
        await crash(app)
        with isolated_catalogue():
            async with App(database, workflows=[flow_of_reload(body, acts)]) as app:
                acts.go.set()
                await (await app.get_handle("it")).result(RESULT_TIMEOUT_S)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert seen[0][2] is FileNotFoundError


def flow_of_reload(body: Body, acts: Acts) -> Workflow[[], Any]:
    from romancy import Catalogue

    @workflow(name="flow", catalogue=Catalogue())
    async def flow(ctx: WorkflowContext) -> Any:
        return await body(ctx, acts)

    return flow


async def test_result_that_looks_like_an_error_stays_a_result(database: Database) -> None:
    @activity
    async def tricky() -> dict[str, str]:
        return {"type": "builtins.ValueError", "message": "not an error"}

    @workflow
    async def flow(ctx: WorkflowContext) -> dict[str, str]:
        return await tricky()

    async with App(database) as app:
        result = await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
    assert result == {"type": "builtins.ValueError", "message": "not an error"}


async def test_workflow_that_fails_after_resume_fails_once(database: Database) -> None:
    await run_until_last_then_crash(database, old)

    async def then_fails(ctx: WorkflowContext, acts: Acts) -> Any:
        await old(ctx, acts)
        raise ValueError("at the end")

    with isolated_catalogue():
        acts = Acts()
        async with App(database, workflows=[flow_of(then_fails, acts)], clock=VirtualClock(auto_advance=True)) as app:
            acts.go.set()
            with pytest.raises(WorkflowFailedError, match="at the end"):
                await (await app.get_handle("it")).result(RESULT_TIMEOUT_S)


def event(**changes: Any) -> HistoryRow:
    row = HistoryRow("i", 1, 1, "ActivityCompleted", "a:1", "a", 1, 1, 0, None, '{"n":1}', "null", None)
    return row._replace(**changes)


def test_rule_accepts_what_fits_and_names_what_does_not() -> None:
    request = Request("a:1", "a", 1, "activity", '{"n":1}', str.__eq__)
    assert compare(event(), request, list) is None
    assert compare(event(position=2), request, list) is not None
    assert compare(event(name="b"), request, list) is not None
    assert compare(event(kind="TimerExpired"), request, list) is not None
    assert compare(event(input='{"n":2}'), request, list) is not None
    assert compare(event(), replace(request, answers="child"), list) is not None
    nothing = compare(event(), None, list)
    assert nothing is not None
    assert nothing.found == "no request at all"


class LoopOwner:
    def __init__(self, instance_id: str) -> None:
        self.instance_id = instance_id


async def test_tasks_of_different_instances_rarely_share_a_hash_and_those_of_one_never_change_theirs() -> None:
    async def nothing() -> None: ...

    def hashes(instance_id: str) -> list[int]:
        loop = make_loop(LoopOwner(instance_id), asyncio.get_running_loop())  # type: ignore[arg-type]
        found = [hash(loop.create_task(nothing())) for _ in range(3)]
        loop.discard()
        return found

    ids = [f"instance-{number}" for number in range(1_000)]
    # asyncio keeps all tasks in one set: with equal hashes each new task would be compared with all others.
    assert len({one for instance_id in ids for one in hashes(instance_id)}) > 2_990
    assert hashes("it") == hashes("it") == [(2727245620 << 12) + number for number in (1, 2, 3)]
