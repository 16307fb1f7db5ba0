"""The session of a transactional activity: opened at its first use, committed together with the outcome.

The user's ``commit`` and ``rollback`` touch a savepoint only. The transaction around it carries the user's rows,
the recorded outcome and the check of the worker's fence; it commits once, or not at all. Where that comes to the same,
there is no savepoint before the user's first ``commit``: until then a rollback may as well end the transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import AsyncAdaptedQueuePool, Connection, Engine, QueuePool, create_engine, event, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import await_only, greenlet_spawn

from romancy.errors import ConfigurationError, DatabaseError, SchemaError, SessionError
from romancy.storage.failures import database_error, is_driver_error, is_lost
from romancy.storage.given import GivenEngines
from romancy.storage.mail import Mail, Post
from romancy.storage.rows import HistoryRow
from romancy.storage.schema import workers
from romancy.storage.store import Store
from romancy.storage.watchdog import Line, answered_within

logger = logging.getLogger("romancy.storage")

LONG_TRANSACTION_S = 1.0
SPARE_S = 5.0
"""Seconds for which a connection that the pool has beyond its size is kept for somebody who needs it."""

WITH_SAVEPOINT: Literal["create_savepoint"] = "create_savepoint"
WITHOUT_SAVEPOINT: Literal["rollback_only"] = "rollback_only"
_TRANSACTION = "romancy_transaction"
NONE_GIVEN = GivenEngines()
NO_OPTIONS: Mapping[str, int] = {}


class CommitUnsureError(DatabaseError):
    """The connection was lost while the outcome was committed; see :meth:`Store.settle_event`."""


class _LazySession(Session):
    """A session that asks its transaction for a connection when it first needs one, and ends with the activity only."""

    @property
    def of_activity(self) -> ActivityTransaction:
        """The transaction that it belongs to."""
        transaction: ActivityTransaction = self.info["transaction"]
        return transaction

    def close(self) -> None:
        if not self.of_activity.is_over:
            raise SessionError(
                "the session of an activity is Romancy's to close, at the activity's end: use it without `with`, and "
                "without close()"
            )
        super().close()

    def get_bind(self, *args: Any, **kwargs: Any) -> Connection:
        return self.of_activity.connection()


@event.listens_for(_LazySession, "before_commit")
def _before_commit(session: Session) -> None:
    assert isinstance(session, _LazySession)
    if session.join_transaction_mode == WITHOUT_SAVEPOINT:
        session.of_activity.check()


@event.listens_for(_LazySession, "after_commit")
def _after_commit(session: Session) -> None:
    # What was committed must outlive the next rollback.
    session.join_transaction_mode = WITH_SAVEPOINT


class ActivityTransaction:
    """One attempt's transaction; nothing is opened until the session is used.

    Not safe for several tasks or threads at a time, as sessions never are.

    Attributes:
        after_commit: called back once the transaction is durable.
        failure: why the transaction could not begin, if so.
        post: once it is committed, what became of the mail in it.
        is_over: it has ended, one way or the other.
    """

    def __init__(self, engines: SessionEngines, *, is_async: bool) -> None:
        self._engines = engines
        self._is_async = is_async
        self._connection: Connection | None = None
        self._session: AsyncSession | Session | None = None
        self._give_back: Callable[[], None] | None = None
        self._opened_at = 0.0
        self._has_spoken = False
        self._is_flushing = False
        self._is_committing = False
        self._is_committed = False
        self.after_commit: list[Callable[[], None]] = []
        self.failure: DatabaseError | None = None
        self.post: Post | None = None
        self.is_over = False

    @property
    def is_open(self) -> bool:
        """Whether the transaction has begun."""
        return self._connection is not None

    @property
    def holds_everybody_up(self) -> bool:
        """Whether nobody else can write now, for the transaction is open and the database has one writer."""
        return self.is_open and self._engines.store.has_one_writer

    @property
    def is_used(self) -> bool:
        """Whether anybody asked for the session."""
        return self._session is not None

    @property
    def _line(self) -> Line | None:
        connection = self._connection
        if connection is None or connection.closed or connection.invalidated:
            return None
        return self._engines.store.line_of(connection)

    def cut(self) -> None:
        """Break the connection, so that whoever waits for the server gets an error. From any thread."""
        with contextlib.suppress(SQLAlchemyError):  # it is being given back at this moment
            line = self._line
            if line is not None:
                line.cut()

    @property
    def open_for_s(self) -> float:
        """Seconds since the transaction began."""
        return time.monotonic() - self._opened_at if self.is_open else 0.0

    def session(self) -> AsyncSession | Session:
        """The session, the same for the whole attempt.

        Raises:
            SessionError: the attempt is over.
        """
        if self.is_over:
            raise SessionError("this activity's session is closed: use it only while the activity runs")
        if self._session is None:
            options: dict[str, Any] = {
                "join_transaction_mode": self._way_to_join(),
                "expire_on_commit": False,
                "info": {"transaction": self},
            }
            if self._is_async:
                self._session = AsyncSession(sync_session_class=_LazySession, **options)
            else:
                self._session = _LazySession(**options)
        return self._session

    def _way_to_join(self) -> Literal["create_savepoint", "rollback_only"]:
        engines = self._engines
        # What the application's engine needs set in a transaction would go with a rollback.
        is_ours = engines.given.of(is_async=self._is_async) is None
        return WITHOUT_SAVEPOINT if is_ours and engines.store.savepoint_may_wait else WITH_SAVEPOINT

    def connection(self) -> Connection:
        """The connection, its transaction begun; in an async activity called inside SQLAlchemy's greenlet."""
        if self.is_over:
            raise SessionError("this activity's session is closed: use it only while the activity runs")
        if self._connection is None:
            try:
                connection = self._begin()
            except Exception as error:
                if not is_driver_error(error):
                    raise
                # Not the activity's failure: it had not begun to write.
                self.failure = database_error(error, self._engines.name)
                raise self.failure from error
            self._connection = connection
            self._opened_at = time.monotonic()
            connection.info[_TRANSACTION] = self
        elif not self._connection.in_transaction():
            # The user's rollback has ended it.
            self._has_spoken = False
            self._connection.begin()
        return self._connection

    def check(self) -> None:
        """Refuse to go on where a savepoint would not have ended well.

        Raises:
            DBAPIError: a statement has failed, and with it all of the transaction.
            SessionError: a statement has ended the transaction.
        """
        connection = self._connection
        if connection is not None and self._has_spoken and connection.in_transaction():
            is_open = self._engines.store.is_in_transaction(connection)
            if not is_open:
                raise SessionError(
                    "a statement of this activity has ended its transaction: leave COMMIT and ROLLBACK to the "
                    "session's commit() and rollback()"
                )

    def _begin(self) -> Connection:
        """A connection with its transaction begun, and the write lock held."""
        given = self._engines.given.of(is_async=self._is_async)
        if given is None:
            self._lock()
            try:
                connection = self._engines.sync_engine(is_async=self._is_async).connect()
                try:
                    connection.begin()
                except BaseException:
                    connection.close()
                    raise
            except BaseException:
                self._engines.write_lock.release()
                raise
            return connection
        # Its pool may have none for us until somebody has written: so first the connection, then the lock.
        connection = given.connect()
        try:
            self._lock()
        except BaseException:
            connection.close()
            raise
        try:
            self._give_back = self._engines.store.begin_on(connection)
            _listen(connection)
        except BaseException:
            try:
                if not connection.invalidated:
                    connection.invalidate()  # some of its settings may be changed
                connection.close()
            finally:
                self._engines.write_lock.release()
            raise
        return connection

    def _lock(self) -> None:
        if self._is_async:
            await_only(self._engines.write_lock.acquire_async())
        else:
            self._engines.write_lock.acquire()

    def on_commit(self) -> None:
        """Somebody commits the whole transaction.

        Raises:
            SessionError: it is not us.
        """
        if not self._is_committing:
            raise SessionError(
                "only Romancy commits the transaction of an activity, together with the recorded outcome: "
                "session.commit() ends a savepoint, connection().commit() is not for activities"
            )

    def on_statement(self, sql: str, parameters: Any, is_many: bool) -> None:
        """A statement is about to be sent.

        Raises:
            PacketTooLargeError: the server would break the connection for it.
        """
        for values in parameters if is_many else [parameters]:
            self._engines.store.check_statement(sql, list(values.values()) if isinstance(values, dict) else values)
        self._has_spoken = True
        line = self._line if self._is_flushing else None
        if line is not None:
            line.deadline = time.monotonic() + self._engines.store.patience_s

    @contextlib.contextmanager
    def _flushing(self) -> Iterator[None]:
        """The activity is over, and its timeout with it: each statement has the engine's time from here on."""
        self._is_flushing = True
        try:
            yield
        finally:
            self._is_flushing = False
            line = self._line
            if line is not None:
                line.deadline = None

    async def flush(self) -> None:
        """Send what the session still holds back to the database, so that its errors count for the activity."""
        session = self._session
        with self._flushing():
            if isinstance(session, AsyncSession):
                await session.commit()
            elif session is not None:
                session.commit()

    def flush_in_thread(self) -> None:
        """The same for the session of a plain ``def``."""
        assert isinstance(self._session, Session)
        with self._flushing():
            self._session.commit()

    async def commit(
        self, worker_id: str, event_row: HistoryRow, renew_until: int, outgoing: Sequence[Mail] = ()
    ) -> None:
        """Write the outcome, and what is sent with it, beside the user's rows and commit both, under the fence.

        Raises:
            FencedError: the worker lost its lease; everything was rolled back.
            CommitUnsureError: the connection was lost; only the database knows what became of it.
            HistoryConflictError: the instance belongs to another worker; everything was rolled back.
            IntegrityError: a constraint that the database checks at the commit refused the user's rows.
            DatabaseError: the commit failed; everything was rolled back.
        """
        await greenlet_spawn(self.commit_in_thread, worker_id, event_row, renew_until, outgoing)

    def commit_in_thread(
        self, worker_id: str, event_row: HistoryRow, renew_until: int, outgoing: Sequence[Mail] = ()
    ) -> None:
        """The same, blocking."""
        connection = self._connection
        assert connection is not None
        self._is_committing = True
        try:
            # The user's own statements take as long as they take; these are the engine's.
            with answered_within(self._line, self._engines.store.patience_s):
                self.post = self._engines.store.commit_in(connection, worker_id, event_row, renew_until, outgoing)
            self._is_committed = True
        except (DatabaseError, IntegrityError):
            raise
        except Exception as error:
            failure = database_error(error, self._engines.name)
            if is_lost(error):
                raise CommitUnsureError(str(failure)) from error
            raise failure from error
        finally:
            self.close_quietly()

    async def close(self) -> None:
        """End the transaction; what is not committed is rolled back."""
        await greenlet_spawn(self.close_in_thread)

    def close_in_thread(self) -> None:
        """The same, blocking."""
        if self.is_over:
            return
        self.is_over = True
        with answered_within(self._line, self._engines.store.patience_s):
            self._close_all(self._session, self._connection)

    def close_quietly(self) -> None:
        """The same, where nobody wants to hear of a connection that breaks meanwhile: all has been said."""
        try:
            self.close_in_thread()
        except Exception as error:  # noqa: BLE001  (whatever it is: what became of the transaction is known)
            logger.debug("the session of an activity closed with an error: %s", error)

    def _close_all(self, session: AsyncSession | Session | None, connection: Connection | None) -> None:
        try:
            if isinstance(session, AsyncSession):
                session.sync_session.close()
            elif session is not None:
                session.close()
        finally:
            if connection is not None:
                try:
                    self._end(connection)
                finally:
                    self._engines.write_lock.release()

    def _end(self, connection: Connection) -> None:
        try:
            if not connection.invalidated:
                connection.info.pop(_TRANSACTION, None)
            if not self._is_committed and not connection.invalidated:
                # SQLAlchemy may take a transaction for ended that the driver has open: after a refused commit.
                connection.connection.rollback()
            if self._give_back is not None and not connection.invalidated:
                self._give_back_as_it_was(connection, self._give_back)
        finally:
            connection.close()

    @staticmethod
    def _give_back_as_it_was(connection: Connection, give_back: Callable[[], None]) -> None:
        try:
            give_back()
        except BaseException as error:
            # The transaction is over, and its outcome with it: the application's pool makes another connection.
            connection.invalidate()
            if not is_driver_error(error):
                raise


