"""Runs workflows that send, wait, have children, undo and recur, in a process that kills itself at a commit."""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection
from typing import Any

from romancy import App, ChildWorkflowError, RetryPolicy, TerminalError, WorkflowContext, activity, current_activity
from romancy import workflow as define
from tests.crash.child import arm
from tests.databases import Database
from tests.ledger import INSERT


async def book(token: str) -> None:
    await current_activity().session.execute(INSERT, {"token": token})


@activity
async def ping(key: str) -> None:
    """Rows and an event, in one transaction."""
    await book(f"ping {key}")
    current_activity().send_event("ping", {"of": key}, key=key)


@activity
async def announce(number: int) -> None:
    """A message, in the group commit."""
    current_activity().publish("news", number)


@activity
async def release(room: str) -> None:
    await book(f"release {room}")


@activity(compensate=release)
async def hold(room: str) -> None:
    await book(f"hold {room}")


@activity
async def pay() -> None:
    raise TerminalError("no money")


@define
async def trip(ctx: WorkflowContext) -> None:
    await hold("room 1")
    await hold("room 2")
    await pay()


@define
async def helper(ctx: WorkflowContext, boss: str) -> str:
    question = await ctx.receive("inbox", type=str)
    await ctx.send_to(boss, "answers", f"{question.data}, answered")
    return f"helped {question.sender}"


@define
async def errand(ctx: WorkflowContext, run: int, found: list[Any]) -> list[Any]:
    if run == 1:
        await ctx.subscribe("news")
        child = await ctx.start_child(helper, ctx.instance_id, id="helper")
        await ctx.send_to("helper", "inbox", "a question")
        found.append((await ctx.receive("answers", type=str)).data)
        await ping("k")
        found.append((await ctx.wait_event("ping", key="k", timeout=60)).data)
        await ctx.send_event("own", 5, key="own")
        found.append((await ctx.wait_event("own", key="own", type=int)).data)
        try:
            await ctx.execute_child(trip)
        except ChildWorkflowError as error:
            found.append(error.status)
        found.append(await child.result())
        await ctx.recur(2, found)
    await announce(7)
    found.append((await ctx.receive("news", type=int)).data)
    try:
        async with asyncio.timeout(0.01):
            await ctx.wait_event("never", key="k")
    except TimeoutError:
        found.append("nothing")
    return found


async def finish(database: Database) -> list[Any]:
    async with App(database, default_retry=RetryPolicy.no_retry()) as app:
        if await app.get_instance("the-one") is None:
            await app.start_workflow(errand, 1, [], id="the-one")
        return await (await app.get_handle("the-one", errand)).result(30)


def main(database: Database, when: str, at: int, outcome: Connection) -> None:
    """Run the workflow to its end, or to the N-th commit; sends the result."""
    arm(database, when, at)
    outcome.send(asyncio.run(finish(database)))
