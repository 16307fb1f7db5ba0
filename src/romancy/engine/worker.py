"""A worker: owns instances under a lease, claims what is free or orphaned, hands back what it leaves.

One worker is one life: when it loses its lease it stops for good, and the app begins another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from romancy.clock import Clock
from romancy.definitions import CODE_NAMES, Catalogue, Workflow
from romancy.engine.activities import ActivityRunner
from romancy.engine.instance import LiveInstance, in_order_of_asking
from romancy.engine.lease import Lease
from romancy.engine.operations import ActivityOperation
from romancy.engine.process import host_identity, is_gone, process_started
from romancy.engine.timers import TimerQueue
from romancy.errors import DatabaseError, FencedError, InstanceStateError
from romancy.failures import encode_error
from romancy.ids import IdSource
from romancy.model import Status
from romancy.settings import Settings
from romancy.signature import Arguments
from romancy.storage.mail import Post
from romancy.storage.rows import ClaimedRow, HistoryRow, StartRow, StateRow, WorkerRow
from romancy.storage.sessions import SessionEngines
from romancy.storage.store import Store
from romancy.storage.writer import Recorder, Writer

logger = logging.getLogger("romancy.worker")

T = TypeVar("T")

MAX_CLAIMS = 20
CLAIM_SIZE = 200
HISTORY_PAGE = 1_000
SCAN_INTERVAL_S = 5.0
SHORTEST_SCAN_INTERVAL_S = 0.1
LOCKED_WAIT_US = 20_000
LONGEST_FAREWELL_S = 5.0
GONE_CHECK_INTERVAL_S = 0.5
CHANGE_CHECK_INTERVAL_S = 0.02
MOST_ROWS_AHEAD = 500
"""Rows that may wait for a commit when a further run of an instance begins."""

CLEARING_INTERVAL_S = 300.0


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
        self._live: dict[str, LiveInstance] = {}
        self._ending: set[str] = set()
        self._waiting: OrderedDict[str, LiveInstance] = OrderedDict()
        self._others: list[WorkerRow] = []
        self._dead: dict[str, WorkerRow] = {}
        self._reserved = 0
        self._wants_room = False
        self._claimed: list[ClaimedRow] = []
        self._next_due_us: int | None = None
        self._may_have_mail = False
        self._cleared_at = 0.0
        self._scan_wait_s = SCAN_INTERVAL_S
        self._seen_commits = 0
        self._is_stopping = False
        self._is_stopped = False
        self._hint = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

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
        await _done(self._store.register(row, started_at=now))
        self._lease.start()
        self._store.start_listening(self._on_hint_from_thread)
        self._tasks = [
            self._loop.create_task(self._forever(self._look_for_work), name="romancy-claims"),
            self._loop.create_task(self._forever(self._watch_changes), name="romancy-changes"),
        ]

    async def stop(self, grace_s: float) -> None:
        """Take no new work, let running activities end, then hand everything back."""
        self._is_stopping = True
        await self._end_tasks()
        await self._runner.finish(grace_s)
        # Instances leave before their activities are cut off, or they would take the cut for an outcome.
        self._drop_all()
        await self._stop_running()
        try:
            async with asyncio.timeout(LONGEST_FAREWELL_S):
                await self.writer.drained()
                if self.writer.stopped_by is None:
                    await _done(self._store.leave(self.worker_id, self.clock.now_us()))
        except (TimeoutError, DatabaseError) as error:
            # What was not written is done again by whoever takes over.
            why = str(error) or f"nothing could be written within {LONGEST_FAREWELL_S:.0f} s"
            logger.warning("worker %s can't hand its instances back: %s", self._settings.name, why)
            self._store.give_up()
        self._is_stopped = True

    async def abandon(self) -> None:
        """Leave memory without writing anything more, as after a lost lease."""
        self._is_stopping = True
        await self._end_tasks()
        self._drop_all()
        await self._stop_running()
        self._is_stopped = True

    async def _stop_running(self) -> None:
        await asyncio.to_thread(self._store.stop_listening)
        await self._runner.close()
        self._lease.stop()
        self.timers.close()

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

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
            self._on_room()
            return
        assert row.started_at is not None
        claimed = ClaimedRow(
            row.instance_id, row.run, row.workflow_name, row.status, row.claims, row.started_at, row.input
        )
        instance = self._load(claimed, given)
        if instance is not None:
            instance.begin()

    def hint(self) -> None:
        """There may be work: look now."""
        self._next_due_us = 0
        self._may_have_mail = True
        self._hint.set()

    def _on_hint_from_thread(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed
            self._loop.call_soon_threadsafe(self.hint)

    def _load(self, row: ClaimedRow, given: Arguments | None = None) -> LiveInstance | None:
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
        state = StateRow(row.instance_id, Status.SUSPENDED.value, None, None, now, None, None, encode_error(error))
        ticket = self.writer.record(_Parked(), None, state)
        self.writer.when_durable(ticket, lambda: self._listener.on_ended(state))

    def start_activity(self, instance: LiveInstance, operation: ActivityOperation) -> None:
        """See :class:`romancy.engine.instance.InstanceHost`."""
        self._runner.start(instance, operation)

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
        self._on_room()

    def _evict(self) -> None:
        """Put the instances to bed that have waited longest."""
        while len(self._waiting) > self._settings.max_hot_instances:
            _, instance = self._waiting.popitem(last=False)
            wake = instance.next_wake_us()
            instance.evict()
            if wake is not None and (self._next_due_us is None or wake < self._next_due_us):
                self._next_due_us = wake
                self._hint.set()

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
            instance = None if self._is_stopping else self._load(row, given)
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

    async def _look_for_mail(self) -> None:
        """Fetch what others have sent to instances of this worker, and claim those that nobody owns."""
        while self._may_have_mail and self.room > 0:
            self._may_have_mail = False
            deliveries, addressees = await _done(self._store.find_news(self.worker_id))
            for delivery in sorted(deliveries, key=in_order_of_asking):
                instance = self._live.get(delivery.instance_id)
                if instance is not None:
                    await self._in_callback(partial(instance.on_delivery, delivery))
            some = addressees[: max(self.room, 0)]
            if some:
                rows = await _done(self._store.claim_addressed(self.worker_id, self.clock.now_us(), some))
                await self._resume(rows)
                self._may_have_mail = True  # there may be more
        self._wants_room = self._wants_room or self._may_have_mail

    async def _clear_expired(self) -> None:
        if self._loop.time() - self._cleared_at >= CLEARING_INTERVAL_S:
            self._cleared_at = self._loop.time()
            while await _done(self._store.clear_expired(self.clock.now_us(), CLAIM_SIZE)) >= CLAIM_SIZE:
                pass

    def on_ended(self, instance: LiveInstance, state: StateRow | None) -> None:
        """See :class:`romancy.engine.instance.InstanceHost`."""
        self._ending.discard(instance.instance_id)
        if state is None:
            return
        self._listener.on_ended(state)
        if state.status == Status.SUSPENDED and state.error is None:
            self.hint()  # it may have been asked to end meanwhile

    def on_gone(self, instance: LiveInstance) -> None:
        """See :class:`romancy.engine.instance.InstanceHost`."""
        if self._live.get(instance.instance_id) is instance:
            del self._live[instance.instance_id]
        if instance.has_ended:
            self._ending.add(instance.instance_id)
        self._waiting.pop(instance.instance_id, None)
        self._on_room()

    def _on_room(self) -> None:
        """A place may have become free: go on with the claims that were waiting for one."""
        if self._wants_room and self.room > 0:
            self._wants_room = False
            self._hint.set()

    # -- looking for work --------------------------------------------------------------------------

    async def _forever(self, body: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await body()
            except FencedError as error:
                self.on_fenced(error)
                return
            except DatabaseError as error:
                logger.warning("worker %s can't look for work now: %s", self._settings.name, error)
                await asyncio.sleep(0.5)
            except Exception:
                logger.exception("worker %s failed in an unforeseen way while it looked for work", self._settings.name)
                await asyncio.sleep(0.5)

    async def _look_for_work(self) -> None:
        if self._store.has_unsure_claim:
            recovered = await _done(self._store.recover_claim(self.worker_id))
            self._claimed += recovered
        await self._resume_claimed()
        await self._scan()
        await self._clear_expired()
        next_scan = self._loop.time() + min(self._next_scan_wait_s(), self._settings.lease_ttl_s / 2)
        while True:
            await self._bury_the_gone()
            await self._take_over()
            await self._claim_due()
            await self._look_for_mail()
            wait_s = next_scan - self._loop.time()
            if wait_s <= 0:
                return
            if not self._may_have_mail or self.room <= 0:
                await self._sleep(min(wait_s, self._seconds_to_next_due(), self._seconds_to_gone_check()))

    def _next_scan_wait_s(self) -> float:
        """Where hints are not heard, look often while something is going on, and ever more rarely when it is not."""
        if not self._store.is_deaf:
            return SCAN_INTERVAL_S
        is_busy = self._seen_commits != self.writer.committed
        self._seen_commits = self.writer.committed
        self._scan_wait_s = SHORTEST_SCAN_INTERVAL_S if is_busy else min(2 * self._scan_wait_s, SCAN_INTERVAL_S)
        return self._scan_wait_s

    async def _sleep(self, wait_s: float) -> None:
        self._hint.clear()
        try:
            async with asyncio.timeout(max(wait_s, 0)):
                await self._hint.wait()
        except TimeoutError:
            return

    def _seconds_to_next_due(self) -> float:
        if self._next_due_us is None or self.room <= 0:
            return SCAN_INTERVAL_S
        return (self._next_due_us - self.clock.now_us()) / 1_000_000

    def _seconds_to_gone_check(self) -> float:
        here = host_identity()
        return GONE_CHECK_INTERVAL_S if any(row.host == here for row in self._others) else SCAN_INTERVAL_S

    async def _scan(self) -> None:
        """Look at the other workers and at the next due time."""
        rows, self._next_due_us, has_mail = await _done(self._store.scan())
        self._may_have_mail = self._may_have_mail or has_mail
        if all(row.worker_id != self.worker_id or row.state != "alive" for row in rows):
            raise FencedError(f"worker {self.worker_id} has lost its lease")
        self._others = [row for row in rows if row.worker_id != self.worker_id and row.state == "alive"]
        self._dead = {row.worker_id: row for row in rows if row.state == "dead"}
        now = self._lease_clock.now_us()
        for row in [row for row in self._others if row.lease_until < now]:
            await self._bury(row)

    async def _bury_the_gone(self) -> None:
        for row in [row for row in self._others if is_gone(row)]:
            await self._bury(row)

    async def _bury(self, row: WorkerRow) -> None:
        """Mark a worker dead; its commit in flight, if any, ends before that or fails after."""
        has_gone = is_gone(row)
        if await _done(self._store.bury(row.worker_id, self._lease_clock.now_us(), is_gone=has_gone)):
            # A restart after a crash is everyday life; a worker that fell silent is not.
            level = logging.INFO if has_gone else logging.WARNING
            logger.log(level, "worker %s (%s) is dead; taking over its instances", row.name, row.worker_id)
            self._dead[row.worker_id] = row
        self._others = [other for other in self._others if other.worker_id != row.worker_id]

    async def _take_over(self) -> None:
        """Claim the instances of dead workers, as far as there is room; the rest when there is."""
        while self._dead:
            if self.room <= 0:
                self._wants_room = True
                return
            dead_id = next(iter(self._dead))
            limit = min(CLAIM_SIZE, self.room)
            rows = await _done(self._store.claim_from(dead_id, self.worker_id, self.clock.now_us(), limit))
            if rows:
                await self._resume(rows)
            else:
                self._dead.pop(dead_id, None)
                self._next_due_us = await _done(self._store.next_due())

    async def _claim_due(self) -> None:
        """Claim what nobody owns and whose time has come, as far as there is room."""
        while self._next_due_us is not None and self._next_due_us <= self.clock.now_us():
            if self.room <= 0:
                self._wants_room = True
                return
            limit = min(CLAIM_SIZE, self.room)
            rows = await _done(self._store.claim_ready(self.worker_id, self.clock.now_us(), limit))
            # Noted first: they are this worker's, also when the next question finds no answer.
            self._claimed += rows
            if len(rows) < limit:
                self._next_due_us = await _done(self._store.next_due())
            now_us = self.clock.now_us()
            if not rows and self._next_due_us is not None and self._next_due_us <= now_us:
                # Somebody else is about to take them; asking without a pause would not be faster.
                self._next_due_us = now_us + LOCKED_WAIT_US
            await self._resume_claimed()

    async def _resume(self, rows: Sequence[ClaimedRow]) -> None:
        """Bring claimed instances back to where their history ends."""
        self._claimed += rows
        await self._resume_claimed()

    async def _resume_claimed(self) -> None:
        # They are this worker's already: what fails here, for the database does, is done again.
        while self._claimed:
            rows = self._claimed[:CLAIM_SIZE]
            pages = await _done(self._store.read_history([(r.instance_id, r.run, 0) for r in rows], HISTORY_PAGE))
            deliveries, waits = await _done(self._store.read_mail_of([row.instance_id for row in rows]))
            for row, page in zip(rows, pages, strict=True):
                instance = await self._in_callback(partial(self._load, row))
                if instance is not None:
                    its_deliveries = [mail for mail in deliveries if mail.instance_id == row.instance_id]
                    its_waits = [wait for wait in waits if wait.instance_id == row.instance_id]
                    if its_deliveries or its_waits:
                        instance.know_mail(its_deliveries, its_waits)
                    try:
                        await self._replay(instance, page)
                    except DatabaseError:
                        instance.drop()
                        raise
                    except Exception as error:
                        await self._in_callback(partial(instance.park, error))
                self._claimed.remove(row)

    async def _replay(self, instance: LiveInstance, page: list[HistoryRow]) -> None:
        while await self._in_callback(partial(instance.replay, page)):
            if len(page) < HISTORY_PAGE:
                await self._in_callback(instance.go_live)
                return
            wanted = [(instance.instance_id, instance.run, page[-1].seq)]
            (page,) = await _done(self._store.read_history(wanted, HISTORY_PAGE))

    async def _in_callback(self, function: Callable[[], T]) -> T:
        """Run workflow code from a plain callback of the loop, never inside a task's step."""
        done: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                result = function()
            except BaseException as error:
                if not done.done():
                    done.set_exception(error)
            else:
                if not done.done():
                    done.set_result(result)

        self._loop.call_soon(run)
        return await done

    async def _watch_changes(self) -> None:
        """Notice what other processes commit, by a look at the log file; only a change costs statements."""
        while True:
            await asyncio.sleep(CHANGE_CHECK_INTERVAL_S)
            if not self._store.has_changed() or not await _done(self._store.others_have_committed()):
                continue
            self._listener.on_foreign_change()
            self._may_have_mail = True
            self._hint.set()
            due = await _done(self._store.next_due())
            if due is not None and (self._next_due_us is None or due < self._next_due_us):
                self._next_due_us = due
                self._hint.set()


async def _done(future: Future[T]) -> T:
    return await asyncio.wrap_future(future)
