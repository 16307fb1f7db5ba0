"""Servers that can't be reached, or can't be trusted: a typed error that names the cure."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from sqlalchemy import make_url

from romancy import App, DatabaseUnavailableError, DatabaseUnsafeError, SchemaError
from romancy.storage.mysql import MysqlLink, MysqlStore
from romancy.storage.postgresql import PostgresqlStore
from romancy.storage.threads import Link
from tests.databases import execute, rows, server_database
from tests.ten_workers import start_ten_workers_at_once


class Answering:
    """A connection that answers some questions with what the test says."""

    def __init__(self, link: Link, answers: dict[str, Any]) -> None:
        self._link = link
        self._answers = answers

    def execute(self, sql: str, parameters: Any = ()) -> Any:
        for part, row in self._answers.items():
            if part in sql:
                return _Rows([row])
        return self._link.execute(sql, parameters)

    def close(self) -> None:
        self._link.close()


class _Rows:
    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def fetchone(self) -> Any:
        return self._rows[0]

    def fetchall(self) -> list[Any]:
        return self._rows


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((120_000, "on", "on", "on", "read committed"), "PostgreSQL 12 is too old"),
        ((150_000, "off", "on", "on", "read committed"), "set fsync = on"),
        ((150_000, "on", "off", "on", "read committed"), "synchronous_commit = on"),
        ((150_000, "on", "on", "off", "read committed"), "set full_page_writes = on"),
    ],
)
async def test_unsafe_postgresql_is_refused(
    postgresql_url: str, answer: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PostgresqlStore._connect
    monkeypatch.setattr(PostgresqlStore, "_connect", lambda self: Answering(real(self), {"server_version_num": answer}))
    with pytest.raises(DatabaseUnsafeError, match=says):
        await App(postgresql_url).start()


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({"VERSION()": ("5.7.44", 1, 1 << 24)}, "MySQL 5.7.44 is too old: take 8.0"),
        ({"VERSION()": ("10.5.1-MariaDB", 1, 1 << 24)}, "MariaDB 10.5.1-MariaDB is too old: take 10.6"),
        ({"VERSION()": ("10.11.1-MariaDB", 2, 1 << 24)}, "innodb_flush_log_at_trx_commit is 2"),
        ({"SELECT table_name, engine": ("romancy_history", "MyISAM")}, "ALTER TABLE romancy_history ENGINE = InnoDB"),
    ],
)
async def test_unsafe_mysql_is_refused(
    mysql_url: str, answers: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MysqlStore._connect

    def connect(self: MysqlStore) -> Any:
        link: MysqlLink = real(self)
        return Answering(link, answers)

    monkeypatch.setattr(MysqlStore, "_connect", connect)
    with pytest.raises(DatabaseUnsafeError, match=says):
        await App(mysql_url).start()


@pytest.fixture(params=["postgresql", "mysql"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_url"))


async def test_server_that_does_not_answer(url: str) -> None:
    nowhere = make_url(url).set(host="127.0.0.1", port=1).render_as_string(hide_password=False)
    with pytest.raises(DatabaseUnavailableError, match="can't be reached"):
        await App(nowhere).start()


async def test_database_that_does_not_exist(url: str) -> None:
    missing = make_url(url).set(database="no_such_database").render_as_string(hide_password=False)
    with pytest.raises(DatabaseUnavailableError, match="no_such_database"):
        await App(missing).start()


async def test_missing_tables_without_migration(url: str) -> None:
    with server_database(make_url(url).get_backend_name()) as fresh:
        with pytest.raises(SchemaError, match="romancy migrate"):
            await App(fresh, auto_migrate=False).start()
        async with App(fresh):
            pass
        async with App(fresh, auto_migrate=False):
            pass
        execute(fresh, "UPDATE romancy_schema_version SET version_num = '9999'")
        with pytest.raises(SchemaError, match="upgrade the package"):
            await App(fresh).start()


def test_ten_processes_that_start_at_once_migrate_once_and_all_work(url: str) -> None:
    with server_database(make_url(url).get_backend_name()) as fresh:
        start_ten_workers_at_once(fresh)
        assert rows(fresh, "SELECT count(*) FROM romancy_schema_version") == [(1,)]
        assert rows(fresh, "SELECT count(*) FROM romancy_instances WHERE status = 'completed'") == [(10,)]


@pytest.mark.parametrize(
    ("scheme", "module", "says"),
    [("postgresql", "psycopg", r"pip install 'romancy\[postgresql\]'"), ("mysql", "pymysql", r"romancy\[mysql\]")],
)
def test_missing_driver_is_named_with_the_command_that_installs_it(scheme: str, module: str, says: str) -> None:
    program = (
        f"import asyncio, sys\nsys.modules[{module!r}] = None\nfrom romancy import App\n"
        f"try:\n    asyncio.run(App('{scheme}://host/database').start())\n"
        f"except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout.startswith("ConfigurationError"), done.stderr
    assert re.search(says, done.stdout)
