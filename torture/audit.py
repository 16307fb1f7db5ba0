"""Sees who writes history: a trigger notes each row whose writer does not own the instance, or is not alive.

The writer is known by its process id, which each connection of a worker carries.
"""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import make_url
from tests.databases import Database, execute, kind_of

TABLE = "CREATE TABLE torture_audit (instance_id VARCHAR(200), run INT, seq INT, writer INT, owner INT)"

# The owner may be gone already in the statement that ends an instance; then there is nothing to compare.
_ROW = "SELECT {new}.instance_id, {new}.run, {new}.seq, {me}, w.pid"
_STRANGER = (
    "FROM romancy_instances i LEFT JOIN romancy_workers w ON w.worker_id = i.owner "
    "WHERE i.instance_id = {new}.instance_id AND i.owner IS NOT NULL AND (w.state IS NULL OR w.state <> 'alive' "
    "OR w.pid <> {me})"
)
_INSERT = f"INSERT INTO torture_audit {_ROW} {_STRANGER}"


def create_audit(database: Database) -> None:
    """Create the table, and on servers the trigger."""
    execute(database, TABLE)
    match kind_of(database):
        case "postgresql":
            body = _INSERT.format(new="NEW", me="current_setting('torture.pid')::int")
            execute(
                database,
                "CREATE FUNCTION torture_audit() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN {body}; RETURN NEW; END $$",
            )
            execute(
                database,
                "CREATE TRIGGER torture_audit BEFORE INSERT ON romancy_history "
                "FOR EACH ROW EXECUTE FUNCTION torture_audit()",
            )
        case "mysql":
            body = _INSERT.format(new="NEW", me="@torture_pid")
            execute(database, f"CREATE TRIGGER torture_audit BEFORE INSERT ON romancy_history FOR EACH ROW {body}")


def watched(database: Database) -> Database:
    """The same database, with connections that carry the id of this process."""
    kind = kind_of(database)
    if kind == "sqlite":
        _watch_sqlite()
        return database
    pid = os.getpid()
    option = (
        {"options": f"-c torture.pid={pid}"} if kind == "postgresql" else {"init_command": f"SET @torture_pid={pid}"}
    )
    return make_url(str(database)).update_query_dict(option).render_as_string(hide_password=False)


def _watch_sqlite() -> None:
    """SQLite has no variables of a connection, but triggers of one."""
    from romancy.storage import sqlite

    prepare = sqlite.prepare_connection
    body = _INSERT.format(new="new", me=str(os.getpid()))

    def prepare_connection(connection: Any, is_durable: bool) -> None:
        prepare(connection, is_durable)
        connection.execute(
            f"CREATE TEMP TRIGGER torture_audit BEFORE INSERT ON main.romancy_history FOR EACH ROW BEGIN {body}; END"
        )

    sqlite.prepare_connection = prepare_connection
