"""Tools for testing workflows: a clock that jumps, and definitions that vanish after the test.

Activities need no tools: called outside a workflow they are the plain functions.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from romancy.clock import Cancellable
from romancy.definitions import DEFAULT_CATALOGUE, Catalogue
from romancy.retry import Seconds, as_seconds


class _VirtualWakeup:
    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class VirtualClock:
    """A clock for ``App(clock=…)``: time stands still until the test moves it, or jumps by itself.

    Args:
        auto_advance: whether to jump to the next deadline as soon as one is asked for, so that days of sleeps
            and backoffs take no time at all.

    Leases and activity timeouts keep to real time.

    Example:
        >>> async def test_reminder_comes_after_a_week():
        ...     clock = VirtualClock()
        ...     async with App(":memory:", clock=clock) as app:
        ...         handle = await app.start_workflow(remind, "user-1")
        ...         await clock.wait_for_sleeper()
        ...         await clock.advance(timedelta(days=7))
        ...         assert await handle.result(timeout=5) == "reminded"
    """

    def __init__(self, *, auto_advance: bool = False) -> None:
        self._now_us = time.time_ns() // 1_000
        self._auto_advance = auto_advance
        self._heap: list[tuple[int, int, _VirtualWakeup]] = []
        self._order = count()
        self._asked: asyncio.Event = asyncio.Event()

    def now_us(self) -> int:
        """Microseconds since the epoch, as far as the test has moved them."""
        return self._now_us

    def call_at(self, deadline_us: int, callback: Callable[[], None]) -> Cancellable:
        """See :class:`romancy.clock.Clock`."""
        wakeup = _VirtualWakeup(callback)
        heapq.heappush(self._heap, (deadline_us, next(self._order), wakeup))
        self._asked.set()
        if self._auto_advance or deadline_us <= self._now_us:
            asyncio.get_running_loop().call_soon(self._jump, deadline_us)
        return wakeup

    async def advance(self, seconds: Seconds) -> None:
        """Move time forward, firing what comes due on the way, in order.

        Args:
            seconds: how far, in seconds or as a ``timedelta``.
        """
        loop = asyncio.get_running_loop()
        moved: asyncio.Future[None] = loop.create_future()

        def move() -> None:
            # In a plain callback: workflow code must not run inside a task's step.
            to_us = self._now_us + round(as_seconds(seconds, "seconds") * 1_000_000)
            self._jump(to_us)
            self._now_us = max(self._now_us, to_us)
            moved.set_result(None)

        loop.call_soon(move)
        await moved

    async def wait_for_sleeper(self) -> None:
        """Wait until something waits for this clock."""
        while not any(wakeup.callback for _, _, wakeup in self._heap):
            self._asked.clear()
            await self._asked.wait()

    def _jump(self, to_us: int) -> None:
        while self._heap and self._heap[0][0] <= to_us:
            deadline_us, _, wakeup = heapq.heappop(self._heap)
            callback, wakeup.callback = wakeup.callback, None
            if callback is not None:
                self._now_us = max(self._now_us, deadline_us)
                callback()


@contextmanager
def isolated_catalogue(catalogue: Catalogue = DEFAULT_CATALOGUE) -> Iterator[Catalogue]:
    """Forget, at the end of the block, every workflow and activity that was defined in it.

    Example:
        >>> with isolated_catalogue():
        ...     @activity
        ...     async def only_here() -> None: ...
    """
    with catalogue.restored():
        yield catalogue
