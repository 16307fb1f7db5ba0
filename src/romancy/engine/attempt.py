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
        timed_out: why it was ended.
        is_given_up: the workflow or the worker no longer wants it.
        is_over: its outcome is settled; what the thread of a timed-out ``def`` still does counts for nothing.
    """

    __slots__ = (
        "__weakref__",
        "_beats",
        "_runner",
        "context",
        "handle",
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
        self.timed_out: ActivityTimeoutError | None = None
        self.is_given_up = False
        self.is_over = False
        self._beats: Heartbeats | None = None

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
        told = None if self._beats is None else self._beats.details
        return self.operation.details if told is None else told

    def beat(self, details: str) -> None:
        """It lives, and has come this far; from any thread.

        Raises:
            ActivityTimeoutError: it has timed out, and what it does counts for nothing.
        """
        if self.is_over:
            raise self.timed_out or ActivityTimeoutError(f"this attempt of activity {self.operation.id} is over")
        beats = self._beats
        if beats is None:
            beats = self._beats = Heartbeats(self, self._runner.loop)
        beats.beat(details)

    # -- on the loop -----------------------------------------------------------------------------------

    def expect_heartbeats(self, limit_s: float) -> None:
        """Time it out when it is silent for so long."""
        if self._beats is None:
            self._beats = Heartbeats(self, self._runner.loop)
        self._beats.expect(limit_s)

    def on_silence(self, limit_s: float) -> None:
        """It has been silent for too long."""
        message = (
            f"attempt {self.operation.attempt + 1} of activity {self.operation.id} gave no heartbeat for {limit_s} s"
        )
        self._runner.time_out(self, ActivityTimeoutError(message))

    def leave(self) -> None:
        """It has ended: expect nothing more of it; the operation knows how far it came."""
        if self.timeout is not None:
            self.timeout.cancel()
        if self._beats is not None:
            self._beats.stop()
            if self._beats.details is not None:
                self.operation.details = self._beats.details


class Heartbeats:
    """What an attempt tells of itself.

    Attributes:
        details: what it told last.
    """

    __slots__ = ("_attempt", "_beat_at", "_is_noted", "_loop", "_recorded_at", "_recording", "_watch", "details")

    def __init__(self, attempt: Attempt, loop: asyncio.AbstractEventLoop) -> None:
        self._attempt = attempt
        self._loop = loop
        self._beat_at = loop.time()
        self._is_noted = False
        self._recorded_at = -RECORD_INTERVAL_S
        self._recording: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self.details: str | None = None

    def beat(self, details: str) -> None:
        """From any thread: it has come this far."""
        self._beat_at = self._loop.time()
        self.details = details
        if not self._is_noted:
            self._is_noted = True
            self._loop.call_soon_threadsafe(self._note)

    def expect(self, limit_s: float) -> None:
        """Tell the attempt when it is silent for so long."""
        left_s = self._beat_at + limit_s - self._loop.time()
        if left_s > 0:
            self._watch = self._loop.call_later(left_s, self.expect, limit_s)
        else:
            self._attempt.on_silence(limit_s)

    def stop(self) -> None:
        """The attempt has ended."""
        for handle in (self._watch, self._recording):
            if handle is not None:
                handle.cancel()

    def _note(self) -> None:
        wait_s = self._recorded_at + RECORD_INTERVAL_S - self._loop.time()
        if wait_s > 0:
            self._recording = self._loop.call_later(wait_s, self._record)
        else:
            self._record()

    def _record(self) -> None:
        self._is_noted = False
        self._recorded_at = self._loop.time()
        attempt = self._attempt
        if self.details is not None and not attempt.is_over:
            attempt.instance.on_progress(attempt.operation, self.details)
