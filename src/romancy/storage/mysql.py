"""MySQL and MariaDB: what they answer in their own way."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import uuid4

from sqlalchemy import URL, ColumnElement, Connection, Engine, event, literal_column, text
from sqlalchemy.dialects import mysql as mysql_dialect
from sqlalchemy.engine.interfaces import Dialect

from romancy.errors import ConfigurationError, DatabaseUnsafeError, SchemaError
from romancy.storage.address import ServerAddress
from romancy.storage.database import check_packet
from romancy.storage.failures import NotOwnedError
from romancy.storage.listener import HINT, LONGEST_WAIT_S, Listener
from romancy.storage.rows import StartRow, StateRow
from romancy.storage.schema import history, instances, workers
from romancy.storage.server import DEFAULT_PATIENCE_S, MOST_IDLE_S, MOST_LOCK_WAIT_S, ServerLink, ServerStore
from romancy.storage.statements import ManyRows, fitting, insert_into
from romancy.storage.threads import Check, Link, no_check
from romancy.storage.tls import refuses_tls, tls_context, without_tls
from romancy.storage.watchdog import Line, answered_within

try:
    import pymysql
    from pymysql.constants import CLIENT, CR, SERVER_STATUS
    from pymysql.converters import escape_string
except ImportError as error:
    raise ConfigurationError(
        f"MySQL and MariaDB need their drivers: pip install 'romancy[mysql]' (import pymysql says: {error})"
    ) from error

logger = logging.getLogger("romancy.storage")

MINIMUM_MARIADB = (10, 6)
MINIMUM_MYSQL = (8, 0)
MIGRATION_LOCK = "romancy-migration"
MIGRATION_WAIT_S = 60
LISTENS = "SELECT /* romancy listens */"
"""How a listener's statement begins; others find it by that."""

INTERRUPTED = 1317
LONGEST_HOLD_S = 365 * 24 * 3600
LONGEST_PAUSE_S = 60.0
"""How long an activity may leave its session alone on MySQL, which can't tell one that has locks from others."""

PACKET_HEAD_BYTES = 64
"""What may stand in a packet beside the statement."""

_DIALECT = mysql_dialect.dialect(paramstyle="format")
_NOW: ColumnElement[Any] = literal_column("CAST(UNIX_TIMESTAMP(SYSDATE(6)) * 1000000 AS SIGNED)")

FALLING_ASLEEP_S = 0.03
"""Seconds after which a listener's statement surely sleeps."""


class MysqlLink(ServerLink):
    """A PyMySQL connection that answers ``execute`` with a cursor.

    A round trip is dear: the answer finds another thread at work, and waits for its turn. So what is queued goes
    together with the next statement, if a packet holds both.
    """

    def __init__(self, connection: pymysql.connections.Connection[Any], line: Line, patience_s: float) -> None:
        super().__init__(line, patience_s)
        self.connection = connection
        self.most_bytes: int | None = None
        self._queue: list[tuple[str, Check]] = []

    def queue(self, sql: str, parameters: Sequence[Any], check: Check) -> None:
        """Run this before the next statement, and then check its result."""
        self._queue.append((self._as_text(sql, parameters), check))

    def run_checks(self) -> None:
        """Run what is queued without waiting for the next statement, unless any results of it will do."""
        if any(check is not no_check for _, check in self._queue):
            with answered_within(self.line, self._patience_s):
                self._run(self.forget_queue())

    def forget_queue(self) -> list[tuple[str, Check]]:
        """Run nothing of what is queued; returns it."""
        queued, self._queue = self._queue, []
        return queued

    def _execute(self, sql: str, parameters: Sequence[Any]) -> Any:
        return self._run([*self.forget_queue(), (self._as_text(sql, parameters), no_check)])

    def _as_text(self, sql: str, parameters: Sequence[Any]) -> str:
        # What the driver does, too, at a third of its time for the types that rows are made of.
        driver: Any = self.connection
        if driver.server_status & SERVER_STATUS.SERVER_STATUS_NO_BACKSLASH_ESCAPES:
            return sql % tuple(map(driver.escape, parameters))
        values = [
            f"'{escape_string(value)}'"
            if value.__class__ is str
            else ("NULL" if value is None else value if value.__class__ is int else driver.escape(value))
            for value in parameters
        ]
        return sql % tuple(values)

    def _run(self, statements: list[tuple[str, Check]]) -> Any:
        text = ";\n".join([text for text, _ in statements]) if len(statements) > 1 else statements[0][0]
        # The server answers what is too long by breaking the connection, and it would be sent again and again.
        if self.most_bytes is not None and 4 * len(text) > self.most_bytes:
            size = len(text.encode("utf-8", "surrogateescape"))
            if size > self.most_bytes and len(statements) > 1:
                for statement in statements[:-1]:
                    self._run([statement])
                return self._run(statements[-1:])
            check_packet(size, self.most_bytes)
        cursor = self.connection.cursor()
        results: list[tuple[int, Sequence[Any]]] = []
        try:
            cursor.execute(text)
            for number, (_, check) in enumerate(statements, 1):
                if check is not no_check:
                    results.append((cursor.rowcount, cursor.fetchall()))
                if number < len(statements):
                    cursor.nextset()
        finally:
            # What a statement has not found may be the reason why a later one has failed.
            checks = [check for _, check in statements if check is not no_check]
            for check, result in zip(checks, results, strict=False):
                check(*result)
        return cursor

    def _close(self) -> None:
        self.connection.close()


