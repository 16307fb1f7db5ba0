"""Many rows in one durable transaction, as one would write it by hand, on each database.

Only what the driver and the server need: no fence, no engine. `MAKERS` says who does it where.

* SQLite: `BEGIN IMMEDIATE`, inserts of several rows a statement, updates through `executemany`, COMMIT.
* PostgreSQL: all of it as one statement, so one round trip. Up to three rows are given as values, more as one text for
  each table, with control characters between rows and values: JSON, arrays and `executemany` came out slower. From 100
  rows of history on, these go through COPY in the same transaction, and the rest as before.
* MySQL and MariaDB: inserts of several rows a statement, the updates as one statement with a join. A transaction that
  is a single statement goes without BEGIN and COMMIT.
"""

import sqlite3
from collections.abc import Callable, Sequence
from functools import cache
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
"""So many rows of history are copied; with fewer, the further round trips cost more than the text."""

FEW = 3
"""So many rows go as values: psycopg takes much longer for more than 50 parameters."""

BETWEEN_VALUES, BETWEEN_ROWS, NULL = "\x1f", "\x1e", "\x1d"
MANY = -1

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
        self.connection = connect(url)
        for name in PLANNER_OFF:
            self.connection.execute(f"SET {name} = off")

    def commit(self, starts: list[Row], events: list[Row], ends: list[Row]) -> None:
        if len(events) < COPY_FROM:
            self._execute(starts, events, ends)
            return
        with self.connection.transaction():
            copied = f"COPY romancy_history ({', '.join(HistoryRow._fields)}) FROM STDIN"
            with self.connection.cursor().copy(copied) as copy:
                for row in events:
                    copy.write_row(row)
            if starts or ends:
                self._execute(starts, [], ends)

    def _execute(self, starts: list[Row], events: list[Row], ends: list[Row]) -> None:
        self.connection.execute(*all_together(starts, events, ends))

    def durability(self) -> Result:
        return server_settings("postgresql", lambda query: fetch(self.connection, query))


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


def all_together(starts: list[Row], events: list[Row], ends: list[Row]) -> tuple[str, list[str | None]]:
    """PostgreSQL's statement for these rows, with its values."""
    tables = (starts, events, ends)
    if len(starts) + len(events) + len(ends) <= FEW:
        values = [_text(value) for table in tables for row in table for value in row]
        return _together(len(starts), len(events), len(ends)), values
    return _together(*(MANY if table else 0 for table in tables)), [_in_one(table) for table in tables if table]


def _text(value: Any) -> str | None:
    """The server takes all for texts, so that missing values don't make it another statement to prepare."""
    return None if value is None else str(value)


def _in_one(rows: list[Row]) -> str:
    return BETWEEN_ROWS.join(
        [BETWEEN_VALUES.join([NULL if value is None else str(value) for value in row]) for row in rows]
    )


@cache
def _together(starts: int, events: int, ends: int) -> str:
    """One statement for so many rows."""
    parts = []
    if starts:
        parts.append(_insert("romancy_instances", StartRow._fields, starts))
    if events:
        parts.append(_insert("romancy_history", HistoryRow._fields, events))
    if ends:
        sets = ", ".join(f"{name} = v.{name}" for name in END_COLUMNS[:-1])
        parts.append(
            f"UPDATE romancy_instances AS i SET {sets} FROM {_rows(END_COLUMNS, ends)} "
            f"WHERE i.instance_id = v.instance_id"
        )
    *first, last = parts
    return f"WITH {', '.join(f'part_{n} AS ({part})' for n, part in enumerate(first))} {last}" if first else last


def _insert(table: str, columns: Sequence[str], count: int) -> str:
    return f"{insert_into(table, columns)} SELECT {', '.join(columns)} FROM {_rows(columns, count)}"


def _rows(columns: Sequence[str], count: int) -> str:
    if count != MANY:
        row = ", ".join(f"CAST(%s AS {NUMBERS.get(name, 'text')})" for name in columns)
        return f"(VALUES {', '.join([f'({row})'] * count)}) AS v({', '.join(columns)})"
    values = ", ".join(f"CAST(a[{n}] AS {NUMBERS.get(name, 'text')})" for n, name in enumerate(columns, 1))
    return (
        f"(SELECT {values} FROM (SELECT string_to_array(line, chr({ord(BETWEEN_VALUES)}), chr({ord(NULL)})) AS a "
        f"FROM unnest(string_to_array(%s, chr({ord(BETWEEN_ROWS)}))) AS line OFFSET 0) AS lines) "
        f"AS v({', '.join(columns)})"
    )


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
