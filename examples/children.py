"""Children: a workflow fans out to others and gathers what they return.

It prints:

    1000 squares, sum 332833500
    one child failed: 7 is unlucky
"""

import asyncio

from romancy import App, ChildWorkflowError, WorkflowContext, workflow


@workflow
async def square(ctx: WorkflowContext, number: int) -> int:
    return number * number


@workflow
async def picky(ctx: WorkflowContext, number: int) -> int:
    if number == 7:
        raise ValueError("7 is unlucky")
    return number


@workflow
async def parent(ctx: WorkflowContext, count: int) -> list[str]:
    squares = await asyncio.gather(*[ctx.execute_child(square, number) for number in range(count)])
    found = [f"{len(squares)} squares, sum {sum(squares)}"]
    child = await ctx.start_child(picky, 7, id="picky-7", on_parent_failure="abandon")
    try:
        await child.result()
    except ChildWorkflowError as error:
        found.append(f"one child {error.status}: {error.__cause__}")
    return found


async def main() -> None:
    async with App(":memory:") as app:
        for line in await (await app.start_workflow(parent, 1000)).result():
            print(line)


if __name__ == "__main__":
    asyncio.run(main())
