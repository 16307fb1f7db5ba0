"""A commit that got lost on its way, and arrives after everybody has stopped waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from romancy import App, WorkflowContext, activity, current_activity, workflow
from romancy.storage.failures import HistoryConflictError
from romancy.storage.sessions import ActivityTransaction, CommitUnsureError
from tests.databases import Database
from tests.engine.test_sessions import tokens
from tests.ledger import INSERT, create_ledger

RESULT_TIMEOUT_S = 20.0


@pytest.fixture
def ledger(any_database: Database) -> Database:
    create_ledger(any_database)
    return any_database


class LatePost:
    """Keeps the first commit of an activity back, as a network may; its sender hears that the connection is lost."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._commit = ActivityTransaction.commit
        self._kept: list[Callable[[], Any]] = []
        self.count = 0
        monkeypatch.setattr(ActivityTransaction, "commit", lambda *arguments: self._keep(*arguments))

    async def _keep(self, transaction: ActivityTransaction, *arguments: Any) -> None:
        self.count += 1
        if self.count > 1:
            await self._commit(transaction, *arguments)
            return
        self._kept.append(lambda: self._commit(transaction, *arguments))
        raise CommitUnsureError("the connection was lost")

    async def deliver(self) -> None:
        """Let the server have it now."""
        await self._kept.pop()()


@pytest.mark.parametrize("delay", ["delivered once the attempt runs again", "delivered in the end"])
async def test_commit_that_arrives_late_is_refused(
    ledger: Database, delay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isinstance(ledger, str):
        pytest.skip("a transaction that is kept back keeps everybody from writing")
    post = LatePost(monkeypatch)
    arrived: list[BaseException | None] = []

    async def arrive() -> None:
        try:
            await post.deliver()
        except HistoryConflictError as error:
            arrived.append(error)

    @activity
    async def book() -> int:
        await current_activity().session.execute(INSERT, {"token": "once"})
        if post.count == 1 and delay.startswith("delivered once"):
            await arrive()
        return post.count

    @workflow
    async def flow(ctx: WorkflowContext) -> int:
        return await book()

    async with App(ledger) as app:
        handle = await app.start_workflow(flow)
        assert await handle.result(RESULT_TIMEOUT_S) == 1
        if post._kept:
            await arrive()
        kinds = [event.kind for event in await app.get_history(handle.instance_id)]
    assert len(arrived) == 1
    assert tokens(ledger) == ["once"]
    assert kinds == ["ActivityAttemptLost", "ActivityCompleted"]
