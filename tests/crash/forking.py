"""A process that forks while its app runs; both it and its child end as any process does.

Arguments: the database; what the child does: ``refused``, ``app`` or ``elsewhere``, and where that is.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Awaitable, Callable

from sqlalchemy import text

from romancy import App, RomancyError, WorkflowContext, activity, current_activity, workflow


@activity
async def by_async() -> int:
    return int((await current_activity().session.execute(text("SELECT 2"))).scalar_one())


@activity
def by_sync() -> int:
    return int(current_activity().sync_session.execute(text("SELECT 3")).scalar_one())


@workflow
async def both(ctx: WorkflowContext) -> int:
    return await by_async() + await by_sync()


async def works(app: App) -> int:
    handle = await app.start_workflow(both)
    result = await handle.result(20)
    assert await app.get_history(handle.instance_id)
    return result


async def app_of_its_own(database: str) -> None:
    async with App(database) as app:
        print("child", await works(app), flush=True)


async def refusals(app: App) -> None:
    calls: list[Callable[[], Awaitable[object]]] = [
        app.start, lambda: app.start_workflow(both), lambda: app.get_instance("it"), lambda: app.send_event("paid"),
        app.shutdown,
    ]  # fmt: skip
    for call in calls:
        try:
            await call()
        except RomancyError as error:
            print("child", type(error).__name__, error, flush=True)


def child(app: App, database: str, what: str, *where: str) -> None:
    gc.collect()
    match what:
        case "refused":
            asyncio.run(refusals(app))
        case "app":
            asyncio.run(app_of_its_own(database))
        case _:
            asyncio.run(app_of_its_own(*where))


def main(database: str, *rest: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    loop = asyncio.new_event_loop()
    app = App(database)
    loop.run_until_complete(app.start())
    print("before", loop.run_until_complete(works(app)), flush=True)
    process_id = os.fork()
    if process_id == 0:
        child(app, database, *rest)
        del app, loop
        gc.collect()
        sys.exit()
    _, status = loop.run_until_complete(asyncio.to_thread(os.waitpid, process_id, 0))
    print("ended", os.waitstatus_to_exitcode(status), flush=True)
    # Open connections would work on without the file; the next ones would not.
    path = getattr(app._life.store, "path", None)
    assert path is None or os.path.exists(path)
    print("after", loop.run_until_complete(works(app)), flush=True)
    loop.run_until_complete(app.shutdown())
    loop.close()
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