def _listen(where: Engine | Connection) -> None:
    event.listen(where, "commit", _on_commit)
    event.listen(where, "before_cursor_execute", _on_statement)


def _on_commit(connection: Connection) -> None:
    transaction: ActivityTransaction | None = connection.info.get(_TRANSACTION)
    if transaction is not None:
        transaction.on_commit()


def _on_statement(
    connection: Connection, _cursor: Any, sql: str, parameters: Any, _context: Any, is_many: bool
) -> None:
    transaction: ActivityTransaction | None = connection.info.get(_TRANSACTION)
    if transaction is not None:
        transaction.on_statement(sql, parameters, is_many)


class _SparePool(QueuePool):
    """A pool that keeps the connections beyond its size for a while, too, for they may be needed again.

    A crowd of short transactions would open and close connections all the time.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._spares: deque[tuple[float, ConnectionPoolEntry]] = deque()

    def _do_get(self) -> ConnectionPoolEntry:
        with contextlib.suppress(IndexError):
            return self._spares.pop()[1]
        return super()._do_get()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if self._pool.full():
            self._spares.append((time.monotonic(), record))
        else:
            super()._do_return_conn(record)

    def close_spares(self, idle_s: float) -> None:
        """Close those beyond the size that nobody has needed for so long."""
        with contextlib.suppress(IndexError):
            while time.monotonic() - self._spares[0][0] >= idle_s:
                super()._do_return_conn(self._spares.popleft()[1])

    def dispose(self) -> None:
        self.close_spares(0)
        super().dispose()


def _spare_pool(engine: Engine) -> _SparePool | None:
    """The pool of an engine, if it has connections beyond its size."""
    pool = engine.pool
    return pool if isinstance(pool, _SparePool) and pool.overflow() > 0 else None


class _SpareAsyncPool(_SparePool, AsyncAdaptedQueuePool):
    """The same for connections of async drivers."""


class SessionEngines:
    """The engines behind activity sessions: the application's own where it gives some, else made at the first session.

    Args:
        store: the database.
        given: the application's.
        pool: options for the pools of those that are made.
    """

    def __init__(self, store: Store, given: GivenEngines = NONE_GIVEN, pool: Mapping[str, int] = NO_OPTIONS) -> None:
        self.store = store
        self._options = {**store.session_options(), **pool}
        self.given = given
        self._async_engine: AsyncEngine | None = None
        self._engine: Engine | None = None
        self.name = store.name
        self.write_lock = store.write_lock

    def transaction(self, *, is_async: bool) -> ActivityTransaction:
        """A transaction for one attempt; nothing is opened yet."""
        return ActivityTransaction(self, is_async=is_async)

    async def check_given(self) -> None:
        """Try whether the application's engines can serve, before any activity needs them.

        Raises:
            ConfigurationError: one of them leads elsewhere.
            DatabaseError: the database can't be reached by it.
        """
        if self.given.for_async is not None:
            await greenlet_spawn(self._check_given, is_async=True)
        if self.given.for_sync is not None:
            await asyncio.to_thread(self._check_given, is_async=False)

    def _check_given(self, *, is_async: bool) -> None:
        transaction = self.transaction(is_async=is_async)
        try:
            transaction.connection().execute(select(workers.c.worker_id).limit(1))
        except SchemaError as error:
            raise _sees_no_tables(error) from error
        except SQLAlchemyError as error:
            found = database_error(error, self.name)
            raise (_sees_no_tables(found) if isinstance(found, SchemaError) else found) from error
        finally:
            transaction.close_in_thread()

    def sync_engine(self, *, is_async: bool) -> Engine:
        """The engine for sessions of that kind (of an async one, its inner engine)."""
        if is_async:
            if self._async_engine is None:
                url = self.store.url(is_async=True)
                self._async_engine = create_async_engine(url, poolclass=_SpareAsyncPool, **self._options)
                _listen(self._async_engine.sync_engine)
                self.store.set_up_sessions(self._async_engine.sync_engine)
            return self._async_engine.sync_engine
        if self._engine is None:
            url = self.store.url(is_async=False)
            self._engine = create_engine(url, poolclass=_SparePool, **self._options)
            _listen(self._engine)
            self.store.set_up_sessions(self._engine)
        return self._engine

    async def close_spares(self) -> None:
        """Close connections that only a crowd has needed, once it has gone."""
        if self._async_engine is not None and (pool := _spare_pool(self._async_engine.sync_engine)) is not None:
            await greenlet_spawn(pool.close_spares, SPARE_S)
        if self._engine is not None and (pool := _spare_pool(self._engine)) is not None:
            await asyncio.to_thread(pool.close_spares, SPARE_S)

    async def dispose(self) -> None:
        """Close all connections of Romancy's own engines."""
        if self._async_engine is not None:
            await self._async_engine.dispose()
        if self._engine is not None:
            self._engine.dispose()


def _sees_no_tables(error: SchemaError) -> ConfigurationError:
    return ConfigurationError(
        f"the given engine leads to the app's database, and does not see Romancy's tables there ({error}): let its "
        f"search_path, or schema_translate_map, lead where the app's own connections find them"
    )
