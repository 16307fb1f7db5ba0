"""Recur: a workflow without end, whose history stays short because each run begins anew.

It prints:

    after 3 runs the counter stands at 33
"""

import asyncio

from romancy import App, WorkflowContext, workflow

ADDITIONS_A_RUN = 10


@workflow
async def counter(ctx: WorkflowContext, total: int) -> tuple[int, int]:
    for _ in range(ADDITIONS_A_RUN):
        message = await ctx.receive("add", type=int)  # the mailbox outlives each run
        if message.data == 0:
            return ctx.run, total
        total += message.data
    await ctx.recur(total)


async def main() -> None:
    async with App(":memory:") as app:
        handle = await app.start_workflow(counter, 0, id="counter")
        for amount in [1] * 15 + [2] * 9 + [0]:
            await app.send_to("counter", "add", amount)
        runs, total = await handle.result()
        print(f"after {runs} runs the counter stands at {total}")


if __name__ == "__main__":
    asyncio.run(main())
