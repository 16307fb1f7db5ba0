"""Waiting for a result costs no question to the database where the answer is on its way anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from romancy import App, Status, WorkflowContext, workflow
from romancy.storage.store import Store
from tests.databases import Database
from tests.support import RESULT_TIMEOUT_S, wait_for_status


async def test_result_that_is_about_to_be_durable_is_not_asked_for(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    get_outcomes = Store.get_outcomes

    def noted(self: Store, instance_ids: Sequence[str]) -> Any:
        asked.extend(instance_ids)
        return get_outcomes(self, instance_ids)

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        await ctx.wait_event("paid", key=ctx.instance_id)
        return "paid"

    async with App(database) as app:
        handle = await app.start_workflow(flow)
        await wait_for_status(app, handle.instance_id, Status.WAITING_FOR_EVENT)
        monkeypatch.setattr(Store, "get_outcomes", noted)
        # When this returns, the code has returned, too, and its end is being written.
        await app.send_event("paid", key=handle.instance_id)
        assert await handle.result(RESULT_TIMEOUT_S) == "paid"
    assert asked == []
