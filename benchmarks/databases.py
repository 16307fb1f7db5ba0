"""The servers that are measured on: reached by URL, described, and asked for an empty database for each measurement."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import psycopg
import pymysql
from peers.common import Result, server_settings
from sqlalchemy import URL, make_url

Kind = Literal["sqlite", "postgresql", "mysql"]
KINDS: tuple[Kind, ...] = ("sqlite", "postgresql", "mysql")
USUAL = {"postgresql": "postgresql://postgres@127.0.0.1:5432/postgres", "mysql": "mysql://root@127.0.0.1:3306/"}
CLOCK_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def connect(database: Path | str) -> Any:
    """A connection of the plain driver, without transactions unless a statement begins one."""
    if isinstance(database, Path):
        return sqlite3.connect(database, isolation_level=None, check_same_thread=False, cached_statements=256)
    url = make_url(database)
    if url.get_backend_name() == "postgresql":
        return psycopg.connect(database, autocommit=True, connect_timeout=10)
    return pymysql.connect(
        host=url.host or "127.0.0.1",
        port=url.port or 3306,
        user=url.username,
        password=url.password or "",
        database=url.database or None,
        charset="utf8mb4",
        autocommit=True,
        connect_timeout=10,
    )


def fetch(connection: Any, query: str) -> Any:
    """The first row of the answer."""
    cursor = connection.cursor()
    cursor.execute(query)
    return cursor.fetchone()


class Server:
    """A database server.

    Args:
        url: with a user who may create databases.
    """

    def __init__(self, url: str) -> None:
        self._url: URL = make_url(url)
        self.kind = "postgresql" if self._url.get_backend_name() == "postgresql" else "mysql"

    def __str__(self) -> str:
        return self._url.render_as_string(hide_password=True)

    def connect(self) -> Any:
        return connect(self._url.render_as_string(hide_password=False))

    def describe(self) -> Result:
        """Its version, and what it says of its durability.

        Raises:
            psycopg.Error, pymysql.Error: nobody answers.
            RuntimeError: it would lose what it has acknowledged.
        """
        with contextlib.closing(self.connect()) as connection:
            return server_settings(self.kind, lambda query: fetch(connection, query))

    @contextlib.contextmanager
    def fresh_database(self) -> Iterator[str]:
        """The URL of an empty database, which is dropped in the end whoever is still connected."""
        name = f"romancy_bench_{uuid4().hex[:12]}"
        force = " WITH (FORCE)" if self.kind == "postgresql" else ""
        with contextlib.closing(self.connect()) as connection:
            connection.cursor().execute(f"CREATE DATABASE {name}")
        try:
            yield self._url.set(database=name).render_as_string(hide_password=False)
        finally:
            with contextlib.closing(self.connect()) as connection:
                connection.cursor().execute(f"DROP DATABASE {name}{force}")


def server_cpu_seconds(connection: Any) -> float | None:
    """User and system seconds of the server's processes so far; ``None`` where they can't be seen from here."""
    try:
        if isinstance(connection, psycopg.Connection):
            parent = int(fetch(connection, "SELECT pg_read_file('postmaster.pid')")[0].split()[0])
        else:
            parent = int(Path(fetch(connection, "SELECT @@pid_file")[0]).read_text())
        stats = [_stat(folder) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    except (psycopg.Error, pymysql.Error, OSError, ValueError):
        return None
    ticks = 0
    for found in stats:
        if found is not None and parent in (found[0], found[1]):
            # The parent's sum has those of its children that have ended.
            ticks += found[2] + (found[3] if found[0] == parent else 0)
    return ticks / CLOCK_TICKS


def _stat(folder: Path) -> tuple[int, int, int, int] | None:
    """Process id, parent's id, its own ticks and those of its ended children; ``None``: it has gone."""
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(folder.name), int(fields[1]), int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
