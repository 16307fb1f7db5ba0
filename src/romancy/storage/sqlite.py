"""SQLite: what it answers in its own way. One writer at a time, in order; the statements run straight on the driver."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, event, null
from sqlalchemy.dialects import sqlite as sqlite_dialect

from romancy.clock import SystemClock
from romancy.errors import DatabaseError, DatabaseUnsafeError, SchemaError
from romancy.storage.address import SqliteAddress
from romancy.storage.database import fenced
from romancy.storage.failures import NotOwnedError
from romancy.storage.lock import WriteLock
from romancy.storage.migrate import ensure_schema
from romancy.storage.rows import HistoryRow, StartRow, StateRow
from romancy.storage.schema import history, instances, workers
from romancy.storage.statements import ManyRows, insert_into
from romancy.storage.store import Store
from romancy.storage.threads import Link

MINIMUM_SQLITE = (3, 35, 0)
BUSY_TIMEOUT_S = 5.0
FULL = 2
PAGES_BETWEEN_CHECKPOINTS = 4_000
_OPEN: Counter[str] = Counter()
"""The files that stores of this process have open."""

_INHERITED: set[str] = set()
"""The files that were open when this process was forked. SQLite keeps in memory which locks its process holds, and
inherits what it has noted, but not the locks: https://www.sqlite.org/howtocorrupt.html, section 2.6."""

_DIALECT = sqlite_dialect.dialect(paramstyle="qmark")
_NO_TIME = null()


class SqliteStore(Store):
    """A SQLite file.

    Args:
        address: where the database lives.
        workflow_names: the workflows that this app can run.
        busy_timeout_s: how long to wait for other processes' write transactions before an error.

    Attributes:
        path: the file; of ``:memory:``, once the store is open.
    """

    begin = "BEGIN IMMEDIATE"
    kind = "sqlite"
    has_one_writer = True

    def __init__(
        self, address: SqliteAddress, workflow_names: Sequence[str], busy_timeout_s: float = BUSY_TIMEOUT_S
    ) -> None:
        super().__init__(str(address), _DIALECT, workflow_names, "?", SystemClock(), _NO_TIME)
        self.address = address
        self.path = address.path
        self.busy_timeout_s = busy_timeout_s
        self.write_lock = WriteLock()
        self._keyed_starts = ManyRows(
            insert_into(instances, StartRow._fields),
            len(StartRow._fields),
            "ON CONFLICT (instance_id) DO NOTHING RETURNING instance_id",
        )
        # The row itself is compared too: a worker may change only what it owns (the last column).
        self._states = ManyRows(
            f"UPDATE {instances.name} SET status = v.column2, owner = v.column3, ready_at = v.column4, "
            f"updated_at = v.column5, completed_at = v.column6, result = v.column7, error = v.column8, claims = 0 "
            f"FROM (",
            len(StateRow._fields) + 1,
            f") AS v WHERE {instances.name}.instance_id = v.column1 AND {instances.name}.owner = v.column9",
        )
        self._opened = ""
        self._remove_folder: Callable[[], object] | None = None
        self._seen_change: tuple[int, int] = (0, 0)
        self._data_version: int | None = None

    # -- opening and closing -----------------------------------------------------------------------

    def connect_first(self, migrate: bool) -> tuple[Link, str | None]:
        if sqlite3.sqlite_version_info < MINIMUM_SQLITE:
            raise DatabaseError(f"SQLite {sqlite3.sqlite_version} is too old: Python must be built with 3.35 or newer")
        if self.address.is_memory:
            folder = tempfile.mkdtemp(prefix="romancy-", dir=_memory_folder())
            self._remove_folder = weakref.finalize(self, _remove, folder, os.getpid())
            self.path = str(Path(folder) / "memory.db")
        self._opened = os.path.realpath(self.path)
        if self._opened in _INHERITED:
            raise DatabaseUnsafeError(
                f"database {self.name}: an app of this process's parent had it open when this process was forked, and "
                f"SQLite would take the parent's locks on it for this one's own: begin this process afresh (as "
                f"subprocess does, or multiprocessing with 'spawn'), or fork before any app has started"
            )
        _OPEN[self._opened] += 1
        found = ensure_schema(self.path, self.connect, migrate=migrate)
        return self.connect(), found

    def close(self) -> None:
        super().close()
        if self._opened in _OPEN:
            _OPEN[self._opened] -= 1
            self._opened = ""
        if self._remove_folder is not None:
            self._remove_folder()
            self._remove_folder = None

    def connect(self) -> sqlite3.Connection:
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

    # -- SQLAlchemy's engines ----------------------------------------------------------------------

    def url(self, *, is_async: bool) -> URL:
        return URL.create("sqlite+aiosqlite" if is_async else "sqlite", database=self.path)

    def session_options(self) -> dict[str, Any]:
        return {"connect_args": {"timeout": self.busy_timeout_s}}

    def set_up_sessions(self, engine: Engine) -> None:
        is_durable = not self.address.is_memory

        @event.listens_for(engine, "connect")
        def on_connect(connection: Any, _record: Any) -> None:
            connection.isolation_level = None
            cursor = connection.cursor()
            try:
                prepare_connection(_CursorAsConnection(cursor), is_durable=is_durable)
            finally:
                cursor.close()

        @event.listens_for(engine, "begin")
        def on_begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    def begin_on(self, connection: Connection) -> Callable[[], None]:
        # Not by SQLAlchemy: that would begin a transaction, in which this setting can't be changed.
        found = int(_ask(connection, "PRAGMA synchronous")[0])
        is_weak = found < FULL
        if is_weak:
            _ask(connection, f"PRAGMA synchronous = {FULL}")
        connection.begin()
        driver: Any = connection.connection.driver_connection
        if driver.in_transaction:
            # The application's own listener has begun it, maybe without the write lock: this takes it, and no row.
            connection.exec_driver_sql(f"DELETE FROM {workers.name} WHERE 0")
        else:
            connection.exec_driver_sql(self.begin)

        def give_back() -> None:
            if is_weak:
                _ask(connection, f"PRAGMA synchronous = {found}")

        return give_back

    def set_up_reading(self, engine: Engine) -> None:
        query_only(engine)

    # -- writing -----------------------------------------------------------------------------------

    def _insert_keyed(self, link: Link, rows: list[StartRow]) -> set[str]:
        inserted: set[str] = set()
        for sql, values, _ in self._keyed_starts.pieces(rows):
            inserted.update(row[0] for row in link.execute(sql, values).fetchall())
        return inserted

    def _update_states(self, link: Link, states: list[StateRow], worker_id: str) -> None:
        for sql, values, size in self._states.pieces([(*state, worker_id) for state in states]):
            if link.execute(sql, values).rowcount != size:
                raise NotOwnedError("an instance is no longer owned by this worker")

    def _roll_back(self, link: Link, error: BaseException) -> None:
        # A full disk may have ended the transaction already.
        assert isinstance(link, sqlite3.Connection)
        if link.in_transaction:
            super()._roll_back(link, error)

    def _record_in(self, connection: Connection, worker_id: str, event: HistoryRow, renew_until: int) -> None:
        # The lease may well be renewed while the write lock is held anyway.
        alive = workers.update().where(workers.c.worker_id == worker_id, workers.c.state == "alive")
        if connection.execute(alive.values(lease_until=renew_until)).rowcount != 1:
            raise fenced(worker_id)
        connection.execute(history.insert().values(event._asdict()))

    # -- noticing others ---------------------------------------------------------------------------

    def has_changed(self) -> bool:
        """Whether anybody may have committed since the last call: a look at the log file, no statement."""
        change = self._latest_change()
        if change == self._seen_change:
            return False
        self._seen_change = change
        return True

    def others_have_committed(self) -> Future[bool]:
        def job(link: Link) -> bool:
            # Whoever commits writes to the log, flushes it, and only then lets others see it; the write lock is held
            # all the while.
            with self._transaction(link):
                # Does not count the commits of the connection that is asked.
                version: int = link.execute("PRAGMA data_version").fetchone()[0]
            is_news, self._data_version = version != self._data_version, version
            return is_news

        return self._write(job)

    def _is_changed(self) -> bool:
        return self._latest_change() != self._seen_change

    def _latest_change(self) -> tuple[int, int]:
        try:
            stat = os.stat(f"{self.path}-wal")
        except OSError:
            return self._seen_change
        return stat.st_mtime_ns, stat.st_size


