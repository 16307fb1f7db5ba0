"""What the engine asks of a database; the same for all of them but for a few methods that each one answers itself.

One thread writes, one reads, each on a driver connection of its own: the event loop never waits for the database, and
the lease is renewed whatever user code does to the loop.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from sqlalchemy import URL, ColumnElement, Connection, Engine
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.exc import IntegrityError

from romancy.clock import Clock, DatabaseClock
from romancy.errors import DatabaseError, FencedError, PacketTooLargeError
from romancy.model import HistoryEvent, HistoryKind, Instance, Status
from romancy.storage.again import Fork, Reruns, supersede
from romancy.storage.batch import Batch, Party, Written, run_batch
from romancy.storage.failures import (
    HistoryConflictError,
    NotOwnedError,
    database_error,
    is_beyond_use,
    is_driver_error,
    is_lost,
)
from romancy.storage.listener import Listener
from romancy.storage.lock import FreeLock, WriteLock
from romancy.storage.lookups import get_history, get_instance, get_outcomes
from romancy.storage.mail import SUSPEND, Delivery, Mail, Post, Receipt, Wait
from romancy.storage.mail_desk import (
    MailDesk,
    clear_expired,
    find_news,
    on_connection,
    on_link,
    open_channel,
    read_mail_of,
    slots_of,
)
from romancy.storage.rows import (
    Change,
    ClaimedRow,
    HistoryRow,
    ProgressRow,
    RunRow,
    StartRow,
    StateRow,
    SupersededRow,
    WorkerRow,
)
from romancy.storage.schema import history, instances, workers
from romancy.storage.statements import (
    MOST_ADDRESSEES,
    VALUE_BYTES,
    ManyRows,
    Prepared,
    bytes_of,
    insert_into,
    statements_for,
)
from romancy.storage.threads import Check, ConnectionThread, Job, Link, no_check
from romancy.storage.watchdog import Line, Watchdog

logger = logging.getLogger("romancy.storage")

T = TypeVar("T")

LONGEST_CLOSE_S = 5.0
_AT_REST = (Status.PENDING.value, Status.SUSPENDED.value)


class Store(ABC):
    """All that the engine asks of a database.

    Methods that return a ``concurrent.futures.Future`` may be called from any thread; they never block.

    Args:
        name: how messages call the database.
        dialect: its SQL; with a positional parameter style.
        workflow_names: the workflows that this app can run.
        mark: the driver's placeholder for a parameter.
        clock: the database's clock.
        server_time: what asks the server for its time.
        guard: see :class:`romancy.storage.statements.Statements`.

    Attributes:
        kind: ``sqlite``, ``postgresql`` or ``mysql``.
        savepoint_may_wait: whether a transaction can do without a savepoint until something in it must outlive a
            rollback: a failed statement fails all of it, and the connection knows.
        write_lock: who may write now; on databases with many writers, everybody.
        has_one_writer: whether an open transaction keeps all others from writing.
        workflow_clock: what workflows take for the time, and mail expires by; a test may put its own here.
        patience_s: how long a server may take for a statement of the engine's own.
        most_bytes: how long a statement's text may be, with its values; ``None`` where that is no concern.
        watchdog: what breaks connections under statements that take longer.
    """

    begin = "BEGIN"
    kind: str
    has_one_writer = False
    savepoint_may_wait = False
    patience_s = math.inf
    most_bytes: int | None = None
    watchdog: Watchdog | None = None

    def __init__(
        self,
        name: str,
        dialect: Dialect,
        workflow_names: Sequence[str],
        mark: str,
        clock: Clock,
        server_time: ColumnElement[Any],
        guard: ColumnElement[bool] | None = None,
    ) -> None:
        self.name = name
        self.mark = mark
        self.write_lock: WriteLock | FreeLock = FreeLock()
        self.clock = clock
        self.workflow_clock: Clock = clock
        self._workflow_names = tuple(workflow_names)
        self._statements = statements_for(dialect, self._workflow_names, server_time, guard)
        self._starts = ManyRows(insert_into(instances, StartRow._fields), len(StartRow._fields), mark=mark)
        self._history = ManyRows(insert_into(history, HistoryRow._fields), len(HistoryRow._fields), mark=mark)
        self._unsure_claim: int | None = None
        self._listener: Listener | None = None
        self._writer: ConnectionThread | None = None
        self._reader: ConnectionThread | None = None

    # -- what each database answers itself ---------------------------------------------------------

    @abstractmethod
    def connect(self) -> Link:
        """A new connection of the engine's own, with durable settings."""

    @abstractmethod
    def connect_first(self, migrate: bool) -> tuple[Link, str | None]:
        """Check the server's settings, and bring the tables up to date. Blocks.

        Returns:
            A connection as :meth:`connect` makes it, and the version of the tables that were there before.
        """

    @abstractmethod
    def url(self, *, is_async: bool) -> URL:
        """SQLAlchemy's URL of this database, with the driver for sessions of that kind."""

    @abstractmethod
    def session_options(self) -> dict[str, Any]:
        """Options for SQLAlchemy's engines behind activity sessions."""

    @abstractmethod
    def set_up_sessions(self, engine: Engine) -> None:
        """Give an engine behind activity sessions what its connections need."""

    @abstractmethod
    def begin_on(self, connection: Connection) -> Callable[[], None]:
        """Begin a transaction on a connection from the application's own engine, with what Romancy promises set.

        Returns:
            What is called after the transaction's end, so that the connection is again as it was.
        """

    @abstractmethod
    def set_up_reading(self, engine: Engine) -> None:
        """Give an engine behind queries what its connections need."""

    @abstractmethod
    def _insert_keyed(self, link: Link, rows: list[StartRow]) -> set[str]:
        """Insert the starts whose ids are new; returns the ids of those."""

    @abstractmethod
    def _update_states(self, link: Link, states: list[StateRow], worker_id: str) -> None:
        """Write the states of instances that this worker owns.

        Raises:
            NotOwnedError: one of them is not this worker's.
        """

    # -- opening and closing -----------------------------------------------------------------------

    def prepare(self, migrate: bool) -> str | None:
        """Check the server's settings, and bring the tables up to date, without opening the database. Blocks.

        Returns:
            The version of the tables that were there before.
        """
        link, found = self.connect_first(migrate)
        link.close()
        return found

    def open(self, migrate: bool) -> None:
        """Connect, check the server's settings and bring the tables up to date. Blocks.

        Raises:
            DatabaseError: it can't be opened, or is not fit for durable work.
        """
        try:
            first, _ = self.connect_first(migrate)
            self._writer = ConnectionThread("romancy-writer", self._connect_again, is_beyond_use, self.is_stale, first)
            self._writer.open().result()
            self._reader = ConnectionThread("romancy-reader", self._connect_again, is_beyond_use, self.is_stale)
            self._reader.open().result()
            self._reader.submit(self._ask_time).result()
        except DatabaseError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise database_error(error, self.name) from error
        except BaseException:
            self.close()
            raise

    def give_up(self) -> None:
        """Write nothing more: whoever waits for its turn fails."""
        self.write_lock.give_up()

    def close(self) -> None:
        """End both threads. Blocks until what was queued is done, or for a while; then it is given up."""
        threads = [thread for thread in (self._writer, self._reader) if thread is not None]
        self._writer = self._reader = None
        for thread in threads:
            thread.end()
        deadline = time.monotonic() + LONGEST_CLOSE_S
        if not all(thread.has_ended(deadline - time.monotonic()) for thread in threads):
            for thread in threads:
                thread.give_up()
            self.cut_all()
            deadline = time.monotonic() + LONGEST_CLOSE_S
            for thread in threads:
                thread.has_ended(deadline - time.monotonic())

    def cut_all(self) -> None:
        """Break all connections to the server: whoever waits for an answer gets an error instead."""
        if self.watchdog is not None:
            self.watchdog.cut_all()

    def line_of(self, connection: Connection) -> Line | None:
        """What is under a connection of SQLAlchemy's, where it can be broken from outside."""
        del connection
        return None

    def check_statement(self, sql: str, values: Sequence[Any]) -> None:
        """Refuse what the server would break the connection for.

        Raises:
            PacketTooLargeError: it is too long.
        """
        if self.most_bytes is not None and 4 * sum(map(_length, values)) + len(sql) > self.most_bytes:
            check_packet(len(sql) + bytes_of(values), self.most_bytes)

    def is_stale(self, link: Link) -> bool:
        """Whether a connection has lain idle for so long that its server may be about to end it."""
        del link
        return False

    # -- the group commit --------------------------------------------------------------------------

    def flush(self, batch: Batch, worker_id: str | None) -> Future[None]:
        """Commit a batch in one transaction, under the worker's fence.

        Rows that a constraint refuses are found and left out; the batch names their parties. After a connection was
        lost in the middle, nobody knows what is durable: the next attempt looks first.
        """

        def job(link: Link) -> None:
            if batch.is_unsure:
                self._leave_out_what_is_durable(link, batch, worker_id)
            try:
                run_batch(batch, lambda parties: self._write_parties(link, batch, parties, worker_id))
            except Exception as error:
                batch.is_unsure = batch.is_unsure or is_lost(error)
                raise
            if batch.is_unsure:
                self._acquit(link, batch)
            if batch.makes_work:
                self._tell_others(link)

        return self._write(job)

    def _write_parties(self, link: Link, batch: Batch, parties: list[Party], worker_id: str | None) -> Written:
        """Commit these parties' rows in one transaction, under the fence."""
        mail = [operation for party in parties for operation in party.mail]
        with self._transaction(link, slots_of(mail)):
            desk = self._desk(link)
            inserted: set[str] = set()
            for some in _run_by_run(parties):
                if any(party.needs_fence for party in some):
                    inserted |= self._write_rows(link, some, worker_id)
                for party in some:
                    for change in party.changes:
                        assert worker_id is not None
                        # Its state, which has been written, may have given the instance away.
                        owner = worker_id if party.state is None else party.state.owner
                        self._change_instance(link, change, owner)
            return Written(inserted, desk.handle(mail, is_repeated=batch.is_unsure) if mail else None)

    def _desk(self, link: Link) -> MailDesk:
        def run(sql: str, parameters: Sequence[Any] = ()) -> None:
            self._run_with_next(link, sql.replace("?", self.mark), parameters)

        now_us = self.workflow_clock.now_us()
        return MailDesk(on_link(link, self.mark), self.kind, now_us, self.most_bytes, run)

    def _write_rows(self, link: Link, parties: list[Party], worker_id: str | None) -> set[str]:
        """Write all rows but the mail, under the fence; returns the ids of the new keyed starts."""
        inserted: set[str] = set()
        if worker_id is not None:
            self._check_fence(link, worker_id, self._statements.fence)
        for sql, values, _ in self._starts.pieces([row for p in parties for row in p.starts], self.most_bytes):
            self._run_with_next(link, sql, values)
        keyed = [row for p in parties for row in p.keyed_starts]
        if keyed:
            inserted = self._insert_keyed(link, keyed)
        for sql, values, _ in self._history.pieces([row for p in parties for row in p.history], self.most_bytes):
            self._run_with_next(link, sql, values)
        states = [p.state for p in parties if p.state is not None]
        if states:
            assert worker_id is not None
            self._update_states(link, states, worker_id)
        return inserted

    def _change_instance(self, link: Link, change: Change, owner: str | None) -> None:
        mark = self.mark
        is_owned = f"owner = {mark}" if owner is not None else "owner IS NULL"
        owners = () if owner is None else (owner,)
        if isinstance(change, SupersededRow):
            supersede(on_link(link, mark), *change)
            return
        if isinstance(change, ProgressRow):
            sql = f"UPDATE {history.name} SET at = {mark}, result = {mark} "
            sql += f"WHERE instance_id = {mark} AND run = {mark} AND seq = {mark}"
            link.execute(sql, (change.at, change.details, *change[:3]))
            return
        if isinstance(change, RunRow):
            if change.run == 2:
                self._keep_first_input(link, change.instance_id)
            sql = (
                f"UPDATE {instances.name} SET run = {mark}, started_at = {mark}, source_hash = {mark}, input = {mark}, "
                f"updated_at = {mark}, status = '{Status.RUNNING.value}', ready_at = NULL, patches = NULL, "
                f"seed = NULL, claims = 0 "
                f"WHERE instance_id = {mark} AND run = {mark} AND {is_owned}"
            )
            values: tuple[Any, ...] = (
                *change[1:], change.started_at, change.instance_id, change.run - 1, *owners,
            )  # fmt: skip
        else:
            sql = f"UPDATE {instances.name} SET patches = {mark} WHERE instance_id = {mark} AND {is_owned}"
            values = (change.patches, change.instance_id, *owners)
        if link.execute(sql, values).rowcount != 1:
            raise NotOwnedError("an instance is no longer owned by this worker")

    def _keep_first_input(self, link: Link, instance_id: str) -> None:
        """A start that is repeated is compared with what the instance was started with."""
        mark = self.mark
        link.execute(
            f"UPDATE {history.name} SET result = (SELECT input FROM {instances.name} WHERE instance_id = {mark}) "
            f"WHERE instance_id = {mark} AND run = 1 AND kind = '{HistoryKind.WORKFLOW_RECURRED.value}'",
            (instance_id, instance_id),
        )

    def start_child(self, worker_id: str, row: StartRow) -> Future[tuple[str, str, str | None] | None]:
        """Insert a child with an id of the user's; where that is taken, the name, input and parent of who has it."""

        def job(link: Link) -> tuple[str, str, str | None] | None:
            with self._transaction(link):
                self._check_fence(link, worker_id, self._statements.fence)
                found: tuple[str, str, str | None] | None = link.execute(
                    *self._statements.read_start(instance_id=row.instance_id)
                ).fetchone()
                if found is None:
                    for sql, values, _ in self._starts.pieces([row]):
                        link.execute(sql, values)
            if found is None:
                self._tell_others(link)
            return found

        return self._write(job)

    def _leave_out_what_is_durable(self, link: Link, batch: Batch, worker_id: str | None) -> None:
        with self._transaction(link):
            if worker_id is not None:
                # Waits until whatever the lost connection left behind is over: that holds a lock on this row, too.
                self._check_fence(link, worker_id, self._statements.lock_worker)
            durable = [party for party in batch.waiting if self._is_durable(link, party)]
        self._note_durable(batch, durable)
        gone = {id(party) for party in durable}
        batch.waiting = [party for party in batch.waiting if id(party) not in gone]

    def _acquit(self, link: Link, batch: Batch) -> None:
        """What was refused because it was there already, from the attempt before, was not refused."""
        durable = [party for party, _ in batch.refused if self._is_durable(link, party)]
        self._note_durable(batch, durable)
        gone = {id(party) for party in durable}
        batch.refused = [(party, error) for party, error in batch.refused if id(party) not in gone]

    @staticmethod
    def _note_durable(batch: Batch, parties: list[Party]) -> None:
        for party in parties:
            batch.inserted.update(row.instance_id for row in party.keyed_starts)

    def _is_durable(self, link: Link, party: Party) -> bool:
        """Whether this party's rows are there: they stand or fall together, so one of them tells."""
        statements = self._statements
        for event in party.history:
            key = {"instance_id": event.instance_id, "run": event.run, "seq": event.seq}
            return link.execute(*statements.read_event(**key)).fetchone() is not None
        if party.state is not None:
            row = link.execute(*statements.read_state(instance_id=party.state.instance_id)).fetchone()
            return row is not None and StateRow._make(row[:-1]) == party.state
        # Mail alone: handled again, it finds what was done.
        starts = [*party.starts, *party.keyed_starts]
        return bool(starts) and all(self._is_start_ours(link, start) for start in starts)

    def _is_start_ours(self, link: Link, start: StartRow) -> bool:
        """Whether the instance with this id is the one that this start has made."""
        row = link.execute(*self._statements.read_state(instance_id=start.instance_id)).fetchone()
        return row is not None and (row[2] or start.owner, row[-1]) == (start.owner, start.created_at)

    def _check_fence(self, link: Link, worker_id: str, statement: Prepared) -> None:
        def check(_count: int, rows: Sequence[Any]) -> None:
            if not rows:
                raise fenced(worker_id)

        self._run_with_next(link, *statement(me=worker_id), check=check)

    @contextlib.contextmanager
    def _transaction(self, link: Link, slots: Sequence[int] = ()) -> Iterator[None]:
        """A transaction that holds these slots of the mail desk; it ends with the body."""
        self.write_lock.acquire()
        try:
            try:
                self._begin(link, slots)
                yield
                self._settle(link)
                link.execute("COMMIT")
            except BaseException as error:
                self._roll_back(link, error)
                raise
        finally:
            self.write_lock.release()

    def _begin(self, link: Link, slots: Sequence[int]) -> None:
        self._run_with_next(link, self.begin)
        self._lock(link, slots)

    def _lock(self, link: Link, slots: Sequence[int]) -> None:
        MailDesk(on_link(link, self.mark), self.kind, 0).lock_slots(slots)

    def _run_with_next(self, link: Link, sql: str, parameters: Sequence[Any] = (), check: Check = no_check) -> None:
        """Run a statement of a transaction whose result is only looked at: in one round trip with the next, if it may.

        Args:
            check: called, before the commit at the latest, with how many rows were affected, and with those found;
                refuses them by raising.
        """
        cursor = link.execute(sql, parameters)
        if check is not no_check:
            check(cursor.rowcount, cursor.fetchall())

    def _settle(self, link: Link) -> None:
        """Whatever :meth:`_run_with_next` was given to check has been run and checked after this."""
        del link

    def _roll_back(self, link: Link, error: BaseException) -> None:
        if not is_lost(error):
            link.execute("ROLLBACK")

    # -- workers and their leases ------------------------------------------------------------------

    def register(self, row: WorkerRow, started_at: int) -> Future[None]:
        """Add this worker, alive."""
        statement = self._statements.register(**row._asdict(), started_at=started_at)

        def job(link: Link) -> None:
            self._run(link, statement)

        return self._write(job)

    def renew(self, worker_id: str, lease_until: int) -> Future[bool]:
        """Lengthen the lease; ``False`` when it was lost."""
        statement = self._statements.renew(me=worker_id, lease_until=lease_until)

        def job(link: Link) -> bool:
            is_news = self._is_changed()
            is_alive = self._run(link, statement) == 1
            if not is_news:
                self.has_changed()  # that was us; should somebody else have been as quick, the next scan sees it
            return is_alive

        return self._write(job)

    def scan(self) -> Future[tuple[list[WorkerRow], int | None, bool]]:
        """All workers, the earliest time at which an instance without an owner may be claimed, and whether there is
        mail."""
        sql, values = self._statements.scan()

        def job(link: Link) -> tuple[list[WorkerRow], int | None, bool]:
            rows = link.execute(sql, values).fetchall()
            if not rows:
                return [], None, False
            *_, news, due, server_us = rows[0]
            self._note_time(server_us)
            return [WorkerRow(*row[:-3]) for row in rows], due, news is not None

        return self._read(job)

    def _ask_time(self, link: Link) -> None:
        self._note_time(link.execute(*self._statements.now()).fetchone()[0])

    def _note_time(self, server_us: int | None) -> None:
        if server_us is not None and isinstance(self.clock, DatabaseClock):
            self.clock.note(server_us)

    def next_due(self) -> Future[int | None]:
        """The earliest time at which an instance without an owner may be claimed."""
        sql, values = self._statements.next_due()
        return self._read(lambda link: link.execute(sql, values).fetchone()[0])

    def bury(self, worker_id: str, now: int, is_gone: bool) -> Future[bool]:
        """Mark a worker dead whose lease has run out, or whose process is known to be gone.

        Waits for a commit of that worker that is under way; one that comes later fails at its fence.
        """
        statement = self._statements.bury(worker_id=worker_id, now=now, is_gone=int(is_gone))
        return self._write(lambda link: self._run(link, statement) == 1)

    def claim_from(self, dead_id: str, me: str, now: int, limit: int) -> Future[list[ClaimedRow]]:
        """Take over instances of a dead worker.

        When none is left that this app can run, the others go back to everybody, and the dead worker's row goes.
        """
        statements = self._statements

        def claim(link: Link) -> list[ClaimedRow]:
            found = link.execute(*statements.find_of_dead(worker_id=dead_id, limit=limit)).fetchall()
            claimed = self._take(link, found, me, now, counted=1)
            if not claimed:
                link.execute(*statements.release(worker_id=dead_id, now=now))
                link.execute(*statements.forget_worker(worker_id=dead_id))
            return claimed

        return self._claim(me, now, claim)

    def claim_ready(self, me: str, now: int, limit: int) -> Future[list[ClaimedRow]]:
        """Take instances that nobody owns and whose time has come."""
        statements = self._statements

        def claim(link: Link) -> list[ClaimedRow]:
            found = link.execute(*statements.find_ready(now=now, limit=limit)).fetchall()
            return self._take(link, found, me, now, counted=0)

        return self._claim(me, now, claim)

    def claim_addressed(self, me: str, now: int, instance_ids: Sequence[str]) -> Future[list[ClaimedRow]]:
        """Take those of these instances, at most ``MOST_ADDRESSEES``, that nobody owns: they have mail."""
        statements = self._statements
        padded = [*instance_ids, *[instance_ids[0]] * (MOST_ADDRESSEES - len(instance_ids))]
        values = {f"id_{n}": instance_id for n, instance_id in enumerate(padded)}

        def claim(link: Link) -> list[ClaimedRow]:
            found = link.execute(*statements.find_addressed(**values)).fetchall()
            return self._take(link, found, me, now, counted=0)

        return self._claim(me, now, claim)

    def _claim(self, me: str, now: int, claim: Job[list[ClaimedRow]]) -> Future[list[ClaimedRow]]:
        def job(link: Link) -> list[ClaimedRow]:
            try:
                with self._transaction(link):
                    self._check_fence(link, me, self._statements.fence)
                    return claim(link)
            except Exception as error:
                if is_lost(error):
                    self._unsure_claim = now
                raise

        return self._write(job)

    @property
    def has_unsure_claim(self) -> bool:
        """Whether a connection was lost while instances were claimed; :meth:`recover_claim` finds out."""
        return self._unsure_claim is not None

    def recover_claim(self, me: str) -> Future[list[ClaimedRow]]:
        """What the claim has taken whose connection was lost, if anything."""
        statements, claimed_at = self._statements, self._unsure_claim

        def job(link: Link) -> list[ClaimedRow]:
            with self._transaction(link):
                self._check_fence(link, me, statements.lock_worker)
                rows = link.execute(*statements.find_claimed(me=me, now=claimed_at)).fetchall()
            self._unsure_claim = None
            return [ClaimedRow(*row) for row in rows]

        return self._write(job)

    def _take(self, link: Link, found: Sequence[Any], me: str, now: int, *, counted: int) -> list[ClaimedRow]:
        """Make instances, whose rows this transaction has locked, this worker's own."""
        if not found:
            return []
        rows = [ClaimedRow(*row) for row in found]
        mark = self.mark
        link.execute(
            f"UPDATE {instances.name} SET owner = {mark}, ready_at = NULL, "
            f"claims = claims + CASE WHEN status IN ('{Status.RUNNING.value}', '{Status.COMPENSATING.value}') "
            f"THEN {mark} ELSE 0 END, "
            f"status = CASE WHEN status IN ('{Status.PENDING.value}', '{Status.SUSPENDED.value}') "
            f"THEN '{Status.RUNNING.value}' ELSE status END, "
            f"started_at = COALESCE(started_at, {mark}), updated_at = {mark} "
            f"WHERE instance_id IN ({','.join([mark] * len(rows))})",
            (me, counted, now, now, *[row.instance_id for row in rows]),
        )
        return [
            row._replace(
                status=Status.RUNNING.value if row.status in _AT_REST else row.status,
                claims=row.claims + (counted if row.status in (Status.RUNNING.value, Status.COMPENSATING.value) else 0),
                started_at=now if row.started_at is None else row.started_at,
                is_fresh=row.started_at is None,
            )
            for row in rows
        ]

    def leave(self, worker_id: str, now: int) -> Future[int]:
        """Hand all instances of this worker back and remove it; returns how many were handed back."""
        statements = self._statements

        def job(link: Link) -> int:
            with self._transaction(link):
                # A worker that was buried meanwhile owns nothing: others may have taken its instances.
                released: int = link.execute(*statements.release(worker_id=worker_id, now=now)).rowcount
                link.execute(*statements.deregister(me=worker_id))
            if released:
                self._tell_others(link)
            return released

        return self._write(job)

    def resume(self, instance_id: str, now: int) -> Future[bool]:
        """Make a suspended instance claimable; ``False`` when it is not suspended.

        Requests to suspend it that came while it was suspended are over with that.
        """
        statement = self._statements.resume(instance_id=instance_id, now=now)

        def job(link: Link) -> bool:
            with self._transaction(link):
                is_resumed: bool = link.execute(*statement).rowcount == 1
                if is_resumed:
                    MailDesk(on_link(link, self.mark), self.kind, now).handle([Receipt(instance_id, 0, SUSPEND)])
            if is_resumed:
                self._tell_others(link)
            return is_resumed

        return self._write(job)

    def retry(self, instance_id: str, now: int) -> Future[None]:
        """Let a failed instance go on; see :meth:`romancy.storage.again.Reruns.retry`."""
        return self._rerun(lambda reruns: reruns.retry(instance_id, now))

    def fork(self, asked: Fork) -> Future[None]:
        """Make an instance with the history of another; see :meth:`romancy.storage.again.Reruns.fork`."""
        return self._rerun(lambda reruns: reruns.fork(asked))

    def _rerun(self, what: Callable[[Reruns], None]) -> Future[None]:
        def job(link: Link) -> None:
            with self._transaction(link):
                what(Reruns(on_link(link, self.mark), self.kind))
            self._tell_others(link)

        return self._write(job)

    # -- mail --------------------------------------------------------------------------------------

    def find_news(self, worker_id: str) -> Future[tuple[list[Delivery], list[str]]]:
        """Mail for this worker's instances that is not recorded yet; and instances without an owner that have some."""
        names = self._workflow_names
        return self._read(lambda link: find_news(on_link(link, self.mark), worker_id, names, MOST_ADDRESSEES))

    def read_mail_of(self, instance_ids: Sequence[str]) -> Future[tuple[list[Delivery], list[Wait]]]:
        """The deliveries and the open waits of these instances."""
        return self._read(lambda link: read_mail_of(on_link(link, self.mark), instance_ids))

    def open_channel(
        self, worker_id: str | None, channel: str, mode: str | None, subscriber: str | None
    ) -> Future[str | None]:
        """The channel's mode; where it has none yet, it gets this one. Then subscribes, if that is its mode."""

        def job(link: Link) -> str | None:
            with self._transaction(link):
                if worker_id is not None:
                    self._check_fence(link, worker_id, self._statements.fence)
                return open_channel(on_link(link, self.mark), self.kind, channel, mode, subscriber)

        if mode is None:
            return self._read(lambda link: open_channel(on_link(link, self.mark), self.kind, channel, None, None))
        return self._write(job)

    def clear_expired(self, now: int, limit: int) -> Future[int]:
        """Remove mail that has expired; returns how much."""

        def job(link: Link) -> int:
            with self._transaction(link):
                return clear_expired(on_link(link, self.mark), self.kind, now, limit)

        return self._write(job)

    # -- the outcome of a transactional activity ---------------------------------------------------

    def is_in_transaction(self, connection: Connection) -> bool:
        """Whether the server has a transaction open here. Asked only where savepoints may wait.

        Raises:
            DBAPIError: it has, and it has failed.
        """
        raise NotImplementedError

    def commit_in(
        self, connection: Connection, worker_id: str, event: HistoryRow, renew_until: int, outgoing: Sequence[Mail]
    ) -> Post | None:
        """Check the fence, write the outcome, send what goes with it, and commit the transaction that carries the
        user's rows; returns what became of the mail.

        Raises:
            FencedError: the worker lost its lease.
            HistoryConflictError: somebody else has recorded this event.
            IntegrityError: a constraint that is checked at the commit refused the user's rows.
        """
        try:
            self._record_in(connection, worker_id, event, renew_until)
        except IntegrityError as error:
            raise taken(event, error.orig) from error
        post = self._send_in(connection, outgoing) if outgoing else None
        connection.commit()
        return post

    def _record_in(self, connection: Connection, worker_id: str, event: HistoryRow, renew_until: int) -> None:
        """Check the fence and write the outcome."""
        del renew_until
        fence = workers.select().where(workers.c.worker_id == worker_id, workers.c.state == "alive")
        if connection.execute(fence.with_for_update(read=True)).first() is None:
            raise fenced(worker_id)
        connection.execute(history.insert().values(event._asdict()))

    def _send_in(self, connection: Connection, outgoing: Sequence[Mail]) -> Post:
        """Send, as the last thing before the commit, for it locks topics."""
        desk = MailDesk(on_connection(connection), self.kind, self.workflow_clock.now_us(), self.most_bytes)
        desk.lock(outgoing)
        return desk.handle(outgoing)

    def settle_event(self, worker_id: str, event: HistoryRow) -> Future[bool]:
        """Whether this outcome is durable, after a connection was lost while it was committed.

        If it is not, its place in history is taken, so that it never will be: the server may have its commit still to
        read, and would carry it out after it was asked.

        The future fails with ``FencedError`` when the worker has lost its lease meanwhile.
        """
        plug = event._replace(kind=HistoryKind.ACTIVITY_ATTEMPT_LOST.value, result=None, error=None)
        key = {"instance_id": event.instance_id, "run": event.run, "seq": event.seq}

        def job(link: Link) -> bool:
            with self._transaction(link):
                self._check_fence(link, worker_id, self._statements.lock_worker)
                found = link.execute(*self._statements.read_event(**key)).fetchone()
                if found is None:
                    for sql, values, _ in self._history.pieces([plug]):
                        link.execute(sql, values)
            return found is not None and found[0] != plug.kind

        return self._write(job)

    # -- reading -----------------------------------------------------------------------------------

    def read_history(self, wanted: Sequence[tuple[str, int, int]], limit: int) -> Future[list[list[HistoryRow]]]:
        """For each ``(instance_id, run, after_seq)`` the next recorded events, at most ``limit`` of them."""
        read: Prepared = self._statements.read_history

        def job(link: Link) -> list[list[HistoryRow]]:
            return [
                [
                    HistoryRow._make(row)
                    for row in link.execute(
                        *read(instance_id=instance_id, run=run, after=after, limit=limit)
                    ).fetchall()
                ]
                for instance_id, run, after in wanted
            ]

        return self._read(job)

    def get_instance(self, instance_id: str) -> Future[Instance | None]:
        """One instance, or ``None``."""
        return self._read(lambda link: get_instance(on_link(link, self.mark), instance_id))

    def get_history(self, instance_id: str, run: int | None) -> Future[list[HistoryEvent]]:
        """The recorded events of a run (by default the latest), in order."""
        return self._read(lambda link: get_history(on_link(link, self.mark), instance_id, run))

    def get_outcomes(self, instance_ids: Sequence[str]) -> Future[list[StateRow]]:
        """The state of those of these instances that have ended or are suspended."""
        return self._read(lambda link: get_outcomes(on_link(link, self.mark), instance_ids))

    def read_start(self, instance_id: str) -> Future[tuple[str, str] | None]:
        """The workflow's name, and the input that an instance was started with."""
        statement = self._statements.read_start(instance_id=instance_id)

        def job(link: Link) -> tuple[str, str] | None:
            row = link.execute(*statement).fetchone()
            return None if row is None else (row[0], row[1])

        return self._read(job)

    def has_changed(self) -> bool:
        """Whether anybody may have committed since the last call; costs no statement."""
        return False

    def others_have_committed(self) -> Future[bool]:
        """Whether another connection than the writer's has committed since the last call.

        For :meth:`has_changed` can't tell others' commits from the own ones, nor from one that is still under way: this
        waits for that.
        """
        raise NotImplementedError  # where changes are not noticed, nobody asks

    def _is_changed(self) -> bool:
        """What :meth:`has_changed` would say, without taking note of it."""
        return False

    # -- hints -------------------------------------------------------------------------------------

    def start_listening(self, on_hint: Callable[[], None]) -> None:
        """Call back, from a thread, whenever another process says that there is work."""
        self.stop_listening()
        self._listener = self._make_listener(on_hint)
        if self._listener is not None:
            self._listener.start()

    def stop_listening(self) -> None:
        """Call back no more. Blocks."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()

    @property
    def is_deaf(self) -> bool:
        """Whether other processes' hints are known not to come through, so that looking must do."""
        return self._listener is not None and self._listener.is_deaf

    def _make_listener(self, on_hint: Callable[[], None]) -> Listener | None:
        """What hears hints on this database, if anything does."""
        del on_hint
        return None

    def _hint(self, link: Link) -> None:
        """Wake those who listen."""
        del link

    def tell_others(self) -> Future[None]:
        """There is work that any worker may take, written by somebody else's transaction."""
        return self._write(self._tell_others)

    def _tell_others(self, link: Link) -> None:
        """There is work that any worker may take. What is written is durable already: failing here costs seconds."""
        try:
            self._hint(link)
        except Exception as error:
            if not is_driver_error(error):
                raise
            logger.debug("a hint could not be sent: %s", error)

    # -- jobs --------------------------------------------------------------------------------------

    def _run(self, link: Link, statement: tuple[str, tuple[Any, ...]]) -> int:
        # One statement is a transaction of its own.
        self.write_lock.acquire()
        try:
            count: int = link.execute(*statement).rowcount
            return count
        finally:
            self.write_lock.release()

    def _write(self, job: Job[T]) -> Future[T]:
        if self._writer is None:
            raise DatabaseError(f"database {self.name} is closed")
        return self._writer.submit(self._typed(job))

    def _read(self, job: Job[T]) -> Future[T]:
        if self._reader is None:
            raise DatabaseError(f"database {self.name} is closed")
        return self._reader.submit(self._typed(job))

    def _connect_again(self) -> Link:
        """A connection; after a loss made before the next job, which fails with a typed error where that can't be."""
        try:
            return self.connect()
        except Exception as error:
            if is_driver_error(error):
                raise database_error(error, self.name) from error
            raise

    def _typed(self, job: Job[T]) -> Callable[[Link], T]:
        def run(link: Link) -> T:
            try:
                return job(link)
            except DatabaseError:
                raise
            except Exception as error:
                if is_driver_error(error):
                    raise database_error(error, self.name) from error
                raise

        return run


