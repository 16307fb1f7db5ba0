"""Many rows in one durable transaction, as one would write it by hand, on each database.

Only what the driver and the server need: no fence, no engine. `MAKERS` says who does it where.

* SQLite: `BEGIN IMMEDIATE`, inserts of several rows a statement, updates through `executemany`, COMMIT.
* PostgreSQL: all of it as one statement, so one round trip; the rows go as JSON. From 100 rows of history on, these go
  through COPY in the same transaction, and the rest as before. Several rows a statement, and `executemany`, came out
  slower than either with psycopg.
* MySQL and MariaDB: inserts of several rows a statement, the updates as one statement with a join. A transaction that
  is a single statement goes without BEGIN and COMMIT.
"""

import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from peers.common import Result, durability, server_settings

from databases import connect, fetch
from romancy.storage.rows import HistoryRow, StartRow

Row = tuple[Any, ...]

SIZES = (256, 64, 16, 4, 1)
PAGES_BETWEEN_CHECKPOINTS = 4_000
PLANNER_OFF = ("enable_seqscan", "enable_hashjoin", "enable_mergejoin", "enable_material", "jit")
"""Or what was prepared while the tables were empty reads all of them later, until the next ANALYZE."""

COPY_FROM = 100
"""So many rows of history are copied; with fewer, the further round trips cost more than the JSON."""

END_COLUMNS = ("status", "owner", "ready_at", "updated_at", "completed_at", "result", "error", "instance_id")
NUMBERS = dict.fromkeys(("run", "claims", "seq", "position", "attempt"), "int") | dict.fromkeys(
    ("ready_at", "created_at", "started_at", "updated_at", "completed_at", "at", "due_at"), "bigint"
)


class Group(Protocol):
    """A connection that commits rows in groups."""

    def commit(self, starts: list[Row], events: list[Row], ends: list[Row]) -> None:
        """Write them in one transaction; they are durable when this returns."""
        ...

    def durability(self) -> Result:
        """What the connection answers."""
        ...


class SqliteGroup:
    """See the module.

    Args:
        path: the database.
        inserts: ``values``, or ``executemany``: the other way that suggests itself, which came out somewhat slower.
    """

    def __init__(self, path: Path, inserts: str = "values") -> None:
        self._connection = connect_sqlite(path)
        self._insert = insert_values if inserts == "values" else insert_executemany
        self._update = (
            f"UPDATE romancy_instances SET {', '.join(f'{name} = ?' for name in END_COLUMNS[:-1])} "
            f"WHERE instance_id = ?"
        )

    def commit(self, starts: list[Row], events: list[Row], ends: list[Row]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._insert(self._connection, insert_into("romancy_instances", StartRow._fields), starts)
        self._insert(self._connection, insert_into("romancy_history", HistoryRow._fields), events)
        if ends:
            self._connection.executemany(self._update, ends)
        self._connection.execute("COMMIT")

    def durability(self) -> Result:
        return durability(
            self._connection.execute("PRAGMA journal_mode").fetchone()[0],
            self._connection.execute("PRAGMA synchronous").fetchone()[0],
        )


class PostgresqlGroup:
    """See the module."""

    def __init__(self, url: str) -> None:
        self._connection = connect(url)
        for name in PLANNER_OFF:
            self._connection.execute(f"SET {name} = off")
        end = ", ".join(f"{name} = v.{name}" for name in END_COLUMNS[:-1])
        self._statement = (
            f"WITH starts AS ({_insert_recordset('romancy_instances', StartRow._fields)}), "
            f"events AS ({_insert_recordset('romancy_history', HistoryRow._fields)}) "
            f"UPDATE romancy_instances AS i SET {end} FROM {_recordset(END_COLUMNS)} "
            f"WHERE i.instance_id = v.instance_id"
        )

    def commit(self, starts: list[Row], events: list[Row], ends: list[Row]) -> None:
        if len(events) < COPY_FROM:
            self._execute(starts, events, ends)
            return
        with self._connection.transaction():
            copied = f"COPY romancy_history ({', '.join(HistoryRow._fields)}) FROM STDIN"
            with self._connection.cursor().copy(copied) as copy:
                for row in events:
                    copy.write_row(row)
            if starts or ends:
                self._execute(starts, [], ends)

    def _execute(self, starts: list[Row], events: list[Row], ends: list[Row]) -> None:
        rows = (
            _as_json(StartRow._fields, starts),
            _as_json(HistoryRow._fields, events),
            _as_json(END_COLUMNS, ends),
        )
        self._connection.execute(self._statement, rows)

    def durability(self) -> Result:
        return server_settings("postgresql", lambda query: fetch(self._connection, query))


class MysqlGroup:
    """See the module."""

    def __init__(self, url: str) -> None:
        self._connection = connect(url)
        self._cursor = self._connection.cursor()

    def commit(self, starts: list[Row], events: list[Row], ends: list[Row]) -> None:
        statements = [
            *_mysql_inserts(insert_into("romancy_instances", StartRow._fields), starts),
            *_mysql_inserts(insert_into("romancy_history", HistoryRow._fields), events),
            *_mysql_update(ends),
        ]
        if len(statements) == 1:
            self._cursor.execute(*statements[0])
            return
        self._cursor.execute("START TRANSACTION")
        for sql, values in statements:
            self._cursor.execute(sql, values)
        self._cursor.execute("COMMIT")

    def durability(self) -> Result:
        return server_settings("mysql", lambda query: fetch(self._connection, query))


MAKERS: dict[str, Callable[[Any], Group]] = {
    "sqlite": SqliteGroup,
    "postgresql": PostgresqlGroup,
    "mysql": MysqlGroup,
}


def insert_into(table: str, columns: Sequence[str]) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)})"


