"""The process that does the jobs: starts, sends, cancels, waits for results, and notes what was acknowledged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from itertools import chain, count
from typing import Any, TypeVar

from tests.databases import Database

from romancy import (
    App,
    DatabaseError,
    ResultTimeoutError,
    WorkflowCancelledError,
    WorkflowFailedError,
    WorkflowHandle,
    WorkflowSuspendedError,
)
from torture import flows, worker
from torture.folder import Folder, append, read
from torture.jobs import Cancelling, Job, Sending, Start, job_of

logger = logging.getLogger("torture.client")

T = TypeVar("T")

WIDTH = 40
RETRY_WAIT_S = 0.1
RESULT_TIMEOUT_S = 5.0


def main(database: Database, folder: Folder, seed: int) -> None:
    """Do jobs until told to stop; a client that was killed goes on where it was."""
    worker.prepare(folder, "client")
    asyncio.run(_run(database, folder, seed))


async def _run(database: Database, folder: Folder, seed: int) -> None:
    acknowledged = read(folder.acknowledged)
    begun = {record["job"] for record in acknowledged if record["what"] == "begun"}
    done = {record["job"] for record in acknowledged if record["what"] == "done"}
    numbers = chain(sorted(begun - done), count(max(begun, default=-1) + 1))
    is_stopping = folder.stop.exists
    app = App(database, worker=False, auto_migrate=False)
    await worker.start(app)
    async with asyncio.TaskGroup() as tasks:
        client = Client(app, folder)
        room = asyncio.Semaphore(WIDTH)
        for number in numbers:
            await room.acquire()
            if is_stopping() and number not in begun:
                break
            job = job_of(seed, number)
            tasks.create_task(client.do(job)).add_done_callback(lambda _: room.release())
    await app.shutdown()


class Client:
    """Does jobs, each step until it is acknowledged.

    Args:
        app: without a worker.
        folder: where the acknowledgements go.
    """

    def __init__(self, app: App, folder: Folder) -> None:
        self._app = app
        self._folder = folder

    async def do(self, job: Job) -> None:
        """All of a job; what was done before is done again, to no effect."""
        self._note("begun", job=job.number)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send(job.sendings))
            handles = [await self._start(start) for start in job.starts]
            for cancelling in job.cancellings:
                tasks.create_task(self._cancel(cancelling))
        for handle in handles:
            await self._result(handle)
        self._note("done", job=job.number)

    async def _start(self, start: Start) -> WorkflowHandle[Any]:
        definition = getattr(flows, start.workflow)
        handle = await insist(lambda: self._app.start_workflow(definition, *start.arguments, id=start.instance_id))
        self._note("start", id=start.instance_id, workflow=start.workflow, arguments=start.arguments)
        return handle

    async def _send(self, sendings: Iterable[Sending]) -> None:
        """One after the other: they arrive in this order."""
        for sending in sendings:
            await asyncio.sleep(sending.delay_s)
            send = partial(self._app.send_event, "ping", sending.data, key=sending.key, id=sending.event_id)
            await insist(partial(send, source="torture"))
            self._note("event", id=sending.event_id)

    async def _cancel(self, cancelling: Cancelling) -> None:
        await asyncio.sleep(cancelling.delay_s)
        await insist(lambda: self._app.cancel(cancelling.instance_id, "the torture"))
        self._note("cancel", id=cancelling.instance_id)

    async def _result(self, handle: WorkflowHandle[Any]) -> None:
        status, result = await insist(lambda: _outcome(handle))
        self._note("result", id=handle.instance_id, status=status, result=result)

    def _note(self, what: str, **details: Any) -> None:
        append(self._folder.acknowledged, {"what": what, **details})


async def _outcome(handle: WorkflowHandle[Any]) -> tuple[str, Any]:
    try:
        return "completed", await handle.result(RESULT_TIMEOUT_S)
    except WorkflowFailedError:
        return "failed", None
    except WorkflowCancelledError:
        return "cancelled", None
    except WorkflowSuspendedError:
        return "suspended", None


async def insist(call: Callable[[], Awaitable[T]]) -> T:
    """Call again and again, until the database has taken it."""
    while True:
        try:
            return await call()
        except (DatabaseError, ResultTimeoutError) as error:
            logger.info("again, for: %s", error)
            await asyncio.sleep(RETRY_WAIT_S)
