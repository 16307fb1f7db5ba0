"""Connections of the plain drivers to the databases that the tests run on."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import psycopg
import pymysql
from sqlalchemy import make_url

Database = Path | str
"""What a test hands to ``App``: the path of a SQLite file, or the URL of a database on a server."""


def kind_of(database: Database) -> str:
    """``sqlite``, ``postgresql`` or ``mysql``."""
    return database.partition(":")[0] if isinstance(database, str) else "sqlite"


def connect(database: Database) -> Any:
    """A connection of the plain driver."""
    if isinstance(database, Path):
        return sqlite3.connect(database, timeout=20)
    url = make_url(database)
    if kind_of(database) == "postgresql":
        return psycopg.connect(database)
    return pymysql.connect(
        host=url.host or "127.0.0.1",
        port=url.port or 3306,
        user=url.username,
        password=url.password or "",
        database=url.database or None,
        charset="utf8mb4",
    )


def commit_at_once(connection: Any) -> None:
    """Let each statement on a server be a transaction of its own."""
    if isinstance(connection, psycopg.Connection):
        connection.autocommit = True
    else:
        connection.autocommit(True)