def connect_sqlite(path: Path) -> sqlite3.Connection:
    connection: sqlite3.Connection = connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {PAGES_BETWEEN_CHECKPOINTS}")
    return connection


def insert_values(connection: sqlite3.Connection, statement: str, rows: list[Row]) -> None:
    """Several rows a statement, in few sizes, so that few statements are prepared."""
    done = 0
    for size in SIZES:
        while len(rows) - done >= size:
            row = f"({','.join('?' * len(rows[0]))})"
            flat = [value for row in rows[done : done + size] for value in row]
            connection.execute(f"{statement} VALUES {','.join([row] * size)}", flat)
            done += size


def insert_executemany(connection: sqlite3.Connection, statement: str, rows: list[Row]) -> None:
    if rows:
        connection.executemany(f"{statement} VALUES ({','.join('?' * len(rows[0]))})", rows)


def _as_json(columns: Sequence[str], rows: list[Row]) -> str:
    return json.dumps([dict(zip(columns, row, strict=True)) for row in rows]) if rows else "[]"


def _recordset(columns: Sequence[str]) -> str:
    typed = ", ".join(f"{name} {NUMBERS.get(name, 'text')}" for name in columns)
    return f"json_to_recordset(CAST(%s AS json)) AS v({typed})"


def _insert_recordset(table: str, columns: Sequence[str]) -> str:
    return f"{insert_into(table, columns)} SELECT {', '.join(columns)} FROM {_recordset(columns)}"


def _mysql_inserts(statement: str, rows: list[Row]) -> list[tuple[str, list[Any]]]:
    """One statement, for this driver puts the values into the text and nothing is prepared."""
    if not rows:
        return []
    row = f"({','.join(['%s'] * len(rows[0]))})"
    return [(f"{statement} VALUES {','.join([row] * len(rows))}", [value for row_ in rows for value in row_])]


def _mysql_update(rows: list[Row]) -> list[tuple[str, list[Any]]]:
    if not rows:
        return []
    sets = ", ".join(f"i.{name} = v.{name}" for name in END_COLUMNS[:-1])
    named = ", ".join(f"%s AS {name}" for name in END_COLUMNS)
    more = f" UNION ALL SELECT {', '.join(['%s'] * len(END_COLUMNS))}" * (len(rows) - 1)
    sql = f"UPDATE romancy_instances AS i JOIN (SELECT {named}{more}) AS v ON i.instance_id = v.instance_id SET {sets}"
    return [(sql, [value for row in rows for value in row])]
