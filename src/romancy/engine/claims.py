"""Looks for work: claims what is free, due, addressed or orphaned, and brings it back to where its history ends.

What it is told from elsewhere are hints, which may be lost: it looks by itself every few seconds anyway.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Protocol, TypeVar

from romancy.clock import Clock
from romancy.engine.instance import LiveInstance, in_order_of_asking
from romancy.engine.process import host_identity, is_gone
from romancy.errors import DatabaseError, FencedError
from romancy.settings import Settings
from romancy.storage.rows import ClaimedRow, HistoryRow, WorkerRow
from romancy.storage.store import Store
from romancy.storage.writer import Writer

logger = logging.getLogger("romancy.worker")

T = TypeVar("T")

CLAIM_SIZE = 200
HISTORY_PAGE = 1_000
SCAN_INTERVAL_S = 5.0
SHORTEST_SCAN_INTERVAL_S = 0.1
LOCKED_WAIT_US = 20_000
GONE_CHECK_INTERVAL_S = 0.5
CHANGE_CHECK_INTERVAL_S = 0.02
CLEARING_INTERVAL_S = 300.0


class ClaimsHost(Protocol):
    """What the search needs of its worker."""

    worker_id: str
    clock: Clock
    writer: Writer

    @property
    def room(self) -> int:
        """How many further instances may run here now."""
        ...

    def live(self, instance_id: str) -> LiveInstance | None:
        """The instance, if it is in memory."""
        ...

    def load(self, row: ClaimedRow) -> LiveInstance | None:
        """Take an instance into memory; ``None``: it can't be, and is set aside."""
        ...

    def on_foreign_change(self) -> None:
        """Another process has written to the database."""
        ...

    def on_fenced(self, error: DatabaseError) -> None:
        """The worker has lost its lease."""
        ...

    async def close_spares(self) -> None:
        """A few seconds are over: close connections that only a crowd has needed."""
        ...


