"""The database's address: what ``App(database)`` and ``--database`` take."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from romancy.errors import DatabaseURLError

if TYPE_CHECKING:
    from sqlalchemy import URL

_FORMS = (
    "a path such as 'orders.db', ':memory:', sqlite:///orders.db, postgresql://user:password@host/database or "
    "mysql://user:password@host/database"
)
_SERVERS = {"postgresql": "postgresql", "postgres": "postgresql", "mysql": "mysql", "mariadb": "mysql"}


@dataclass(frozen=True, slots=True)
class SqliteAddress:
    """Where a SQLite database lives.

    Attributes:
        path: the absolute path of the file; empty for ``:memory:``, which gets a private temporary file.
    """

    path: str

    @property
    def is_memory(self) -> bool:
        """Whether the database is to vanish with the app."""
        return not self.path

    def __str__(self) -> str:
        return self.path or ":memory:"


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a database on a server lives.

    Attributes:
        kind: ``postgresql``, or ``mysql`` for MySQL and MariaDB.
        url: user, password, host, port, database, and options for the driver (TLS and the like); no driver name.
    """

    kind: str
    url: URL

    def __str__(self) -> str:
        return self.url.render_as_string(hide_password=True)


Address = SqliteAddress | ServerAddress


def parse_address(database: str | os.PathLike[str]) -> Address:
    """Read a path, ``:memory:`` or a URL.

    Raises:
        DatabaseURLError: it is neither, or names a database that is not supported.
    """
    try:
        text = os.fspath(database)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise DatabaseURLError(f"the database {database!r} is of type {type(database).__name__}: give {_FORMS}")
    if not text or not text.strip():
        raise DatabaseURLError(f"the database is empty: give {_FORMS}")
    if "\0" in text:
        raise DatabaseURLError(f"the database {text!r} holds a NUL character: give {_FORMS}")
    if text == ":memory:":
        return SqliteAddress("")
    if "://" not in text:
        return _file(text)
    scheme = text.split("://", 1)[0].lower()
    if scheme == "sqlite":
        return _sqlite(text)
    if scheme.partition("+")[0] in _SERVERS:
        return _server(text, scheme)
    raise DatabaseURLError(f"{scheme}:// is not supported: give {_FORMS}")


def _sqlite(text: str) -> SqliteAddress:
    parts = urlsplit(text)
    if parts.netloc or not parts.path:
        raise DatabaseURLError(
            f"{text!r} has {parts.netloc!r} where the path begins: write sqlite:///relative.db with three slashes, or "
            f"sqlite:////absolute.db with four"
        )
    if parts.query or parts.fragment:
        raise DatabaseURLError(f"{text!r} has options, and SQLite addresses take none: give {_FORMS}")
    path = unquote(parts.path[1:])
    return SqliteAddress("") if path in ("", ":memory:") else _file(path)


def _file(path: str) -> SqliteAddress:
    try:
        absolute = Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise DatabaseURLError(f"the folder at the beginning of {path!r} is unknown: {error}") from None
    if absolute.is_dir():
        raise DatabaseURLError(f"{path!r} is a folder: name a file in it, such as {str(absolute / 'romancy.db')!r}")
    return SqliteAddress(str(absolute))


def _server(text: str, scheme: str) -> ServerAddress:
    from sqlalchemy import make_url  # noqa: PLC0415  (paths, and the command line's --help, need none of it)
    from sqlalchemy.exc import ArgumentError  # noqa: PLC0415

    name, _, driver = scheme.partition("+")
    kind = _SERVERS[name]
    try:
        url = make_url(kind + text[len(scheme) :])
    except (ArgumentError, ValueError):
        # Not with the text: it may hold a password.
        raise DatabaseURLError(
            f"this {name}:// address can't be understood: write {name}://user:password@host:port/database, and "
            f"percent-encode special characters of the password"
        ) from None
    shown = url.render_as_string(hide_password=True)
    if driver:
        raise DatabaseURLError(
            f"{shown!r} was given with the driver {driver!r}, and Romancy brings its own: write {name}://…"
        )
    if not url.database:
        raise DatabaseURLError(f"{shown!r} names no database: write {name}://user:password@host:port/database")
    return ServerAddress(kind, url)
