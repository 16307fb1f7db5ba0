"""The worker's lease, renewed by a thread that user code on the event loop can't block; and the watch over that loop.

A blocked loop is reported by the name of what blocks it. The lease is still renewed, so that nobody takes the
instances away meanwhile; but not for ever: a loop that does not come back loses them, loudly.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import CodeType, FrameType
from typing import Protocol

logger = logging.getLogger("romancy.worker")

LOOK_INTERVAL_S = 0.25
LONGEST_STALL_S = 60.0


class LeaseStore(Protocol):
    """What the lease needs of the database."""

    def renew(self, worker_id: str, lease_until: int) -> Future[bool]:
        """Lengthen the lease; ``False`` when it was lost."""
        ...


class Lease:
    """Keeps one worker alive in the eyes of the others.

    Args:
        store: where the worker's row is.
        worker_id: which worker.
        ttl_s: how long the others wait after the last renewal.
        now_us: the database's clock.
        stall_warning_s: after how long a blocked event loop is reported.
        names: the code of activities and workflows, with what to call it in the report.
        on_lost: called on the loop when the lease was lost.
    """

    def __init__(
        self,
        store: LeaseStore,
        worker_id: str,
        ttl_s: float,
        now_us: Callable[[], int],
        stall_warning_s: float,
        names: Mapping[CodeType, str],
        on_lost: Callable[[], None],
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._ttl_s = ttl_s
        self._now_us = now_us
        self._stall_warning_s = stall_warning_s
        self._names = names
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._loop_thread_id = threading.get_ident()
        self._stop = threading.Event()
        self._renewed_at = time.monotonic()
        self._asked_at: float | None = None
        self._is_reported = False
        self._is_given_up = False
        self._thread = threading.Thread(target=self._run, name="romancy-lease", daemon=True)

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def stop(self) -> None:
        """Renew no more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def deadline_us(self) -> int:
        """Until when a lease renewed now would hold."""
        return self._now_us() + round(self._ttl_s * 1_000_000)

    def _run(self) -> None:
        while not self._stop.wait(min(LOOK_INTERVAL_S, self._ttl_s / 8)):
            stalled_s = self._look_at_loop()
            self._is_given_up = stalled_s > LONGEST_STALL_S
            if not self._is_given_up and time.monotonic() - self._renewed_at >= self._ttl_s / 2:
                self._renewed_at = time.monotonic()
                self._store.renew(self._worker_id, self.deadline_us()).add_done_callback(self._on_renewed)

    def _on_renewed(self, outcome: Future[bool]) -> None:
        error = outcome.exception()
        if error is not None:
            logger.warning("the lease of worker %s could not be renewed: %s", self._worker_id, error)
            self._renewed_at -= self._ttl_s / 4  # sooner than usual
        elif not outcome.result() and not self._stop.is_set():
            try:
                self._loop.call_soon_threadsafe(self._on_lost)
            except RuntimeError:
                logger.debug("the event loop closed before the lease was lost")

    # -- the event loop ----------------------------------------------------------------------------

    def _look_at_loop(self) -> float:
        """Ask the loop for a sign of life; returns for how many seconds it has owed one."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            try:
                self._loop.call_soon_threadsafe(self._on_sign_of_life)
            except RuntimeError:
                self._stop.set()
            return 0.0
        stalled_s = time.monotonic() - self._asked_at
        if stalled_s >= self._stall_warning_s and not self._is_reported:
            self._is_reported = True
            logger.error("%s", self._describe_stall(stalled_s))
        elif stalled_s > LONGEST_STALL_S and not self._is_given_up:
            logger.critical("%s; the lease is given up", self._describe_stall(stalled_s))
        return stalled_s

    def _on_sign_of_life(self) -> None:
        if self._is_reported and self._asked_at is not None:
            logger.warning("the event loop is free again after %.1f s", time.monotonic() - self._asked_at)
        self._is_reported = False
        self._asked_at = None

    def _describe_stall(self, stalled_s: float) -> str:
        frame = sys._current_frames().get(self._loop_thread_id)
        who, where = "something", "unknown place"
        if frame is not None:
            where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        walker: FrameType | None = frame
        while walker is not None:
            if walker.f_code in self._names:
                who = self._names[walker.f_code]
                where = f"{walker.f_code.co_filename}:{walker.f_lineno}"
                break
            walker = walker.f_back
        return (
            f"{who} has blocked the event loop for {stalled_s:.1f} s at {where}: no workflow of this worker goes on. "
            f"Await instead of blocking (asyncio.sleep for time.sleep), or make the activity a plain def, "
            f"which runs in a thread"
        )
