"""A worker: owns instances under a lease, runs what it has started or claimed, hands back what it leaves.

One worker is one life: when it loses its lease it stops for good, and the app begins another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Protocol
from uuid import uuid4

from romancy.clock import Clock
from romancy.definitions import CODE_NAMES, Catalogue, Workflow
from romancy.engine.activities import ActivityRunner
from romancy.engine.claims import Claims
from romancy.engine.instance import LiveInstance
from romancy.engine.lease import Lease
from romancy.engine.operations import ActivityOperation
from romancy.engine.process import host_identity, process_started
from romancy.engine.timers import TimerQueue
from romancy.errors import DatabaseError, FencedError, InstanceStateError
from romancy.failures import encode_error
from romancy.ids import IdSource
from romancy.model import Status
from romancy.settings import Settings
from romancy.signature import Arguments
from romancy.storage.mail import Post
from romancy.storage.rows import ClaimedRow, StartRow, StateRow, WorkerRow
from romancy.storage.sessions import SessionEngines
from romancy.storage.store import Store
from romancy.storage.writer import Recorder, Writer

logger = logging.getLogger("romancy.worker")

SUSPENDED = Status.SUSPENDED.value

MAX_CLAIMS = 20
LONGEST_FAREWELL_S = 5.0
MOST_ROWS_AHEAD = 500
"""Rows that may wait for a commit when a further run of an instance begins."""


class WorkerListener(Protocol):
    """Who hears of what the worker sees."""

    def on_ended(self, state: StateRow) -> None:
        """An instance has ended or was suspended, durably."""
        ...

    def on_foreign_change(self) -> None:
        """Another process has written to the database."""
        ...

    def on_worker_lost(self, error: DatabaseError) -> None:
        """This worker has stopped by itself: it lost its lease, or the database is beyond hope."""
        ...


class _Parked(Recorder):
    """An instance that can't even be loaded."""

    def on_refused(self, error: DatabaseError) -> None:
        logger.warning("an instance could not be parked: %s", error)