class Ear:
    """A listener's connection: waits on the server until it is woken.

    On MySQL it sleeps. MariaDB has one mutex for all that sleep, on any database: who wakes one that is about to take
    it stands still with it for 2 s, and with them everybody else who sleeps or wakes. So there it waits for a lock of
    its own, which nobody gets, for a second connection holds it.

    Args:
        link: the connection that waits.
        holder: the one that holds what it waits for; without one it sleeps.
    """

    def __init__(self, link: MysqlLink, holder: MysqlLink | None) -> None:
        self.link = link
        self._holder = holder
        self._call = "SLEEP("
        if holder is not None:
            name = f"romancy-{uuid4()}"
            holder.execute(f"SET SESSION wait_timeout = {LONGEST_HOLD_S}")
            holder.execute("SELECT GET_LOCK(%s, 0)", [name])
            self._call = f"GET_LOCK('{name}', "

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """See :class:`romancy.storage.threads.Link`."""
        return self.link.execute(sql, parameters)

    def is_woken(self, timeout_s: float) -> bool:
        """Wait for about so many seconds, or until woken."""
        try:
            (answer,) = self.link.execute(f"{LISTENS} {self._call}{timeout_s:.3f})").fetchone()
        except pymysql.err.OperationalError as error:
            if error.args[0] == INTERRUPTED:
                return True
            raise
        if self._holder is None:
            return bool(answer)
        if answer == 1:
            raise pymysql.err.OperationalError(
                CR.CR_SERVER_LOST, "the connection that holds the listener's lock is gone"
            )
        return answer is None

    def cut(self) -> None:
        """Let the wait fail at once. From any thread."""
        self.link.line.cut()

    def close(self) -> None:
        """See :class:`romancy.storage.threads.Link`."""
        try:
            self.link.close()
        finally:
            # Whatever waits on the server for a client that has gone gets the lock, and ends.
            if self._holder is not None:
                self._holder.close()


