"""All deadlines of a worker, with one wake-up for the earliest."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from romancy.clock import Cancellable, Clock

MOST_CANCELLED = 100


class Deadline:
    """A callback that is due at a time; may be cancelled."""

    __slots__ = ("_queue", "at_us", "callback")

    def __init__(self, at_us: int, callback: Callable[[], None], queue: TimerQueue) -> None:
        self.at_us = at_us
        self.callback: Callable[[], None] | None = callback
        self._queue = queue

    def cancel(self) -> None:
        """Never call back."""
        if self.callback is not None:
            self.callback = None
            self._queue.on_cancelled()


class TimerQueue:
    """Calls back at deadlines, never early, in the order of the deadlines."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heap: list[tuple[int, int, Deadline]] = []
        self._order = count()
        self._wakeup: Cancellable | None = None
        self._wakeup_at_us = 0
        self._is_firing = False
        self._cancelled_count = 0

    def add(self, at_us: int, callback: Callable[[], None]) -> Deadline:
        """Call back once that time has come."""
        deadline = Deadline(at_us, callback, self)
        heapq.heappush(self._heap, (at_us, next(self._order), deadline))
        if not self._is_firing:
            self._arm()
        return deadline

    def on_cancelled(self) -> None:
        """A deadline of this queue was cancelled; forget such ones once they are most."""
        self._cancelled_count += 1
        if self._cancelled_count > MOST_CANCELLED and 2 * self._cancelled_count > len(self._heap):
            self._heap[:] = [entry for entry in self._heap if entry[2].callback is not None]
            heapq.heapify(self._heap)
            self._cancelled_count = 0

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
