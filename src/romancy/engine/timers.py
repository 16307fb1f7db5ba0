"""All deadlines of a worker, with one wake-up for the earliest."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from romancy.clock import Cancellable, Clock


class Deadline:
    """A callback that is due at a time; may be cancelled."""

    __slots__ = ("at_us", "callback")

    def __init__(self, at_us: int, callback: Callable[[], None]) -> None:
        self.at_us = at_us
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Never call back."""
        self.callback = None


class TimerQueue:
    """Calls back at deadlines, never early, in the order of the deadlines."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heap: list[tuple[int, int, Deadline]] = []
        self._order = count()
        self._wakeup: Cancellable | None = None
        self._wakeup_at_us = 0
        self._is_firing = False

    def add(self, at_us: int, callback: Callable[[], None]) -> Deadline:
        """Call back once that time has come."""
        deadline = Deadline(at_us, callback)
        heapq.heappush(self._heap, (at_us, next(self._order), deadline))
        if not self._is_firing:
            self._arm()
        return deadline

    def close(self) -> None:
        """Forget all deadlines."""
        self._heap.clear()
        if self._wakeup is not None:
            self._wakeup.cancel()
            self._wakeup = None

    def _arm(self) -> None:
        heap = self._heap
        while heap and heap[0][2].callback is None:
            heapq.heappop(heap)
        if not heap:
            return
        earliest = heap[0][0]
        if self._wakeup is not None:
            if self._wakeup_at_us <= earliest:
                return
            self._wakeup.cancel()
        self._wakeup_at_us = earliest
        self._wakeup = self._clock.call_at(earliest, self._fire)

    def _fire(self) -> None:
        self._wakeup = None
        self._is_firing = True
        now = self._clock.now_us()
        heap = self._heap
        try:
            while heap and heap[0][0] <= now:
                deadline = heapq.heappop(heap)[2]
                callback, deadline.callback = deadline.callback, None
                if callback is not None:
                    callback()
        finally:
            self._is_firing = False
            self._arm()