class Worker:
    """Runs instances; see the module.

    Args:
        settings: the app's options.
        store: the database.
        engines: where activity sessions come from.
        catalogue: what this worker can run.
        ids: makes the ids of mail.
        clock: workflow time.
        lease_clock: the database's.
        listener: the app's life.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        engines: SessionEngines,
        catalogue: Catalogue,
        ids: IdSource,
        clock: Clock,
        lease_clock: Clock,
        listener: WorkerListener,
    ) -> None:
        self.worker_id = str(uuid4())
        self.clock = clock
        self.default_retry = settings.default_retry
        self.max_payload_bytes = settings.max_payload_bytes
        self.event_retention_us = settings.event_retention_us
        self.timers = TimerQueue(clock)
        self._settings = settings
        self._store = store
        self._engines = engines
        self._workflows: Mapping[str, Workflow[..., Any]] = catalogue.workflows
        self._ids = ids
        self._lease_clock = lease_clock
        self._listener = listener
        self.loop = self._loop = asyncio.get_running_loop()
        self._lease = Lease(
            store,
            self.worker_id,
            settings.lease_ttl_s,
            lease_clock.now_us,
            settings.stall_warning_s,
            CODE_NAMES,
            lambda: self.on_fenced(FencedError(f"worker {self.worker_id} has lost its lease")),
        )
        self.writer = Writer(store, self.worker_id, self._on_writer_stopped, self.on_post)
        self._runner = ActivityRunner(self, engines, settings.max_activities, settings.activity_threads)
        self.start_activity = self._runner.start  # see InstanceHost
        self._live: dict[str, LiveInstance] = {}
        self._ending: set[str] = set()
        self._waiting: OrderedDict[str, LiveInstance] = OrderedDict()
        self._reserved = 0
        self._is_stopping = False
        self._claims = Claims(self, store, lease_clock, settings)

    # -- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Register, take over what dead workers left, and begin to look for work.

        Raises:
            DatabaseError: the worker can't be registered.
        """
        now = self._lease_clock.now_us()
        row = WorkerRow(
            self.worker_id,
            self._settings.name,
            "alive",
            host_identity(),
            os.getpid(),
            process_started(os.getpid()) or 0,
            self._lease.deadline_us(),
        )
        await asyncio.wrap_future(self._store.register(row, started_at=now))
        self._lease.start()
        self._store.start_listening(self._on_hint_from_thread)
        self._claims.start()

    async def stop(self, grace_s: float) -> None:
        """Take no new work, let running activities end, then hand everything back."""
        self._is_stopping = True
        await self._claims.stop()
        await self._runner.finish(grace_s)
        # Instances leave before their activities are cut off, or they would take the cut for an outcome.
        self._drop_all()
        await self._stop_running()
        try:
            async with asyncio.timeout(LONGEST_FAREWELL_S):
                await self.writer.drained()
                if self.writer.stopped_by is None:
                    await asyncio.wrap_future(self._store.leave(self.worker_id, self.clock.now_us()))
        except (TimeoutError, DatabaseError) as error:
            # What was not written is done again by whoever takes over.
            why = str(error) or f"nothing could be written within {LONGEST_FAREWELL_S:.0f} s"
            logger.warning("worker %s can't hand its instances back: %s", self._settings.name, why)
            self._store.give_up()

    async def abandon(self) -> None:
        """Leave memory without writing anything more, as after a lost lease."""
        self._is_stopping = True
        await self._claims.stop()
        self._drop_all()
        await self._stop_running()

    async def _stop_running(self) -> None:
        await asyncio.to_thread(self._store.stop_listening)
        await self._runner.close()
        self._lease.stop()
        self.timers.close()

    def _drop_all(self) -> None:
        for instance in list(self._live.values()):
            instance.drop()
        self._live.clear()
        self._ending.clear()
        self._waiting.clear()

    def on_fenced(self, error: DatabaseError) -> None:
        """The lease is lost: others own the instances; stop without writing or compensating anything."""
        self.writer.stop(error)

    def _on_writer_stopped(self, error: DatabaseError) -> None:
        if self._is_stopping:
            return
        self._is_stopping = True
        logger.error("worker %s (%s) stops: %s", self.worker_id, self._settings.name, error)
        self._drop_all()
        self._listener.on_worker_lost(error)

    async def close_spares(self) -> None:
        """See :class:`romancy.engine.claims.ClaimsHost`."""
        await self._engines.close_spares()

    def on_foreign_change(self) -> None:
        """See :class:`romancy.engine.claims.ClaimsHost`."""
        self._listener.on_foreign_change()

    def lease_deadline_us(self) -> int:
        """See :class:`romancy.engine.activities.RunnerHost`."""
        return self._lease.deadline_us()

    # -- instances ---------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many further instances may run here now; those that wait for time alone take no room."""
        if self._is_stopping:
            return 0
        return self._settings.max_instances - (len(self._live) - len(self._waiting)) - self._reserved

    def reserve_room(self) -> bool:
        """Keep a place for a start that is on its way to the database; ``False`` when there is none."""
        if self.room <= 0:
            return False
        self._reserved += 1
        return True

    def is_live(self, instance_id: str) -> bool:
        """Whether the instance is in this worker's memory, or its end on the way to the database."""
        return instance_id in self._live or instance_id in self._ending

    def on_start_settled(self, row: StartRow, given: Arguments, is_new: bool) -> None:
        """Run an instance that was just stored as this worker's own, with the input that it was stored with."""
        self._reserved -= 1
        if not is_new or self._is_stopping:
            self._claims.on_room()
            return
        instance_id, run, name, status, _, _, claims, _, started_at, _, _, text, _ = row
        assert started_at is not None
        claimed = ClaimedRow(instance_id, run, name, status, claims, started_at, text)
        instance = self.load(claimed, given)
        if instance is not None:
            instance.begin()

    def hint(self) -> None:
        """There may be work: look now."""
        self._claims.hint()

    def _on_hint_from_thread(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed
            self._loop.call_soon_threadsafe(self.hint)

    def live(self, instance_id: str) -> LiveInstance | None:
        """See :class:`romancy.engine.claims.ClaimsHost`."""
        return self._live.get(instance_id)

    def load(self, row: ClaimedRow, given: Arguments | None = None) -> LiveInstance | None:
        """Take an instance into memory; ``None``: it can't be, and is set aside."""
        try:
            if row.claims > MAX_CLAIMS:
                raise InstanceStateError(
                    f"the workers that ran this instance died {row.claims - 1} times in a row without its coming "
                    f"forward; it may be what kills them. Once that is mended, resume it"
                )
            instance = LiveInstance(self, row, self._workflows[row.workflow_name], given)
        except Exception as error:
            self._park_unloaded(row, error)
            return None
        self._live[row.instance_id] = instance
        return instance

    def _park_unloaded(self, row: ClaimedRow, error: Exception) -> None:
        logger.error("instance %s of workflow %s is suspended: %s", row.instance_id, row.workflow_name, error)
        now = self.clock.now_us()
        state = StateRow(row.instance_id, SUSPENDED, None, None, now, None, None, encode_error(error))
        ticket = self.writer.record(_Parked(), None, state)
        self.writer.when_durable(ticket, lambda: self._listener.on_ended(state))

    def cancel_activity(self, operation: ActivityOperation) -> None:
        """See :class:`romancy.engine.instance.InstanceHost`."""
        self._runner.cancel(operation)

    def on_waiting(self, instance: LiveInstance, is_waiting: bool) -> None:
        """See :class:`romancy.engine.instance.InstanceHost`."""
        if not is_waiting:
            self._waiting.pop(instance.instance_id, None)
            return
        self._waiting[instance.instance_id] = instance
        self._waiting.move_to_end(instance.instance_id)
        if len(self._waiting) > self._settings.max_hot_instances:
            self._loop.call_soon(self._evict)
        self._claims.on_room()

    def _evict(self) -> None:
        """Put the instances to bed that have waited longest."""
        while len(self._waiting) > self._settings.max_hot_instances:
            _, instance = self._waiting.popitem(last=False)
            wake = instance.next_wake_us()
            instance.evict()
            if wake is not None:
                self._claims.note_due(wake)

    # -- mail --------------------------------------------------------------------------------------

    def new_mail_id(self) -> str:
        """See :class:`romancy.engine.messaging.MessagingHost`."""
        return self._ids.new_id()

    def open_channel(self, channel: str, mode: str | None, subscriber: str | None) -> Future[str | None]:
        """See :class:`romancy.engine.messaging.MessagingHost`."""
        return self._store.open_channel(self.worker_id, channel, mode, subscriber)

    def start_child(self, row: StartRow) -> Future[tuple[str, str, str | None] | None]:
        """See :class:`romancy.engine.messaging.MessagingHost`."""
        return self._store.start_child(self.worker_id, row)

    def begin_run(self, last: LiveInstance, row: ClaimedRow, given: Arguments, ticket: int) -> None:
        """See :class:`romancy.engine.instance.InstanceHost`."""

        def begin() -> None:
            instance = None if self._is_stopping else self.load(row, given)
            if instance is not None:
                instance.ticket = ticket
                last.succeeded_by(instance)
                instance.begin()

        def begin_late() -> None:
            self._loop.call_soon(begin)
            # A request may have come while the instance was between its runs.
            self.hint()

        # In a callback of its own: ten thousand runs in a row must not nest.
        if self.writer.waiting_rows < MOST_ROWS_AHEAD:
            self._loop.call_soon(begin)
        else:
            # Nor pile up: without activities, runs are quicker than commits.
            self.writer.when_durable(ticket, begin_late)

    def on_post(self, post: Post) -> None:
        """Mail of a durable transaction: what is for live instances goes there at once."""
        is_for_others = False
        for delivery in [*post.deliveries, *post.kept]:
            instance = self._live.get(delivery.instance_id)
            if instance is None:
                is_for_others = True
            else:
                instance.on_delivery(delivery)
        if is_for_others:
            self.hint()
            self._store.tell_others()

    def on_ended(self, instance: LiveInstance, state: StateRow | None) -> None:
        """See :class:`romancy.engine.instance.InstanceHost`."""
        self._ending.discard(instance.instance_id)
        if state is None:
            return
        self._listener.on_ended(state)
        if state.status == SUSPENDED and state.error is None:
            self.hint()  # it may have been asked to end meanwhile

    def on_gone(self, instance: LiveInstance) -> None:
        """See :class:`romancy.engine.instance.InstanceHost`."""
        if self._live.get(instance.instance_id) is instance:
            del self._live[instance.instance_id]
        if instance.has_ended:
            self._ending.add(instance.instance_id)
        self._waiting.pop(instance.instance_id, None)
        self._claims.on_room()
