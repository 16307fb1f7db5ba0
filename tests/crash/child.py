"""Runs one workflow, and kills itself at a commit.

    python -m tests.crash.child DATABASE TOKENS [before|after:N]

Plain activities append a token to the file TOKENS, transactional ones insert one into the keyless table ``ledger``.
Prints the workflow's result as JSON, and how many commits there were.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import text

from romancy import App, RetryPolicy, WorkflowContext, activity, current_activity, workflow
from romancy.storage.sessions import ActivityTransaction
from romancy.storage.sqlite import SqliteStore

DATABASE, TOKENS = Path(sys.argv[1]), Path(sys.argv[2])
WHEN, _, AT = (sys.argv[3] if len(sys.argv) > 3 else "never:0").partition(":")
INSERT = text("INSERT INTO ledger (token) VALUES (:token)")
commits = 0


def killing(real: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, but the process dies just before or just after the N-th call."""

    def call(*arguments: Any, **options: Any) -> Any:
        global commits
        commits += 1
        mine = commits
        if mine == int(AT) and WHEN == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if mine == int(AT) and WHEN == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


SqliteStore._commit = killing(SqliteStore._commit)  # type: ignore[method-assign]
ActivityTransaction.commit_in_thread = killing(ActivityTransaction.commit_in_thread)  # type: ignore[method-assign]


def note(token: str) -> None:
    with TOKENS.open("a") as file:
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


async def main() -> None:
    async with App(DATABASE, default_retry=RetryPolicy.no_retry()) as app:
        handle = await app.start_workflow(scenario, id="the-one")
        result = await handle.result(30)
    print(json.dumps({"result": result, "commits": commits}))


with sqlite3.connect(DATABASE) as connection:
    connection.execute("CREATE TABLE IF NOT EXISTS ledger (token TEXT)")
connection.close()
asyncio.run(main())
