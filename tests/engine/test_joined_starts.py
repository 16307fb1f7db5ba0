"""Starts that are part of a transaction of the user's own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from romancy import (
    App,
    ConfigurationError,
    InstanceConflictError,
    RetryPolicy,
    WorkflowContext,
    WorkflowFailedError,
    activity,
    current_activity,
    workflow,
)
from tests.databases import Database, rows
from tests.ledger import INSERT, create_ledger
from tests.support import RESULT_TIMEOUT_S


class Shop:
    """A workflow, and activities that start it in their own transaction."""

    def __init__(self) -> None:
        self.apps: list[App] = []

        @workflow(name="deliver")
        async def deliver(ctx: WorkflowContext, order: str) -> str:
            return f"delivered {order}"

        @activity(name="order", retry=RetryPolicy.no_retry())
        async def order(number: str, fails: bool) -> str:
            session = current_activity().session
            await session.execute(INSERT, {"token": number})
            handle = await self.apps[0].start_workflow(deliver, number, id=f"delivery-{number}", session=session)
            if fails:
                raise ValueError(number)
            return handle.instance_id

        @workflow(name="shop")
        async def flow(ctx: WorkflowContext, number: str, fails: bool) -> str:
            return await order(number, fails)

        self.deliver, self.flow = deliver, flow


def names(database: Database) -> list[Any]:
    return [name for (name,) in rows(database, "SELECT workflow_name FROM romancy_instances ORDER BY workflow_name")]


async def test_start_in_an_activity_stands_and_falls_with_its_transaction(database: Database) -> None:
    create_ledger(database)
    shop = Shop()
    async with App(database) as app:
        shop.apps.append(app)
        with pytest.raises(WorkflowFailedError):
            await (await app.start_workflow(shop.flow, "A-1", True)).result(RESULT_TIMEOUT_S)
        assert names(database) == ["shop"]
        assert rows(database, "SELECT token FROM ledger") == []
        delivery = await (await app.start_workflow(shop.flow, "A-2", False)).result(RESULT_TIMEOUT_S)
        handle = await app.get_handle(delivery, shop.deliver)
        assert await handle.result(RESULT_TIMEOUT_S) == "delivered A-2"
        assert rows(database, "SELECT token FROM ledger") == [("A-2",)]


async def test_start_in_a_session_of_the_users_own(database: Database) -> None:
    create_ledger(database)
    shop = Shop()
    async with App(database) as app:
        engine = create_async_engine(app._life.store.url(is_async=True))
        async with AsyncSession(engine) as session:
            await session.execute(INSERT, {"token": "lost"})
            await app.start_workflow(shop.deliver, "lost", id="lost", session=session)
            await session.rollback()
            await session.execute(INSERT, {"token": "kept"})
            handle = await app.start_workflow(shop.deliver, "kept", id="kept", session=session)
            again = await app.start_workflow(shop.deliver, "kept", id="kept", session=session)
            with pytest.raises(InstanceConflictError, match="another input"):
                await app.start_workflow(shop.deliver, "other", id="kept", session=session)
            await session.commit()
        await engine.dispose()
        assert await handle.result(RESULT_TIMEOUT_S) == await again.result(RESULT_TIMEOUT_S) == "delivered kept"
    assert rows(database, "SELECT instance_id FROM romancy_instances") == [("kept",)]
    assert rows(database, "SELECT token FROM ledger") == [("kept",)]


async def test_committed_start_begins_at_once(database: Database) -> None:
    shop = Shop()
    async with App(database) as app:
        engine = create_async_engine(app._life.store.url(is_async=True))
        async with AsyncSession(engine) as session:
            handle = await app.start_workflow(shop.deliver, "A-3", session=session)
            async with session.begin_nested():
                pass  # the end of a savepoint is no commit
            await session.commit()
            async with asyncio.timeout(2):  # far less than the next look for work
                assert await handle.result() == "delivered A-3"
        await engine.dispose()


async def test_what_is_no_session_is_refused(database: Database) -> None:
    shop = Shop()
    async with App(database) as app:
        with pytest.raises(ConfigurationError, match="give an AsyncSession"):
            await app.start_workflow(shop.deliver, "A-4", session="session")  # type: ignore[arg-type]
