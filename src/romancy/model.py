"""The records that callers read: frozen, typed, without behaviour beyond reading."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """Where an instance stands."""

    PENDING = "pending"
    RUNNING = "running"
    WAITING_FOR_EVENT = "waiting_for_event"
    WAITING_FOR_TIMER = "waiting_for_timer"
    WAITING_FOR_MESSAGE = "waiting_for_message"
    WAITING_FOR_CHILD = "waiting_for_child"
    COMPENSATING = "compensating"
    SUSPENDED = "suspended"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the instance has ended: completed, failed or cancelled."""
        return self in TERMINAL


TERMINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})


class HistoryKind(StrEnum):
    """What one history event records."""

    ACTIVITY_COMPLETED = "ActivityCompleted"
    ACTIVITY_FAILED = "ActivityFailed"
    ACTIVITY_RETRY_SCHEDULED = "ActivityRetryScheduled"
    TIMER_EXPIRED = "TimerExpired"
    WORKFLOW_FAILED = "WorkflowFailed"
    WORKFLOW_CANCELLED = "WorkflowCancelled"


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An exception as it is recorded.

    Attributes:
        type: ``module.QualName`` of the exception's class.
        message: its text.
        traceback: the last frames as text, for people; may be empty.
    """

    type: str
    message: str
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Instance:
    """One workflow instance, as the database holds it.

    Attributes:
        input: the stored input: the structured input itself, or an object keyed by parameter name.
        result: the stored result once completed, as plain JSON values.
        error: why it failed or is suspended.
        worker_id: the worker that owns it now, or ``None``.
        next_wake_at: when a sleeping instance goes on.
        claims: how often it was taken over from a dead worker since it last came forward.
    """

    instance_id: str
    run: int
    workflow_name: str
    status: Status
    input: Any
    result: Any
    error: ErrorInfo | None
    worker_id: str | None
    created_at: datetime
    started_at: datetime | None
    updated_at: datetime
    completed_at: datetime | None
    next_wake_at: datetime | None
    claims: int
    source_hash: str | None


@dataclass(frozen=True, slots=True)
class InstancePage:
    """A page of instances, newest first.

    Attributes:
        has_more: whether a further page exists.
        next_page_token: pass it as ``page_token`` to the same query to go on; ``None`` on the last page.
    """

    instances: tuple[Instance, ...]
    has_more: bool
    next_page_token: str | None


@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """One recorded event of a run, in the order in which the workflow saw them.

    Attributes:
        seq: the position within the run; gaps are allowed, the order counts.
        activity_id: which call it belongs to, for example ``"charge:1"``; ``None`` for events of the run.
        name: the activity's name.
        attempt: how many attempts had been made.
        input: the activity's arguments by parameter name.
        result: what the activity returned.
        error: what it raised.
        next_attempt_at: for a scheduled retry, when it is due.
    """

    instance_id: str
    run: int
    seq: int
    kind: HistoryKind
    activity_id: str | None
    name: str | None
    attempt: int
    input: Any
    result: Any
    error: ErrorInfo | None
    at: datetime
    next_attempt_at: datetime | None = None


def from_micros(value: int) -> datetime:
    """An aware UTC datetime from microseconds since the epoch, without float rounding."""
    return datetime.fromtimestamp(value // 1_000_000, UTC).replace(microsecond=value % 1_000_000)


def to_micros(value: datetime) -> int:
    """Microseconds since the epoch of an aware datetime.

    Raises:
        ValueError: the datetime is naive.
    """
    if value.tzinfo is None:
        msg = f"{value!r} has no time zone: use an aware datetime, such as datetime.now(UTC)"
        raise ValueError(msg)
    delta = value - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds
