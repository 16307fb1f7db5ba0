"""Engines that the application gives, so that the sessions of activities come from its own pool.

Romancy listens to none of their events and disposes none of them: what a transaction of an activity needs is set on
its connection, and taken back before that returns to the pool.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from romancy.errors import ConfigurationError
from romancy.storage.address import Address, ServerAddress, SqliteAddress

_KINDS = {"sqlite": "sqlite", "postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql"}
_ASYNC_DRIVERS = {"sqlite": "aiosqlite", "postgresql": "psycopg", "mysql": "asyncmy"}
_SYNC_DRIVERS = {"sqlite": "pysqlite", "postgresql": "psycopg", "mysql": "pymysql"}
_PORTS = {"postgresql": 5432, "mysql": 3306}
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class GivenEngines:
    """The application's engines.

    Attributes:
        for_async: serves the sessions of ``async def`` activities; ``None``: Romancy makes one.
        for_sync: serves those of plain ``def`` activities; ``None``: Romancy makes one.
    """

    for_async: AsyncEngine | None = None
    for_sync: Engine | None = None

    def __post_init__(self) -> None:
        if self.for_async is not None and not isinstance(self.for_async, AsyncEngine):
            raise ConfigurationError(
                f"engine={self.for_async!r}: give an AsyncEngine, made with create_async_engine; a synchronous one "
                f"goes to sync_engine="
            )
        if self.for_sync is not None and not isinstance(self.for_sync, Engine):
            raise ConfigurationError(
                f"sync_engine={self.for_sync!r}: give an Engine, made with create_engine; an AsyncEngine goes to "
                f"engine="
            )
        for option, engine, drivers in self._named():
            _check_engine(option, engine, drivers)

    def __bool__(self) -> bool:
        return self.for_async is not None or self.for_sync is not None

    def _named(self) -> list[tuple[str, Engine, dict[str, str]]]:
        named: list[tuple[str, Engine, dict[str, str]]] = []
        if self.for_async is not None:
            named.append(("engine", self.for_async.sync_engine, _ASYNC_DRIVERS))
        if self.for_sync is not None:
            named.append(("sync_engine", self.for_sync, _SYNC_DRIVERS))
        return named

    def of(self, *, is_async: bool) -> Engine | None:
        """The engine for sessions of that kind (of an async one, its inner engine)."""
        if is_async:
            return None if self.for_async is None else self.for_async.sync_engine
        return self.for_sync

    def address(self) -> Address:
        """Where the first of them leads."""
        (_, engine, _), *_ = self._named()
        return _address(engine.url)

    def check(self, address: Address) -> None:
        """Refuse engines of another database.

        Raises:
            ConfigurationError: one leads elsewhere.
        """
        for option, engine, _ in self._named():
            if _place(_address(engine.url)) != _place(address):
                raise ConfigurationError(
                    f"{option}= leads to {engine.url.render_as_string(hide_password=True)!r}, the app to "
                    f"{str(address)!r}: rows and outcome commit together in one database only. Give an engine of the "
                    f"same host, port and database (or path), or leave out the app's database to take the engine's"
                )


def _check_engine(option: str, engine: Engine, drivers: dict[str, str]) -> None:
    shown = engine.url.render_as_string(hide_password=True)
    kind = _KINDS.get(engine.dialect.name)
    if kind is None:
        raise ConfigurationError(f"{option}= leads to {shown!r}: Romancy knows SQLite, PostgreSQL, MySQL and MariaDB")
    if engine.dialect.driver != drivers[kind]:
        raise ConfigurationError(
            f"{option}= leads to {shown!r} by the driver {engine.dialect.driver!r}, whose lost connections Romancy "
            f"can't tell from other errors: make the engine with {engine.dialect.name}+{drivers[kind]}://…"
        )
    if kind == "sqlite":
        if engine.url.query:
            raise ConfigurationError(f"{option}= leads to {shown!r}, with options: write a plain path, sqlite:///path")
        if engine.url.database in (None, "", ":memory:"):
            raise ConfigurationError(
                f"{option}= leads to {shown!r}, which lives in one connection only, where Romancy's own can't see it: "
                f"give an engine of a file"
            )
    if isinstance(engine.pool, StaticPool | SingletonThreadPool):
        raise ConfigurationError(
            f"{option}= has a {type(engine.pool).__name__}, which hands one connection to several at a time: a "
            f"transaction needs one to itself. Make the engine with the default pool, or with NullPool"
        )


def _address(url: URL) -> Address:
    kind = _KINDS[url.get_backend_name()]
    if kind == "sqlite":
        assert url.database is not None
        return SqliteAddress(os.path.abspath(url.database))
    if not url.database:
        raise ConfigurationError(
            f"the engine's URL {url.render_as_string(hide_password=True)!r} names no database: name it there, for "
            f"Romancy has connections of its own, too"
        )
    return ServerAddress(kind, url.set(drivername=kind))


def _place(address: Address) -> tuple[object, ...]:
    """What two addresses of one database have in common."""
    if isinstance(address, SqliteAddress):
        return ("sqlite", address.path and os.path.realpath(address.path))
    url = address.url
    host = (
        (url.host or url.query.get("host") or "localhost")
        if address.kind == "mysql"
        else (url.host or url.query.get("host") or "")
    )
    port = url.port or url.query.get("port") or _PORTS[address.kind]
    return (address.kind, "localhost" if host in _LOOPBACK else host, str(port), url.database)
