"""A database as the engine uses it: its connections, its transactions, its hints.

One thread writes, one reads, each on a driver connection of its own: the event loop never waits for the database, and
the lease is renewed whatever user code does to the loop.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from sqlalchemy import URL, ColumnElement, Connection, Engine
from sqlalchemy.engine.interfaces import Dialect

from romancy.clock import Clock, DatabaseClock
from romancy.errors import DatabaseError, FencedError, PacketTooLargeError
from romancy.storage.failures import database_error, is_beyond_use, is_driver_error, is_lost
from romancy.storage.listener import Listener
from romancy.storage.lock import FreeLock, WriteLock
from romancy.storage.mail_desk import MailDesk, on_link
from romancy.storage.statements import VALUE_BYTES, Prepared, bytes_of, statements_for
from romancy.storage.threads import Check, ConnectionThread, Job, Link, no_check
from romancy.storage.watchdog import Line, Watchdog

logger = logging.getLogger("romancy.storage")

T = TypeVar("T")

LONGEST_CLOSE_S = 5.0


class Database(ABC):
    """What opens a database, and runs jobs on it.

    Methods that return a ``concurrent.futures.Future`` may be called from any thread; they never block.

    Args:
        name: how messages call the database.
        dialect: its SQL; with a positional parameter style.
        workflow_names: the workflows that this app can run.
        mark: the driver's placeholder for a parameter.
        clock: the database's clock.
        server_time: what asks the server for its time.
        guard: see :class:`romancy.storage.statements.Statements`.

    Attributes:
        kind: ``sqlite``, ``postgresql`` or ``mysql``.
        savepoint_may_wait: whether a transaction can do without a savepoint until something in it must outlive a
            rollback: a failed statement fails all of it, and the connection knows.
        write_lock: who may write now; on databases with many writers, everybody.
        has_one_writer: whether an open transaction keeps all others from writing.
        works_beside: whether a group commit leaves this process alone until it's done, so that several smaller ones,
            with work between them, come out cheaper than one.
        workflow_clock: what workflows take for the time, and mail expires by; a test may put its own here.
        patience_s: how long a server may take for a statement of the engine's own.
        most_bytes: how long a statement's text may be, with its values; ``None`` where that is no concern.
        watchdog: what breaks connections under statements that take longer.
    """

    begin = "BEGIN"
    kind: str
    has_one_writer = False
    works_beside = False
    savepoint_may_wait = False
    patience_s = math.inf
    most_bytes: int | None = None
    watchdog: Watchdog | None = None

    def __init__(
        self,
        name: str,
        dialect: Dialect,
        workflow_names: Sequence[str],
        mark: str,
        clock: Clock,
        server_time: ColumnElement[Any],
        guard: ColumnElement[bool] | None = None,
    ) -> None:
        self.name = name
        self.mark = mark
        self.write_lock: WriteLock | FreeLock = FreeLock()
        self.clock = clock
        self.workflow_clock: Clock = clock
        self._workflow_names = tuple(workflow_names)
        self._statements = statements_for(dialect, self._workflow_names, server_time, guard)
        self._listener: Listener | None = None
        self._writer: ConnectionThread | None = None
        self._reader: ConnectionThread | None = None

    # -- what each database answers itself ---------------------------------------------------------

    @abstractmethod
    def connect(self) -> Link:
        """A new connection of the engine's own, with durable settings."""

    @abstractmethod
    def connect_first(self, migrate: bool) -> tuple[Link, str | None]:
        """Check the server's settings, and bring the tables up to date. Blocks.

        Returns:
            A connection as :meth:`connect` makes it, and the version of the tables that were there before.
        """

    @abstractmethod
    def url(self, *, is_async: bool) -> URL:
        """SQLAlchemy's URL of this database, with the driver for sessions of that kind."""

    @abstractmethod
    def session_options(self) -> dict[str, Any]:
        """Options for SQLAlchemy's engines behind activity sessions."""

    @abstractmethod
    def set_up_sessions(self, engine: Engine) -> None:
        """Give an engine behind activity sessions what its connections need."""

    @abstractmethod
    def begin_on(self, connection: Connection) -> Callable[[], None]:
        """Begin a transaction on a connection from the application's own engine, with what Romancy promises set.

        Returns:
            What is called after the transaction's end, so that the connection is again as it was.
        """

    @abstractmethod
    def set_up_reading(self, engine: Engine) -> None:
        """Give an engine behind queries what its connections need."""

    # -- opening and closing -----------------------------------------------------------------------

    def prepare(self, migrate: bool) -> str | None:
        """Check the server's settings, and bring the tables up to date, without opening the database. Blocks.

        Returns:
            The version of the tables that were there before.
        """
        link, found = self.connect_first(migrate)
        link.close()
        return found

    def open(self, migrate: bool) -> None:
        """Connect, check the server's settings and bring the tables up to date. Blocks.

        Raises:
            DatabaseError: it can't be opened, or is not fit for durable work.
        """
        try:
            first, _ = self.connect_first(migrate)
            self._writer = ConnectionThread("romancy-writer", self._connect_again, is_beyond_use, self.is_stale, first)
            self._writer.open().result()
            self._reader = ConnectionThread("romancy-reader", self._connect_again, is_beyond_use, self.is_stale)
            self._reader.open().result()
            self._reader.submit(self._ask_time).result()
        except DatabaseError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise database_error(error, self.name) from error
        except BaseException:
            self.close()
            raise

    def give_up(self) -> None:
        """Write nothing more: whoever waits for its turn fails."""
        self.write_lock.give_up()

    def close(self) -> None:
        """End both threads. Blocks until what was queued is done, or for a while; then it is given up."""
        threads = [thread for thread in (self._writer, self._reader) if thread is not None]
        self._writer = self._reader = None
        for thread in threads:
            thread.end()
        deadline = time.monotonic() + LONGEST_CLOSE_S
        if not all(thread.has_ended(deadline - time.monotonic()) for thread in threads):
            for thread in threads:
                thread.give_up()
            self.cut_all()
            deadline = time.monotonic() + LONGEST_CLOSE_S
            for thread in threads:
                thread.has_ended(deadline - time.monotonic())

    def cut_all(self) -> None:
        """Break all connections to the server: whoever waits for an answer gets an error instead."""
        if self.watchdog is not None:
            self.watchdog.cut_all()

    def line_of(self, connection: Connection) -> Line | None:
        """What is under a connection of SQLAlchemy's, where it can be broken from outside."""
        del connection
        return None

    def check_statement(self, sql: str, values: Sequence[Any]) -> None:
        """Refuse what the server would break the connection for.

        Raises:
            PacketTooLargeError: it is too long.
        """
        if self.most_bytes is not None and 4 * sum(map(_length, values)) + len(sql) > self.most_bytes:
            check_packet(len(sql) + bytes_of(values), self.most_bytes)

    def is_stale(self, link: Link) -> bool:
        """Whether a connection has lain idle for so long that its server may be about to end it."""
        del link
        return False

    # -- transactions ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self, link: Link, slots: Sequence[int] = ()) -> Iterator[None]:
        """A transaction that holds these slots of the mail desk; it ends with the body."""
        self.write_lock.acquire()
        try:
            try:
                self._begin(link, slots)
                yield
                self._settle(link)
                link.execute("COMMIT")
            except BaseException as error:
                self._roll_back(link, error)
                raise
        finally:
            self.write_lock.release()

    def _begin(self, link: Link, slots: Sequence[int]) -> None:
        self._run_with_next(link, self.begin)
        self._lock(link, slots)

    def _lock(self, link: Link, slots: Sequence[int]) -> None:
        MailDesk(on_link(link, self.mark), self.kind, 0).lock_slots(slots)

    def _run_with_next(self, link: Link, sql: str, parameters: Sequence[Any] = (), check: Check = no_check) -> None:
        """Run a statement of a transaction whose result is only looked at: in one round trip with the next, if it may.

        Args:
            check: called, before the commit at the latest, with how many rows were affected, and with those found;
                refuses them by raising.
        """
        cursor = link.execute(sql, parameters)
        if check is not no_check:
            check(cursor.rowcount, cursor.fetchall())

    def _settle(self, link: Link) -> None:
        """Whatever :meth:`_run_with_next` was given to check has been run and checked after this."""
        del link

    def _roll_back(self, link: Link, error: BaseException) -> None:
        if not is_lost(error):
            link.execute("ROLLBACK")

    def _check_fence(self, link: Link, worker_id: str, statement: Prepared) -> None:
        def check(_count: int, rows: Sequence[Any]) -> None:
            if not rows:
                raise fenced(worker_id)

        self._run_with_next(link, *statement(me=worker_id), check=check)

    def _desk(self, link: Link) -> MailDesk:
        def run(sql: str, parameters: Sequence[Any] = ()) -> None:
            self._run_with_next(link, sql.replace("?", self.mark), parameters)

        now_us = self.workflow_clock.now_us()
        return MailDesk(on_link(link, self.mark), self.kind, now_us, self.most_bytes, run)

    # -- its clock ---------------------------------------------------------------------------------

    def _ask_time(self, link: Link) -> None:
        self._note_time(link.execute(*self._statements.now()).fetchone()[0])

    def _note_time(self, server_us: int | None) -> None:
        if server_us is not None and isinstance(self.clock, DatabaseClock):
            self.clock.note(server_us)

    # -- hints -------------------------------------------------------------------------------------

    def start_listening(self, on_hint: Callable[[], None]) -> None:
        """Call back, from a thread, whenever another process says that there is work."""
        self.stop_listening()
        self._listener = self._make_listener(on_hint)
        if self._listener is not None:
            self._listener.start()

    def stop_listening(self) -> None:
        """Call back no more. Blocks."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()

    @property
    def is_deaf(self) -> bool:
        """Whether other processes' hints are known not to come through, so that looking must do."""
        return self._listener is not None and self._listener.is_deaf

    def _make_listener(self, on_hint: Callable[[], None]) -> Listener | None:
        """What hears hints on this database, if anything does."""
        del on_hint
        return None

    def _hint(self, link: Link) -> None:
        """Wake those who listen."""
        del link

    def tell_others(self) -> Future[None]:
        """There is work that any worker may take, written by somebody else's transaction."""
        return self._write(self._tell_others)

    def _tell_others(self, link: Link) -> None:
        """There is work that any worker may take. What is written is durable already: failing here costs seconds."""
        try:
            self._hint(link)
        except Exception as error:
            if not is_driver_error(error):
                raise
            logger.debug("a hint could not be sent: %s", error)

    def has_changed(self) -> bool:
        """Whether anybody may have committed since the last call; costs no statement."""
        return False

    def others_have_committed(self) -> Future[bool]:
        """Whether another connection than the writer's has committed since the last call.

        For :meth:`has_changed` can't tell others' commits from the own ones, nor from one that is still under way: this
        waits for that.
        """
        raise NotImplementedError  # where changes are not noticed, nobody asks

    def _is_changed(self) -> bool:
        """What :meth:`has_changed` would say, without taking note of it."""
        return False

    # -- jobs --------------------------------------------------------------------------------------

    def _run(self, link: Link, statement: tuple[str, tuple[Any, ...]]) -> int:
        # One statement is a transaction of its own.
        self.write_lock.acquire()
        try:
            count: int = link.execute(*statement).rowcount
            return count
        finally:
            self.write_lock.release()

    def _write(self, job: Job[T]) -> Future[T]:
        if self._writer is None:
            raise DatabaseError(f"database {self.name} is closed")
        return self._writer.submit(self._typed(job))

    def _read(self, job: Job[T]) -> Future[T]:
        if self._reader is None:
            raise DatabaseError(f"database {self.name} is closed")
        return self._reader.submit(self._typed(job))

    def _connect_again(self) -> Link:
        """A connection; after a loss made before the next job, which fails with a typed error where that can't be."""
        try:
            return self.connect()
        except Exception as error:
            if is_driver_error(error):
                raise database_error(error, self.name) from error
            raise

    def _typed(self, job: Job[T]) -> Callable[[Link], T]:
        def run(link: Link) -> T:
            try:
                return job(link)
            except DatabaseError:
                raise
            except Exception as error:
                if is_driver_error(error):
                    raise database_error(error, self.name) from error
                raise

        return run


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes) else VALUE_BYTES


def check_packet(size: int, most_bytes: int) -> None:
    """Refuse a statement of this many bytes where the server takes so many.

    Raises:
        PacketTooLargeError: it is too long.
    """
    if size > most_bytes:
        raise PacketTooLargeError(
            f"a row takes {size:,} bytes on its way to the server, which takes {most_bytes:,} at once: store large "
            f"data elsewhere and pass a reference, or raise the server's max_allowed_packet and restart the app"
        )


def fenced(worker_id: str) -> FencedError:
    """The error for a write by a worker that is no longer alive in the eyes of the others."""
    return FencedError(f"worker {worker_id} has lost its lease; its instances belong to others now")
