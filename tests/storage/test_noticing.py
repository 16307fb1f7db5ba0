"""Other processes' commits are told from the own ones, on SQLite, where nobody sends hints."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from romancy import App, WorkflowContext, workflow
from romancy.storage.store import Store
from tests.support import RESULT_TIMEOUT_S

CHANGES = 20
"""At one look each 20 ms, these take longer than any pause between two looks for news could last."""


class Looks:
    """Counts what a worker does about changes of the log file.

    Attributes:
        changes: how often the file had changed.
        looks: how often the worker then looked for others' news.
    """

    def __init__(self, app: App, patch: pytest.MonkeyPatch) -> None:
        self.changes = self.looks = 0
        self.looked = asyncio.Event()
        has_changed, on_foreign_change = app._life.store.has_changed, app._life.on_foreign_change

        def count_changes() -> bool:
            found = has_changed()
            self.changes += found
            return found

        def count_looks() -> None:
            self.looks += 1
            self.looked.set()
            on_foreign_change()

        patch.setattr(app._life.store, "has_changed", count_changes)
        patch.setattr(app._life, "on_foreign_change", count_looks)


async def test_worker_looks_for_news_when_others_commit_and_not_when_it_does(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @workflow
    async def nothing(ctx: WorkflowContext) -> None: ...

    @workflow
    async def order(ctx: WorkflowContext) -> int:
        return (await ctx.wait_event("paid", key="k", type=int)).data

    async with App(database) as app, App(database, worker=False) as client:
        store: Store = app._life.store
        await asyncio.wrap_future(store.others_have_committed())  # from now on
        store.has_changed()
        looks = Looks(app, monkeypatch)
        waiting = await app.start_workflow(order)
        while looks.changes < CHANGES:
            await (await app.start_workflow(nothing)).result(RESULT_TIMEOUT_S)
        assert looks.looks == 0
        await client.send_event("paid", 17, key="k")
        await (await app.start_workflow(nothing)).result(RESULT_TIMEOUT_S)
        assert await waiting.result(RESULT_TIMEOUT_S) == 17
        assert looks.looks >= 1


async def test_only_commits_of_other_connections_count(database: Path) -> None:
    async with App(database, worker=False) as one, App(database, worker=False) as other:
        store: Store = one._life.store
        await asyncio.wrap_future(store.others_have_committed())
        await one.send_event("paid", 1, key="k")
        assert not await asyncio.wrap_future(store.others_have_committed())
        await other.send_event("paid", 2, key="k")
        await one.send_event("paid", 3, key="k")
        assert await asyncio.wrap_future(store.others_have_committed())
        assert not await asyncio.wrap_future(store.others_have_committed())


async def test_commit_that_is_under_way_is_waited_for(database: Path) -> None:
    async with App(database, worker=False) as app:
        store: Store = app._life.store
        await asyncio.wrap_future(store.others_have_committed())
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            # So it is while the log is written, and flushed: others see nothing yet.
            other.execute("BEGIN IMMEDIATE")
            other.execute("INSERT INTO romancy_channels (name, mode) VALUES ('news', 'broadcast')")
            answer = asyncio.wrap_future(store.others_have_committed())
            await asyncio.wait([answer], timeout=0.2)
            assert not answer.done()
            other.execute("COMMIT")
        assert await answer
