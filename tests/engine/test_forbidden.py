"""What workflow code must not do is refused with a message that says what to do instead."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from romancy import (
    App,
    ForbiddenInWorkflowError,
    Status,
    WorkflowContext,
    WorkflowSuspendedError,
    activity,
    workflow,
)
from romancy.engine import loop as loop_module
from romancy.failures import decode_error
from tests.databases import Database, rows
from tests.support import RESULT_TIMEOUT_S

Try = Callable[[asyncio.AbstractEventLoop], Any]


async def open_connection(loop: asyncio.AbstractEventLoop) -> None:
    await asyncio.open_connection("127.0.0.1", 1)


async def use_thread(loop: asyncio.AbstractEventLoop) -> None:
    await asyncio.to_thread(print)


async def use_executor(loop: asyncio.AbstractEventLoop) -> None:
    await loop.run_in_executor(None, print)


async def use_process(loop: asyncio.AbstractEventLoop) -> None:
    await asyncio.create_subprocess_exec("true")


async def start_server(loop: asyncio.AbstractEventLoop) -> None:
    await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)


async def resolve_name(loop: asyncio.AbstractEventLoop) -> None:
    await loop.getaddrinfo("localhost", 80)


async def call_from_thread(loop: asyncio.AbstractEventLoop) -> None:
    loop.call_soon_threadsafe(print)


async def watch_socket(loop: asyncio.AbstractEventLoop) -> None:
    left, right = socket.socketpair()
    with left, right:
        loop.add_reader(left, print)


async def run_coroutine_threadsafe(loop: asyncio.AbstractEventLoop) -> None:
    coroutine = asyncio.sleep(0)
    try:
        asyncio.run_coroutine_threadsafe(coroutine, loop)
    finally:
        coroutine.close()


TRIES = [
    open_connection,
    use_thread,
    use_executor,
    use_process,
    start_server,
    resolve_name,
    call_from_thread,
    watch_socket,
    run_coroutine_threadsafe,
]


@pytest.mark.parametrize("attempt", TRIES, ids=lambda attempt: attempt.__name__)
async def test_io_and_threads_are_refused_by_name_and_place(database: Database, attempt: Try) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        try:
            await attempt(asyncio.get_running_loop())
        except ForbiddenInWorkflowError as error:
            return str(error)
        return "nothing happened"

    async with App(database) as app:
        message = await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
    assert "Do this in an activity" in message
    assert f"{__file__}:" in message


async def test_uncaught_refusal_parks_the_instance_for_the_code_to_be_mended(database: Database) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await asyncio.to_thread(print)

    async with App(database) as app:
        handle = await app.start_workflow(flow)
        with pytest.raises(WorkflowSuspendedError, match="threads"):
            await handle.result(RESULT_TIMEOUT_S)
        assert await handle.status() is Status.SUSPENDED


async def test_endless_loop_without_a_durable_wait_is_parked_and_others_go_on(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "MAX_CALLBACKS_PER_STEP", 1_000)

    @workflow
    async def endless(ctx: WorkflowContext) -> None:
        while True:
            await asyncio.sleep(0)

    @workflow
    async def fine(ctx: WorkflowContext) -> str:
        return "fine"

    async with App(database) as app:
        handle = await app.start_workflow(endless)
        with pytest.raises(WorkflowSuspendedError, match="loops without end"):
            await handle.result(RESULT_TIMEOUT_S)
        assert await (await app.start_workflow(fine)).result(RESULT_TIMEOUT_S) == "fine"


async def test_waiting_for_what_nothing_can_set_is_parked(database: Database) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await asyncio.Event().wait()

    async with App(database) as app:
        handle = await app.start_workflow(flow)
        with pytest.raises(WorkflowSuspendedError, match="nothing will ever set"):
            await handle.result(RESULT_TIMEOUT_S)
        (error,) = rows(database, "SELECT error FROM romancy_instances")[0]
        assert isinstance(decode_error(error), ForbiddenInWorkflowError)


async def test_loop_time_is_workflow_time_not_the_wall_clock(database: Database) -> None:
    @activity
    async def act() -> None: ...

    @workflow
    async def flow(ctx: WorkflowContext) -> bool:
        loop = asyncio.get_running_loop()
        at_start = loop.time()
        assert at_start == ctx.now().timestamp()
        await act()
        assert loop.time() == ctx.now().timestamp()
        return loop.time() > at_start

    async with App(database) as app:
        assert await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)


async def test_async_generators_are_closed_on_the_workflows_own_loop(database: Database) -> None:
    closed = []

    @activity
    async def act(n: int) -> int:
        return n

    @workflow
    async def flow(ctx: WorkflowContext) -> list[int]:
        async def numbers() -> Any:
            try:
                for n in range(10):
                    yield await act(n)
            finally:
                closed.append(True)

        found = []
        async for n in numbers():
            found.append(n)
            if n == 2:
                break
        await act(0)
        return found

    async with App(database) as app:
        assert await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S) == [0, 1, 2]
    assert closed == [True]


async def test_sys_exit_in_a_workflow_is_a_failure_of_that_workflow_only(database: Database) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        raise SystemExit(3)

    async with App(database) as app:
        handle = await app.start_workflow(flow)
        with pytest.raises(Exception, match="SystemExit"):
            await handle.result(RESULT_TIMEOUT_S)
        assert await handle.status() is Status.FAILED
