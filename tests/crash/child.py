"""Runs one workflow in a process of its own, and kills itself at a commit.

Plain activities append a token to a file, transactional ones insert one into the keyless table ``ledger``.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from romancy import App, RetryPolicy, WorkflowContext, activity, current_activity, workflow
from romancy.storage.address import parse_address
from romancy.storage.sessions import ActivityTransaction
from romancy.storage.stores import make_store
from tests.databases import Database
from tests.ledger import INSERT

tokens_file = Path()
commits = 0


def killing(real: Callable[..., Any], when: str, at: int) -> Callable[..., Any]:
    """The same function, but the process dies just before or just after the N-th call."""

    def call(*arguments: Any, **options: Any) -> Any:
        global commits
        commits += 1
        mine = commits
        if mine == at and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if mine == at and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


def killing_on_loop(real: Callable[..., Any], when: str, at: int) -> Callable[..., Any]:
    """The same for what needs no thread, where it can do without one: else nothing has happened, and nothing counts."""

    def call(*arguments: Any) -> Any:
        global commits
        commits += 1
        if commits == at and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        outcome = real(*arguments)
        if outcome is None:
            commits -= 1
        elif commits == at and when == "after":
            outcome.add_done_callback(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        return outcome

    return call


def note(token: str) -> None:
    with tokens_file.open("a") as file:
        file.write(token + "\n")
        file.flush()
        os.fsync(file.fileno())


@activity
async def plain(name: str) -> str:
    note(f"{name} {current_activity().activity_id}")
    return name


@activity
async def book(name: str) -> str:
    note(f"book {name}")
    await current_activity().session.execute(INSERT, {"token": name})
    return name


@activity
def book_in_thread(name: str) -> str:
    note(f"book {name}")
    current_activity().sync_session.execute(INSERT, {"token": name})
    return name


@activity(retry=RetryPolicy.fixed(3, 0))
async def flaky(name: str) -> int:
    await current_activity().session.execute(INSERT, {"token": name})
    if current_activity().attempt < 3:
        raise ConnectionError(name)
    return current_activity().attempt


@workflow
async def scenario(ctx: WorkflowContext) -> dict[str, Any]:
    found: list[Any] = [await plain("a")]
    found.append(await book("one"))
    found += await asyncio.gather(plain("b"), book("two"), plain("c"), book_in_thread("three"))
    found.append(await flaky("four"))
    await ctx.sleep(0.001)
    found.append(await plain("d"))
    return {"found": found, "id": str(ctx.uuid4())}


async def finish(database: Database) -> dict[str, Any]:
    async with App(database, default_retry=RetryPolicy.no_retry()) as app:
        handle = await app.start_workflow(scenario, id="the-one")
        return await handle.result(30)


def arm(database: Database, when: str, at: int) -> None:
    """From here on, the process dies just before or just after the N-th commit of history."""
    store: Any = type(make_store(parse_address(database), []))
    store._write_parties = killing(store._write_parties, when, at)
    store._flush_on_loop = killing_on_loop(store._flush_on_loop, when, at)
    ActivityTransaction.commit_in_thread = killing(  # type: ignore[method-assign]
        ActivityTransaction.commit_in_thread, when, at
    )


def main(database: Database, tokens: Path, when: str, at: int, outcome: Connection) -> None:
    """Run the workflow to its end, or to the N-th commit; sends the result, and how many commits there were."""
    global tokens_file
    tokens_file = tokens
    arm(database, when, at)
    outcome.send({"result": asyncio.run(finish(database)), "commits": commits})