class Claims:
    """What a worker claims; see the module.

    Args:
        host: the worker.
        store: the database.
        lease_clock: the database's.
        settings: the app's options.
    """

    def __init__(self, host: ClaimsHost, store: Store, lease_clock: Clock, settings: Settings) -> None:
        self._host = host
        self._store = store
        self._lease_clock = lease_clock
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._others: list[WorkerRow] = []
        self._dead: dict[str, WorkerRow] = {}
        self._wants_room = False
        self._claimed: list[ClaimedRow] = []
        self._next_due_us: int | None = None
        self._may_have_mail = False
        self._cleared_at = 0.0
        self._scan_wait_s = SCAN_INTERVAL_S
        self._seen_commits = 0
        self._hint = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    # -- what the worker tells ---------------------------------------------------------------------

    def start(self) -> None:
        """Take over what dead workers left, and begin to look for work."""
        self._tasks = [
            self._loop.create_task(self._forever(self._look_for_work), name="romancy-claims"),
            self._loop.create_task(self._forever(self._watch_changes), name="romancy-changes"),
        ]

    async def stop(self) -> None:
        """Look no more."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def hint(self) -> None:
        """There may be work: look now."""
        self._next_due_us = 0
        self._may_have_mail = True
        self._hint.set()

    def note_due(self, due_us: int) -> None:
        """Something that nobody runs is due at that time."""
        if self._next_due_us is None or due_us < self._next_due_us:
            self._next_due_us = due_us
            self._hint.set()

    def on_room(self) -> None:
        """A place may have become free: go on with the claims that were waiting for one."""
        if self._wants_room and self._host.room > 0:
            self._wants_room = False
            self._hint.set()

    # -- looking -----------------------------------------------------------------------------------

    async def _forever(self, body: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await body()
            except FencedError as error:
                self._host.on_fenced(error)
                return
            except DatabaseError as error:
                logger.warning("worker %s can't look for work now: %s", self._settings.name, error)
                await asyncio.sleep(0.5)
            except Exception:
                logger.exception("worker %s failed in an unforeseen way while it looked for work", self._settings.name)
                await asyncio.sleep(0.5)

    async def _look_for_work(self) -> None:
        if self._store.has_unsure_claim:
            recovered = await _done(self._store.recover_claim(self._host.worker_id))
            self._claimed += recovered
        await self._resume_claimed()
        await self._scan()
        await self._clear_expired()
        await self._host.close_spares()
        next_scan = self._loop.time() + min(self._next_scan_wait_s(), self._settings.lease_ttl_s / 2)
        while True:
            await self._bury_the_gone()
            await self._take_over()
            await self._claim_due()
            await self._look_for_mail()
            wait_s = next_scan - self._loop.time()
            if wait_s <= 0:
                return
            if not self._may_have_mail or self._host.room <= 0:
                await self._sleep(min(wait_s, self._seconds_to_next_due(), self._seconds_to_gone_check()))

    async def _watch_changes(self) -> None:
        """Notice what other processes commit, by a look at the log file; only a change costs statements."""
        while True:
            await asyncio.sleep(CHANGE_CHECK_INTERVAL_S)
            if not self._store.has_changed() or not await _done(self._store.others_have_committed()):
                continue
            self._host.on_foreign_change()
            self._may_have_mail = True
            self._hint.set()
            due = await _done(self._store.next_due())
            if due is not None:
                self.note_due(due)

    def _next_scan_wait_s(self) -> float:
        """Where hints are not heard, look often while something is going on, and ever more rarely when it is not."""
        if not self._store.is_deaf:
            return SCAN_INTERVAL_S
        is_busy = self._seen_commits != self._host.writer.committed
        self._seen_commits = self._host.writer.committed
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
        if self._next_due_us is None or self._host.room <= 0:
            return SCAN_INTERVAL_S
        return (self._next_due_us - self._host.clock.now_us()) / 1_000_000

    def _seconds_to_gone_check(self) -> float:
        here = host_identity()
        return GONE_CHECK_INTERVAL_S if any(row.host == here for row in self._others) else SCAN_INTERVAL_S

    # -- other workers -----------------------------------------------------------------------------

    async def _scan(self) -> None:
        """Look at the other workers and at the next due time."""
        rows, self._next_due_us, has_mail = await _done(self._store.scan())
        self._may_have_mail = self._may_have_mail or has_mail
        if all(row.worker_id != self._host.worker_id or row.state != "alive" for row in rows):
            raise FencedError(f"worker {self._host.worker_id} has lost its lease")
        self._others = [row for row in rows if row.worker_id != self._host.worker_id and row.state == "alive"]
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
            if self._host.room <= 0:
                self._wants_room = True
                return
            dead_id = next(iter(self._dead))
            limit = min(CLAIM_SIZE, self._host.room)
            rows = await _done(self._store.claim_from(dead_id, self._host.worker_id, self._host.clock.now_us(), limit))
            if rows:
                await self._resume(rows)
            else:
                self._dead.pop(dead_id, None)
                self._next_due_us = await _done(self._store.next_due())

    # -- what nobody owns --------------------------------------------------------------------------

    async def _claim_due(self) -> None:
        """Claim what nobody owns and whose time has come, as far as there is room."""
        while self._next_due_us is not None and self._next_due_us <= self._host.clock.now_us():
            if self._host.room <= 0:
                self._wants_room = True
                return
            limit = min(CLAIM_SIZE, self._host.room)
            rows = await _done(self._store.claim_ready(self._host.worker_id, self._host.clock.now_us(), limit))
            # Noted first: they are this worker's, also when the next question finds no answer.
            self._claimed += rows
            if len(rows) < limit:
                self._next_due_us = await _done(self._store.next_due())
            now_us = self._host.clock.now_us()
            if not rows and self._next_due_us is not None and self._next_due_us <= now_us:
                # Somebody else is about to take them; asking without a pause would not be faster.
                self._next_due_us = now_us + LOCKED_WAIT_US
            await self._resume_claimed()

    async def _look_for_mail(self) -> None:
        """Fetch what others have sent to instances of this worker, and claim those that nobody owns."""
        while self._may_have_mail and self._host.room > 0:
            self._may_have_mail = False
            deliveries, addressees = await _done(self._store.find_news(self._host.worker_id))
            for delivery in sorted(deliveries, key=in_order_of_asking):
                instance = self._host.live(delivery.instance_id)
                if instance is not None:
                    await self._in_callback(partial(instance.on_delivery, delivery))
            some = addressees[: max(self._host.room, 0)]
            if some:
                rows = await _done(self._store.claim_addressed(self._host.worker_id, self._host.clock.now_us(), some))
                await self._resume(rows)
                self._may_have_mail = True  # there may be more
        self._wants_room = self._wants_room or self._may_have_mail

    async def _clear_expired(self) -> None:
        if self._loop.time() - self._cleared_at >= CLEARING_INTERVAL_S:
            self._cleared_at = self._loop.time()
            while await _done(self._store.clear_expired(self._host.clock.now_us(), CLAIM_SIZE)) >= CLAIM_SIZE:
                pass

    # -- bringing back -----------------------------------------------------------------------------

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
                instance = await self._in_callback(partial(self._host.load, row))
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


async def _done(future: Future[T]) -> T:
    return await asyncio.wrap_future(future)
