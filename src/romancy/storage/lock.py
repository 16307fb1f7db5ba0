"""One write transaction at a time in this process, in order of arrival.

SQLite has one writer. Waiting in line here, instead of in SQLite's busy handler (which sleeps and retries), keeps
waits short and fair among the group commits and the sessions of one app.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from concurrent.futures import Future

from romancy.errors import DatabaseLockedError


class WriteLock:
    """A fair lock for threads and coroutines alike; may be released from any thread."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._is_held = False
        self._is_given_up = False
        self._waiters: deque[Future[None]] = deque()

    def acquire(self) -> None:
        """Wait in this thread for the lock."""
        waiter = self._try_or_queue()
        if waiter is not None:
            waiter.result()

    async def acquire_async(self) -> None:
        """Wait in this task for the lock; a cancelled wait gives up its place."""
        waiter = self._try_or_queue()
        if waiter is None:
            return
        try:
            await asyncio.wrap_future(waiter)
        except asyncio.CancelledError:
            if not waiter.cancel() and not waiter.cancelled():
                self.release()
            raise

    def release(self) -> None:
        """Hand the lock to whoever waits longest."""
        with self._mutex:
            assert self._is_held
            while self._waiters:
                waiter = self._waiters.popleft()
                if waiter.set_running_or_notify_cancel():
                    waiter.set_result(None)
                    return
            self._is_held = False

    def give_up(self) -> None:
        """Let all who wait, and all who come, fail with a :class:`DatabaseLockedError`."""
        with self._mutex:
            self._is_given_up = True
            waiters, self._waiters = self._waiters, deque()
        for waiter in waiters:
            if waiter.set_running_or_notify_cancel():
                waiter.set_exception(_given_up())

    def _try_or_queue(self) -> Future[None] | None:
        with self._mutex:
            if self._is_given_up:
                raise _given_up()
            if not self._is_held:
                self._is_held = True
                return None
            waiter: Future[None] = Future()
            self._waiters.append(waiter)
            return waiter


def _given_up() -> DatabaseLockedError:
    return DatabaseLockedError("the app shuts down, and an activity still holds the database's write lock")


class FreeLock:
    """No lock at all, for databases that take many writers at a time."""

    def acquire(self) -> None:
        """Go on."""

    async def acquire_async(self) -> None:
        """Go on."""

    def release(self) -> None:
        """Go on."""

    def give_up(self) -> None:
        """Nobody waits here."""
