"""One attempt of an activity on its way, and what it tells of its progress."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from romancy.clock import Clock
from romancy.context import ActivityContext
from romancy.engine.operations import ActivityOperation
from romancy.errors import ActivityTimeoutError

if TYPE_CHECKING:
    from romancy.engine.instance import LiveInstance

RECORD_INTERVAL_S = 1.0
"""Progress is recorded at most this often, so that a loop may tell of each of its rounds."""


class SendingHost(Protocol):
    """What an attempt needs of the worker, for what the activity sends."""

    clock: Clock
    max_payload_bytes: int
    event_retention_us: int

    def new_mail_id(self) -> str:
        """An id for something sent."""
        ...


class Attempts(Protocol):
    """What an attempt needs of the runner."""

    loop: asyncio.AbstractEventLoop

    @property
    def host(self) -> SendingHost: ...
    def time_out(self, attempt: Attempt, error: ActivityTimeoutError) -> None:
        """The attempt has taken too long, or has fallen silent."""
        ...


class Attempt:
    """One attempt on its way.

    Attributes:
        handle: the task, or for a plain ``def`` the thread pool's future; ``None`` while it waits for a place.
        timeout: ends it when it has taken too long.
        heartbeat_timeout_s: how long it may be silent; ``None``: for ever.
        timed_out: why it was ended.
        is_given_up: the workflow or the worker no longer wants it.
        is_over: its outcome is settled; what the thread of a timed-out ``def`` still does counts for nothing.
    """

    __slots__ = (
        "_beat_at",
        "_details",
        "_is_noted",
        "_recorded_at",
        "_recording",
        "_runner",
        "_watch",
        "context",
        "handle",
        "heartbeat_timeout_s",
        "instance",
        "is_given_up",
        "is_over",
        "operation",
        "timed_out",
        "timeout",
    )

    def __init__(self, runner: Attempts, instance: LiveInstance, operation: ActivityOperation) -> None:
        self._runner = runner
        self.instance = instance
        self.operation = operation
        self.context: ActivityContext
        self.handle: asyncio.Task[Any] | Future[Any] | None = None
        self.timeout: asyncio.TimerHandle | None = None
        self.heartbeat_timeout_s: float | None = None
        self.timed_out: ActivityTimeoutError | None = None
        self.is_given_up = False
        self.is_over = False
        self._beat_at = 0.0
        self._details: str | None = None
        self._is_noted = False
        self._recorded_at = -RECORD_INTERVAL_S
        self._recording: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None

    # -- what its context asks (see ActivitySender) ----------------------------------------------------

    @property
    def max_payload_bytes(self) -> int:
        """The largest payload that may be stored."""
        return self._runner.host.max_payload_bytes

    @property
    def event_retention_us(self) -> int:
        """How long an event is kept for somebody who waits for it."""
        return self._runner.host.event_retention_us

    def new_mail_id(self) -> str:
        """An id for something sent."""
        return self._runner.host.new_mail_id()

    def now_us(self) -> int:
        """The time."""
        return self._runner.host.clock.now_us()

    @property
    def last_details(self) -> str | None:
        """What the last heartbeat of this call told, be it of this attempt or of one before."""
        return self._details if self._details is not None else self.operation.details

    def beat(self, details: str) -> None:
        """It lives, and has come this far; from any thread.

        Raises:
            ActivityTimeoutError: it has timed out, and what it does counts for nothing.
        """
        if self.is_over:
            raise self.timed_out or ActivityTimeoutError(f"this attempt of activity {self.operation.id} is over")
        self._beat_at = self._runner.loop.time()
        self._details = details
        if not self._is_noted:
            self._is_noted = True
            self._runner.loop.call_soon_threadsafe(self._note)

    # -- watching and recording, on the loop -----------------------------------------------------------

    def watch(self) -> None:
        """Begin to expect heartbeats, if it has promised some."""
        if self.heartbeat_timeout_s is not None:
            self._beat_at = self._runner.loop.time()
            self._watch = self._runner.loop.call_later(self.heartbeat_timeout_s, self._look)

    def _look(self) -> None:
        limit_s = self.heartbeat_timeout_s
        assert limit_s is not None
        left_s = self._beat_at + limit_s - self._runner.loop.time()
        if left_s > 0:
            self._watch = self._runner.loop.call_later(left_s, self._look)
            return
        message = (
            f"attempt {self.operation.attempt + 1} of activity {self.operation.id} gave no heartbeat for {limit_s} s"
        )
        self._runner.time_out(self, ActivityTimeoutError(message))

    def _note(self) -> None:
        wait_s = self._recorded_at + RECORD_INTERVAL_S - self._runner.loop.time()
        if wait_s > 0:
            self._recording = self._runner.loop.call_later(wait_s, self._record)
        else:
            self._record()

    def _record(self) -> None:
        self._is_noted = False
        self._recorded_at = self._runner.loop.time()
        if self._details is not None and not self.is_over:
            self.instance.on_progress(self.operation, self._details)

    def leave(self) -> None:
        """It has ended: expect nothing more of it; the operation knows how far it came."""
        for handle in (self.timeout, self._watch, self._recording):
            if handle is not None:
                handle.cancel()
        if self._details is not None:
            self.operation.details = self._details