def prepare_connection(connection: Any, is_durable: bool) -> None:
    """Write-ahead log, and a flush to disk at each commit."""
    if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise SchemaError(f"the file system allows no write-ahead log (journal mode is {mode}); use a local disk")
    connection.execute(f"PRAGMA synchronous = {'FULL' if is_durable else 'OFF'}")
    connection.execute(f"PRAGMA wal_autocheckpoint = {PAGES_BETWEEN_CHECKPOINTS}")


def _ask(connection: Connection, pragma: str) -> Any:
    cursor = connection.connection.cursor()
    try:
        cursor.execute(pragma)
        return cursor.fetchone()
    finally:
        cursor.close()


def query_only(engine: Engine) -> None:
    """Let nothing be written through this engine."""

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA query_only = ON")
        cursor.close()


def _on_fork() -> None:
    _INHERITED.update(path for path, count in _OPEN.items() if count)
    _OPEN.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_on_fork)


def _remove(folder: str, process_id: int) -> None:
    # A forked process ends, too, and the folder is not its own.
    if os.getpid() == process_id:
        shutil.rmtree(folder, ignore_errors=True)


def _memory_folder() -> str | None:
    shared = "/dev/shm"  # noqa: S108
    return shared if os.access(shared, os.W_OK) else None


class _CursorAsConnection:
    """A cursor that answers ``execute(…)`` with itself, as sqlite3's connections do; aiosqlite's do not."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor

    def execute(self, sql: str) -> Any:
        """Run a statement; fetch from what is returned."""
        self._cursor.execute(sql)
        return self._cursor
