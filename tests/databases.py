"""The databases that the tests run on: SQLite always, servers where there are any.

A server is taken from ``ROMANCY_TEST_POSTGRESQL_URL`` or ``ROMANCY_TEST_MYSQL_URL``, else looked for at its usual
address on this machine, else started for this run (:mod:`tests.servers`). Where its programs are missing, too, its
tests are skipped, unless ``ROMANCY_TEST_ALL_DATABASES`` is set: then they fail.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

import psycopg
import pymysql
import pytest
from sqlalchemy import URL, make_url

from romancy import App
from tests.drivers import Database, commit_at_once, connect, kind_of
from tests.servers import MYSQL_FOLDER, MissingError, borrow, own_server

KINDS = ("sqlite", "postgresql", "mysql")
ADDRESSES = {
    "postgresql": ("ROMANCY_TEST_POSTGRESQL_URL", "postgresql://postgres@127.0.0.1:5432/postgres"),
    "mysql": ("ROMANCY_TEST_MYSQL_URL", "mysql://root@127.0.0.1:3306/"),
}
TABLES = {
    "postgresql": "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()",
    "mysql": "SHOW TABLES",
}
NAMES = {"postgresql": "PostgreSQL", "mysql": "MySQL or MariaDB"}


def database_of(app: App) -> Database:
    """The database of an app that runs, for :func:`rows`."""
    path = getattr(app._life.store, "path", None)
    return Path(path) if path is not None else str(app.address)


def rows(database: Database, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """What the database holds, read by the plain driver; parameters stand as ``?``."""
    with _connection(database) as connection:
        cursor = connection.cursor()
        cursor.execute(_marked(database, sql), parameters)
        return [tuple(row) for row in cursor.fetchall()]


def execute(database: Database, sql: str, *parameters: Any) -> None:
    """Change the database behind Romancy's back."""
    with _connection(database) as connection:
        connection.cursor().execute(_marked(database, sql), parameters)
        connection.commit()


_kept: dict[str, Any] = {}
"""Idle connections to servers: a new one is more work for the server than all that most tests do with it."""


@contextmanager
def _connection(database: Database) -> Iterator[Any]:
    if isinstance(database, Path):
        with closing(connect(database)) as connection:
            yield connection
        return
    connection = _kept.pop(database, None)
    if connection is None or not _is_alive(connection):
        connection = connect(database)
        commit_at_once(connection)
    try:
        yield connection
    except BaseException:
        connection.close()
        raise
    if _kept.setdefault(database, connection) is not connection:
        connection.close()


def _is_alive(connection: Any) -> bool:
    try:
        connection.cursor().execute("SELECT 1")
    except (psycopg.Error, pymysql.Error):
        return False
    return True


def _marked(database: Database, sql: str) -> str:
    return sql if isinstance(database, Path) else sql.replace("%", "%%").replace("?", "%s")


@contextmanager
def server_database(kind: str) -> Iterator[str]:
    """The URL of a new database on a server; skips the test where there is no server."""
    found = server(kind)
    name = f"romancy_test_{uuid4().hex[:12]}"
    _administer(found, f"CREATE DATABASE {name}")
    try:
        yield found.set(database=name).render_as_string(hide_password=False)
    finally:
        for url in [url for url in _kept if make_url(url).database == name]:
            _kept.pop(url).close()
        force = " WITH (FORCE)" if kind == "postgresql" else ""
        _administer(found, f"DROP DATABASE {name}{force}")


def clean(database: str) -> None:
    """Empty Romancy's tables and drop the test's own."""
    with _connection(database) as connection:
        cursor = connection.cursor()
        cursor.execute(TABLES[kind_of(database)])
        names = {name for (name,) in cursor.fetchall()}
        own = {name for name in names if name.startswith("romancy_")}
        cursor.execute("BEGIN")
        for name in sorted(own - {"romancy_schema_version", "romancy_slots"}):
            cursor.execute(f"DELETE FROM {name}")
        cursor.execute("COMMIT")
        for name in names - own:
            cursor.execute(f"DROP TABLE {name}")


NOTHING_TESTED = "NOTHING IS TESTED"


def skip_loudly(reason: str) -> NoReturn:
    """Skip the test; where all databases are wanted, fail it."""
    if os.environ.get("ROMANCY_TEST_ALL_DATABASES"):
        pytest.fail(reason)
    pytest.skip(reason)


def server(kind: str) -> URL:
    """A server of this kind; skips the test where there is none and none can be started."""
    variable, usual = ADDRESSES[kind]
    given = os.environ.get(variable)
    ways = [partial(_shared, usual), partial(borrow, kind)] if given is None else [partial(_shared, given)]
    if given is None and kind == "mysql" and MYSQL_FOLDER in os.environ:
        ways = [partial(borrow, kind)]
    reasons: list[str] = []
    for way in ways:
        try:
            return make_url(way())
        except (psycopg.Error, pymysql.Error, MissingError) as error:
            reasons.append(" ".join(str(error).split()))
    skip_loudly(f"{NOTHING_TESTED} on {NAMES[kind]}: {'; and '.join(reasons)}; or set {variable}")


def _shared(url: str) -> str:
    connect(url).close()
    return url


@contextmanager
def server_with(kind: str, *options: str, with_tls: bool = False) -> Iterator[str]:
    """The address of an empty database on a server with these options; skips the test where there can be none."""
    with tempfile.TemporaryDirectory(prefix="romancy-", ignore_cleanup_errors=True) as folder:
        try:
            started = own_server(kind, Path(folder), *options, with_tls=with_tls)
        except MissingError as error:
            skip_loudly(f"{NOTHING_TESTED} on {NAMES[kind]} with {' '.join(options)}: {error}")
        try:
            yield started.url
        finally:
            started.kill()


def _administer(url: URL, sql: str) -> None:
    with closing(connect(url.render_as_string(hide_password=False))) as connection:
        commit_at_once(connection)
        connection.cursor().execute(sql)
