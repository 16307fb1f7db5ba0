"""What drivers raise, as the typed errors that callers catch."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError

from romancy.errors import (
    DatabaseCorruptError,
    DatabaseError,
    DatabaseFullError,
    DatabaseLockedError,
    DatabaseReadOnlyError,
    DatabaseUnavailableError,
    SchemaError,
)

_CURES: dict[int, tuple[type[DatabaseError], str]] = {
    sqlite3.SQLITE_BUSY: (
        DatabaseLockedError,
        "another process holds its write lock; end that transaction, or try again",
    ),
    sqlite3.SQLITE_LOCKED: (DatabaseLockedError, "another connection holds its lock; try again"),
    sqlite3.SQLITE_READONLY: (
        DatabaseReadOnlyError,
        "it can't be written; give this user write permission on the file and on its folder",
    ),
    sqlite3.SQLITE_PERM: (DatabaseReadOnlyError, "its permissions refuse the access; correct them"),
    sqlite3.SQLITE_CORRUPT: (
        DatabaseCorruptError,
        "the file is damaged; restore a backup, or save what can be read with sqlite3's .recover",
    ),
    sqlite3.SQLITE_NOTADB: (DatabaseCorruptError, "the file is no SQLite database; check the path"),
    sqlite3.SQLITE_FULL: (DatabaseFullError, "the disk is full; free some space, the work goes on by itself"),
    sqlite3.SQLITE_IOERR: (DatabaseUnavailableError, "the disk reports an error; check it"),
    sqlite3.SQLITE_CANTOPEN: (
        DatabaseUnavailableError,
        "it can't be opened; the folder must exist and be writable, and the path must name a file",
    ),
}


def database_error(error: BaseException, database: str) -> DatabaseError:
    """The typed error for what a driver (or SQLAlchemy around it) raised."""
    if isinstance(error, DatabaseError):
        return error
    origin: BaseException | None = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(origin, "sqlite_errorcode", None)
    if code is not None and code & 0xFF in _CURES:
        kind, cure = _CURES[code & 0xFF]
        return _caused(kind(f"database {database}: {cure} ({origin})"), error)
    if "no such table" in str(origin) or "no such column" in str(origin):
        cure = f"its tables are missing or of another version ({origin}); run: romancy migrate --database {database}"
        return _caused(SchemaError(f"database {database}: {cure}"), error)
    return _caused(DatabaseError(f"database {database}: {origin}"), error)


def is_row_error(error: BaseException) -> bool:
    """Whether one row is at fault (a unique key, a value that can't be bound), so that others may go on."""
    return isinstance(
        error,
        sqlite3.IntegrityError
        | sqlite3.DataError
        | sqlite3.InterfaceError
        | sqlite3.ProgrammingError
        | OverflowError
        | UnicodeError,
    )


def _caused(error: DatabaseError, cause: BaseException) -> DatabaseError:
    error.__cause__ = cause
    return error
