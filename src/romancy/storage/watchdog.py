"""Breaks connections whose answers don't come, so that nobody waits for ever.

A network may swallow bytes without a word: the peer is gone, or something between keeps the connection open and passes
nothing on. Drivers then wait for an answer as long as it takes. Here each statement of the engine's own has a time,
and a thread that breaks the connection under one that is over it; the driver raises what it raises for any lost
connection, and all goes the way of those.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time
from collections.abc import Iterator
from weakref import WeakSet

logger = logging.getLogger("romancy.storage")

MOST_LOOKS_S = 0.5
LOOKS_A_LIMIT = 8
PROBES = 3


class Line:
    """The socket under a driver's connection, as a descriptor of our own: it can't become another one's meanwhile.

    Attributes:
        deadline: when to break it, by ``time.monotonic``; ``None`` while nobody waits for an answer.
        is_ours: the connection is not one of the application's.
    """

    def __init__(self, descriptor: int, *, is_ours: bool = True) -> None:
        try:
            self._socket = socket.socket(fileno=socket.dup(descriptor))
        except OSError:
            # The server has hung up already, and the driver has closed it: that is the driver's to say.
            self._socket = socket.socket()
        self.deadline: float | None = None
        self.is_ours = is_ours

    def __del__(self) -> None:
        self._socket.close()

    def close(self) -> None:
        """Let go of the descriptor; the connection is the driver's to close."""
        self._socket.close()

    def cut(self) -> None:
        """Break the connection: whoever waits for it gets an error at once. From any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def keep_alive(self, limit_s: float) -> None:
        """Let the system notice within about this time that the peer's machine is gone, also while a long statement
        runs; a peer that is there and busy answers the system's questions."""
        if self._socket.family not in (socket.AF_INET, socket.AF_INET6):
            return
        whole_s = max(1, math.ceil(limit_s / 2))
        options = {
            "TCP_KEEPIDLE": whole_s,
            "TCP_KEEPINTVL": max(1, whole_s // PROBES),
            "TCP_KEEPCNT": PROBES,
            "TCP_USER_TIMEOUT": max(1, math.ceil(limit_s * 1_000)),
        }
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in options.items():
                option: int | None = getattr(socket, name, None)  # not every system has each of them
                if option is not None:
                    self._socket.setsockopt(socket.IPPROTO_TCP, option, value)


class Watchdog:
    """Looks at all lines of one store.

    Args:
        limit_s: how long a statement of the engine's own may take.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._lines: WeakSet[Line] = WeakSet()
        self._lock = threading.Lock()
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="romancy-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more. Blocks."""
        self._is_stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def hold(self, descriptor: int, *, is_ours: bool = True) -> Line:
        """A line over this socket, to be looked at; the settings of one that is not ours are left as they are."""
        line = Line(descriptor, is_ours=is_ours)
        if is_ours:
            line.keep_alive(self.limit_s)
        with self._lock:
            self._lines.add(line)
        return line

    def cut_all(self) -> None:
        """Break every connection."""
        for line in self._all():
            line.cut()

    def _all(self) -> list[Line]:
        with self._lock:
            return list(self._lines)

    def _run(self) -> None:
        while not self._is_stopped.wait(min(MOST_LOOKS_S, self.limit_s / LOOKS_A_LIMIT)):
            now = time.monotonic()
            for line in self._all():
                deadline = line.deadline
                if deadline is not None and deadline < now:
                    line.deadline = None
                    logger.warning("the server owes an answer for too long; its connection is given up")
                    line.cut()


@contextlib.contextmanager
def answered_within(line: Line | None, limit_s: float) -> Iterator[None]:
    """Break the line unless the body ends in time."""
    if line is None:
        yield
        return
    before = line.deadline
    line.deadline = time.monotonic() + limit_s
    try:
        yield
    finally:
        line.deadline = before
