"""The session of a transactional activity: opened at its first use, committed together with the outcome.

The user's ``commit`` and ``rollback`` touch a savepoint only. The transaction around it carries the user's rows,
the recorded outcome and the check of the worker's fence; it commits once, or not at all.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, greenlet_spawn

from romancy.errors import DatabaseError, FencedError, SessionError
from romancy.storage.failures import database_error
from romancy.storage.lock import WriteLock
from romancy.storage.rows import HistoryRow
from romancy.storage.schema import history, workers
from romancy.storage.sqlite import SqliteStore, prepare_connection

LONG_TRANSACTION_S = 1.0


class _LazySession(Session):
    """A session that asks its transaction for a connection when it first needs one."""

    def get_bind(self, *args: Any, **kwargs: Any) -> Connection:
        transaction: ActivityTransaction = self.info["transaction"]
        return transaction.connection()


class ActivityTransaction:
    """One attempt's transaction; nothing is opened until the session is used.

    Not safe for several tasks or threads at a time, as sessions never are.
    """

    def __init__(self, engines: SessionEngines, *, is_async: bool) -> None:
        self._engines = engines
        self._is_async = is_async
        self._connection: Connection | None = None
        self._session: AsyncSession | Session | None = None
        self._opened_at = 0.0
        self._is_over = False

    @property
    def is_open(self) -> bool:
        """Whether the transaction has begun, and so holds the database's write lock."""
        return self._connection is not None

    @property
    def is_used(self) -> bool:
        """Whether anybody asked for the session."""
        return self._session is not None

    @property
    def open_for_s(self) -> float:
        """Seconds since the transaction began."""
        return time.monotonic() - self._opened_at if self.is_open else 0.0

    def session(self) -> AsyncSession | Session:
        """The session, the same for the whole attempt.

        Raises:
            SessionError: the attempt is over.
        """
        if self._is_over:
            raise SessionError("this activity's session is closed: use it only while the activity runs")
        if self._session is None:
            options: dict[str, Any] = {
                "join_transaction_mode": "create_savepoint",
                "expire_on_commit": False,
                "info": {"transaction": self},
            }
            if self._is_async:
                self._session = AsyncSession(sync_session_class=_LazySession, **options)
            else:
                self._session = _LazySession(**options)
        return self._session

    def connection(self) -> Connection:
        """The connection, its transaction begun; in an async activity called inside SQLAlchemy's greenlet."""
        if self._is_over:
            raise SessionError("this activity's session is closed: use it only while the activity runs")
        if self._connection is None:
            lock = self._engines.write_lock
            if self._is_async:
                await_only(lock.acquire_async())
            else:
                lock.acquire()
            try:
                connection = self._engines.sync_engine(is_async=self._is_async).connect()
                try:
                    connection.begin()
                except BaseException:
                    connection.close()
                    raise
            except SQLAlchemyError as error:
                lock.release()
                # Not the activity's failure: it had not begun to write.
                raise database_error(error, self._engines.name) from error
            except BaseException:
                lock.release()
                raise
            self._connection = connection
            self._opened_at = time.monotonic()
        return self._connection

    async def flush(self) -> None:
        """Send what the session still holds back to the database, so that its errors count for the activity."""
        session = self._session
        if isinstance(session, AsyncSession):
            await session.commit()
        elif session is not None:
            session.commit()

    def flush_in_thread(self) -> None:
        """The same for the session of a plain ``def``."""
        assert isinstance(self._session, Session)
        self._session.commit()

    async def commit(self, worker_id: str, event_row: HistoryRow, renew_until: int) -> None:
        """Write the outcome beside the user's rows and commit both, under the fence.

        Raises:
            FencedError: the worker lost its lease; everything was rolled back.
            DatabaseError: the commit failed; everything was rolled back.
        """
        await greenlet_spawn(self.commit_in_thread, worker_id, event_row, renew_until)

    def commit_in_thread(self, worker_id: str, event_row: HistoryRow, renew_until: int) -> None:
        """The same, blocking."""
        connection = self._connection
        assert connection is not None
        try:
            fence = workers.update().where(workers.c.worker_id == worker_id, workers.c.state == "alive")
            if connection.execute(fence.values(lease_until=renew_until)).rowcount != 1:
                raise FencedError(f"worker {worker_id} has lost its lease; its instances belong to others now")
            connection.execute(history.insert().values(event_row._asdict()))
            connection.commit()
        except DatabaseError:
            self.close_in_thread()
            raise
        except Exception as error:
            self.close_in_thread()
            raise database_error(error, self._engines.name) from error
        self.close_in_thread()

    async def close(self) -> None:
        """End the transaction; what is not committed is rolled back."""
        await greenlet_spawn(self.close_in_thread)

    def close_in_thread(self) -> None:
        """The same, blocking."""
        if self._is_over:
            return
        self._is_over = True
        session, connection = self._session, self._connection
        try:
            if isinstance(session, AsyncSession):
                session.sync_session.close()
            elif session is not None:
                session.close()
        finally:
            if connection is not None:
                try:
                    connection.close()
                finally:
                    self._engines.write_lock.release()


class SessionEngines:
    """The engines behind activity sessions, made when the first one is opened."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._async_engine: AsyncEngine | None = None
        self._engine: Engine | None = None
        self.name = str(store.address)
        self.write_lock: WriteLock = store.write_lock

    def transaction(self, *, is_async: bool) -> ActivityTransaction:
        """A transaction for one attempt; nothing is opened yet."""
        return ActivityTransaction(self, is_async=is_async)

    def sync_engine(self, *, is_async: bool) -> Engine:
        """The engine for sessions of that kind (of an async one, its inner engine)."""
        if is_async:
            if self._async_engine is None:
                self._async_engine = create_async_engine(self._url("sqlite+aiosqlite"), **self._options())
                self._set_up(self._async_engine.sync_engine)
            return self._async_engine.sync_engine
        if self._engine is None:
            self._engine = create_engine(self._url("sqlite"), **self._options())
            self._set_up(self._engine)
        return self._engine

    async def dispose(self) -> None:
        """Close all connections."""
        if self._async_engine is not None:
            await self._async_engine.dispose()
        if self._engine is not None:
            self._engine.dispose()

    def _url(self, driver: str) -> URL:
        return URL.create(driver, database=self._store.path)

    def _options(self) -> dict[str, Any]:
        return {"connect_args": {"timeout": self._store.busy_timeout_s}}

    def _set_up(self, engine: Engine) -> None:
        is_durable = not self._store.address.is_memory

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


class _CursorAsConnection:
    """A cursor that answers ``execute(…)`` with itself, as sqlite3's connections do; aiosqlite's do not."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor

    def execute(self, sql: str) -> Any:
        """Run a statement; fetch from what is returned."""
        self._cursor.execute(sql)
        return self._cursor