class MysqlStore(ServerStore):
    """A MySQL or MariaDB database.

    Args:
        address: where it is.
        workflow_names: the workflows that this app can run.
        patience_s: see :class:`romancy.storage.server.ServerStore`.
    """

    begin = "START TRANSACTION"
    kind = "mysql"

    def __init__(
        self, address: ServerAddress, workflow_names: Sequence[str], patience_s: float = DEFAULT_PATIENCE_S
    ) -> None:
        super().__init__(address, _DIALECT, workflow_names, patience_s, _NOW)
        self._is_mariadb = True
        self._url = without_tls(address.url)
        tls = tls_context(address.url)
        self._tls: dict[str, Any] = {} if tls is None else {"ssl": tls}
        # Unless it is told not to, PyMySQL uses TLS wherever the server has it; asyncmy only when it is told to.
        self._plain: dict[str, Any] = {"ssl_disabled": True} if refuses_tls(address.url) else {}
        self._keyed_starts = ManyRows(
            insert_into(instances, StartRow._fields),
            len(StartRow._fields),
            "ON DUPLICATE KEY UPDATE instance_id = VALUES(instance_id)",
            mark="%s",
        )

    # -- opening -----------------------------------------------------------------------------------

    def check(self, link: Link) -> None:
        version, flushes, packet = link.execute(
            "SELECT VERSION(), @@innodb_flush_log_at_trx_commit, @@max_allowed_packet"
        ).fetchone()
        self.most_bytes = packet - PACKET_HEAD_BYTES
        self._is_mariadb = "mariadb" in version.lower()
        numbers = tuple(int(part) for part in version.split("-")[0].split(".")[:2])
        kind, minimum = ("MariaDB", MINIMUM_MARIADB) if self._is_mariadb else ("MySQL", MINIMUM_MYSQL)
        if numbers < minimum:
            raise DatabaseUnsafeError(
                f"database {self.name}: {kind} {version} is too old: take {'.'.join(map(str, minimum))} or newer"
            )
        if flushes != 1:
            raise DatabaseUnsafeError(
                f"database {self.name}: innodb_flush_log_at_trx_commit is {flushes}, so a crash of the server would "
                f"lose what it has acknowledged: SET GLOBAL innodb_flush_log_at_trx_commit = 1, and in my.cnf"
            )

    def check_tables(self, link: Link) -> None:
        names = [table.name for table in (instances, history, workers)]
        found = link.execute(
            "SELECT table_name, engine FROM information_schema.tables "
            f"WHERE table_schema = DATABASE() AND table_name IN ({','.join(['%s'] * len(names))})",
            names,
        ).fetchall()
        for name, engine in found:
            if engine.lower() != "innodb":
                raise DatabaseUnsafeError(
                    f"database {self.name}: table {name} has the engine {engine}, which has no transactions: "
                    f"ALTER TABLE {name} ENGINE = InnoDB"
                )

    def _connect_listener(self) -> Ear:
        link = self._connect(LONGEST_WAIT_S)
        holder: MysqlLink | None = None
        try:
            self._set_up(link)
            if self._is_mariadb:
                holder = self._connect()
            return Ear(link, holder)
        except BaseException:
            for made in (link, holder):
                if made is not None:
                    made.close()
            raise

    def _set_up(self, link: Link) -> None:
        assert isinstance(link, MysqlLink)
        # MySQL has a time for idle connections only, in a transaction or not: see is_stale.
        variable = "idle_transaction_timeout" if self._is_mariadb else "wait_timeout"
        settings = {
            # Shorter than our patience: the server is to give up first.
            "innodb_lock_wait_timeout": max(1, math.floor(min(MOST_LOCK_WAIT_S, self.patience_s / 2))),
            "time_zone": "'+00:00'",
            variable: self.idle_transaction_s,
        }
        link.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
        link.execute("SET " + ", ".join(f"SESSION {name} = {value}" for name, value in settings.items()))
        link.most_bytes = link.execute("SELECT @@max_allowed_packet").fetchone()[0] - PACKET_HEAD_BYTES

    def _connect(self, sleep_s: float = 0.0) -> MysqlLink:
        url = self.url(is_async=False)
        _, parameters = mysql_dialect.pymysql.dialect().create_connect_args(url)
        parameters["client_flag"] = parameters.get("client_flag", 0) | CLIENT.FOUND_ROWS | CLIENT.MULTI_STATEMENTS
        patience_s = self.patience_s + sleep_s
        options: dict[str, Any] = {
            "connect_timeout": self.connect_timeout_s,
            "read_timeout": patience_s,
            "write_timeout": self.patience_s,
            "charset": "utf8mb4",
        }
        connection = pymysql.connect(autocommit=True, **{**options, **parameters, **self._tls, **self._plain})
        return MysqlLink(connection, self._dog.hold(self._descriptor(connection)), patience_s)

    def _connecting(self, dialect: Dialect, options: dict[str, Any]) -> dict[str, Any]:
        plain = self._plain if dialect.driver == "pymysql" else {}
        # The drivers' own timeout for connecting ends before the server has said a word.
        options = {"read_timeout": self.connect_timeout_s, **options, **self._tls, **plain}
        return super()._connecting(dialect, options)

    def migration_options(self) -> dict[str, Any]:
        return {"connect_args": {**self._tls, **self._plain}}

    def _on_connected(self, driver: Any, options: dict[str, Any]) -> None:
        driver._read_timeout = options.get("read_timeout")

    def _descriptor(self, connection: Any) -> int:
        # asyncmy's is hidden in its transport.
        transport = getattr(connection, "_transport", None)
        end = connection._sock if transport is None else transport.get_extra_info("socket")
        descriptor: int = end.fileno()
        return descriptor

    def url(self, *, is_async: bool) -> URL:
        kind = "mariadb" if self._is_mariadb else "mysql"
        return self._url.set(drivername=f"{kind}+{'asyncmy' if is_async else 'pymysql'}")

    @contextlib.contextmanager
    def migration_lock(self, connection: Connection) -> Iterator[None]:
        parameters = {"name": MIGRATION_LOCK, "wait": MIGRATION_WAIT_S}
        if connection.execute(text("SELECT GET_LOCK(:name, :wait)"), parameters).scalar_one() != 1:
            raise SchemaError(
                f"database {self.name}: another process has migrated it for more than {MIGRATION_WAIT_S} s; start again"
            )
        try:
            yield
        finally:
            connection.execute(text("SELECT RELEASE_LOCK(:name)"), parameters)

    def set_up_sessions(self, engine: Engine) -> None:
        self._set_idle_time(engine)
        super().set_up_sessions(engine)

    def _begin_on(self, connection: Connection) -> Callable[[], None]:
        isolation = "tx_isolation" if self._is_mariadb else "transaction_isolation"
        wanted: dict[str, Any] = {isolation: "READ-COMMITTED"}
        variable, limit_s = self._idle_time()
        wanted[variable] = limit_s
        connection.begin()
        names = ", ".join(f"@@SESSION.{name}" for name in wanted)
        values = connection.exec_driver_sql(f"SELECT {names}").one()
        found = dict(zip(wanted, values, strict=True))
        if found != wanted:
            connection.exec_driver_sql(_setting(wanted))
        # By statement, for the driver may be in autocommit mode.
        connection.exec_driver_sql("START TRANSACTION READ WRITE")

        def undo() -> None:
            if found != wanted:
                cursor = connection.connection.cursor()
                cursor.execute(_setting(found))
                cursor.close()

        return undo

    def is_stale(self, link: Link) -> bool:
        assert isinstance(link, ServerLink)
        return not self._is_mariadb and time.monotonic() - link.used_at > self.idle_transaction_s / 2

    def _idle_time(self) -> tuple[str, int]:
        """The server's variable that ends a session whose host has vanished, and its seconds."""
        if self._is_mariadb:
            return "idle_write_transaction_timeout", round(MOST_IDLE_S)
        return "wait_timeout", round(LONGEST_PAUSE_S)

    def _set_idle_time(self, engine: Engine) -> None:
        variable, limit_s = self._idle_time()

        @event.listens_for(engine, "connect")
        def on_connect(connection: Any, _record: Any) -> None:
            cursor = connection.cursor()
            cursor.execute(f"SET SESSION {variable} = {limit_s}")
            cursor.close()

    # -- hints -------------------------------------------------------------------------------------

    def _make_listener(self, on_hint: Callable[[], None]) -> Listener:
        is_awake = True

        def wait(link: Link, timeout_s: float) -> str | None:
            nonlocal is_awake
            if is_awake:
                # Who was to be woken while nobody slept was not: look once more, from within the sleep.
                again = threading.Timer(FALLING_ASLEEP_S, on_hint)
                again.daemon = True
                again.start()
            said = self._wait_for_hint(link, timeout_s)
            is_awake = said is not None
            return said

        return Listener(self._connect_listener, wait, _abort, on_hint)

    def _wait_for_hint(self, link: Link, timeout_s: float) -> str | None:
        # Neither server has a call that waits for news; but whoever waits can be woken, see _hint.
        assert isinstance(link, Ear)
        return HINT if link.is_woken(timeout_s) else None

    def _hint(self, link: Link) -> None:
        waiting = "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND info LIKE %s"
        for (thread_id,) in link.execute(waiting, [f"{LISTENS}%"]).fetchall():
            try:
                link.execute(f"KILL QUERY {int(thread_id)}")
            except pymysql.err.Error as error:
                logger.debug("connection %s has gone before it was woken: %s", thread_id, error)

    # -- writing -----------------------------------------------------------------------------------

    def _insert_keyed(self, link: Link, rows: list[StartRow]) -> set[str]:
        for sql, values, _ in self._keyed_starts.pieces(rows, self.most_bytes):
            self._run_with_next(link, sql, values)
        # Neither server says which of several rows it has inserted.
        return {row.instance_id for row in rows if self._is_start_ours(link, row)}

    def _run_with_next(self, link: Link, sql: str, parameters: Sequence[Any] = (), check: Check = no_check) -> None:
        assert isinstance(link, MysqlLink)
        link.queue(sql, parameters, check)

    def _settle(self, link: Link) -> None:
        assert isinstance(link, MysqlLink)
        link.run_checks()

    def _roll_back(self, link: Link, error: BaseException) -> None:
        assert isinstance(link, MysqlLink)
        link.forget_queue()
        super()._roll_back(link, error)

    def _update_states(self, link: Link, states: list[StateRow], worker_id: str) -> None:
        for some in fitting(states, self.most_bytes):
            self._update_some(link, some, worker_id)

    def _update_some(self, link: Link, states: Sequence[StateRow], worker_id: str) -> None:
        sets = ", ".join(f"i.{field} = v.{field}" for field in StateRow._fields if field != "instance_id")
        first = ", ".join(f"%s AS {field}" for field in StateRow._fields)
        others = " UNION ALL SELECT ".join([first, *[", ".join(["%s"] * len(StateRow._fields))] * (len(states) - 1)])
        sql = (
            f"UPDATE {instances.name} AS i JOIN (SELECT {others}) AS v ON i.instance_id = v.instance_id "
            f"SET {sets}, i.claims = 0 WHERE i.owner = %s"
        )

        def check(count: int, _rows: Sequence[Any]) -> None:
            if count != len(states):
                raise NotOwnedError("an instance is no longer owned by this worker")

        self._run_with_next(link, sql, [*[value for state in states for value in state], worker_id], check)


def _setting(variables: dict[str, Any]) -> str:
    return "SET " + ", ".join(f"SESSION {name} = {value!r}" for name, value in variables.items())


def _abort(link: Link) -> None:
    assert isinstance(link, Ear)
    link.cut()
