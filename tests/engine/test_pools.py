"""How many connections the sessions of activities may take."""

from __future__ import annotations

import asyncio
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.ext.asyncio import create_async_engine

from romancy import App, ConfigurationError, WorkflowContext, activity, current_activity, workflow
from romancy.engine import claims
from romancy.storage import sessions
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


@pytest.mark.parametrize("is_async", [True, False], ids=["async def", "def"])
async def test_connections_of_a_crowd_serve_the_next_one_and_are_closed_once_nobody_needs_them(
    database: Database, is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind_of(database) == "sqlite":
        pytest.skip("its sessions are open one at a time anyway")
    monkeypatch.setattr(claims, "SCAN_INTERVAL_S", 0.1)
    crowd = Barrier(3) if not is_async else asyncio.Barrier(3)
    opened: list[Any] = []

    @activity
    async def meet() -> None:
        await current_activity().session.execute(text("SELECT 1"))
        assert isinstance(crowd, asyncio.Barrier)
        await crowd.wait()

    @activity
    def meet_in_thread() -> None:
        current_activity().sync_session.execute(text("SELECT 1"))
        assert isinstance(crowd, Barrier)
        crowd.wait(RESULT_TIMEOUT_S)

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await asyncio.gather(*[meet() if is_async else meet_in_thread() for _ in range(3)])

    async with App(database, pool_size=1, max_overflow=2, activity_threads=3) as app:
        pool: Any = app._life.engines.sync_engine(is_async=is_async).pool
        event.listen(pool, "connect", lambda *_: opened.append(_))
        for _ in range(3):
            await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
        assert len(opened) == 3
        await app._life.engines.close_spares()
        assert pool.overflow() == 2  # they may be needed again
        monkeypatch.setattr(sessions, "SPARE_S", 0)
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while pool.overflow() > 0:
                await asyncio.sleep(0)
        monkeypatch.setattr(sessions, "SPARE_S", 3_600)
        await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
        assert len(opened) == 5
        assert pool._spares
    assert not pool._spares
