"""Timers: a workflow that sleeps for days and bounds what it waits for, run by a clock that jumps.

It prints:

    asked for a review after 14 days, 0:00:00
    nobody answered within an hour
    went on on Monday, 2030-01-07 09:00:00+00:00
"""

import asyncio
from datetime import UTC, datetime, timedelta

from romancy import App, WorkflowContext, activity, workflow
from romancy.testing import VirtualClock


@activity
async def ask_for_review(order_id: str) -> str:
    return f"asked for a review of {order_id}"


@workflow
async def after_the_sale(ctx: WorkflowContext, order_id: str) -> list[str]:
    began = ctx.now()
    await ctx.sleep(timedelta(days=14))  # or plain asyncio.sleep: it survives restarts, too
    await ask_for_review(order_id)
    found = [f"asked for a review after {ctx.now() - began}"]
    try:
        async with asyncio.timeout(3600):
            await ctx.wait_event("review", key=order_id)
    except TimeoutError:
        found.append("nobody answered within an hour")
    monday = datetime(2030, 1, 7, 9, tzinfo=UTC)
    await ctx.sleep_until(monday)  # a time in the past would be no wait at all
    found.append(f"went on on Monday, {ctx.now()}")
    return found


async def main() -> None:
    async with App(":memory:", clock=VirtualClock(auto_advance=True)) as app:
        handle = await app.start_workflow(after_the_sale, "A-17")
        for line in await handle.result():
            print(line)


if __name__ == "__main__":
    asyncio.run(main())
