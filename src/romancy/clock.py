"""Time, as the engine sees it; tests put a clock of their own in its place (see ``romancy.testing``)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

LONGEST_SLEEP_S = 60.0
"""The wall clock may be set while we sleep; look at it at least this often."""


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
