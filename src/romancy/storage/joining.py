"""Starts that are part of a transaction of the user's own."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import event, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from romancy.storage.rows import StartRow
from romancy.storage.schema import instances
from romancy.storage.sessions import ActivityTransaction
from romancy.storage.statements import FIRST_INPUT

_CALLBACKS = "romancy_after_commit"


async def insert_start(session: AsyncSession, row: StartRow) -> tuple[str, str] | None:
    """Insert an instance in the session's transaction; it is there once that is committed, and not at all otherwise.

    Returns:
        ``None``; or, where the id was taken, the workflow's name and the input that its instance was started with.
    """
    try:
        async with session.begin_nested():
            await session.execute(insert(instances).values(row._asdict()))
    except IntegrityError:
        found = select(instances.c.workflow_name, FIRST_INPUT).where(instances.c.instance_id == row.instance_id)
        name, stored = (await session.execute(found)).one()
        return name, stored
    return None


def after_commit(session: AsyncSession, callback: Callable[[], None]) -> None:
    """Call back once the transaction around the session is committed; never, if it is rolled back."""
    transaction = session.sync_session.info.get("transaction")
    if isinstance(transaction, ActivityTransaction):
        transaction.after_commit.append(callback)
        return

    callbacks: list[Callable[[], None]] | None = session.sync_session.info.get(_CALLBACKS)
    if callbacks is None:
        callbacks = session.sync_session.info[_CALLBACKS] = []
        event.listen(session.sync_session, "after_commit", _call_back)
    callbacks.append(callback)


def _call_back(session: Session) -> None:
    # The ends of savepoints come by here, too.
    if not session.in_nested_transaction():
        callbacks: list[Callable[[], None]] = session.info[_CALLBACKS]
        while callbacks:
            callbacks.pop()()