def _run_by_run(parties: list[Party]) -> Iterator[list[Party]]:
    """Parties that can be written together: the state of a run comes after the change that has begun the run."""
    some: list[Party] = []
    begun: set[str] = set()
    for party in parties:
        if party.state is not None and party.state.instance_id in begun:
            yield some
            some, begun = [], set()
        some.append(party)
        begun |= {change.instance_id for change in party.changes if isinstance(change, RunRow)}
    yield some


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes) else VALUE_BYTES


def check_packet(size: int, most_bytes: int) -> None:
    """Refuse a statement of this many bytes where the server takes so many.

    Raises:
        PacketTooLargeError: it is too long.
    """
    if size > most_bytes:
        raise PacketTooLargeError(
            f"a row takes {size:,} bytes on its way to the server, which takes {most_bytes:,} at once: store large "
            f"data elsewhere and pass a reference, or raise the server's max_allowed_packet and restart the app"
        )


def taken(event: HistoryRow, error: BaseException | None) -> HistoryConflictError:
    """The error for an event whose place in history has been taken."""
    return HistoryConflictError(f"another worker has recorded event {event.seq}: {error}")


def fenced(worker_id: str) -> FencedError:
    """The error for a write by a worker that is no longer alive in the eyes of the others."""
    return FencedError(f"worker {worker_id} has lost its lease; its instances belong to others now")
