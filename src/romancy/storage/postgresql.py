"""PostgreSQL: what it answers in its own way. A group commit is one statement, its fence included: one round trip."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextvars import Context
from functools import cache, partial
from typing import Any

from sqlalchemy import URL, BigInteger, ColumnElement, Connection, Engine, cast, event, func, text
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.exc import IntegrityError
from sqlalchemy.util import await_only

from romancy.errors import ConfigurationError, DatabaseError, DatabaseUnsafeError, DatabaseURLError
from romancy.storage.address import ServerAddress
from romancy.storage.batch import Batch, Party, Written
from romancy.storage.database import fenced
from romancy.storage.failures import database_error, is_beyond_use, is_driver_error, is_lost, is_row_error
from romancy.storage.flight import Flight
from romancy.storage.listener import HINT, Listener, SelfTest
from romancy.storage.mail import Closing, Mail, Operation, Post, Receipt
from romancy.storage.mail_desk import locking
from romancy.storage.postgresql_flush import Fence, Rows, flush_statement, new_starts, rows_of, typed_mark
from romancy.storage.rows import HistoryRow, StartRow, StateRow
from romancy.storage.schema import history, workers
from romancy.storage.server import DEFAULT_PATIENCE_S, MOST_LOCK_WAIT_S, NEW_S, ServerStore
from romancy.storage.store import taken
from romancy.storage.threads import Link

try:
    import psycopg
    from psycopg.pq import TransactionStatus

    from romancy.storage.postgresql_link import NOT_PREPARED, PLANNING, PREPARE_AFTER, PostgresqlLink
except ImportError as error:
    raise ConfigurationError(
        f"PostgreSQL needs its driver: pip install 'romancy[postgresql]' (import psycopg says: {error})"
    ) from error

MINIMUM_VERSION = 130_000
CHANNEL = "romancy"
DEAF_WARNING = (
    "database {name}: a NOTIFY that this process sent itself has not come back, so hints from other processes are not "
    "heard: between them and us stands a pooler that hands out a connection for each transaction, where LISTEN is "
    "lost. Nothing is lost but time: this worker looks every few seconds for what others have left. Give "
    "App(listen_on=…) an address that leads to the server directly, or accept that"
)
PREPARING = "prepare_threshold"
ANYTHING = "SELECT 1"
WHO_SERVES = "SELECT pg_backend_pid()"
MIGRATION_LOCK = 0x526F6D616E6379  # "Romancy"

_make_dialect: Any = PGDialect
_DIALECT = _make_dialect(paramstyle="format")
_NOW = cast(func.extract("epoch", func.clock_timestamp()) * 1_000_000, BigInteger)


class PostgresqlStore(ServerStore):
    """A PostgreSQL database, reached directly or through a pooler such as PgBouncer, in any of its modes.

    Args:
        address: where it is.
        workflow_names: the workflows that this app can run.
        patience_s: see :class:`romancy.storage.server.ServerStore`.

    Attributes:
        listen_url: where hints are heard, if not at the same address.
    """

    kind = "postgresql"
    savepoint_may_wait = True
    works_beside = True

    def __init__(
        self, address: ServerAddress, workflow_names: Sequence[str], patience_s: float = DEFAULT_PATIENCE_S
    ) -> None:
        # Shorter than our patience: the server is to give up first.
        lock_wait = f"{round(min(MOST_LOCK_WAIT_S, patience_s / 2) * 1_000)}ms"
        super().__init__(address, _DIALECT, workflow_names, patience_s, _NOW, _guard(lock_wait))
        self._is_preparing_given, self._prepare_after = _preparing(address.url)
        self._url = address.url.difference_update_query([PREPARING])
        self.listen_url: URL | None = None
        self._is_read_committed = True
        self._flight: Flight[PostgresqlLink] | None = None
        self._begin_together = (
            "BEGIN ISOLATION LEVEL READ COMMITTED",
            f"SET LOCAL lock_timeout = '{lock_wait}'",
            f"SET LOCAL idle_in_transaction_session_timeout = '{self.idle_transaction_s}s'",
        )
        bounded = f"set_config('lock_timeout', '{lock_wait}', true)"
        self._client_fence = Fence(f"SELECT {bounded}")
        self._worker_fence = (
            f"SELECT 1 FROM {workers.name} WHERE worker_id = %s AND state = 'alive' AND {bounded} <> '' FOR SHARE"
        )

    # -- opening -----------------------------------------------------------------------------------

    def check(self, link: Link) -> None:
        settings: Any = link.execute(
            "SELECT current_setting('server_version_num')::int, current_setting('fsync'), "
            "current_setting('synchronous_commit'), current_setting('full_page_writes'), "
            "current_setting('default_transaction_isolation')"
        ).fetchone()
        version, fsync, commit, pages, isolation = settings
        self._is_read_committed = isolation == "read committed"
        if version < MINIMUM_VERSION:
            raise DatabaseUnsafeError(
                f"database {self.name}: PostgreSQL {version // 10_000} is too old: take 13 or newer"
            )
        for setting, value, wanted in (("fsync", fsync, "on"), ("full_page_writes", pages, "on")):
            if value != wanted:
                raise DatabaseUnsafeError(
                    f"database {self.name}: {setting} is {value}, so a crash of the server would lose what it has "
                    f"acknowledged: set {setting} = {wanted} in postgresql.conf"
                )
        if commit == "off":
            raise DatabaseUnsafeError(
                f"database {self.name}: synchronous_commit is off, so a crash of the server would lose what it has "
                f"acknowledged: ALTER DATABASE … SET synchronous_commit = on"
            )

    def _connect(self) -> PostgresqlLink:
        return self._connect_to(self._url)

    def _connect_to(self, url: URL) -> PostgresqlLink:
        query = url.difference_update_query([PREPARING]).query
        options = {"connect_timeout": str(self.connect_timeout_s), **query}
        parameters: dict[str, Any] = {
            "host": url.host,
            "port": url.port,
            "user": url.username,
            "password": url.password,
            "dbname": url.database,
            **options,
        }
        connection = psycopg.connect(
            autocommit=True, **{key: value for key, value in parameters.items() if value is not None}
        )
        link = PostgresqlLink(connection, self._dog.hold(self._descriptor(connection)), self.patience_s)
        try:
            (pid,) = link.execute(WHO_SERVES).fetchone()
            connection.prepare_threshold = self._prepare_threshold(connection, pid)
            if _is_direct(connection, pid):
                link.execute_together(*PLANNING)
        except BaseException:
            link.close()
            raise
        return link

    def _descriptor(self, connection: Any) -> int:
        descriptor: int = connection.pgconn.socket
        return descriptor

    def _prepare_threshold(self, connection: psycopg.BaseConnection[Any], pid: int) -> int | None:
        """After how many executions the driver may prepare a statement; ``None`` behind a pooler.

        Preparing saves half of a short flush's time, so it is not simply left off.
        """
        if self._is_preparing_given:
            return self._prepare_after
        return PREPARE_AFTER if _is_direct(connection, pid) else None

    def url(self, *, is_async: bool) -> URL:
        del is_async  # one driver does both
        return self._url.set(drivername="postgresql+psycopg")

    def migration_options(self) -> dict[str, Any]:
        return {"connect_args": {"prepare_threshold": None}}

    def _watch_engine(self, engine: Engine, limit_s: float | None, trust_s: float = NEW_S) -> None:
        @event.listens_for(engine, "connect")
        def on_connect(connection: Any, _record: Any) -> None:
            driver = getattr(connection, "driver_connection", connection)
            cursor = connection.cursor()
            cursor.execute(WHO_SERVES)
            (pid,) = cursor.fetchone()
            cursor.close()
            connection.rollback()
            driver.prepare_threshold = self._prepare_threshold(driver, pid)

        super()._watch_engine(engine, limit_s, trust_s)

    def _begin_on(self, connection: Connection) -> Callable[[], None]:
        connection.begin()
        driver: Any = connection.connection.driver_connection
        # It holds for the transaction only. Without autocommit the driver has said BEGIN before the first of them.
        begin = "BEGIN" if driver.autocommit else "SET TRANSACTION"
        connection.exec_driver_sql(f"{begin} ISOLATION LEVEL READ COMMITTED, READ WRITE")
        return _nothing

    @contextlib.contextmanager
    def migration_lock(self, connection: Connection) -> Iterator[None]:
        # Ends with the transaction; DDL belongs to it, too.
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        yield

    # -- writing -----------------------------------------------------------------------------------

    def _begin(self, link: Link, slots: Sequence[int]) -> None:
        assert isinstance(link, PostgresqlLink)
        if not slots:
            link.execute_together(*self._begin_together)
        elif len(link.execute_together(*self._begin_together, locking(slots)).fetchall()) < len(slots):
            self._lock(link, slots)

    def _write_parties(self, link: Link, batch: Batch, parties: list[Party], worker_id: str | None) -> Written:
        ends = [operation for party in parties for operation in party.mail]
        if not self._is_one_statement(parties, ends):
            return super()._write_parties(link, batch, parties, worker_id)
        return Written(self._write_together(link, parties, worker_id, ends))

    def _is_one_statement(self, parties: list[Party], operations: Sequence[Operation]) -> bool:
        return (
            self._is_read_committed
            and not any(party.changes for party in parties)
            and all(isinstance(operation, Receipt | Closing) for operation in operations)
        )

    def _write_rows(self, link: Link, parties: list[Party], worker_id: str | None) -> set[str]:
        return self._write_together(link, parties, worker_id, ())

    def _write_together(
        self, link: Link, parties: list[Party], worker_id: str | None, ends: Sequence[Operation]
    ) -> set[str]:
        """Write all rows in one statement, the ends of deliveries and mailboxes included; see :meth:`_write_rows`."""
        rows = _rows_of(parties, ends)
        sql, values = flush_statement(self._fence_of(worker_id), rows, len(parties))
        is_alive, inserted, _ = link.execute(sql, values).fetchone()
        assert isinstance(link, PostgresqlLink)
        return self._note_written(link, rows, worker_id, inserted, is_alive=is_alive)

    def _flush_on_loop(self, batch: Batch, worker_id: str | None) -> Future[None] | None:
        loop, thread = _running_loop(), self._writer
        ends = [operation for party in batch.waiting for operation in party.mail]
        # A hint to others would be one more statement.
        if loop is None or batch.makes_work or thread is None or not self._is_one_statement(batch.waiting, ends):
            return None
        parties = len(batch.waiting)
        rows = _rows_of(batch.waiting, ends)
        try:
            sql, values = flush_statement(self._fence_of(worker_id), rows, parties)
        except (DatabaseError, UnicodeError):
            return None
        outcome: Future[None] = Future()

        def land(link: PostgresqlLink, answer: tuple[Any, ...] | BaseException) -> None:
            self._flight = None
            if isinstance(answer, BaseException):
                self._flush_again(batch, worker_id, answer, outcome)
                return
            is_alive, inserted, _ = answer
            try:
                keyed = self._note_written(link, rows, worker_id, inserted, is_alive=is_alive == "t")
                batch.note(parties, Written(keyed))
            except Exception as error:  # noqa: BLE001  # the batch must have an end, whatever it is
                # The rows are there by now, save where we ourselves say that they aren't.
                batch.is_unsure = batch.is_unsure or not isinstance(error, DatabaseError)
                outcome.set_exception(error)
                return
            if link.needs_care:
                with contextlib.suppress(DatabaseError):  # it may have been closed meanwhile
                    self._write(_take_care)
            outcome.set_result(None)

        flight = Flight(loop, thread, is_beyond_use, land)
        if not flight.depart(sql, values):
            return None
        self._flight = flight
        return outcome

    def look(self) -> None:
        """See :class:`romancy.storage.writer.BatchStore`."""
        if self._flight is not None:
            Context().run(self._flight.look)  # what comes of it is nobody's in particular

    def _flush_again(self, batch: Batch, worker_id: str | None, error: BaseException, outcome: Future[None]) -> None:
        """A statement has failed, so nothing of it is durable; or its connection has, and nobody knows."""

        def end(done: Future[None]) -> None:
            failure = done.exception()
            if failure is None:
                outcome.set_result(None)
            else:
                outcome.set_exception(failure)

        if is_row_error(error) or getattr(error, "sqlstate", None) in NOT_PREPARED:
            try:
                self._flush_on_thread(batch, worker_id).add_done_callback(end)
            except DatabaseError as closed:
                outcome.set_exception(closed)
            return
        batch.is_unsure = is_lost(error)
        outcome.set_exception(database_error(error, self.name) if is_driver_error(error) else error)

    def _fence_of(self, worker_id: str | None) -> Fence:
        return self._client_fence if worker_id is None else Fence(self._worker_fence, worker_id)

    def _note_written(
        self, link: PostgresqlLink, rows: Rows, worker_id: str | None, inserted: str | None, *, is_alive: bool
    ) -> set[str]:
        if not is_alive:
            assert worker_id is not None
            raise fenced(worker_id)
        link.note_rows(rows.new)
        return new_starts(inserted)

    # -- hints -------------------------------------------------------------------------------------

    def _make_listener(self, on_hint: Callable[[], None]) -> Listener:
        self_test = SelfTest(lambda word: self._write(partial(_say, word)), DEAF_WARNING.format(name=self.name))
        return Listener(self._listen, self._wait_for_hint, _abort, on_hint, self_test)

    def _listen(self) -> Link:
        link = self._connect_to(self.listen_url or self._url)
        link.execute(f"LISTEN {CHANNEL}")
        return link

    def _wait_for_hint(self, link: Link, timeout_s: float) -> str | None:
        assert isinstance(link, PostgresqlLink)
        heard = link.connection.notifies(timeout=timeout_s, stop_after=1)
        return next((notification.payload for notification in heard), None)

    def _hint(self, link: Link) -> None:
        # Not in the transaction of the work itself: notifying commits queue up behind one lock of the server.
        _say(HINT, link)

    def is_in_transaction(self, connection: Connection) -> bool:
        driver: Any = connection.connection.driver_connection
        if driver.info.transaction_status == TransactionStatus.INERROR:
            connection.exec_driver_sql(ANYTHING)
        return bool(driver.info.transaction_status == TransactionStatus.INTRANS)

    def commit_in(
        self, connection: Connection, worker_id: str, event: HistoryRow, renew_until: int, outgoing: Sequence[Mail]
    ) -> Post | None:
        if outgoing:
            return super().commit_in(connection, worker_id, event, renew_until, outgoing)
        values = (event.run, worker_id, event.instance_id, *event[2:])
        try:
            # One round trip for both: without the fence the row is refused, and nothing after it is carried out.
            self._execute_and_end(connection, _RECORD_AND_COMMIT, values)
        except IntegrityError as error:
            refused: Any = error.orig
            if refused.diag.table_name != history.name:
                raise
            raise (fenced(worker_id) if refused.diag.column_name == "run" else taken(event, refused)) from error
        return None

    def _execute_and_end(self, connection: Connection, sql: bytes, values: Sequence[Any]) -> None:
        """Run statements that end the transaction in one round trip, the values written into them."""
        driver: Any = connection.connection.driver_connection
        is_sync = isinstance(driver, psycopg.Connection)
        cursor: Any = psycopg.ClientCursor(driver) if is_sync else psycopg.AsyncClientCursor(driver)
        line = self.line_of(connection)
        if line is None or not line.is_ours:
            # What listens to the application's engine is to see it.
            connection.exec_driver_sql(cursor.mogrify(sql, values), execution_options={"no_parameters": True})
            connection.commit()  # SQLAlchemy does not know yet; nothing is sent
            return
        try:
            executed = cursor.execute(sql, values)
            if not is_sync:
                await_only(executed)
        except psycopg.IntegrityError as error:
            raise IntegrityError(sql.decode(), None, error) from error
        # SQLAlchemy will roll back when it closes: there is nothing left, and nothing is sent.

    def _record_in(self, connection: Connection, worker_id: str, event: HistoryRow, renew_until: int) -> None:
        del renew_until
        parameters = {
            "me": worker_id,
            "idle": f"{self.idle_transaction_s}s",
            **event._asdict(),
        }
        found = connection.execute(_RECORD, parameters).first()
        if found is None:
            raise fenced(worker_id)

    def _insert_keyed(self, link: Link, rows: list[StartRow]) -> set[str]:
        raise NotImplementedError  # part of the one statement

    def _update_states(self, link: Link, states: list[StateRow], worker_id: str) -> None:
        raise NotImplementedError  # part of the one statement


def _is_direct(connection: psycopg.BaseConnection[Any], pid: int) -> bool:
    """Whether the server process that answers, of this id, is the connection's own.

    A server says at the beginning which process of its serves the connection; a pooler says something else.
    """
    return pid == connection.info.backend_pid


def _rows_of(parties: Sequence[Party], ends: Sequence[Operation]) -> Rows:
    return Rows(
        [row for p in parties for row in p.starts],
        [row for p in parties for row in p.keyed_starts],
        [row for p in parties for row in p.history],
        [p.state for p in parties if p.state is not None],
        *rows_of(ends),
    )


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _take_care(link: Link) -> None:
    assert isinstance(link, PostgresqlLink)
    link.take_care()


def _abort(link: Link) -> None:
    assert isinstance(link, PostgresqlLink)
    link.line.cut()


def _nothing() -> None:
    """There is nothing to take back."""


@cache
def _guard(lock_wait: str) -> ColumnElement[bool]:
    return func.set_config("lock_timeout", lock_wait, True) != ""


def _say(word: str, link: Link) -> None:
    link.execute("SELECT pg_notify(%s, %s)", (CHANNEL, word))


def _preparing(url: URL) -> tuple[bool, int | None]:
    """What the address says about preparing statements, and whether it says anything."""
    given = url.query.get(PREPARING)
    if given is None:
        return False, None
    if given == "none":
        return True, None
    if isinstance(given, str) and given.isdecimal():
        return True, int(given)
    raise DatabaseURLError(f"{PREPARING}={given!r}: give a number of executions, or 'none' to prepare nothing")


_ALL_BUT_RUN = ("instance_id", *HistoryRow._fields[2:])
_RUN_OF_THE_LIVING = f"(SELECT %s FROM {workers.name} WHERE worker_id = %s AND state = 'alive' FOR SHARE)"
"""A history row's run, as only a worker has it that is alive; for others it is missing, and the row is refused."""

_RECORD_AND_COMMIT = (
    f"INSERT INTO {history.name} (run, {', '.join(_ALL_BUT_RUN)}) "
    f"VALUES ({_RUN_OF_THE_LIVING}, {', '.join(['%s'] * len(_ALL_BUT_RUN))}); COMMIT"
).encode()
_RECORD = text(
    f"WITH fence AS MATERIALIZED (SELECT 1 FROM {workers.name} "
    f"WHERE worker_id = :me AND state = 'alive' FOR SHARE) "
    f"INSERT INTO {history.name} ({', '.join(HistoryRow._fields)}) "
    f"SELECT {', '.join(typed_mark(field, f':{field}') for field in HistoryRow._fields)} "
    f"WHERE EXISTS (SELECT FROM fence) "
    "RETURNING set_config('idle_in_transaction_session_timeout', :idle, true)"
)
