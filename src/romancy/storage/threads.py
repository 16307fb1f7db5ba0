"""A driver connection on a thread of its own: jobs in order, each with a future for its outcome."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from romancy.errors import DatabaseError

T = TypeVar("T")


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
        self._first = first
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def open(self) -> Future[None]:
        """Start the thread, and connect unless there is a connection already."""
        self._thread.start()
        return self._opened

    def submit(self, job: Job[T]) -> Future[T]:
        """Queue a job."""
        outcome: Future[T] = Future()
        self._jobs.put((outcome, job))
        return outcome

    def end(self) -> None:
        """Let the queued jobs end, then close the connection and the thread."""
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
        link: Link | None = self._first
        self._first = None
        try:
            if link is None:
                link = self._connect()
        except BaseException as error:
            self._opened.set_exception(error)
            return
        self._opened.set_result(None)
        while (item := self._jobs.get()) is not None:
            outcome, job = item
            if not outcome.set_running_or_notify_cancel():
                continue
            try:
                if self._is_given_up:
                    raise DatabaseError("the app shuts down, and the database does not answer")
                if link is not None and self._is_stale(link):
                    _close(link)
                    link = None
                if link is None:
                    link = self._connect()
                result = job(link)
            except BaseException as error:
                if link is not None and self._is_lost(error):
                    _close(link)
                    link = None
                outcome.set_exception(error)
            else:
                outcome.set_result(result)
            del item, outcome, job
        if link is not None:
            _close(link)


def _close(link: Link) -> None:
    with contextlib.suppress(Exception):
        link.close()
