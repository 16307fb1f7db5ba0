"""Group commit: all instances of a process hand their rows here, and each commit carries whatever waits.

One batch is in flight at a time. While it is being flushed the next one fills; the longer a flush takes, the more
the next one carries. A batch that fails is tried again whole; a row that the database refuses fails alone.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextvars import Context
from typing import Protocol

from romancy.errors import (
    AppNotRunningError,
    DatabaseCorruptError,
    DatabaseError,
    DatabaseReadOnlyError,
    FencedError,
    SchemaError,
)
from romancy.storage.batch import Batch, Member, OutsideParty, Party
from romancy.storage.mail import Mail, Operation, Post
from romancy.storage.rows import Change, HistoryRow, StartRow, StateRow

logger = logging.getLogger("romancy.storage")

MAX_WAITING_ROWS = 20_000
MUCH = 128
"""So many rows are worth a commit of their own, if the database works while this thread does."""
MAX_RETRY_WAIT_S = 1.0
HOPELESS = (DatabaseCorruptError, DatabaseReadOnlyError, SchemaError)
"""Errors that waiting does not mend: the worker stops, its instances stay as they were."""


class Recorder:
    """Somebody whose rows go through the writer; keeps its place in the open batch.

    Attributes:
        ticket: the number of the batch that holds its latest row; durable once ``writer.committed`` reaches it.
    """

    __slots__ = ("party", "ticket")

    def __init__(self) -> None:
        self.ticket = 0
        self.party: Party | None = None

    def on_refused(self, error: DatabaseError) -> None:
        """See :class:`romancy.storage.batch.Member`."""
        raise NotImplementedError


class Posting:
    """Mail from outside on its way, and who waits for it."""

    __slots__ = ("future", "mail_id")

    def __init__(self, mail_id: str, future: asyncio.Future[bool]) -> None:
        self.mail_id = mail_id
        self.future = future

    def on_refused(self, error: DatabaseError) -> None:
        """Tell the caller."""
        self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Tell the caller, unless it has gone."""
        if not self.future.done():
            self.future.set_exception(error)

    def settle(self, batch: Batch) -> None:
        """The batch is durable: say whether the mail counts, or was known already."""
        if not self.future.done():
            self.future.set_result(all(self.mail_id not in post.repeated for post in batch.posts))


class Start:
    """A start on its way: who waits for it, and who acts on it."""

    __slots__ = ("_on_settled", "future", "is_keyed", "row")

    def __init__(
        self, row: StartRow, is_keyed: bool, on_settled: Callable[[bool], None], future: asyncio.Future[bool]
    ) -> None:
        self.row = row
        self.is_keyed = is_keyed
        self._on_settled: Callable[[bool], None] | None = on_settled
        self.future = future

    def on_refused(self, error: DatabaseError) -> None:
        """Tell the caller."""
        self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Tell the caller, unless it has gone."""
        self._settle(False)
        if not self.future.done():
            self.future.set_exception(error)

    def succeed(self, is_new: bool) -> None:
        """The instance is durable; go on with it."""
        self._settle(is_new)
        if not self.future.done():
            self.future.set_result(is_new)

    def settle(self, batch: Batch) -> None:
        """The batch is durable."""
        if self.future.done() and not self.future.cancelled():
            return
        is_new = not self.is_keyed or self.row.instance_id in batch.inserted
        # Of several starts of one id in a batch, the first has made the instance.
        batch.inserted.discard(self.row.instance_id)
        self.succeed(is_new)

    def _settle(self, is_new: bool) -> None:
        on_settled, self._on_settled = self._on_settled, None
        if on_settled is not None:
            on_settled(is_new)


class BatchStore(Protocol):
    """What the writer needs of a database.

    Attributes:
        works_beside: whether a flush leaves this process alone meanwhile.
    """

    works_beside: bool

    def look(self) -> None:
        """See whether a flush has ended that works beside this process; if so, its future is done now."""
        ...

    def flush(self, batch: Batch, worker_id: str | None) -> Future[None]:
        """Commit a batch under the worker's fence; never ends before it returns."""
        ...


