"""SQLite: one thread that writes, one that reads, and the statements run straight on the driver."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.dialects import sqlite as sqlite_dialect

from romancy.errors import DatabaseError, FencedError, SchemaError
from romancy.storage.address import SqliteAddress
from romancy.storage.batch import Batch, Party, run_batch
from romancy.storage.failures import database_error
from romancy.storage.lock import WriteLock
from romancy.storage.migrate import ensure_schema
from romancy.storage.rows import ClaimedRow, HistoryRow, WorkerRow
from romancy.storage.statements import Prepared, Statements

logger = logging.getLogger("romancy.storage")

T = TypeVar("T")

MINIMUM_SQLITE = (3, 35, 0)
BUSY_TIMEOUT_S = 5.0
PAGES_BETWEEN_CHECKPOINTS = 4_000


class ConnectionThread:
    """A driver connection that lives on a thread of its own and runs jobs in order.

    A job's outcome is set on a ``concurrent.futures.Future``.
    """

    def __init__(self, name: str, connect: Callable[[], sqlite3.Connection]) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[sqlite3.Connection], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._connect = connect
        self._opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def open(self) -> Future[None]:
        """Start the thread and connect."""
        self._thread.start()
        return self._opened

    def submit(self, job: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """Queue a job."""
        outcome: Future[T] = Future()
        self._jobs.put((outcome, job))
        return outcome

    def close(self) -> None:
        """Let the queued jobs end, then close the connection and the thread."""
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            connection = self._connect()
        except BaseException as error:
            self._opened.set_exception(error)
            return
        self._opened.set_result(None)
        while (item := self._jobs.get()) is not None:
            outcome, job = item
            if not outcome.set_running_or_notify_cancel():
                continue
            try:
                result = job(connection)
            except BaseException as error:
                outcome.set_exception(error)
            else:
                outcome.set_result(result)
            del item, outcome, job
        connection.close()


class SqliteStore:
    """All that the engine asks of a SQLite database.

    Methods that return a ``concurrent.futures.Future`` may be called from any thread; they never block.

    Args:
        address: where the database lives.
        workflow_names: the workflows that this app can run.
        busy_timeout_s: how long to wait for other processes' write transactions before an error.
    """

    def __init__(
        self, address: SqliteAddress, workflow_names: Sequence[str], busy_timeout_s: float = BUSY_TIMEOUT_S
    ) -> None:
        self.address = address
        self.write_lock = WriteLock()
        self.busy_timeout_s = busy_timeout_s
        self._statements = Statements(sqlite_dialect.dialect(paramstyle="qmark"), workflow_names)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.path = address.path
        self._writer: ConnectionThread | None = None
        self._reader: ConnectionThread | None = None
        self._seen_change: tuple[int, int] = (0, 0)
        self.own_writes = 0

    # -- opening and closing -----------------------------------------------------------------------

    def open(self, migrate: bool) -> None:
        """Connect, check the server's settings and bring the tables up to date. Blocks.

        Raises:
            DatabaseError: it can't be opened, or is not fit for durable work.
        """
        if sqlite3.sqlite_version_info < MINIMUM_SQLITE:
            raise DatabaseError(f"SQLite {sqlite3.sqlite_version} is too old: Python must be built with 3.35 or newer")
        if self.address.is_memory:
            self._folder = tempfile.TemporaryDirectory(prefix="romancy-", dir=_memory_folder())
            self.path = str(Path(self._folder.name) / "memory.db")
        try:
            ensure_schema(self.path, self.connect, migrate=migrate)
            self._writer = ConnectionThread("romancy-writer", self.connect)
            self._writer.open().result()
            self._reader = ConnectionThread("romancy-reader", self.connect)
            self._reader.open().result()
        except sqlite3.Error as error:
            self.close()
            raise database_error(error, str(self.address)) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End both threads. Blocks until what was queued is done."""
        for thread in (self._writer, self._reader):
            if thread is not None:
                thread.close()
        self._writer = self._reader = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def connect(self) -> sqlite3.Connection:
        """A new connection with durable settings."""
        connection = sqlite3.connect(
            self.path,
            timeout=self.busy_timeout_s,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )
        try:
            prepare_connection(connection, is_durable=not self.address.is_memory)
        except BaseException:
            connection.close()
            raise
        return connection

    # -- the group commit --------------------------------------------------------------------------

    def flush(self, batch: Batch, worker_id: str | None, renew_until: int | None) -> Future[None]:
        """Commit a batch in one transaction, under the worker's fence.

        Rows that a constraint refuses are found and left out; the batch names their parties.
        """

        def job(connection: sqlite3.Connection) -> None:
            run_batch(batch, lambda parties: self._commit(connection, parties, worker_id, renew_until))

        return self._write(job)

    def _commit(
        self,
        connection: sqlite3.Connection,
        parties: list[Party],
        worker_id: str | None,
        renew_until: int | None,
    ) -> set[str]:
        """One transaction with these parties' rows; returns the ids of the keyed starts that were inserted."""
        statements = self._statements
        inserted: set[str] = set()
        with self._transaction(connection):
            if worker_id is not None:
                self._check_fence(connection, worker_id, renew_until)
            for sql, values, _ in statements.starts.pieces([row for p in parties for row in p.starts]):
                connection.execute(sql, values)
            for sql, values, _ in statements.keyed_starts.pieces([row for p in parties for row in p.keyed_starts]):
                inserted.update(row[0] for row in connection.execute(sql, values))
            for sql, values, _ in statements.history.pieces([row for p in parties for row in p.history]):
                connection.execute(sql, values)
            states = [(*p.state, worker_id) for p in parties if p.state is not None]
            for sql, values, size in statements.states.pieces(states):
                if connection.execute(sql, values).rowcount != size:
                    raise sqlite3.IntegrityError("an instance is no longer owned by this worker")
        return inserted

    def _check_fence(self, connection: sqlite3.Connection, worker_id: str, renew_until: int | None) -> None:
        statements = self._statements
        if renew_until is None:
            alive = connection.execute(*statements.fence(me=worker_id)).fetchone() is not None
        else:
            alive = connection.execute(*statements.renew(me=worker_id, lease_until=renew_until)).rowcount == 1
        if not alive:
            raise FencedError(f"worker {worker_id} has lost its lease; its instances belong to others now")

    @contextlib.contextmanager
    def _transaction(self, connection: sqlite3.Connection) -> Iterator[None]:
        self.write_lock.acquire()
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                connection.execute("COMMIT")
            except BaseException:
                # A full disk may have ended the transaction already.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        finally:
            self.write_lock.release()

    # -- workers and their leases ------------------------------------------------------------------

    def register(self, row: WorkerRow, started_at: int) -> Future[None]:
        """Add this worker, alive."""
        statement = self._statements.register(**row._asdict(), started_at=started_at)

        def job(connection: sqlite3.Connection) -> None:
            self._run(connection, statement)

        return self._write(job)

    def renew(self, worker_id: str, lease_until: int) -> Future[bool]:
        """Lengthen the lease; ``False`` when it was lost."""
        statement = self._statements.renew(me=worker_id, lease_until=lease_until)

        def job(connection: sqlite3.Connection) -> bool:
            is_alive = self._run(connection, statement) == 1
            self.has_changed()  # that was us; should somebody else have been as quick, the next scan sees it
            return is_alive

        return self._write(job)

    def scan(self) -> Future[tuple[list[WorkerRow], int | None]]:
        """All workers, and the earliest time at which an instance without an owner may be claimed."""
        sql, values = self._statements.scan()

        def job(connection: sqlite3.Connection) -> tuple[list[WorkerRow], int | None]:
            rows = connection.execute(sql, values).fetchall()
            due = rows[0][-1] if rows else None
            return [WorkerRow(*row[:-1]) for row in rows], due

        return self._read(job)

    def next_due(self) -> Future[int | None]:
        """The earliest time at which an instance without an owner may be claimed."""
        sql, values = self._statements.next_due()
        return self._read(lambda connection: connection.execute(sql, values).fetchone()[0])

    def bury(self, worker_id: str, now: int, is_gone: bool) -> Future[bool]:
        """Mark a worker dead whose lease has run out, or whose process is known to be gone."""
        statement = self._statements.bury(worker_id=worker_id, now=now, is_gone=int(is_gone))
        return self._write(lambda connection: self._run(connection, statement) == 1)

    def claim_from(self, dead_id: str, me: str, now: int, limit: int) -> Future[list[ClaimedRow]]:
        """Take over instances of a dead worker.

        When none is left that this app can run, the others go back to everybody, and the dead worker's row goes.
        """
        statements = self._statements

        def job(connection: sqlite3.Connection) -> list[ClaimedRow]:
            with self._transaction(connection):
                self._check_fence(connection, me, None)
                statement = statements.claim_from(worker_id=dead_id, me=me, now=now, limit=limit)
                claimed = [ClaimedRow(*row) for row in connection.execute(*statement)]
                if not claimed:
                    connection.execute(*statements.release(worker_id=dead_id, now=now))
                    connection.execute(*statements.forget_worker(worker_id=dead_id))
            return claimed

        return self._write(job)

    def claim_ready(self, me: str, now: int, limit: int) -> Future[list[ClaimedRow]]:
        """Take instances that nobody owns and whose time has come."""
        statements = self._statements

        def job(connection: sqlite3.Connection) -> list[ClaimedRow]:
            with self._transaction(connection):
                self._check_fence(connection, me, None)
                statement = statements.claim_ready(me=me, now=now, limit=limit)
                return [ClaimedRow(*row) for row in connection.execute(*statement)]

        return self._write(job)

    def leave(self, worker_id: str, now: int) -> Future[int]:
        """Hand all instances of this worker back and remove it; returns how many were handed back."""
        statements = self._statements

        def job(connection: sqlite3.Connection) -> int:
            with self._transaction(connection):
                # A worker that was buried meanwhile owns nothing: others may have taken its instances.
                released = connection.execute(*statements.release(worker_id=worker_id, now=now)).rowcount
                connection.execute(*statements.deregister(me=worker_id))
            return released

        return self._write(job)

    def resume(self, instance_id: str, now: int) -> Future[bool]:
        """Make a suspended instance claimable; ``False`` when it is not suspended."""
        statement = self._statements.resume(instance_id=instance_id, now=now)
        return self._write(lambda connection: self._run(connection, statement) == 1)

    # -- reading -----------------------------------------------------------------------------------

    def read_history(self, wanted: Sequence[tuple[str, int, int]], limit: int) -> Future[list[list[HistoryRow]]]:
        """For each ``(instance_id, run, after_seq)`` the next recorded events, at most ``limit`` of them."""
        read: Prepared = self._statements.read_history

        def job(connection: sqlite3.Connection) -> list[list[HistoryRow]]:
            return [
                [
                    HistoryRow._make(row)
                    for row in connection.execute(*read(instance_id=instance_id, run=run, after=after, limit=limit))
                ]
                for instance_id, run, after in wanted
            ]

        return self._read(job)

    def read_start(self, instance_id: str) -> Future[tuple[str, str] | None]:
        """The workflow's name and the stored input of an instance."""
        statement = self._statements.read_start(instance_id=instance_id)
        return self._read(lambda connection: connection.execute(*statement).fetchone())

    def has_changed(self) -> bool:
        """Whether anybody may have committed since the last call. A look at the log file; no statement."""
        try:
            stat = os.stat(f"{self.path}-wal")
        except OSError:
            return False
        change = (stat.st_mtime_ns, stat.st_size)
        if change == self._seen_change:
            return False
        self._seen_change = change
        return True

    def _run(self, connection: sqlite3.Connection, statement: tuple[str, tuple[Any, ...]]) -> int:
        # One statement is a transaction of its own.
        self.write_lock.acquire()
        try:
            return connection.execute(*statement).rowcount
        finally:
            self.write_lock.release()

    def _write(self, job: Callable[[sqlite3.Connection], T]) -> Future[T]:
        if self._writer is None:
            raise DatabaseError(f"database {self.address} is closed")
        self.own_writes += 1
        return self._writer.submit(self._typed(job))

    def _read(self, job: Callable[[sqlite3.Connection], T]) -> Future[T]:
        if self._reader is None:
            raise DatabaseError(f"database {self.address} is closed")
        return self._reader.submit(self._typed(job))

    def _typed(self, job: Callable[[sqlite3.Connection], T]) -> Callable[[sqlite3.Connection], T]:
        def run(connection: sqlite3.Connection) -> T:
            try:
                return job(connection)
            except sqlite3.Error as error:
                raise database_error(error, str(self.address)) from error

        return run


def prepare_connection(connection: Any, is_durable: bool) -> None:
    """Write-ahead log, and a flush to disk at each commit."""
    if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise SchemaError(f"the file system allows no write-ahead log (journal mode is {mode}); use a local disk")
    connection.execute(f"PRAGMA synchronous = {'FULL' if is_durable else 'OFF'}")
    connection.execute(f"PRAGMA wal_autocheckpoint = {PAGES_BETWEEN_CHECKPOINTS}")


def _memory_folder() -> str | None:
    shared = "/dev/shm"  # noqa: S108
    return shared if os.access(shared, os.W_OK) else None
