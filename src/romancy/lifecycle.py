"""The life of an app: opens its database, begins a worker, begins another when that has lost its lease, closes all."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine, Mapping
from typing import Any

from romancy.clock import Clock, SystemClock
from romancy.definitions import DEFAULT_CATALOGUE, Catalogue, Workflow
from romancy.engine.worker import LONGEST_FAREWELL_S, Worker
from romancy.errors import AppNotRunningError, DatabaseError, FencedError, InstanceStateError
from romancy.ids import IdSource
from romancy.outcomes import Outcomes
from romancy.polling import OutcomePoller
from romancy.settings import Settings
from romancy.storage.mail import Post
from romancy.storage.queries import Queries
from romancy.storage.rows import StateRow
from romancy.storage.sessions import SessionEngines
from romancy.storage.store import Store
from romancy.storage.stores import make_queries, make_store
from romancy.storage.writer import Writer

logger = logging.getLogger("romancy.app")


class Lifecycle:
    """What an app has open while it runs. It may be started again after its shutdown.

    Attributes:
        ids: makes the ids of instances and of mail.
        outcomes: who waits for which instance to end; they outlive a restart.
        clock: workflow time.
        catalogue: where workflows are looked up.
        known: the workflows that were there at the start: what can be run.
        store: the database.
        engines: where the sessions of activities come from.
        queries: pages of instances.
        writer: commits what is sent from outside; the worker's, where there is one.
        worker: runs instances; ``None`` in an app that only starts and reads, and while another is about to begin.
        poller: looks for ends elsewhere.
        process_id: of the process that started it; ``None`` while it does not run.
        broken: why it has stopped by itself.
    """

    store: Store
    engines: SessionEngines
    queries: Queries
    writer: Writer
    catalogue: Catalogue
    poller: OutcomePoller

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.ids = IdSource()
        self.outcomes = Outcomes()
        self.clock: Clock = settings.clock or SystemClock()
        self.known: Mapping[str, Workflow[..., Any]] = {}
        self.worker: Worker | None = None
        self.process_id: int | None = None
        self.broken: DatabaseError | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Open the database, bring its tables up to date, and begin a worker if there is to be one.

        Raises:
            DatabaseError: the database can't be opened, or is not fit for durable work.
            InstanceStateError: it runs already.
            AppNotRunningError: it runs in the process that this one was forked from.
        """
        self._check_not_forked()
        if self.process_id is not None:
            raise InstanceStateError("this app is running already: start it once, or make another App")
        settings = self._settings
        self.catalogue = settings.workflows or DEFAULT_CATALOGUE
        self.known = self.catalogue.workflows
        self.store = make_store(settings.address, list(self.known), settings.listen_on, settings.lease_ttl_s)
        await asyncio.to_thread(self.store.open, settings.auto_migrate)
        self.clock = self.store.workflow_clock = settings.clock or self.store.clock
        self.process_id = os.getpid()
        self.broken = None
        self.poller = OutcomePoller(self.outcomes, self.store, self._is_live)
        self.engines = SessionEngines(self.store, settings.given, settings.pool)
        self.queries = make_queries(self.store)
        try:
            await self.engines.check_given()
            if settings.has_worker:
                await self._begin_worker()
            else:
                self.writer = Writer(self.store, None, self._on_client_stopped, self._on_post)
        except BaseException:
            await self._close()
            raise
        self.poller.start()

    async def shutdown(self) -> None:
        """Stop in good order; at once, where it does not run.

        Raises:
            AppNotRunningError: it runs in the process that this one was forked from, and is left alone.
        """
        self._check_not_forked()
        if self.process_id is None:
            return
        try:
            if self.worker is not None:
                await self.worker.stop(self._settings.shutdown_grace_s)
            else:
                async with asyncio.timeout(LONGEST_FAREWELL_S):
                    await self.writer.drained()
        except TimeoutError:
            logger.warning("nothing could be written within %.0f s; what waited is given up", LONGEST_FAREWELL_S)
            self.store.give_up()
        finally:
            await self._close()

    def check_running(self) -> None:
        """Refuse what needs an open database.

        Raises:
            AppNotRunningError: it does not run, or not here, or not any more.
        """
        if self.process_id is None:
            raise AppNotRunningError("the app is not running: use `async with App(…) as app`, or await app.start()")
        self._check_not_forked()
        if self.broken is not None:
            raise AppNotRunningError(f"the app has stopped, for {self.broken}") from self.broken

    def hint_worker(self) -> None:
        """There may be work: let the worker, if there is one, look now."""
        if self.worker is not None:
            self.worker.hint()

    def _check_not_forked(self) -> None:
        if self.process_id is not None and self.process_id != os.getpid():
            raise AppNotRunningError(
                "the app was started before this process forked, and its threads and connections are the other "
                "process's: make an App of its own here"
            )

    def _is_live(self, instance_id: str) -> bool:
        return self.worker is not None and self.worker.is_live(instance_id)

    async def _begin_worker(self) -> None:
        worker = Worker(
            self._settings, self.store, self.engines, self.catalogue, self.ids, self.clock, self.store.clock, self
        )
        await worker.start()
        self.worker, self.writer = worker, worker.writer

    async def _close(self) -> None:
        self.process_id = None
        stopped = AppNotRunningError("the app has shut down; the instance goes on when an app starts again")
        writer: Writer | None = getattr(self, "writer", None)
        if writer is not None:
            writer.stop(DatabaseError("the app has shut down"))
        self.worker = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        tasks += self.poller.stop()
        if tasks:
            _, stuck = await asyncio.wait(tasks, timeout=LONGEST_FAREWELL_S)
            if stuck:
                self.store.cut_all()
                await asyncio.wait(stuck, timeout=LONGEST_FAREWELL_S)
        self.outcomes.fail_all(stopped)
        await self.queries.dispose()
        await self.engines.dispose()
        await asyncio.to_thread(self.store.close)

    # -- what the worker tells ---------------------------------------------------------------------

    def on_ended(self, state: StateRow) -> None:
        """See :class:`romancy.engine.worker.WorkerListener`."""
        self.outcomes.settle(state)

    def on_foreign_change(self) -> None:
        """See :class:`romancy.engine.worker.WorkerListener`."""
        self.poller.look()

    def on_worker_lost(self, error: DatabaseError) -> None:
        """See :class:`romancy.engine.worker.WorkerListener`."""
        if self.process_id is None:
            return
        if isinstance(error, FencedError):
            self._spawn(self._replace_worker())
        else:
            self._break(error)

    async def _replace_worker(self) -> None:
        """A lost lease ends a worker, not the app: begin another life under a fresh id."""
        lost, self.worker = self.worker, None
        if lost is not None:
            await lost.abandon()
        while self.process_id is not None:
            try:
                await self._begin_worker()
            except DatabaseError as error:
                logger.warning("no new worker can begin: %s", error)
                await asyncio.sleep(0.5)
            else:
                return

    def _break(self, error: DatabaseError) -> None:
        self.broken = error
        self.outcomes.fail_all(error)
        if self.worker is not None:
            self._spawn(self._let_go(self.worker))

    async def _let_go(self, worker: Worker) -> None:
        """Others may take over at once what this worker can no longer record."""
        await worker.abandon()
        try:
            await asyncio.wrap_future(self.store.leave(worker.worker_id, self.clock.now_us()))
        except DatabaseError as error:
            logger.info("the instances could not be handed back, and wait for the end of the lease: %s", error)

    def _spawn(self, body: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(body)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a background task of the app failed in an unforeseen way", exc_info=task.exception())

    # -- what the writer of an app without a worker tells ------------------------------------------

    def _on_client_stopped(self, error: DatabaseError) -> None:
        if self.process_id is not None:
            self._break(error)

    def _on_post(self, post: Post) -> None:
        if post.deliveries:
            self.store.tell_others()