class Writer:
    """The group commit of one app; lives on the app's event loop.

    Args:
        store: where batches go.
        worker_id: whose fence every batch checks; ``None`` in an app without a worker.
        on_stopped: called once when no further write is possible: the lease was lost, or the database is
            beyond hope.
        on_post: called with what became of the mail of a durable batch.

    Attributes:
        committed: the number of the last durable batch.
    """

    def __init__(
        self,
        store: BatchStore,
        worker_id: str | None,
        on_stopped: Callable[[DatabaseError], None],
        on_post: Callable[[Post], None] = lambda post: None,
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._on_stopped = on_stopped
        self._on_post = on_post
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._open = Batch(1)
        self._in_flight: Batch | None = None
        self._is_scheduled = False
        self._hurry_at = MUCH
        self._failures = 0
        self._callbacks: list[Callable[[], None]] = []
        self._flight_callbacks: list[Callable[[], None]] = []
        self._starts: list[Start | Posting] = []
        self._flight_starts: list[Start | Posting] = []
        self._room: list[asyncio.Future[None]] = []
        self._idle: list[asyncio.Future[None]] = []
        self.committed = 0
        self.stopped_by: DatabaseError | None = None

    @property
    def waiting_rows(self) -> int:
        """How many rows the next batch has so far."""
        return self._open.row_count

    # -- handing rows over -------------------------------------------------------------------------

    def record(self, recorder: Recorder, event: HistoryRow | None, state: StateRow | None = None) -> int:
        """Queue rows of one instance; returns the ticket that :meth:`when_durable` takes."""
        batch = self._open
        party = recorder.party
        if party is None or recorder.ticket != batch.number:
            party = self._party_of(recorder)
        if event is not None:
            if party.history:
                party.history.append(event)
            else:
                party.history = [event]
        if state is not None:
            party.state = state
            if state.ready_at == 0:
                batch.makes_work = True
        batch.row_count += 1
        if self._in_flight is None:
            self._schedule()
        return batch.number

    def record_mail(self, recorder: Recorder, operations: Sequence[Operation], starts: Sequence[StartRow] = ()) -> int:
        """Queue what an instance sends, waits for and has received, and children that it starts."""
        batch = self._open
        party = self._party_of(recorder)
        if operations:
            party.mail = [*party.mail, *operations] if party.mail else list(operations)
        if starts:
            party.starts = [*party.starts, *starts]
            batch.makes_work = True
        batch.row_count += len(operations) + len(starts)
        self._schedule()
        return batch.number

    def record_change(self, recorder: Recorder, change: Change) -> int:
        """Queue another change of an instance."""
        party = self._party_of(recorder)
        party.changes = [*party.changes, change]
        self._open.row_count += 1
        self._schedule()
        return self._open.number

    def _party_of(self, recorder: Recorder) -> Party:
        batch = self._open
        party = recorder.party
        if recorder.ticket != batch.number or party is None:
            recorder.ticket = batch.number
            party = recorder.party = Party(recorder)
            batch.waiting.append(party)
        return party

    async def post(self, mail: Mail) -> bool:
        """Send from outside; returns, once it is durable, whether it counts: ``False`` for one that was sent before.

        A caller that is cancelled meanwhile doesn't take it back.

        Raises:
            DatabaseError: the database can't take it now; nothing was stored.
        """
        await self._wait_for_room()
        self._check_open()
        posting = Posting(mail.mail_id, self._loop.create_future())
        party = OutsideParty(posting)
        party.mail = [mail]
        self._open.waiting.append(party)
        self._open.row_count += 1
        self._starts.append(posting)
        self._schedule()
        return await posting.future

    async def _wait_for_room(self) -> None:
        while self._open.row_count >= MAX_WAITING_ROWS and self.stopped_by is None:
            waiter = self._loop.create_future()
            self._room.append(waiter)
            await waiter

    async def start(self, row: StartRow, is_keyed: bool, on_settled: Callable[[bool], None]) -> bool:
        """Store a new instance; returns, once it is durable, whether it is new.

        A caller that is cancelled meanwhile doesn't undo the start.

        Args:
            row: the instance.
            is_keyed: whether the id came from the user, so that an existing instance is no fault.
            on_settled: called once, with whether this start has made a new, durable instance.

        Raises:
            DatabaseError: the database can't take it now; nothing was stored.
        """
        if self._open.row_count >= MAX_WAITING_ROWS:
            try:
                await self._wait_for_room()
            except asyncio.CancelledError:
                on_settled(False)
                raise
        if self.stopped_by is not None:
            on_settled(False)
        self._check_open()
        start = Start(row, is_keyed, on_settled, self._loop.create_future())
        party = Party(start)
        if is_keyed:
            party.keyed_starts = [row]
        else:
            party.starts = [row]
        self._open.waiting.append(party)
        self._open.makes_work = self._open.makes_work or row.owner is None
        self._open.row_count += 1
        self._starts.append(start)
        self._schedule()
        return await start.future

    def when_durable(self, ticket: int, callback: Callable[[], None]) -> None:
        """Call back once the batch with this number is durable (at once if it is)."""
        if ticket <= self.committed:
            callback()
        elif ticket == self._open.number:
            self._callbacks.append(callback)
        else:
            self._flight_callbacks.append(callback)

    async def drained(self) -> None:
        """Wait until all that was handed over is durable, or the writer has stopped."""
        while self.stopped_by is None and (self._in_flight is not None or self._open.waiting):
            waiter = self._loop.create_future()
            self._idle.append(waiter)
            await waiter

    def stop(self, error: DatabaseError) -> None:
        """Write nothing more; what waits is given up, and its waiters get the error."""
        if self.stopped_by is not None:
            return
        self.stopped_by = error
        for start in self._flight_starts + self._starts:
            start.fail(error)
        self._flight_starts, self._starts = [], []
        self._callbacks, self._flight_callbacks = [], []
        self._open.waiting.clear()
        self._release(self._room)
        self._release(self._idle)
        self._on_stopped(error)

    def _check_open(self) -> None:
        if self.stopped_by is not None:
            raise AppNotRunningError(f"nothing can be stored: {self.stopped_by}") from self.stopped_by

    # -- flushing ----------------------------------------------------------------------------------

    def hurry(self) -> None:
        """Send what waits, if it's much and nothing is on its way, before more is done: so that of many instances, all
        at the same point, some go on while the database writes what the others have done.

        Called only when nobody has more to add to what belongs together.
        """
        count = self._open.row_count
        if count < self._hurry_at or not self._store.works_beside:
            return
        if self._in_flight is None:
            self._seal()
        else:
            # The loop hears of an answer only when it has done all that was ready, and that may be much.
            self._hurry_at = count + MUCH
            self._store.look()

    def _schedule(self) -> None:
        # Not at once: the callbacks that are ready in this turn of the loop add their rows first.
        if self._in_flight is None and not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._seal)

    def _seal(self) -> None:
        self._is_scheduled = False
        if self._in_flight is not None or self.stopped_by is not None or not self._open.waiting:
            return
        batch = self._open
        self._open = Batch(batch.number + 1)
        self._in_flight = batch
        self._hurry_at = max(MUCH, batch.row_count)
        self._flight_callbacks, self._callbacks = self._callbacks, []
        self._flight_starts, self._starts = self._starts, []
        self._send(batch)

    def _send(self, batch: Batch) -> None:
        if self.stopped_by is not None:
            return
        try:
            outcome = self._store.flush(batch, self._worker_id)
        except Exception as error:
            # Who has caused it, by the last row or the first, is in the middle of something else. It's nobody's alone.
            Context().run(self._loop.call_soon, self._flushed, batch, error)
            return
        outcome.add_done_callback(lambda done: self._post(batch, done))

    def _post(self, batch: Batch, done: Future[None]) -> None:
        """From the store's thread, if it was one, back to the loop."""
        if self._is_on_loop():
            self._flushed(batch, done.exception())
            return
        try:
            self._loop.call_soon_threadsafe(self._flushed, batch, done.exception())
        except RuntimeError:
            logger.debug("the event loop closed before a flush ended")

    def _is_on_loop(self) -> bool:
        """Whether this is a callback of the loop; not one of its tasks, for instances enter tasks of their own."""
        if threading.get_ident() != self._thread_id:
            return False
        try:
            return asyncio.current_task() is None
        except RuntimeError:  # the loop does not run
            return False

    def _flushed(self, batch: Batch, error: BaseException | None) -> None:
        if self.stopped_by is not None:
            return
        if error is not None:
            self._retry_or_stop(batch, error)
            return
        self._failures = 0
        self.committed = batch.number
        for party, _ in batch.refused:
            self._take_back(party.member)
        for party, refusal in batch.refused:
            party.member.on_refused(refusal)
        callbacks, starts = self._flight_callbacks, self._flight_starts
        self._flight_callbacks, self._flight_starts = [], []
        self._in_flight = None
        self._hurry_at = MUCH
        # The next batch is on its way before this one's consequences are worked out.
        self._seal()
        for post in batch.posts:
            self._on_post(post)
        for start in starts:
            start.settle(batch)
        for callback in callbacks:
            callback()
        if self._open.row_count < MAX_WAITING_ROWS:
            self._release(self._room)
        if self._in_flight is None and not self._open.waiting:
            self._release(self._idle)

    def _take_back(self, member: Member) -> None:
        """What came after refused rows is not written, either; but for what the member says when it hears of it."""
        self._open.waiting = [party for party in self._open.waiting if party.member is not member]
        if isinstance(member, Recorder):
            member.party = None

    def _retry_or_stop(self, batch: Batch, error: BaseException) -> None:
        if not isinstance(error, DatabaseError):
            logger.error("a flush failed in an unforeseen way", exc_info=error)
            failure = DatabaseError(f"a flush failed in an unforeseen way: {error!r}")
            failure.__cause__ = error
            error = failure
        if isinstance(error, (FencedError, *HOPELESS)):
            self.stop(error)
            return
        self._failures += 1
        wait_s = min(0.01 * 2**self._failures, MAX_RETRY_WAIT_S)
        logger.warning("a flush failed and is tried again in %.2f s: %s", wait_s, error)
        self._fail_starts(batch, error)
        self._loop.call_later(wait_s, self._send, batch)

    def _fail_starts(self, batch: Batch, error: DatabaseError) -> None:
        """Callers of start hear of the error now, and may try again; what the engine recorded waits.

        Not so after a connection was lost in the middle: those starts may be durable, and their callers wait for the
        truth.
        """
        for start in self._starts:
            start.fail(error)
        self._starts = []
        self._leave_out_starts(self._open)
        if batch.is_unsure:
            return
        not_durable = {id(party.member) for party in batch.waiting}
        for start in self._flight_starts:
            if id(start) in not_durable:
                start.fail(error)
        self._flight_starts = [start for start in self._flight_starts if id(start) not in not_durable]
        self._leave_out_starts(batch)

    @staticmethod
    def _leave_out_starts(batch: Batch) -> None:
        batch.waiting = [party for party in batch.waiting if not isinstance(party.member, Start | Posting)]

    @staticmethod
    def _release(waiters: list[asyncio.Future[None]]) -> None:
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        waiters.clear()
