"""What drivers raise, as the typed errors that callers catch."""

from __future__ import annotations

import sqlite3
from ssl import SSLError

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from romancy.errors import (
    DatabaseCorruptError,
    DatabaseError,
    DatabaseFullError,
    DatabaseLockedError,
    DatabaseReadOnlyError,
    DatabaseUnavailableError,
    PacketTooLargeError,
    SchemaError,
)

Cure = tuple[type[DatabaseError], str]

_SQLITE: dict[int, Cure] = {
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


_POSTGRESQL: dict[str, Cure] = {
    "40001": (DatabaseLockedError, "another transaction was in the way; try again"),
    "40P01": (DatabaseLockedError, "two transactions waited for each other; try again"),
    "55P03": (DatabaseLockedError, "another transaction holds a lock; end that transaction, or try again"),
    "25P03": (DatabaseUnavailableError, "the server ended an idle transaction; try again"),
    "25006": (DatabaseReadOnlyError, "it can't be written; connect to the primary server, not to a replica"),
    "42501": (DatabaseReadOnlyError, "its permissions refuse the access; grant them to this user"),
    "53100": (DatabaseFullError, "the server's disk is full; free some space, the work goes on by itself"),
    "53200": (DatabaseUnavailableError, "the server is out of memory; it goes on when there is some"),
    "53300": (DatabaseUnavailableError, "the server has no connection left; close some, or raise max_connections"),
    "3D000": (DatabaseUnavailableError, "there is no such database on the server; create it: CREATE DATABASE …"),
    "28P01": (DatabaseUnavailableError, "the server refuses the password; check user and password"),
    "28000": (DatabaseUnavailableError, "the server refuses this user; check user, host and pg_hba.conf"),
    "42P01": (SchemaError, "its tables are missing or of another version; run: romancy migrate --database {name}"),
    "42703": (SchemaError, "its tables are of another version; run: romancy migrate --database {name}"),
    "XX001": (DatabaseCorruptError, "the server reports damaged data; restore a backup"),
    "XX002": (DatabaseCorruptError, "the server reports a damaged index; reindex it"),
}
"""By SQLSTATE; https://www.postgresql.org/docs/current/errcodes-appendix.html."""

_MYSQL: dict[int, Cure] = {
    1205: (DatabaseLockedError, "another transaction holds a lock; end that transaction, or try again"),
    1213: (DatabaseLockedError, "two transactions waited for each other; try again"),
    1290: (DatabaseReadOnlyError, "it can't be written; connect to the primary server, not to a replica"),
    1792: (DatabaseReadOnlyError, "it can't be written; connect to the primary server, not to a replica"),
    1836: (DatabaseReadOnlyError, "the server is read-only; switch that off, or connect to the primary server"),
    1142: (DatabaseReadOnlyError, "its permissions refuse the access; grant them to this user"),
    1021: (DatabaseFullError, "the server's disk is full; free some space, the work goes on by itself"),
    1114: (DatabaseFullError, "a table is full; free some space on the server, the work goes on by itself"),
    1040: (DatabaseUnavailableError, "the server has no connection left; close some, or raise max_connections"),
    1044: (DatabaseUnavailableError, "the server refuses this user the database; grant it"),
    1045: (DatabaseUnavailableError, "the server refuses user or password; check both"),
    1049: (DatabaseUnavailableError, "there is no such database on the server; create it: CREATE DATABASE …"),
    1146: (SchemaError, "its tables are missing or of another version; run: romancy migrate --database {name}"),
    1054: (SchemaError, "its tables are of another version; run: romancy migrate --database {name}"),
}
"""By error number; https://mariadb.com/kb/en/mariadb-error-code-reference/."""

_MYSQL_LOST = {1053, 1077, 1078, 1079, 1080, 1152, 1158, 1159, 1160, 1161, 1184, 1927, 4031}
_MYSQL_ROW = {1048, 1062, 1153, 1264, 1265, 1292, 1366, 1406, 1690, 3819, 4025, 3988}
_UNREACHABLE = (
    DatabaseUnavailableError,
    "the server can't be reached, or has ended the connection; the work goes on by itself when it is back",
)
_UNTRUSTED = (
    DatabaseUnavailableError,
    "no encrypted connection to the server comes about that both sides trust; check that sslrootcert (PostgreSQL) or "
    "ssl_ca (MySQL, MariaDB) names the CA of its certificate, that the certificate is for this host and still valid, "
    "and that the server offers TLS",
)
_UNTRUSTED_WORDS = (
    "certificate verify failed",
    "certificate_verify_failed",
    "server certificate for",
    "certificate file",
    "certificate required",
    "private key file",
    "unknown ca",
    "does not support ssl",
    "doesn't support ssl",
    "ssl is required",
    "sslv3 alert",
    "tlsv1 alert",
    "wrong_version_number",
)
"""What the drivers and OpenSSL say of that; none of them has a number for it."""


def database_error(error: BaseException, database: str) -> DatabaseError:
    """The typed error for what a driver (or SQLAlchemy around it) raised."""
    if isinstance(error, DatabaseError):
        return error
    origin: BaseException = error
    if isinstance(error, DBAPIError) and error.orig is not None:
        origin = error.orig
    text = " ".join(str(origin).split())
    cure = _cure(origin)
    if cure is not None:
        kind, what = cure
        return _caused(kind(f"database {database}: {what.format(name=database)} ({text})"), error)
    if "no such table" in text or "no such column" in text:
        what = f"its tables are missing or of another version ({text}); run: romancy migrate --database {database}"
        return _caused(SchemaError(f"database {database}: {what}"), error)
    return _caused(DatabaseError(f"database {database}: {text}"), error)


def _cure(origin: BaseException) -> Cure | None:
    code = getattr(origin, "sqlite_errorcode", None)
    if code is not None:
        return _SQLITE.get(code & 0xFF)
    if is_lost(origin) or isinstance(origin, SSLError):
        said = str(origin).lower()
        return _UNTRUSTED if any(words in said for words in _UNTRUSTED_WORDS) else _UNREACHABLE
    number = _mysql_number(origin)
    if number is not None:
        return _MYSQL.get(number)
    state = getattr(origin, "sqlstate", None)
    return None if state is None else _POSTGRESQL.get(state)


def is_lost(error: BaseException) -> bool:
    """Whether a server has ended the connection, or can't be reached; what was under way may have been committed."""
    if isinstance(error, DatabaseError) and error.__cause__ is not None:
        error = error.__cause__
    origin: BaseException | None = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(origin, ConnectionError | EOFError):
        return True
    kind = type(origin)
    package = kind.__module__.partition(".")[0]
    if package == "psycopg":
        state: str | None = getattr(origin, "sqlstate", None)
        if state is None:
            return any(base.__name__ in ("OperationalError", "InterfaceError") for base in kind.__mro__)
        return state.startswith(("08", "57P")) or state == "25P03"
    number = _mysql_number(origin)
    if number is None:
        return package in ("pymysql", "asyncmy") and kind.__name__ == "InterfaceError"
    return 2000 <= number < 3000 or number in _MYSQL_LOST or number == 0


def is_beyond_use(error: BaseException) -> bool:
    """Whether a connection of the engine's own is of no more use: it is lost, or stuck in a failed transaction."""
    cause = error.__cause__ if isinstance(error, DatabaseError) else error
    return is_lost(error) or getattr(cause, "sqlstate", None) == "25P02"


def _mysql_number(origin: BaseException | None) -> int | None:
    if type(origin).__module__.partition(".")[0] not in ("pymysql", "asyncmy") or origin is None or not origin.args:
        return None
    number = origin.args[0]
    return number if isinstance(number, int) else None


def is_driver_error(error: BaseException) -> bool:
    """Whether a driver, or SQLAlchemy around it, raised this."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, sqlite3.Error | SQLAlchemyError | OSError) or package in ("psycopg", "pymysql", "asyncmy")


def is_row_error(error: BaseException) -> bool:
    """Whether one row is at fault (a unique key, a value that can't be bound), so that others may go on."""
    if isinstance(error, PacketTooLargeError):
        return True
    number = _mysql_number(error)
    if number is not None:
        return number in _MYSQL_ROW
    state = getattr(error, "sqlstate", None)
    if state is not None:
        return bool(state[:2] in ("22", "23", "54"))
    if type(error).__module__.partition(".")[0] == "psycopg":
        return type(error).__name__ == "DataError"  # raised before anything was sent
    return isinstance(
        error,
        sqlite3.IntegrityError
        | sqlite3.DataError
        | sqlite3.InterfaceError
        | sqlite3.ProgrammingError
        | NotOwnedError
        | OverflowError
        | UnicodeError,
    )


def is_conflict(error: BaseException) -> bool:
    """Whether a row was refused for somebody else's: its key is taken, or its instance has another owner."""
    cause = error.__cause__ if isinstance(error, DatabaseError) else error
    if isinstance(cause, DBAPIError):
        cause = cause.orig
    return (
        isinstance(cause, NotOwnedError)
        or getattr(cause, "sqlstate", None) in ("23505", "22012")
        or _mysql_number(cause) == 1062
        or (isinstance(cause, sqlite3.IntegrityError) and "UNIQUE" in str(cause))
    )


class NotOwnedError(Exception):
    """A state was to be written on an instance that the worker does not own."""


class HistoryConflictError(DatabaseError):
    """Somebody else has recorded the event that was to be written: the instance is theirs."""


def _caused(error: DatabaseError, cause: BaseException) -> DatabaseError:
    error.__cause__ = cause
    return error
