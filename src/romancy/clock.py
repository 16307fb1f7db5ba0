"""Time, as the engine sees it; tests put a clock of their own in its place (see ``romancy.testing``)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

LONGEST_SLEEP_S = 60.0
"""The wall clock may be set while we sleep; look at it at least this often."""

MOST_JITTER_US = 1_000_000
MOST_DRIFT_US = 1_000
"""Between two answers of the server, some seconds apart."""


class Cancellable(Protocol):
    """A wake-up that may be called off."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """What tells the time and wakes the engine."""

    def now_us(self) -> int:
        """Microseconds since the epoch."""
        ...

    def call_at(self, deadline_us: int, callback: Callable[[], None]) -> Cancellable:
        """Call back on the running loop at that time, or somewhat before it; the caller looks again."""
        ...


class SystemClock:
    """The machine's wall clock."""

    def now_us(self) -> int:
        """Microseconds since the epoch."""
        return time.time_ns() // 1_000

    def call_at(self, deadline_us: int, callback: Callable[[], None]) -> Cancellable:
        """See :class:`Clock`."""
        wait_s = (deadline_us - self.now_us()) / 1_000_000
        return asyncio.get_running_loop().call_later(min(max(wait_s, 0.0), LONGEST_SLEEP_S), callback)


class DatabaseClock(SystemClock):
    """The database server's clock, as far as it is known here: never ahead of it, and behind by one round trip at most.

    So whoever asks it is never early, wherever this machine's own clock stands.
    """

    def __init__(self) -> None:
        self._ahead_us: int | None = None

    def now_us(self) -> int:
        """Microseconds since the epoch."""
        if self._ahead_us is None:
            return super().now_us()
        return time.monotonic_ns() // 1_000 + self._ahead_us

    def note(self, server_us: int) -> None:
        """The server has just answered with this time."""
        ahead_us = server_us - time.monotonic_ns() // 1_000
        if self._ahead_us is not None and abs(ahead_us - self._ahead_us) < MOST_JITTER_US:
            # Of two answers the one that was quicker on its way is nearer the truth; clocks also drift apart.
            ahead_us = max(ahead_us, self._ahead_us - MOST_DRIFT_US)
        self._ahead_us = ahead_us
