"""Changing code under running instances: ``ctx.patched`` keeps to the old way where a run has gone it already.

It prints:

    old instance: reserve, charge
    new instance: check, reserve, charge
"""

import asyncio

from romancy import App, WorkflowContext, activity, workflow
from romancy.testing import isolated_catalogue

diary: dict[str, list[str]] = {}


async def run_old_version(path: str) -> None:
    """What was deployed last week: one instance has reserved, and waits."""
    with isolated_catalogue():
        step = activity(name="step")(note)

        @workflow(name="order")
        async def order(ctx: WorkflowContext) -> None:
            await step(ctx.instance_id, "reserve")
            await ctx.wait_event("go on", key=ctx.instance_id)
            await step(ctx.instance_id, "charge")

        async with App(path, workflows=[order]) as app:
            handle = await app.start_workflow(order, id="old")
            while await handle.status() != "waiting_for_event":
                await asyncio.sleep(0.01)


async def run_new_version(path: str) -> None:
    """What is deployed today: orders are checked first, unless they had gone past that."""
    with isolated_catalogue():
        step = activity(name="step")(note)

        @workflow(name="order")
        async def order(ctx: WorkflowContext) -> None:
            if ctx.patched("check first"):
                await step(ctx.instance_id, "check")
            await step(ctx.instance_id, "reserve")
            await ctx.wait_event("go on", key=ctx.instance_id)
            await step(ctx.instance_id, "charge")

        async with App(path, workflows=[order]) as app:
            handles = [await app.get_handle("old"), await app.start_workflow(order, id="new")]
            for handle in handles:
                await app.send_event("go on", key=handle.instance_id)
            for handle in handles:
                await handle.result()
                print(f"{handle.instance_id} instance:", ", ".join(diary[handle.instance_id]))


async def note(instance_id: str, what: str) -> None:
    diary.setdefault(instance_id, []).append(what)


async def main(path: str = "changing.db") -> None:
    await run_old_version(path)
    await run_new_version(path)


if __name__ == "__main__":
    asyncio.run(main())
