"""How many connections the sessions of activities may take."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from romancy import App, ConfigurationError, WorkflowContext, activity, current_activity, workflow
from tests.databases import Database, kind_of
from tests.support import RESULT_TIMEOUT_S, until_quiet


async def test_pool_size_and_overflow_bound_the_open_sessions(database: Database) -> None:
    if kind_of(database) == "sqlite":
        pytest.skip("its sessions are open one at a time anyway")
    opened: list[int] = []
    all_open, go = asyncio.Event(), asyncio.Event()

    @activity
    async def hold(n: int) -> None:
        await current_activity().session.execute(text("SELECT 1"))
        opened.append(n)
        if len(opened) == 3:
            all_open.set()
        await go.wait()

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await asyncio.gather(*[hold(n) for n in range(8)])

    async with App(database, pool_size=2, max_overflow=1) as app:
        handle = await app.start_workflow(flow)
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            await all_open.wait()
        await until_quiet(app, lambda: len(opened))
        assert len(opened) == 3
        pool: Any = app._life.engines.sync_engine(is_async=True).pool
        assert (pool.checkedout(), pool.overflow()) == (3, 1)
        go.set()
        await handle.result(RESULT_TIMEOUT_S)
    assert sorted(opened) == list(range(8))


async def test_pool_options_hold_for_both_engines(database: Database) -> None:
    async with App(database, pool_size=3, max_overflow=0) as app:
        for is_async in (True, False):
            pool: Any = app._life.engines.sync_engine(is_async=is_async).pool
            assert (pool.size(), pool._max_overflow) == (3, 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pool_size": 0}, "pool_size=0: give a whole number of at least 1"),
        ({"pool_size": True}, "pool_size=True"),
        ({"pool_size": "5"}, "pool_size='5'"),
        ({"max_overflow": -1}, "max_overflow=-1: give a whole number of at least 0"),
        ({"max_overflow": 1.5}, "max_overflow=1.5"),
    ],
)
def test_wrong_pool_option_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        App("a.db", **options)


def test_pool_options_without_a_pool_of_romancys_own_are_refused() -> None:
    engine, sync_engine = create_async_engine("sqlite+aiosqlite:///a.db"), create_engine("sqlite:///a.db")
    App("a.db", engine=engine, pool_size=3)
    with pytest.raises(ConfigurationError, match="bring their own pools"):
        App("a.db", engine=engine, sync_engine=sync_engine, pool_size=3)
