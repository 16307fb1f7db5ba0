"""The load: workflows that use everything, each with a result that follows from its input.

Each activity appends a line to a file outside of any database, and the transactional ones insert a token into the
keyless table ``ledger``, also in attempts that then fail: those rows must not stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from typing import Any

from tests.ledger import INSERT

from romancy import (
    EventTimeoutError,
    Message,
    MessageTimeoutError,
    RetryPolicy,
    WorkflowContext,
    activity,
    current_activity,
    workflow,
)
from torture.folder import Folder

NEVER = "never"
"""An event that nobody sends."""

MEAN_WORK_S = 0.04
IMPATIENCE_S = 0.06

_journal: int | None = None
_folder: Folder | None = None

HAS_CHANGE = False
"""Whether this process has the newer code of ``changing``."""


class StumbledError(Exception):
    """What activities raise on purpose."""


def set_up(folder: Folder, *, has_change: bool) -> None:
    """Let the activities of this process write into this folder, and choose the code."""
    global HAS_CHANGE, _folder, _journal
    _folder = folder
    _journal = os.open(folder.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    HAS_CHANGE = has_change


def leave_line() -> str:
    """Append a line about the attempt in one write; returns the token for the ledger."""
    assert _journal is not None
    attempt = current_activity()
    line = f"{attempt.idempotency_key} {attempt.attempt} {os.getpid()} {time.time_ns() // 1_000}\n"
    os.write(_journal, line.encode())
    return attempt.idempotency_key


def some_time_s() -> float:
    """How long an attempt takes; so that a process which is stopped has attempts on their way, and ends them all at
    once when it wakes."""
    return random.expovariate(1 / MEAN_WORK_S)


async def book() -> None:
    """A line, and a token through the session."""
    await asyncio.sleep(some_time_s())
    token = leave_line()
    await current_activity().session.execute(INSERT, {"token": token})


def book_in_thread() -> None:
    """The same in a plain ``def``."""
    time.sleep(some_time_s())
    token = leave_line()
    current_activity().sync_session.execute(INSERT, {"token": token})


# -- activities --------------------------------------------------------------------------------------


@activity
async def add(total: int, step: int) -> int:
    await book()
    return total + step


@activity
def add_in_thread(total: int, step: int) -> int:
    book_in_thread()
    return total + step


@activity
async def add_unbooked(total: int, step: int) -> int:
    """Without a session: its outcome goes through the group commit."""
    await asyncio.sleep(some_time_s())
    leave_line()
    return total + step


@activity(retry=RetryPolicy.fixed(20, 0.05))
async def stumble(times: int) -> int:
    """Fails so many times, each time after it has written; returns the number of the attempt."""
    await book()
    attempt = current_activity().attempt
    if attempt <= times:
        raise StumbledError(f"attempt {attempt}")
    return attempt


@activity(retry=RetryPolicy.fixed(2, 0.05))
async def fall() -> None:
    """Fails for good."""
    await book()
    raise StumbledError("for good")


@activity(retry=RetryPolicy.fixed(2, 0.05))
async def strain(key: str, level: int) -> int:
    """Fails for good, after it has written, until that was mended from outside."""
    await book()
    assert _folder is not None
    if _folder.mended_level(key) < level:
        raise StumbledError(f"{key} is broken at level {level}")
    return 0


@activity
async def complain() -> None:
    """Done only because something has failed; a retry takes it back."""
    await book()


@activity
async def is_early(not_before_us: int) -> bool:
    """Whether the wall clock has not yet come so far, but for the clocks' difference."""
    leave_line()
    return time.time_ns() // 1_000 < not_before_us - 1_000


@activity(retry=RetryPolicy.fixed(20, 0.05))
async def give_back(number: int) -> None:
    """Undoes ``take``; the odd ones need two attempts."""
    await book()
    if number % 2 and current_activity().attempt == 1:
        raise StumbledError("the first undoing")


@activity(compensate=give_back)
async def take(number: int) -> int:
    await book()
    return number


@activity
async def publish_booked(channel: str, data: int) -> None:
    """Publishes as part of a transaction."""
    await book()
    current_activity().publish(channel, data)


# -- workflows ---------------------------------------------------------------------------------------


@workflow
async def sequence(ctx: WorkflowContext, total: int, steps: int) -> int:
    for step in range(steps):
        call = (add, add_in_thread, add_unbooked)[(total + step) % 3]
        total = await call(total, step)
    return total


@workflow
async def fan(ctx: WorkflowContext, total: int, width: int) -> int:
    calls = [(add, add_in_thread, add_unbooked)[step % 3](total, step) for step in range(width)]
    return sum(await asyncio.gather(*calls, stumble(1)))


@workflow
async def race(ctx: WorkflowContext, total: int) -> int:
    tasks = [asyncio.create_task(call(total, 1)) for call in (add, add_in_thread, add_unbooked)]
    tasks.append(asyncio.create_task(ctx.sleep(0.01)))  # type: ignore[arg-type]
    done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    found = [task.result() or 0 for task in done] + [value or 0 for value in await asyncio.gather(*rest)]
    return sum(found) + await add_unbooked(len(found), 0)


@workflow
async def stubborn(ctx: WorkflowContext, times: int) -> list[Any]:
    found: list[Any] = [await stumble(times)]
    try:
        await fall()
    except Exception as error:
        found.append(type(error).__name__)
    return found


