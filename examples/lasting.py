"""Activities that last: heartbeats tell that one lives and how far it came; the next attempt goes on from there.

It prints:

    attempt 1 begins at page 0
    attempt 1 lost its connection at page 3
    attempt 2 begins at page 3
    while it waited: export:1 has failed 1 time, was at page 3
    exported 6 pages
"""

import asyncio

from romancy import App, RetryPolicy, WorkflowContext, activity, current_activity, workflow


@activity(timeout=3600, heartbeat_timeout=30, retry=RetryPolicy.fixed(5, 0.3))
async def export(pages: int) -> str:
    context = current_activity()
    start: int = context.last_heartbeat(type=int) or 0
    print(f"attempt {context.attempt} begins at page {start}")
    for page in range(start, pages):
        context.heartbeat(page)
        if page == 3 and context.attempt == 1:
            print(f"attempt 1 lost its connection at page {page}")
            raise ConnectionError("the service is away")
    return f"exported {pages} pages"


@workflow
async def nightly(ctx: WorkflowContext, pages: int) -> str:
    return await export(pages)


async def main() -> None:
    async with App(":memory:") as app:
        handle = await app.start_workflow(nightly, 6, id="tonight")
        seen = None
        while seen is None:
            await asyncio.sleep(0.01)
            instance = await app.get_instance("tonight")
            seen = next((one for one in instance.pending if one.attempts), None) if instance else None
        result = await handle.result()
        times = "time" if seen.attempts == 1 else "times"
        print(f"while it waited: {seen.activity_id} has failed {seen.attempts} {times}, was at page {seen.heartbeat}")
        print(result)


if __name__ == "__main__":
    asyncio.run(main())
