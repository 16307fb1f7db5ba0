"""Operating: look at an instance, suspend it, resume it, retry one that failed, and fork it.

It prints:

    suspended
    resumed and failed: the printer is out of paper
    retried: packed and labelled, packed 1 time
    forked: packed and labelled again, packed 1 time
    the history of the fork: ActivityCompleted, WorkflowForked, ActivityCompleted
"""

import asyncio

from romancy import App, Status, TerminalError, WorkflowContext, WorkflowFailedError, activity, workflow

packed = 0
paper = 0


@activity
async def pack() -> str:
    global packed  # noqa: PLW0603  (stands for the world outside)
    packed += 1
    return "packed"


@activity
async def label() -> str:
    if not paper:
        raise TerminalError("the printer is out of paper")
    return "labelled" if paper == 1 else "labelled again"


@workflow
async def ship(ctx: WorkflowContext) -> str:
    first = await pack()
    await ctx.sleep(1)
    return f"{first} and {await label()}"


async def main() -> None:
    global paper  # noqa: PLW0603
    async with App(":memory:") as app:
        handle = await app.start_workflow(ship, id="parcel")
        await app.suspend("parcel")
        while await handle.status() is not Status.SUSPENDED:
            await asyncio.sleep(0.01)
        print(await handle.status())

        await app.resume("parcel")
        try:
            await handle.result()
        except WorkflowFailedError as error:
            print("resumed and failed:", error.__cause__)

        paper = 1
        handle = await app.retry("parcel")
        print(f"retried: {await handle.result()}, packed {packed} time")

        paper = 2
        fork = await app.fork("parcel", from_activity="label:1")
        print(f"forked: {await fork.result()}, packed {packed} time")
        kinds = [event.kind for event in await app.get_history(fork.instance_id) if event.kind != "TimerExpired"]
        print("the history of the fork:", ", ".join(kinds))


if __name__ == "__main__":
    asyncio.run(main())
