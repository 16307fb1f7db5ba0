"""Tables are made once, the same by every way, and never silently."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from romancy import App, SchemaError, WorkflowContext, workflow
from romancy.errors import DatabaseError
from romancy.storage.migrate import ensure_schema, schema_version, upgrade
from romancy.storage.schema import SCHEMA_VERSION, VERSION_TABLE, instances, metadata
from tests.ten_workers import start_ten_workers_at_once


def _connect(path: Path) -> Callable[[], sqlite3.Connection]:
    return lambda: sqlite3.connect(path, isolation_level=None, timeout=20)


def _shape(path: Path) -> dict[str, Any]:
    """Everything about the tables that the database itself knows, but for the spelling of their SQL."""
    connection = sqlite3.connect(path)
    try:
        shape: dict[str, Any] = {}
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for name in names:
            indexes = {}
            for row in connection.execute(f"PRAGMA index_list({name})"):
                columns = connection.execute(f"PRAGMA index_xinfo({row[1]})").fetchall()
                sql = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (row[1],)).fetchone()
                where = sql[0].partition(" WHERE ")[2] if sql and sql[0] else ""
                indexes[row[1]] = (row[2:], columns, where)
            sql = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (name,)).fetchone()[0]
            shape[name] = {
                "columns": connection.execute(f"PRAGMA table_xinfo({name})").fetchall(),
                "foreign_keys": connection.execute(f"PRAGMA foreign_key_list({name})").fetchall(),
                "indexes": indexes,
                "without_rowid": "WITHOUT ROWID" in sql.upper(),
            }
        shape["triggers"] = connection.execute(
            "SELECT name FROM sqlite_master WHERE type IN ('trigger', 'view')"
        ).fetchall()
        return shape
    finally:
        connection.close()


def test_fresh_tables_are_the_same_as_migrated_ones(tmp_path: Path) -> None:
    fresh, migrated = tmp_path / "fresh.db", tmp_path / "migrated.db"
    assert ensure_schema(str(fresh), _connect(fresh), migrate=True) is None
    upgrade(str(migrated))
    shape = _shape(fresh)
    assert shape == _shape(migrated)
    assert set(shape) >= {table.name for table in metadata.sorted_tables} | {VERSION_TABLE}
    assert all(name.startswith("romancy_") for name in shape if name != "triggers")
    for path in (fresh, migrated):
        connection = sqlite3.connect(path)
        assert schema_version(connection) == SCHEMA_VERSION
        connection.close()


def test_second_start_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    ensure_schema(str(path), _connect(path), migrate=True)
    before = path.read_bytes()
    assert ensure_schema(str(path), _connect(path), migrate=True) == SCHEMA_VERSION
    assert ensure_schema(str(path), _connect(path), migrate=False) == SCHEMA_VERSION
    assert path.read_bytes() == before


def test_upgrade_of_an_up_to_date_database_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    ensure_schema(str(path), _connect(path), migrate=True)
    before = _shape(path)
    upgrade(str(path))
    assert _shape(path) == before


def test_path_with_characters_of_urls_is_one_file_throughout(tmp_path: Path) -> None:
    path = tmp_path / "what?a=b#c%41.db"
    upgrade(str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_tables_of_others_in_the_same_file_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE orders (id INTEGER)")
    connection.execute("INSERT INTO orders VALUES (7)")
    connection.commit()
    ensure_schema(str(path), _connect(path), migrate=True)
    assert connection.execute("SELECT * FROM orders").fetchall() == [(7,)]
    connection.close()


def test_threads_that_start_at_once_migrate_once(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    ready = threading.Barrier(10)
    outcomes: list[object] = []

    def start() -> None:
        ready.wait()
        try:
            outcomes.append(ensure_schema(str(path), _connect(path), migrate=True))
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=start) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(None) == 1, outcomes
    assert outcomes.count(SCHEMA_VERSION) == 9, outcomes


def test_ten_processes_that_start_at_once_migrate_once_and_all_work(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    start_ten_workers_at_once(path)
    connection = sqlite3.connect(path)
    found = connection.execute(f"SELECT count(*), max(version_num) FROM {VERSION_TABLE}").fetchone()
    assert found == (1, SCHEMA_VERSION)
    assert connection.execute("SELECT count(*) FROM romancy_instances WHERE status = 'completed'").fetchone() == (10,)
    connection.close()


def _one_workflow() -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None: ...


async def test_without_auto_migrate_a_fresh_database_is_an_error_that_says_what_to_run(database: Path) -> None:
    _one_workflow()
    with pytest.raises(SchemaError, match=r"tables are missing.*run: romancy migrate --database") as caught:
        await App(database, auto_migrate=False).start()
    assert str(database) in str(caught.value)
    async with App(database):
        pass
    async with App(database, auto_migrate=False):
        pass


def _set_version(path: Path, *versions: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"DELETE FROM {VERSION_TABLE}")
    connection.executemany(f"INSERT INTO {VERSION_TABLE} VALUES (?)", [(version,) for version in versions])
    connection.commit()
    connection.close()


@pytest.mark.parametrize("auto_migrate", [True, False])
async def test_tables_of_a_newer_version_are_refused_untouched(database: Path, auto_migrate: bool) -> None:
    _one_workflow()
    async with App(database):
        pass
    _set_version(database, "9999")
    before = _shape(database)
    with pytest.raises(SchemaError, match=r"tables have version 9999, this Romancy knows .*upgrade the package"):
        await App(database, auto_migrate=auto_migrate).start()
    assert _shape(database) == before


async def test_tables_of_an_older_version_are_refused_without_auto_migrate(database: Path) -> None:
    _one_workflow()
    async with App(database):
        pass
    _set_version(database, "0000")
    with pytest.raises(SchemaError, match="tables have version 0000, this version needs"):
        await App(database, auto_migrate=False).start()


async def test_version_that_no_migration_knows_is_a_schema_error(database: Path) -> None:
    _one_workflow()
    async with App(database):
        pass
    _set_version(database, "0000")
    with pytest.raises(SchemaError, match="can't be brought up to date"):
        await App(database).start()


async def test_emptied_version_table_is_a_schema_error(database: Path) -> None:
    _one_workflow()
    async with App(database):
        pass
    _set_version(database)
    with pytest.raises(SchemaError, match="the version of Romancy's tables is unknown"):
        await App(database).start()


async def test_foreign_table_in_the_way_leaves_nothing_half_made(database: Path) -> None:
    _one_workflow()
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE romancy_workers (x)")
    connection.commit()
    with pytest.raises(DatabaseError, match="romancy_workers"):
        await App(database).start()
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("romancy_workers",)]
    connection.close()


async def test_table_that_vanished_is_a_schema_error(database: Path) -> None:
    _one_workflow()
    async with App(database, worker=False) as app:
        connection = sqlite3.connect(database)
        connection.execute(f"DROP TABLE {instances.name}")
        connection.close()
        with pytest.raises(SchemaError, match="tables are missing"):
            await app.list_instances()
        await asyncio.sleep(0)
