"""Which store an address asks for."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from romancy.errors import ConfigurationError
from romancy.storage.address import Address, ServerAddress, SqliteAddress
from romancy.storage.queries import Queries
from romancy.storage.server import DEFAULT_PATIENCE_S, SHORTEST_PATIENCE_S
from romancy.storage.store import Store


def make_store(
    address: Address,
    workflow_names: Sequence[str],
    listen_on: Address | None = None,
    patience_s: float = DEFAULT_PATIENCE_S,
) -> Store:
    """The store of this database, not open yet.

    Args:
        address: where the database is.
        workflow_names: the workflows that this app can run.
        listen_on: where hints are heard, if not at the same address.
        patience_s: how long a server may take for a statement of the engine's own.

    Raises:
        ConfigurationError: ``listen_on`` is given where it means nothing.
        MissingDriverError: its driver is not installed.
    """
    if listen_on is not None and not (_is_postgresql(address) and _is_postgresql(listen_on)):
        raise ConfigurationError(
            f"listen_on={str(listen_on)!r} is for PostgreSQL behind a pooler: an address of the same database that "
            f"leads to the server directly"
        )
    patience_s = max(patience_s, SHORTEST_PATIENCE_S)
    # Each kind is imported where it is needed: the drivers of the others may not be there.
    if isinstance(address, SqliteAddress):
        from romancy.storage.sqlite import SqliteStore  # noqa: PLC0415

        return SqliteStore(address, workflow_names)
    if address.kind == "postgresql":
        from romancy.storage.postgresql import PostgresqlStore  # noqa: PLC0415

        store = PostgresqlStore(address, workflow_names, patience_s)
        if isinstance(listen_on, ServerAddress):
            store.listen_url = listen_on.url
        return store
    from romancy.storage.mysql import MysqlStore  # noqa: PLC0415

    return MysqlStore(address, workflow_names, patience_s)


def _is_postgresql(address: Address) -> bool:
    return isinstance(address, ServerAddress) and address.kind == "postgresql"


def make_queries(store: Store) -> Queries:
    """The read side of this store's database; opens connections as they are needed."""

    def make_engine() -> AsyncEngine:
        url = store.url(is_async=True)
        engine = create_async_engine(url, isolation_level="AUTOCOMMIT", pool_size=2, max_overflow=8)
        store.set_up_reading(engine.sync_engine)
        return engine

    return Queries(make_engine, store.name, store.url(is_async=True).get_backend_name())
