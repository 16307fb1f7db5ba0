"""The process that does the jobs: starts, sends, cancels, suspends, retries, forks, and notes what was acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from itertools import chain, count
from typing import Any, TypeVar

from tests.databases import Database

from romancy import (
    App,
    DatabaseError,
    InstanceStateError,
    ResultTimeoutError,
    Status,
    WorkflowCancelledError,
    WorkflowFailedError,
    WorkflowHandle,
    WorkflowSuspendedError,
)
from torture import flows, worker
from torture.audit import watched
from torture.folder import Folder, append, read
from torture.jobs import Cancelling, Forking, Job, Resting, Sending, Start, job_of

logger = logging.getLogger("torture.client")

T = TypeVar("T")

WIDTH = 40
RETRY_WAIT_S = 0.1
RESULT_TIMEOUT_S = 5.0
LOOK_WAIT_S = 0.03


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
    app = App(watched(database), worker=False, auto_migrate=False)
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
            if job.cancellings:
                tasks.create_task(self._end(job))
            else:
                tasks.create_task(self._rest(job.restings))
            tasks.create_task(self._go_on_again(job))
        del handles  # those of instances that were retried know of their first end only
        for instance_id in [*(start.instance_id for start in job.starts), *(fork.fork_id for fork in job.forkings)]:
            await self._result(instance_id)
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

    async def _end(self, job: Job) -> None:
        """Cancel; what was suspended just before ends all the same, without a resume."""
        for resting in job.restings:
            await asyncio.sleep(resting.delay_s)
            await insist(partial(self._unless_in_other_state, partial(self._app.suspend, resting.instance_id)))
        for cancelling in job.cancellings:
            await self._cancel(cancelling)

    async def _cancel(self, cancelling: Cancelling) -> None:
        await asyncio.sleep(cancelling.delay_s)
        await insist(lambda: self._app.cancel(cancelling.instance_id, "the torture"))
        self._note("cancel", id=cancelling.instance_id)

    async def _rest(self, restings: Iterable[Resting]) -> None:
        """Suspend, look twice, and resume, one rest after the other."""
        for resting in restings:
            instance_id = resting.instance_id
            await asyncio.sleep(resting.delay_s)
            if not await self._suspend(instance_id):
                return
            before = await self._traces(instance_id)
            await asyncio.sleep(resting.rest_s)
            after = await self._traces(instance_id)
            self._note("rest", id=instance_id, before=before, after=after)
            await self._resume(instance_id)

    async def _suspend(self, instance_id: str) -> bool:
        """Whether it is suspended; ``False`` when it has ended."""
        await insist(partial(self._unless_in_other_state, partial(self._app.suspend, instance_id)))
        while True:
            status = await insist(lambda: self._status(instance_id))
            if status.is_terminal or status is Status.SUSPENDED:
                return status is Status.SUSPENDED
            await asyncio.sleep(LOOK_WAIT_S)

    async def _traces(self, instance_id: str) -> list[Any]:
        """What an instance that rests must not change: its status, and how much it has recorded."""
        status = await insist(lambda: self._status(instance_id))
        events = await insist(lambda: self._app.get_history(instance_id))
        return [status.value, len(events)]

    async def _go_on_again(self, job: Job) -> None:
        for retrying in job.retryings:
            if await self._wait_for_end(retrying.instance_id) == "failed":
                self._folder.mend(retrying.instance_id, retrying.level)
                await self._retry(retrying.instance_id)
        if job.retryings:
            await self._wait_for_end(job.retryings[0].instance_id)
        for forking in job.forkings:
            await asyncio.sleep(forking.delay_s)
            await self._fork(forking)

    async def _retry(self, instance_id: str) -> None:
        """What was taken, but not acknowledged, is refused the second time: it has not failed any more."""
        try:
            await insist(lambda: self._app.retry(instance_id))
        except InstanceStateError as error:
            self._note("refusal", id=instance_id, error=str(error))
        else:
            self._note("retry", id=instance_id)

    async def _fork(self, forking: Forking) -> None:
        """As soon as the source has recorded the call."""
        again = partial(self._app.fork, forking.source_id, from_activity=forking.activity_id, id=forking.fork_id)
        while True:
            status = await insist(lambda: self._status(forking.source_id))
            try:
                await insist(again)
            except InstanceStateError:
                if status.is_terminal:
                    raise
                await asyncio.sleep(LOOK_WAIT_S)
            else:
                self._note("fork", id=forking.fork_id, source=forking.source_id, activity=forking.activity_id)
                return

    async def _status(self, instance_id: str) -> Status:
        instance = await self._app.get_instance(instance_id)
        assert instance is not None
        return instance.status

    async def _resume(self, instance_id: str) -> None:
        await insist(partial(self._unless_in_other_state, partial(self._app.resume, instance_id)))

    @staticmethod
    async def _unless_in_other_state(call: Callable[[], Awaitable[None]]) -> None:
        """Asked for again, for the answer was lost; or it has ended meanwhile."""
        with contextlib.suppress(InstanceStateError):
            await call()

    async def _wait_for_end(self, instance_id: str) -> str:
        return (await insist(lambda: self._outcome(instance_id)))[0]

    async def _result(self, instance_id: str) -> None:
        status, result = await insist(lambda: self._outcome(instance_id))
        self._note("result", id=instance_id, status=status, result=result)

    async def _outcome(self, instance_id: str) -> tuple[str, Any]:
        """How it has ended; what is parked, for its code was another's, is resumed until it meets its own."""
        is_changing = instance_id.startswith("changing-")
        while True:
            handle = await self._app.get_handle(instance_id)
            try:
                return "completed", await handle.result(RESULT_TIMEOUT_S)
            except WorkflowFailedError:
                return "failed", None
            except WorkflowCancelledError:
                return "cancelled", None
            except WorkflowSuspendedError:
                if is_changing:
                    await self._resume(instance_id)
                await asyncio.sleep(LOOK_WAIT_S)

    def _note(self, what: str, **details: Any) -> None:
        append(self._folder.acknowledged, {"what": what, **details})


async def insist(call: Callable[[], Awaitable[T]]) -> T:
    """Call again and again, until the database has taken it."""
    while True:
        try:
            return await call()
        except (DatabaseError, ResultTimeoutError) as error:
            logger.info("again, for: %s", error)
            await asyncio.sleep(RETRY_WAIT_S)
