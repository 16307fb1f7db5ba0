"""The database's address: what ``App(database)`` and ``--database`` take."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from romancy.errors import DatabaseURLError

_SQLITE_FORMS = "a path such as 'orders.db', ':memory:', or sqlite:///orders.db"


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


def parse_address(database: str | os.PathLike[str]) -> SqliteAddress:
    """Read a path, ``:memory:`` or a URL.

    Raises:
        DatabaseURLError: it is neither, or names a database that this version does not support.
    """
    try:
        text = os.fspath(database)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise DatabaseURLError(f"the database {database!r} is of type {type(database).__name__}: give {_SQLITE_FORMS}")
    if not text or not text.strip():
        raise DatabaseURLError(f"the database is empty: give {_SQLITE_FORMS}")
    if "\0" in text:
        raise DatabaseURLError(f"the database {text!r} holds a NUL character: give {_SQLITE_FORMS}")
    if text == ":memory:":
        return SqliteAddress("")
    if "://" not in text:
        return _file(text)
    scheme = text.split("://", 1)[0].lower()
    if scheme != "sqlite":
        raise DatabaseURLError(f"{scheme}:// is not supported by this version: give {_SQLITE_FORMS}")
    parts = urlsplit(text)
    if parts.netloc or not parts.path:
        raise DatabaseURLError(
            f"{text!r} has {parts.netloc!r} where the path begins: write sqlite:///relative.db with three slashes, or "
            f"sqlite:////absolute.db with four"
        )
    if parts.query or parts.fragment:
        raise DatabaseURLError(f"{text!r} has options, and SQLite addresses take none: give {_SQLITE_FORMS}")
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
