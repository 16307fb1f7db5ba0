"""Names and ids that are texts of a kind of their own."""

from __future__ import annotations

import asyncio
from enum import Enum

import pytest

from romancy import App, Catalogue, WorkflowContext, WorkflowSuspendedError, activity, workflow
from tests.databases import Database, rows
from tests.support import RESULT_TIMEOUT_S


class Name(str, Enum):  # noqa: UP042 - it says something else of itself than what it holds
    PARENT = "parent"
    CHILD = "child"
    STEP = "enum-step"
    CALL = "call"
    KIND = "enum-kind"


MINE = Catalogue()


@activity(name=Name.STEP, catalogue=MINE)
async def step() -> None:
    pass


@workflow(name=Name.KIND, catalogue=MINE)
async def kind(ctx: WorkflowContext, depth: int) -> None:
    await step.options(id=Name.CALL)()
    if depth:
        await (await ctx.start_child(kind, 0, id=Name.CHILD)).result()


async def test_enum_is_stored_as_the_text_that_it_holds(database: Database) -> None:
    """And not as what ``str()`` says of it; also among many rows, which are written in another way than few."""
    async with App(database, workflows=[kind]) as app:
        first = await app.start_workflow(kind, 1, id=Name.PARENT)
        others = [await app.start_workflow(kind, 0) for _ in range(8)]
        for handle in (first, *others):
            await handle.result(timeout=RESULT_TIMEOUT_S)
        assert type(first.instance_id) is str
        assert (await app.get_handle(Name.CHILD)).instance_id == "child"
        assert await app.cancel(Name.PARENT) is False
    found = rows(database, "SELECT instance_id, operation_id, name FROM romancy_history WHERE name = 'enum-step'")
    assert {(operation, name) for _, operation, name in found} == {("call", "enum-step")}
    assert {"parent", "child"} < {instance for instance, _, _ in found}
    assert {tuple(row) for row in rows(database, "SELECT DISTINCT workflow_name FROM romancy_instances")} == {
        ("enum-kind",)
    }


async def test_what_is_asked_of_an_enums_instance_is_heard_once(database: Database) -> None:
    many = Enum("many", {f"N{number}": f"order-{number}" for number in range(12)}, type=str)

    @workflow(catalogue=Catalogue())
    async def waits(ctx: WorkflowContext) -> None:
        await ctx.wait_event("go")

    async with App(database, workflows=[waits]) as app:
        handles = [await app.start_workflow(waits, id=each) for each in many]
        await asyncio.gather(*(app.suspend(each) for each in many))
        for handle in handles:
            with pytest.raises(WorkflowSuspendedError):
                await handle.result(timeout=RESULT_TIMEOUT_S)
        await app._life.writer.drained()
    assert rows(database, "SELECT instance_id FROM romancy_deliveries") == []
