"""Channels: news for all, jobs for whoever is free, and a mailbox for each instance.

It prints:

    ann has read: rain, then sun
    bob has read: rain, then sun
    4 jobs were done, each once
    carl was asked by boss: are you there?
"""

import asyncio

from romancy import App, Status, WorkflowContext, WorkflowHandle, workflow


@workflow
async def reader(ctx: WorkflowContext) -> str:
    await ctx.subscribe("news")  # broadcast: all that is published from here on
    first = await ctx.receive("news", type=str)
    second = await ctx.receive("news", type=str)
    return f"{ctx.instance_id} has read: {first.data}, then {second.data}"


@workflow
async def worker(ctx: WorkflowContext) -> list[int]:
    await ctx.subscribe("jobs", mode="competing")  # each message has one consumer
    done: list[int] = []
    while (job := await ctx.receive("jobs", type=int)).data:
        done.append(job.data)
    return done


@workflow
async def listener(ctx: WorkflowContext) -> str:
    message = await ctx.receive("inbox", type=str)  # direct: needs no subscription
    return f"{ctx.instance_id} was asked by {message.sender}: {message.data}"


@workflow
async def boss(ctx: WorkflowContext) -> None:
    await ctx.publish("news", "rain")
    await ctx.publish("news", "sun")
    for job in (1, 2, 3, 4, 0, 0):
        await ctx.publish("jobs", job)
    await ctx.send_to("carl", "inbox", "are you there?")


async def until_they_wait(*handles: WorkflowHandle[str]) -> None:
    for handle in handles:
        while await handle.status() is not Status.WAITING_FOR_MESSAGE:
            await asyncio.sleep(0.01)


async def main() -> None:
    async with App(":memory:") as app:
        readers = [await app.start_workflow(reader, id=name) for name in ("ann", "bob")]
        workers = [await app.start_workflow(worker) for _ in range(2)]
        await until_they_wait(*readers)

        await app.start_workflow(boss, id="boss")
        carl = await app.start_workflow(listener, id="carl")  # his message may be there before him

        for handle in readers:
            print(await handle.result())
        jobs = [job for handle in workers for job in await handle.result()]
        print(len(jobs), "jobs were done, each once" if sorted(jobs) == [1, 2, 3, 4] else "jobs?")
        print(await carl.result())


if __name__ == "__main__":
    asyncio.run(main())