@workflow
async def nap(ctx: WorkflowContext, naps: int) -> int:
    early = 0
    for number in range(naps):
        delay_us = 50_000 * (number + 1)
        due_us = round(ctx.now().timestamp() * 1_000_000) + delay_us
        await ctx.sleep(delay_us / 1_000_000)
        early += await is_early(due_us)
    return early


@workflow
async def waiter(ctx: WorkflowContext, key: str) -> list[int]:
    found = []
    for _ in range(2):
        event = await ctx.wait_event("ping", key=key)
        found.append(await add(event.data, 0))
    return found


@workflow
async def late(ctx: WorkflowContext, key: str) -> int:
    """The event may come before or after the time is over: it is there in either case, and once."""
    try:
        event = await ctx.wait_event("ping", key=key, timeout=0.2)
    except EventTimeoutError:
        event = await ctx.wait_event("ping", key=key)
    try:
        await ctx.wait_event("ping", key=key, timeout=0.05)
    except EventTimeoutError:
        return await add(event.data, 0)
    return -1


@workflow
async def producer(ctx: WorkflowContext, channel: str, first: int, count: int) -> int:
    for number in range(first, first + count):
        if number % 2:
            await ctx.publish(channel, number)
        else:
            await publish_booked(channel, number)
    return count


async def next_message(ctx: WorkflowContext, channel: str) -> Message[int]:
    """Patiently, or giving up again and again, in one way or the other: what comes meanwhile is for others."""
    while True:
        match ctx.instance_id[-1]:
            case "0":
                return await ctx.receive(channel)
            case "1":
                with contextlib.suppress(MessageTimeoutError):
                    return await ctx.receive(channel, timeout=IMPATIENCE_S)
            case _:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(IMPATIENCE_S):
                        return await ctx.receive(channel)


@workflow
async def consumer(ctx: WorkflowContext, channel: str, count: int) -> list[int]:
    found: list[int] = []
    await ctx.subscribe(channel, "competing")
    while len(found) < count:
        message = await next_message(ctx, channel)
        found.append(await add_unbooked(message.data, 0) if message.data % 3 else message.data)
    return found


@workflow
async def listener(ctx: WorkflowContext, channel: str, count: int, parent_id: str) -> list[int]:
    await ctx.subscribe(channel, "broadcast")
    await ctx.send_to(parent_id, f"{channel}-ready", ctx.instance_id)
    return [(await ctx.receive(channel)).data for _ in range(count)]


@workflow
async def crowd(ctx: WorkflowContext, listeners: int, count: int) -> list[list[int]]:
    channel = f"news of {ctx.instance_id}"
    children = []
    for number in range(listeners):
        child_id = f"{ctx.instance_id} child {number}" if number % 2 else None
        children.append(await ctx.start_child(listener, channel, count, ctx.instance_id, id=child_id))
    ready = {(await ctx.receive(f"{channel}-ready")).data for _ in children}
    assert ready == {child.instance_id for child in children}
    for number in range(count):
        if number % 2:
            await publish_booked(channel, number)
        else:
            await ctx.publish(channel, number)
    return [await child.result() for child in children]


@workflow
async def saga(ctx: WorkflowContext, steps: int, is_doomed: bool) -> int:
    for number in range(steps):
        await take(number)
        if number % 2:
            ctx.on_failure(give_back, 100 + number)
    await asyncio.gather(take(10), take(11), add_in_thread(0, 1))
    if is_doomed:
        raise StumbledError("doomed")
    return steps


@workflow
async def victim(ctx: WorkflowContext, steps: int) -> None:
    """Waits until it is cancelled."""
    for number in range(steps):
        await take(number)
    await ctx.wait_event(NEVER, key=ctx.instance_id)


@workflow
async def counter(ctx: WorkflowContext, total: int, left: int) -> int:
    total = await (add if left % 2 else add_unbooked)(total, left)
    if left:
        await ctx.recur(total, left - 1)
    return total


@workflow
async def broken(ctx: WorkflowContext, total: int, steps: int, levels: int, key: str) -> int:
    """Fails at each level until that was mended; a retry goes on from there."""
    for step in range(steps):
        total = await (add, add_unbooked)[step % 2](total, step)
    try:
        for level in range(1, levels + 1):
            total += sum(await asyncio.gather(strain(key, level), add_in_thread(0, level)))
    except Exception:
        await complain()
        raise
    return await add(total, 1)


@workflow
async def guardian(ctx: WorkflowContext, total: int, steps: int, levels: int, key: str) -> int:
    """Fails with its child; a retry goes on with that."""
    total = await add(total, 0)
    return await ctx.execute_child(broken, total, steps, levels, key)


@workflow
async def line(ctx: WorkflowContext, total: int, steps: int) -> int:
    """To be forked: a fork has the same chances, but another id."""
    for step in range(steps):
        total = await (add_in_thread, add_unbooked)[step % 2](total, step)
        total = await add(total, ctx.random().randrange(1_000))
        if step % 2:
            await ctx.sleep(0.01)
    return total


@workflow
async def changing(ctx: WorkflowContext, total: int) -> int:
    """Some processes have the newer code, some the older; an instance is of one of them, from its first step on."""
    total = await add(total, 1)
    for step in (10, 100):
        is_new = HAS_CHANGE and ctx.patched("in thread")
        total = await (add_in_thread if is_new else add_unbooked)(total, step)
        await ctx.sleep(0.4)
    if HAS_CHANGE:
        ctx.patched("met last")
    return total
