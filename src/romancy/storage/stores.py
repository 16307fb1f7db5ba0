"""Which store an address asks for."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.ext.asyncio import create_async_engine

from romancy.storage.address import Address, SqliteAddress
from romancy.storage.queries import Queries
from romancy.storage.store import Store


def make_store(address: Address, workflow_names: Sequence[str]) -> Store:
    """The store of this database, not open yet.

    Raises:
        MissingDriverError: its driver is not installed.
    """
    # Each kind is imported where it is needed: the drivers of the others may not be there.
    if isinstance(address, SqliteAddress):
        from romancy.storage.sqlite import SqliteStore  # noqa: PLC0415

        return SqliteStore(address, workflow_names)
    if address.kind == "postgresql":
        from romancy.storage.postgresql import PostgresqlStore  # noqa: PLC0415

        return PostgresqlStore(address, workflow_names)
    from romancy.storage.mysql import MysqlStore  # noqa: PLC0415

    return MysqlStore(address, workflow_names)


def make_queries(store: Store) -> Queries:
    """The read side of this store's database; opens connections as they are needed."""
    engine = create_async_engine(store.url(is_async=True), isolation_level="AUTOCOMMIT", pool_size=2, max_overflow=8)
    store.set_up_reading(engine.sync_engine)
    return Queries(engine, store.name)
