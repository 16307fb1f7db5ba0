"""What the databases on servers have in common: SQLAlchemy's engines, and tables made under a lock."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, NullPool, create_engine
from sqlalchemy.engine.interfaces import Dialect

from romancy.clock import DatabaseClock
from romancy.storage.address import ServerAddress
from romancy.storage.failures import is_driver_error, is_lost
from romancy.storage.migrate import ensure_server_schema
from romancy.storage.schema import SCHEMA_VERSION, VERSION_TABLE
from romancy.storage.store import Store
from romancy.storage.threads import Link

CONNECT_TIMEOUT_S = 10
LOCK_WAIT_S = 5
"""The engine's own transactions are short; what waits longer for a lock is tried again."""

IDLE_TRANSACTION_S = 10
"""A transaction that has checked the fence and falls silent, for its process was stopped, must not hold up others."""


class ServerStore(Store):
    """A database on a server.

    Args:
        address: where it is.
        dialect: its SQL.
        workflow_names: the workflows that this app can run.
        server_time: what asks the server for its time.
        guard: see :class:`romancy.storage.statements.Statements`.
    """

    def __init__(
        self,
        address: ServerAddress,
        dialect: Dialect,
        workflow_names: Sequence[str],
        server_time: ColumnElement[Any],
        guard: ColumnElement[bool] | None = None,
    ) -> None:
        super().__init__(str(address), dialect, workflow_names, "%s", DatabaseClock(), server_time, guard)
        self.address = address

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

    def prepare(self, migrate: bool) -> str | None:
        with contextlib.closing(self._connect()) as link:
            self.check(link)
            found = _version_if_any(link)
            if found == SCHEMA_VERSION:
                self.check_tables(link)
                return found
        engine = create_engine(self.url(is_async=False), poolclass=NullPool, **self.migration_options())
        found = ensure_server_schema(engine, self.name, self.migration_lock, migrate=migrate)
        with contextlib.closing(self._connect()) as link:
            self.check_tables(link)
        return found

    def _connect(self) -> Link:
        """A connection for a first look, while it is not known what server that is."""
        return self.connect()

    def migration_options(self) -> dict[str, Any]:
        """Options for SQLAlchemy's engine behind migrations."""
        return {}

    def session_options(self) -> dict[str, Any]:
        # A server, or a proxy before it, may have closed a connection that lay idle.
        return {"isolation_level": "READ COMMITTED", "pool_pre_ping": True, "pool_size": 10, "max_overflow": 20}

    def set_up_sessions(self, engine: Engine) -> None:
        del engine

    def set_up_reading(self, engine: Engine) -> None:
        del engine


def _version_if_any(link: Link) -> str | None:
    """The version of the tables, or ``None`` where this first look can't tell."""
    try:
        row = link.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()
    except Exception as error:
        if is_lost(error) or not is_driver_error(error):
            raise
        return None
    return None if row is None else str(row[0])
