"""What several tests share: crashes on demand, and a look into a quiet app."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, Literal

import pytest

from romancy import App, Status
from romancy.errors import DatabaseError
from romancy.storage.batch import Batch
from romancy.storage.store import Store
from tests.databases import Database, database_of, execute

RESULT_TIMEOUT_S = 20.0
"""How long a test waits for what must come; never reached when all is well."""


class CrashPlan:
    """Stops the world at the ``at``-th flush, just before or just after its commit.

    Attributes:
        happened: set once it has.
        flushes: how many flushes there were.
    """

    def __init__(self, at: int, when: Literal["before", "after"]) -> None:
        self.at = at
        self.when = when
        self.flushes = 0
        self.happened = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._real: Callable[..., Future[None]] = Store.flush

    def flush(self, store: Store, batch: Batch, worker_id: str | None) -> Future[None]:
        self.flushes += 1
        if self.flushes < self.at:
            return self._real(store, batch, worker_id)
        never: Future[None] = Future()
        if self.flushes == self.at and self.when == "after":
            self._real(store, batch, worker_id).add_done_callback(lambda _: self._stop())
        else:
            self._stop()
        return never

    async def happens_soon(self) -> None:
        """Wait until it happens, though only for a moment: it may never."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.happened.wait(), 0.02)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self.happened.set)

    @contextmanager
    def armed(self) -> Iterator[CrashPlan]:
        with pytest.MonkeyPatch.context() as patch:
            plan = self

            def flush(store: Store, batch: Batch, worker_id: str | None) -> Future[None]:
                return plan.flush(store, batch, worker_id)

            patch.setattr(Store, "flush", flush)
            yield self


async def crash(app: App) -> None:
    """End an app as a killed process would: nothing is written any more, nothing is handed back."""
    worker = app._life.worker
    app._life.process_id = None
    assert worker is not None
    worker._is_stopping = True
    worker.writer.stop(DatabaseError("the test crashed this app"))
    await worker.abandon()
    worker_id = worker.worker_id
    app._life.worker = None
    for task in list(app._life._tasks):
        task.cancel()
    for task in app._life.poller.stop():
        await task
    await app._life.queries.dispose()
    await app._life.engines.dispose()
    database = database_of(app)
    await asyncio.to_thread(app._life.store.close)
    forget_process(database, worker_id)


def forget_process(database: Database, worker_id: str) -> None:
    """Let others see that the worker's process is gone; it is ours, so they could not tell."""
    execute(database, "UPDATE romancy_workers SET pid = 2147483646 WHERE worker_id = ?", worker_id)


async def until_quiet(app: App, state: Callable[[], Any]) -> None:
    """Wait until nothing moves any more but what the test itself holds back."""
    calm = 0
    seen: Any = None
    while calm < 12:
        worker = app._life.worker
        if worker is not None:
            await worker.writer.drained()
        await asyncio.sleep(0)
        now = (state(), worker and worker.writer.committed)
        calm = calm + 1 if now == seen else 0
        seen = now


async def until_live(app: App, instance_id: str) -> None:
    """Wait until the app's worker has brought the instance to where its history ends."""
    async with asyncio.timeout(RESULT_TIMEOUT_S):
        while True:
            worker = app._life.worker
            instance = None if worker is None else worker._live.get(instance_id)
            if instance is not None and not instance.is_replaying:
                return
            await asyncio.sleep(0)


async def wait_for_status(app: App, instance_id: str, status: Status) -> None:
    """Wait until the database says so."""
    async with asyncio.timeout(RESULT_TIMEOUT_S):
        while True:
            instance = await app.get_instance(instance_id)
            if instance is not None and instance.status is status:
                return
            await _news(app)


async def _news(app: App) -> None:
    """Wait until the app's worker has committed something; or for a while, for others may have."""
    worker = app._life.worker
    committed = worker and worker.writer.committed
    for _ in range(10):
        await asyncio.sleep(0.002)
        if worker is None or app._life.worker is not worker or worker.writer.committed != committed:
            return
