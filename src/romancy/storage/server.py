"""What the databases on servers have in common: connections that are watched, and tables made under a lock."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, NullPool, create_engine, event
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.exc import InvalidatePoolError

from romancy.clock import DatabaseClock
from romancy.storage.address import ServerAddress
from romancy.storage.failures import is_driver_error, is_lost
from romancy.storage.migrate import ensure_server_schema
from romancy.storage.schema import SCHEMA_VERSION, VERSION_TABLE
from romancy.storage.store import Store
from romancy.storage.threads import Link
from romancy.storage.watchdog import Line, Watchdog, answered_within

DEFAULT_PATIENCE_S = 10.0
SHORTEST_PATIENCE_S = 3.0
"""A busy server may well need a second, however short the lease."""

LONGEST_READ_S = 60.0
"""Queries of users may have to look at a whole table."""

MOST_CONNECT_S = 10.0
MOST_LOCK_WAIT_S = 5.0
MOST_IDLE_S = 10.0
LINE = "romancy_line"
_USED_AT = "romancy_used_at"
NEW_S = 0.02
"""Seconds for which a connection is new."""

IN_USE_S = 1.0
"""Seconds for which a session's connection is trusted after its last use."""


class ServerLink(ABC):
    """A driver connection of the engine's own; a statement that is not answered in time breaks it.

    Args:
        line: the socket under it.
        patience_s: how long a statement may take.

    Attributes:
        used_at: when it was last used, by ``time.monotonic``.
    """

    def __init__(self, line: Line, patience_s: float) -> None:
        self.line = line
        self.used_at = time.monotonic()
        self._patience_s = patience_s

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """See :class:`romancy.storage.threads.Link`."""
        line = self.line
        self.used_at = time.monotonic()
        line.deadline = self.used_at + self._patience_s
        try:
            return self._execute(sql, parameters)
        finally:
            line.deadline = None

    @abstractmethod
    def _execute(self, sql: str, parameters: Sequence[Any]) -> Any:
        """Run one statement on the driver."""

    @abstractmethod
    def _close(self) -> None:
        """End the driver's connection."""

    def close(self) -> None:
        """See :class:`romancy.storage.threads.Link`."""
        try:
            with answered_within(self.line, self._patience_s):
                self._close()
        finally:
            self.line.close()


