"""Brings the tables to this version's shape: forward only, under a lock, safe when many workers start at once."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

from sqlalchemy import URL, Column, Connection, Engine, MetaData, String, Table, create_engine, insert, inspect, select
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateIndex, CreateTable

from romancy.errors import SchemaError
from romancy.storage.failures import database_error
from romancy.storage.schema import SCHEMA_VERSION, SLOTS, VERSION_TABLE, metadata, slots


def schema_version(connection: sqlite3.Connection) -> str | None:
    """The version of the tables, or ``None`` where there are none."""
    sql = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    if connection.execute(sql, (VERSION_TABLE,)).fetchone() is None:
        return None
    row = connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()  # noqa: S608
    if row is None:
        raise SchemaError(
            f"the table {VERSION_TABLE} is empty, so the version of Romancy's tables is unknown: restore it"
        )
    return str(row[0])


def is_up_to_date(found: str | None, database: str, *, migrate: bool) -> bool:
    """Whether there is nothing to do.

    Raises:
        SchemaError: there is, and ``migrate`` is off; or the tables belong to a newer Romancy.
    """
    if found == SCHEMA_VERSION:
        return True
    if found is not None and found > SCHEMA_VERSION:
        raise SchemaError(
            f"database {database}: its tables have version {found}, this Romancy knows {SCHEMA_VERSION}; "
            f"upgrade the package"
        )
    if not migrate:
        there = f"have version {found}" if found else "are missing"
        raise SchemaError(
            f"database {database}: Romancy's tables {there}, this version needs {SCHEMA_VERSION}; "
            f"run: romancy migrate --database {database}"
        )
    return False


def ensure_schema(path: str, connect: Callable[[], sqlite3.Connection], *, migrate: bool) -> str | None:
    """Create or upgrade the tables; returns the version that was there before.

    A fresh database gets all tables at once; an older one goes through the numbered migrations.

    Raises:
        SchemaError: they are missing or outdated and ``migrate`` is off, or they belong to a newer Romancy.
    """
    connection = connect()
    try:
        found = schema_version(connection)
        if is_up_to_date(found, path, migrate=migrate):
            return found
        connection.execute("BEGIN IMMEDIATE")
        try:
            found = schema_version(connection)
            if found is None:
                _create_all(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    finally:
        connection.close()
    if found is not None and found != SCHEMA_VERSION:
        upgrade(path)
    return found


def _create_all(connection: sqlite3.Connection) -> None:
    for statement in _creation():
        connection.execute(statement)
    connection.execute(
        f"CREATE TABLE {VERSION_TABLE} (version_num VARCHAR(32) NOT NULL, "
        f"CONSTRAINT {VERSION_TABLE}_pkc PRIMARY KEY (version_num))"
    )
    connection.execute(f"INSERT INTO {VERSION_TABLE} VALUES (?)", (SCHEMA_VERSION,))  # noqa: S608


@cache
def _creation() -> list[str]:
    dialect = sqlite_dialect.dialect()
    statements: list[str] = []
    for table in metadata.sorted_tables:
        statements.append(str(CreateTable(table).compile(dialect=dialect)))
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            statements.append(str(CreateIndex(index).compile(dialect=dialect)))
    return statements


def upgrade(path: str) -> None:
    """Run the numbered migrations that are missing, in one transaction that holds the write lock."""
    engine = create_engine(URL.create("sqlite", database=path), poolclass=NullPool)
    try:
        with engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.isolation_level = None
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            run_migrations(connection, path)
            connection.exec_driver_sql("COMMIT")
    except DBAPIError as error:
        raise database_error(error, path) from error
    finally:
        engine.dispose()


def run_migrations(connection: Connection, database: str) -> None:
    """Run the numbered migrations that are missing, on this connection.

    Raises:
        SchemaError: there is no way from the version that is there.
    """
    from alembic import command  # noqa: PLC0415  (only an outdated database needs it)
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util.exc import CommandError  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise SchemaError(f"database {database}: its tables can't be brought up to date: {error}") from error


# -- databases on servers ----------------------------------------------------------------------------


def ensure_server_schema(
    engine: Engine, database: str, locked: Callable[[Connection], AbstractContextManager[None]], *, migrate: bool
) -> str | None:
    """The same on a server, by an engine that is disposed of; ``locked`` lets one process at a time migrate.

    Raises:
        SchemaError: as for :func:`ensure_schema`.
    """
    try:
        with engine.connect() as connection:
            found = _server_version(connection)
            if is_up_to_date(found, database, migrate=migrate):
                return found
            connection.rollback()
            with locked(connection):
                found = _server_version(connection)
                if found is None:
                    _create_all_on_server(connection)
                elif not is_up_to_date(found, database, migrate=True):
                    run_migrations(connection, database)
                connection.commit()
            return found
    finally:
        engine.dispose()


_VERSION = Table(VERSION_TABLE, MetaData(), Column("version_num", String(32), primary_key=True))


def _server_version(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    row = connection.execute(_VERSION.select()).first()
    # Empty where a server without transactions for DDL was interrupted: the version is written last.
    return None if row is None else str(row[0])


def _create_all_on_server(connection: Connection) -> None:
    for table in metadata.sorted_tables:
        connection.execute(CreateTable(table, if_not_exists=True))
        # In this order: of two that seem to cost the same, PostgreSQL takes the one that was made last, and before it
        # has statistics, all mail of one name seems to cost no more than that of one name and subject.
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            index.create(connection, checkfirst=True)
    filled = set(connection.execute(select(slots.c.slot)).scalars())
    if missing := [{"slot": slot} for slot in range(SLOTS) if slot not in filled]:
        connection.execute(insert(slots), missing)
    _VERSION.create(connection, checkfirst=True)
    connection.execute(_VERSION.insert().values(version_num=SCHEMA_VERSION))
