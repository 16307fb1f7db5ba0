"""A statement on its way whose answer the event loop waits for, on a connection that its thread has lent.

To hand a statement to a thread, and to hear from it, takes longer than what a small commit takes the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import selectors
import threading
from collections.abc import Callable, Sequence
from contextvars import Context
from typing import Any, Generic, Protocol, TypeVar

from romancy.storage.threads import ConnectionThread

logger = logging.getLogger("romancy.storage")

LONGEST_LOOK_S = 1.0


class AirLink(Protocol):
    """A connection that can send without waiting."""

    def send(self, sql: str, values: Sequence[str | None]) -> None:
        """Begin to send one statement."""
        ...

    def is_sent(self) -> bool:
        """Send what is left, as far as that goes; returns whether all of it has left."""
        ...

    def receive(self) -> tuple[Any, ...] | None:
        """What has come of the answer: its only row once it is complete, ``None`` before.

        Raises:
            Exception: the driver's, for a statement that has failed or a connection that is lost.
        """
        ...

    def descriptor(self) -> int:
        """Of the socket."""
        ...

    def land(self) -> None:
        """Nobody waits for an answer any more."""
        ...


L = TypeVar("L", bound=AirLink)


class Flight(Generic[L]):
    """See the module.

    Args:
        loop: where it is waited for.
        thread: who lends the connection; one of its links can do what :class:`AirLink` says.
        is_lost: whether an error says that the connection is of no more use.
        on_landed: called once on the loop, after :meth:`depart` has returned ``True``: with the connection, and the
            answer's row or the error.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        thread: ConnectionThread,
        is_lost: Callable[[BaseException], bool],
        on_landed: Callable[[L, tuple[Any, ...] | BaseException], None],
    ) -> None:
        self._thread = thread
        self._is_lost = is_lost
        self._on_landed = on_landed
        self._loop = loop
        self._link: L
        self._descriptor = -1
        self._lock = threading.Lock()
        self._answer: tuple[Any, ...] | BaseException | None = None
        self._has_writer = False
        self._is_sent = False

    def depart(self, sql: str, values: Sequence[str | None]) -> bool:
        """Send the statement, if the connection can be had now; else nothing is done."""
        with self._lock:  # the thread may have waited for long, and want to finish what has not begun
            link: Any = self._thread.borrow(self)
            if link is None:
                return False
            self._link = link
            try:
                # One of our own, for the thread may close the connection's before the loop has let go of it.
                self._descriptor = os.dup(link.descriptor())
                self._watch(self._loop.add_reader)
            except Exception as error:  # lost already; or a loop that can watch no sockets, as asyncio's on Windows
                self._note(error)
                self._leave()
                return False
            try:
                link.send(sql, values)
                if not link.is_sent():
                    self._watch(self._loop.add_writer)
                    self._has_writer = True
            except Exception as error:
                self._note(error)
                Context().run(self._loop.call_soon, self._land)
            return True

    def finish(self) -> None:
        """See :class:`romancy.storage.threads.Loan`. The loop has been busy with something else, or the server has."""
        with self._lock:
            if self._answer is not None:
                return
            self._wait()
        try:
            self._loop.call_soon_threadsafe(self._land)
        except RuntimeError:
            logger.debug("the event loop closed before a flush ended")
            os.close(self._descriptor)

    def _wait(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._descriptor, selectors.EVENT_READ)
            while not self._is_complete():
                wanted = selectors.EVENT_READ if self._is_sent else selectors.EVENT_READ | selectors.EVENT_WRITE
                selector.modify(self._descriptor, wanted)
                selector.select(LONGEST_LOOK_S)

    def _watch(self, add: Callable[[int, Callable[[], None]], None]) -> None:
        # What comes of it is nobody's in particular: not that of whoever happened to send it.
        Context().run(add, self._descriptor, self.look)

    def look(self) -> None:
        """On the loop: there is something to read, or room to write; or maybe not."""
        if not self._lock.acquire(blocking=False):
            return  # the thread has taken over, and will say
        try:
            if self._answer is not None:
                return
            if not self._is_complete():
                if self._has_writer and self._is_sent:
                    self._has_writer = False
                    self._loop.remove_writer(self._descriptor)
                return
        finally:
            self._lock.release()
        self._land()

    def _is_complete(self) -> bool:
        """Send and receive what can be without waiting."""
        try:
            self._is_sent = self._link.is_sent()
            answer = self._link.receive()
        except Exception as error:
            self._note(error)
            return True
        if answer is None:
            return False
        self._note(answer)
        return True

    def _note(self, answer: tuple[Any, ...] | BaseException) -> None:
        self._answer = answer
        self._link.land()
        is_lost = isinstance(answer, BaseException) and self._is_lost(answer)
        self._thread.give_back(is_lost=is_lost)

    def _land(self) -> None:
        self._leave()
        assert self._answer is not None
        self._on_landed(self._link, self._answer)

    def _leave(self) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(NotImplementedError):
                self._loop.remove_reader(self._descriptor)
            if self._has_writer:
                self._loop.remove_writer(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
