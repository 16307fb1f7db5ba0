# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""What type checkers see of the public calls: read by pyright, never run.

Each ``pyright: ignore`` is a call that must be refused: pyright reports one that is not needed.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import assert_type

from romancy import (
    App,
    ChildHandle,
    Event,
    Instance,
    Message,
    RetryPolicy,
    Status,
    WorkflowContext,
    WorkflowHandle,
    activity,
    current_activity,
    workflow,
)


@dataclass
class Order:
    number: str


@dataclass
class Receipt:
    total: int


@activity
async def charge(order: Order, cents: int = 0) -> Receipt:
    return Receipt(cents)


@activity(retry=RetryPolicy.fixed(3, 1.0), timeout=timedelta(seconds=5))
def pack(order: Order) -> str:
    return order.number


@workflow
async def process(ctx: WorkflowContext, order: Order) -> Receipt:
    assert_type(await charge(order, 5), Receipt)
    assert_type(await pack(order), str)
    assert_type(await charge.options(id="again")(order, cents=5), Receipt)
    first, second = await asyncio.gather(charge(order), pack(order))
    assert_type(first, Receipt)
    assert_type(second, str)
    await charge("A-17")  # pyright: ignore[reportArgumentType]
    await charge(order, dollars=5)  # pyright: ignore[reportCallIssue]
    await charge.options(id="third")(5)  # pyright: ignore[reportArgumentType]
    return first


@workflow(name="other", compare_inputs=False)
async def without_input(ctx: WorkflowContext) -> int:
    return 1


@activity(compensate=charge, heartbeat_timeout=30)
async def lasts(order: Order) -> None:
    context = current_activity()
    assert_type(context.last_heartbeat(type=Receipt), Receipt | None)
    context.heartbeat(Receipt(1))
    context.send_event("paid", Receipt(1), key="k")
    await lasts.options(heartbeat_timeout=timedelta(seconds=1))(order)
    lasts.options(heartbeat_timeout="soon")  # pyright: ignore[reportArgumentType]


@workflow
async def waits(ctx: WorkflowContext) -> int:
    assert_type(await ctx.wait_event("paid", key="k", timeout=5, type=Receipt), Event[Receipt])
    assert_type((await ctx.receive("news", type=Order)).data, Order)
    assert_type(await ctx.receive("news", type=Order), Message[Order])
    ctx.on_failure(charge, Order("A"), cents=5)
    child = await ctx.start_child(process, Order("A"), on_parent_failure="abandon")
    assert_type(child, ChildHandle[Receipt])
    assert_type(await child.result(), Receipt)
    assert_type(await ctx.execute_child(process, Order("A")), Receipt)
    await ctx.execute_child("process", Order("A"))  # pyright: ignore[reportArgumentType]
    await ctx.start_child(process, on_parent_failure="stay")  # pyright: ignore[reportArgumentType]
    await ctx.recur()


async def from_outside(app: App, order: Order) -> None:
    handle = await app.start_workflow(process, order, id="A-17")
    assert_type(handle, WorkflowHandle[Receipt])
    assert_type(await handle.result(timeout=timedelta(seconds=1)), Receipt)
    assert_type(await handle.status(), Status)
    assert_type(await (await app.start_workflow(without_input)).result(), int)
    assert_type(await app.get_handle("A-17", process), WorkflowHandle[Receipt])
    assert_type(await app.get_instance("A-17"), Instance | None)
    await app.find_instances({"order": [1]})  # pyright: ignore[reportArgumentType]
    await app.list_instances(limit="1")  # pyright: ignore[reportArgumentType]