class ServerStore(Store):
    """A database on a server.

    Args:
        address: where it is.
        dialect: its SQL.
        workflow_names: the workflows that this app can run.
        patience_s: how long a statement of the engine's own may take: as long as the lease, for what is not written
            by then is another worker's to write.
        server_time: what asks the server for its time.
        guard: see :class:`romancy.storage.statements.Statements`.
    """

    def __init__(
        self,
        address: ServerAddress,
        dialect: Dialect,
        workflow_names: Sequence[str],
        patience_s: float,
        server_time: ColumnElement[Any],
        guard: ColumnElement[bool] | None = None,
    ) -> None:
        super().__init__(str(address), dialect, workflow_names, "%s", DatabaseClock(), server_time, guard)
        self.address = address
        self.patience_s = patience_s
        self.watchdog = self._dog = Watchdog(patience_s)

    @property
    def connect_timeout_s(self) -> int:
        """How long making a connection may take."""
        return math.ceil(min(self.patience_s, MOST_CONNECT_S))

    @property
    def idle_transaction_s(self) -> int:
        """A transaction that has checked the fence and falls silent must not hold up others for longer."""
        return math.ceil(min(self.patience_s, MOST_IDLE_S))

    def open(self, migrate: bool) -> None:
        self._dog.start()
        super().open(migrate)

    def close(self) -> None:
        super().close()
        self._dog.stop()

    @abstractmethod
    def _descriptor(self, connection: Any) -> int:
        """The socket's descriptor of one of the drivers' connections."""

    def _connecting(self, dialect: Dialect, options: dict[str, Any]) -> dict[str, Any]:
        """The driver's options, with a bound for the time that connecting may take."""
        del dialect
        return {"connect_timeout": self.connect_timeout_s, **options}

    def _on_connected(self, driver: Any, options: dict[str, Any]) -> None:
        """Take back what is to hold while connecting only."""
        del driver, options

    def _watch_engine(self, engine: Engine, limit_s: float | None, trust_s: float = NEW_S) -> None:
        """Bound what SQLAlchemy asks by itself on this engine's connections; and with a limit, all between taking one
        from the pool and giving it back. Connections that were used within so many seconds are taken to be fine."""

        @event.listens_for(engine, "do_connect")
        def do_connect(dialect: Dialect, record: Any, arguments: Any, options: Any) -> Any:
            connection = dialect.connect(*arguments, **self._connecting(dialect, options))
            driver = getattr(connection, "driver_connection", connection)
            self._on_connected(driver, options)
            line = self._dog.hold(self._descriptor(driver))
            line.deadline = time.monotonic() + self.patience_s
            record.info[LINE] = line
            return connection

        @event.listens_for(engine, "connect")
        def on_connect(_connection: Any, record: Any) -> None:
            record.info[LINE].deadline = None
            record.info[_USED_AT] = time.monotonic()

        @event.listens_for(engine, "checkout")
        def on_checkout(connection: Any, record: Any, _proxy: Any) -> None:
            line: Line = record.info[LINE]
            if time.monotonic() - record.info[_USED_AT] > trust_s:
                # A server, or a proxy before it, may have closed a connection that lay idle, or let it go stale.
                with answered_within(line, self.patience_s):
                    _ping(engine.dialect, connection)
            if limit_s is not None:
                line.deadline = time.monotonic() + limit_s

        @event.listens_for(engine, "checkin")
        def on_checkin(_connection: Any, record: Any) -> None:
            line: Line | None = record.info.get(LINE)
            if line is not None:
                line.deadline = None
                record.info[_USED_AT] = time.monotonic()

    @abstractmethod
    def check(self, link: Link) -> None:
        """Refuse a server that is too old, or would lose what it has acknowledged.

        Raises:
            DatabaseUnsafeError: it is one.
        """

    def check_tables(self, link: Link) -> None:
        """Refuse tables that can't hold what they should.

        Raises:
            DatabaseUnsafeError: there is one.
        """
        del link

    @abstractmethod
    def migration_lock(self, connection: Connection) -> AbstractContextManager[None]:
        """Lets one process at a time migrate."""

    def connect_first(self, migrate: bool) -> tuple[Link, str | None]:
        link = self._connect()
        try:
            self.check(link)
            found = _version_if_any(link)
            if found != SCHEMA_VERSION:
                engine = create_engine(self.url(is_async=False), poolclass=NullPool, **self.migration_options())
                found = ensure_server_schema(engine, self.name, self.migration_lock, migrate=migrate)
            self.check_tables(link)
            self._set_up(link)
        except BaseException:
            link.close()
            raise
        return link, found

    def connect(self) -> Link:
        link = self._connect()
        try:
            self._set_up(link)
        except BaseException:
            link.close()
            raise
        return link

    @abstractmethod
    def _connect(self) -> Link:
        """A connection, with nothing set that it takes to know the server for."""

    def _set_up(self, link: Link) -> None:
        """Set what its server needs."""
        del link

    def migration_options(self) -> dict[str, Any]:
        """Options for SQLAlchemy's engine behind migrations."""
        return {}

    def session_options(self) -> dict[str, Any]:
        return {"isolation_level": "READ COMMITTED", "pool_size": 10, "max_overflow": 20}

    def set_up_sessions(self, engine: Engine) -> None:
        # An attempt that finds its connection broken all the same runs again, and doesn't count.
        self._watch_engine(engine, None, IN_USE_S)

    def begin_on(self, connection: Connection) -> Callable[[], None]:
        line = self._dog.hold(self._descriptor(connection.connection.driver_connection), is_ours=False)
        connection.info[LINE] = line
        try:
            with answered_within(line, self.patience_s):
                undo = self._begin_on(connection)
        except BaseException:
            connection.info.pop(LINE, None)
            line.close()
            raise

        def give_back() -> None:
            with answered_within(line, self.patience_s):
                undo()
            connection.info.pop(LINE, None)
            line.close()

        return give_back

    @abstractmethod
    def _begin_on(self, connection: Connection) -> Callable[[], None]:
        """See :meth:`begin_on`."""

    def set_up_reading(self, engine: Engine) -> None:
        self._watch_engine(engine, max(LONGEST_READ_S, self.patience_s))

    def line_of(self, connection: Connection) -> Line | None:
        line: Line | None = connection.info.get(LINE)
        return line


def _ping(dialect: Dialect, connection: Any) -> None:
    """Let the pool make another connection if this one is of no more use."""
    try:
        dialect.do_ping(connection)
    except Exception as error:
        if not is_driver_error(error):
            raise
        raise InvalidatePoolError from error


def _version_if_any(link: Link) -> str | None:
    """The version of the tables, or ``None`` where this first look can't tell."""
    try:
        row = link.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()
    except Exception as error:
        if is_lost(error) or not is_driver_error(error):
            raise
        return None
    return None if row is None else str(row[0])
