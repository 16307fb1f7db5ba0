"""A connection to PostgreSQL of the engine's own: blocking, for threads, or without waiting, for the event loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus

from romancy.storage.server import ServerLink
from romancy.storage.watchdog import Line, answered_within

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

PREPARE_AFTER = 5
"""Executions after which the driver lets the server keep a statement's plan."""

NOT_PREPARED = ("26000", "0A000")
"""There is no such statement (the driver discards what is prepared after some errors, and so may a pooler), or what it
gives has changed; https://www.postgresql.org/docs/current/errcodes-appendix.html."""

PLANNING = ("SET plan_cache_mode = force_generic_plan", "SET enable_seqscan = off", "SET jit = off")
"""Statements are planned for any values, and by indexes: tables may be all but empty when it's done."""

PLANS_SERVE = 32
"""New rows after which plans are made anew; from then on twice as many each time …"""

PLANS_SERVE_AT_MOST = 1_024
"""… up to so many …"""

PLANS_SERVE_S = 0.5
"""… and not oftener than after so many seconds."""


class PostgresqlLink(ServerLink):
    """A psycopg connection, or one of a pooler's that leads to another server connection in each transaction.

    Behind a pooler nothing is set for a session, for it would be handed to somebody else: what a transaction needs it
    sets for itself. And nothing is prepared: names of prepared statements belong to a session, too, and the same name
    may stand for another client's statement.
    """

    def __init__(self, connection: psycopg.Connection[Any], line: Line, patience_s: float) -> None:
        super().__init__(line, patience_s)
        self.connection = connection
        self._encoding: str | None = None
        self._uses: dict[str, int] = {}
        self._prepared: dict[str, bytes] = {}
        self._to_prepare: list[str] = []
        self._named = 0
        self._received: PGresult | None = None
        self._grown_by = 0
        self._plans_serve = PLANS_SERVE
        self._planned_at = time.monotonic()

    def _execute(self, sql: str, parameters: Sequence[Any]) -> Any:
        if self._is_plan_due():
            self._plan_anew()
        cursor = self.connection.execute(_encoded(sql), parameters)
        if (cursor.statusmessage or "").startswith("INSERT"):
            self.note_rows(cursor.rowcount)
        return cursor

    def note_rows(self, count: int) -> None:
        """So many rows more have been written: plans may have to be made anew."""
        self._grown_by += count

    def _is_plan_due(self) -> bool:
        return (
            self._grown_by >= self._plans_serve
            and self.connection.prepare_threshold is not None
            and time.monotonic() - self._planned_at >= PLANS_SERVE_S
        )

    def _plan_anew(self) -> None:
        """For a table that was all but empty any index will do, also one that leads through all of a large one; and
        that plan would be kept until the server has new statistics, for a minute.

        To plan takes longer than to execute: so the older the plans, the longer they serve.
        """
        # In a failed transaction nothing but its end would be carried out.
        if self.connection.info.transaction_status != TransactionStatus.INERROR:
            self._grown_by, self._planned_at = 0, time.monotonic()
            self._plans_serve = min(2 * self._plans_serve, PLANS_SERVE_AT_MOST)
            self.connection.execute("DISCARD PLANS", (), prepare=False)

    def execute_together(self, *statements: str) -> Any:
        """Run several statements in one round trip; returns the cursor of the last."""
        with answered_within(self.line, self._patience_s):
            cursor = self.connection.execute("; ".join(statements).encode(), (), prepare=False)
        while cursor.nextset():
            pass
        return cursor

    def _close(self) -> None:
        self.connection.close()

    # -- for the event loop: see romancy.storage.flight.AirLink ------------------------------------

    def send(self, sql: str, values: Sequence[str | None]) -> None:
        """Begin to send one statement; its values are given as texts."""
        self.used_at = time.monotonic()
        self.line.deadline = self.used_at + self._patience_s
        if self._encoding is None:
            self._encoding = self.connection.info.encoding
        encoding = self._encoding
        encoded = [None if value is None else value.encode(encoding) for value in values]
        if any(b"\0" in value for value in encoded if value is not None):
            raise psycopg.DataError("PostgreSQL text fields cannot contain NUL (0x00) bytes")
        self._received = None
        name = self._prepared.get(sql)
        if name is not None:
            self.connection.pgconn.send_query_prepared(name, encoded)
            return
        self.connection.pgconn.send_query_params(_numbered(sql), encoded)
        threshold = self.connection.prepare_threshold
        uses = self._uses[sql] = self._uses.get(sql, 0) + 1
        if threshold is not None and uses == max(threshold, 1):
            self._to_prepare.append(sql)

    def is_sent(self) -> bool:
        """Send what is left, as far as that goes; returns whether all of it has left."""
        return self.connection.pgconn.flush() == 0

    def receive(self) -> tuple[str | None, ...] | None:
        """The only row of the answer, as texts, once it is complete."""
        pgconn = self.connection.pgconn
        pgconn.consume_input()
        while not pgconn.is_busy():
            result = pgconn.get_result()
            if result is not None:
                # The commit comes after the row, and may fail.
                if self._received is None or self._received.status == ExecStatus.TUPLES_OK:
                    self._received = result
                continue
            if self._received is None or pgconn.status == ConnStatus.BAD:
                raise psycopg.OperationalError(f"the connection is lost: {pgconn.get_error_message()}")
            if self._received.status != ExecStatus.TUPLES_OK:
                error = psycopg.errors.error_from_result(self._received, encoding=self._encoding or "utf-8")
                if error.sqlstate in NOT_PREPARED:
                    self._prepared.clear()
                    self._uses.clear()
                raise error
            return tuple(self._text_of(self._received.get_value(0, column)) for column in range(self._received.nfields))
        return None

    def land(self) -> None:
        """Nobody waits for an answer any more."""
        self.line.deadline = None

    def descriptor(self) -> int:
        """Of the socket."""
        descriptor: int = self.connection.pgconn.socket
        return descriptor

    @property
    def needs_care(self) -> bool:
        """Whether :meth:`take_care` has something to do."""
        return bool(self._to_prepare) or self._is_plan_due()

    def take_care(self) -> None:
        """Let the server keep the plans of statements that are sent again and again, and make old plans anew."""
        while self._to_prepare:
            sql = self._to_prepare.pop()
            self._named += 1
            name = f"romancy_{self._named}".encode()
            with answered_within(self.line, self._patience_s):
                # Not by a statement PREPARE, of which poolers know nothing.
                result = self.connection.pgconn.prepare(name, _numbered(sql))
            if result.status != ExecStatus.COMMAND_OK:
                raise psycopg.errors.error_from_result(result, encoding=self._encoding or "utf-8")
            self._prepared[sql] = name
        if self._is_plan_due():
            self._plan_anew()

    def _text_of(self, value: bytes | None) -> str | None:
        return None if value is None else value.decode(self._encoding or "utf-8")


@lru_cache(1_024)
def _encoded(sql: str) -> bytes:
    """The same object each time, for its hash is kept: the driver looks statements up by it."""
    return sql.encode()


@lru_cache(1_024)
def _numbered(sql: str) -> bytes:
    """A statement as the server takes it."""
    first, *rest = sql.split("%s")
    return "".join([first, *(f"${number}{part}" for number, part in enumerate(rest, 1))]).encode()
