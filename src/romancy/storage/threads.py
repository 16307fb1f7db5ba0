"""A driver connection on a thread of its own: jobs in order, each with a future for its outcome.

While the thread has nothing to do, the connection may be lent to the event loop.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from romancy.errors import DatabaseError

logger = logging.getLogger("romancy.storage")

T = TypeVar("T")

LONGEST_LOAN_S = 0.05
"""After so long the thread, if it needs the connection, does itself what the loop has borrowed it for."""


class Link(Protocol):
    """A driver connection in autocommit mode; transactions are begun and ended by statements."""

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> Any:
        """Run one statement; returns a cursor with ``fetchone``, ``fetchall`` and ``rowcount``."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


Job = Callable[[Link], T]
Check = Callable[[int, Sequence[Any]], None]
"""Refuses, by raising, a statement's result: how many rows it affected, and those it found."""


def no_check(_count: int, _rows: Sequence[Any]) -> None:
    """Any result will do."""


class Loan(Protocol):
    """What somebody else has borrowed the connection for."""

    def finish(self) -> None:
        """Do what is left to do, and give the connection back. Blocks; from the connection's thread."""
        ...


class ConnectionThread:
    """A connection that lives on a thread of its own, and is made anew when it was lost.

    Args:
        name: the thread's name.
        connect: makes the connection.
        is_lost: whether this error says that the connection is of no more use.
        is_stale: whether the connection has lain idle for so long that its server may be about to end it; then it is
            made anew before the next job.
        first: a connection to begin with; by default one is made.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Link],
        is_lost: Callable[[BaseException], bool],
        is_stale: Callable[[Link], bool] = lambda _: False,
        first: Link | None = None,
    ) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Job[Any]] | None] = queue.SimpleQueue()
        self._connect = connect
        self._is_lost = is_lost
        self._is_stale = is_stale
        self._opened: Future[None] = Future()
        self._is_given_up = False
        self._link = first
        self._is_link_lost = False
        self._loan: Loan | None = None
        self._unfinished = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def open(self) -> Future[None]:
        """Start the thread, and connect unless there is a connection already."""
        self._thread.start()
        return self._opened

    def submit(self, job: Job[T]) -> Future[T]:
        """Queue a job."""
        outcome: Future[T] = Future()
        with self._changed:
            self._unfinished += 1
        self._jobs.put((outcome, job))
        return outcome

    def borrow(self, loan: Loan) -> Link | None:
        """The connection, for the caller alone until :meth:`give_back`; ``None`` while the thread needs it itself."""
        with self._changed:
            link = self._link
            if self._unfinished or self._loan is not None or link is None or self._is_link_lost or self._is_stale(link):
                return None
            self._loan = loan
            return link

    def give_back(self, *, is_lost: bool = False) -> None:
        """End the loan; from any thread.

        Args:
            is_lost: the connection is of no more use.
        """
        with self._changed:
            self._loan = None
            self._is_link_lost = self._is_link_lost or is_lost
            self._changed.notify_all()

    def end(self) -> None:
        """Let the queued jobs end, then close the connection and the thread."""
        with self._changed:
            self._unfinished += 1
        self._jobs.put(None)

    def has_ended(self, timeout_s: float) -> bool:
        """Whether the thread has ended; waits for that so many seconds."""
        if self._thread.is_alive():
            self._thread.join(max(timeout_s, 0))
        return not self._thread.is_alive()

    def give_up(self) -> None:
        """Begin none of the queued jobs, and connect no more."""
        self._is_given_up = True

    def _run(self) -> None:
        try:
            if self._link is None:
                self._link = self._connect()
        except BaseException as error:
            self._opened.set_exception(error)
            return
        self._opened.set_result(None)
        while (item := self._jobs.get()) is not None:
            outcome, job = item
            self._reclaim()
            if outcome.set_running_or_notify_cancel():
                self._do(outcome, job)
            else:
                self._note_finished()
            del item, outcome, job
        self._reclaim()
        self._drop_link()

    def _do(self, outcome: Future[Any], job: Job[Any]) -> None:
        try:
            result = job(self._ready_link())
        except BaseException as error:
            if self._is_lost(error):
                self._drop_link()
            self._note_finished()
            outcome.set_exception(error)
        else:
            self._note_finished()
            outcome.set_result(result)

    def _ready_link(self) -> Link:
        if self._is_given_up:
            raise DatabaseError("the app shuts down, and the database does not answer")
        if self._link is not None and (self._is_link_lost or self._is_stale(self._link)):
            self._drop_link()
        if self._link is None:
            self._link = self._connect()
        return self._link

    def _drop_link(self) -> None:
        link, self._link, self._is_link_lost = self._link, None, False
        if link is not None:
            _close(link)

    def _note_finished(self) -> None:
        with self._changed:
            self._unfinished -= 1

    def _reclaim(self) -> None:
        """Wait for the connection to come back; not for a loop that does something else."""
        with self._changed:
            loan = self._loan
            if loan is None or self._changed.wait_for(lambda: self._loan is None, LONGEST_LOAN_S):
                return
        try:
            loan.finish()
        except Exception:
            logger.exception("what was begun on a lent connection could not be finished")
            self.give_back(is_lost=True)


def _close(link: Link) -> None:
    with contextlib.suppress(Exception):
        link.close()
