"""What the commands do with a database.

Imports of SQLAlchemy and of ``App`` stand where they are needed: they take most of a second, and ``--help`` and
``--version`` need neither.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from romancy.cli.text import command
from romancy.errors import DatabaseUnavailableError, InstanceNotFoundError
from romancy.storage.address import Address, SqliteAddress, parse_address

if TYPE_CHECKING:
    from romancy.app import App
    from romancy.model import Instance
    from romancy.storage.queries import Queries
    from romancy.storage.store import Store

BUSY_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Migration:
    """What :func:`migrate` did.

    Attributes:
        from_version: the version of the tables that were there, if any.
    """

    database: str
    from_version: str | None
    to_version: str

    @property
    def action(self) -> Literal["created", "upgraded", "none"]:
        """In a word."""
        if self.from_version is None:
            return "created"
        return "none" if self.from_version == self.to_version else "upgraded"


@asynccontextmanager
async def open_queries(database: str) -> AsyncIterator[Queries]:
    """The read side of a database; nothing is created, written or registered.

    Raises:
        DatabaseError: there is no such database, or its tables are missing or of another version.
    """
    from romancy.storage.stores import make_queries, make_store  # noqa: PLC0415

    address = _existing(database)
    store = make_store(address, [])
    if isinstance(address, SqliteAddress):
        _check_tables(address)
    else:
        _prepare(store, migrate=False)
    queries = make_queries(store)
    try:
        yield queries
    finally:
        await queries.dispose()


async def read_instance(queries: Queries, instance_id: str, database: str) -> Instance:
    """One instance.

    Raises:
        InstanceNotFoundError: there is none with this id.
    """
    # What is no valid text (a shell hands on any bytes) can't be stored, nor asked for.
    is_text = not any("\ud800" <= char <= "\udfff" for char in instance_id)
    instance = await queries.get_instance(instance_id) if is_text else None
    if instance is None:
        raise InstanceNotFoundError(
            f"there is no instance {instance_id!r}; find it by a part of its id: "
            + command("list", "--database", database, "--id", "PART")
        )
    return instance


@asynccontextmanager
async def open_app(database: str) -> AsyncIterator[tuple[App, Queries]]:
    """An app that runs nothing, to change what is there; nothing is created or registered.

    Raises:
        DatabaseError: there is no such database, or its tables are missing or of another version.
    """
    async with open_queries(database) as queries:
        from romancy.app import App  # noqa: PLC0415

        async with App(database, worker=False, auto_migrate=False) as app:
            yield app, queries


def migrate(database: str) -> Migration:
    """Create the tables, or bring them up to date.

    Raises:
        DatabaseError: the database can't be opened or written, or belongs to a newer version.
    """
    from romancy.storage.schema import SCHEMA_VERSION  # noqa: PLC0415
    from romancy.storage.stores import make_store  # noqa: PLC0415

    address = _stored(database)
    found = _prepare(make_store(address, []), migrate=True)
    return Migration(str(address), found, SCHEMA_VERSION)


def _prepare(store: Store, *, migrate: bool) -> str | None:
    from romancy.storage.failures import database_error, is_driver_error  # noqa: PLC0415

    try:
        return store.prepare(migrate)
    except Exception as error:
        if is_driver_error(error):
            raise database_error(error, store.name) from error
        raise


def _existing(database: str) -> Address:
    address = _stored(database)
    if isinstance(address, SqliteAddress) and not Path(address.path).exists():
        raise DatabaseUnavailableError(
            f"there is no database {address}: check the path, or create it: "
            + command("migrate", "--database", database)
        )
    return address


def _stored(database: str) -> Address:
    address = parse_address(database)
    if isinstance(address, SqliteAddress) and address.is_memory:
        raise DatabaseUnavailableError(f"{database} lives and ends with its app, unseen from here: name a file")
    return address


def _check_tables(address: SqliteAddress) -> None:
    from romancy.storage.failures import database_error  # noqa: PLC0415
    from romancy.storage.migrate import ensure_schema  # noqa: PLC0415

    # Unlike "ro", "rw" leaves no log file behind; neither creates a database.
    uri = f"{Path(address.path).as_uri()}?mode=rw"

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S)
        connection.execute("PRAGMA query_only = ON")
        return connection

    try:
        ensure_schema(address.path, connect, migrate=False)
    except sqlite3.Error as error:
        raise database_error(error, str(address)) from error
