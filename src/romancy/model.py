"""The records that callers read: frozen, typed, without behaviour beyond reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Generic, TypeVar

T = TypeVar("T")


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


WAITING = (Status.WAITING_FOR_EVENT, Status.WAITING_FOR_TIMER, Status.WAITING_FOR_MESSAGE, Status.WAITING_FOR_CHILD)
TERMINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})


class HistoryKind(StrEnum):
    """What one history event records."""

    ACTIVITY_COMPLETED = "ActivityCompleted"
    ACTIVITY_FAILED = "ActivityFailed"
    ACTIVITY_RETRY_SCHEDULED = "ActivityRetryScheduled"
    ACTIVITY_HEARTBEAT = "ActivityHeartbeat"
    ACTIVITY_ATTEMPT_LOST = "ActivityAttemptLost"
    TIMER_EXPIRED = "TimerExpired"
    EVENT_RECEIVED = "EventReceived"
    EVENT_TIMEOUT = "EventTimeout"
    EVENT_SENT = "EventSent"
    CHANNEL_SUBSCRIBED = "ChannelSubscribed"
    CHANNEL_UNSUBSCRIBED = "ChannelUnsubscribed"
    CHANNEL_REFUSED = "ChannelRefused"
    CHANNEL_MESSAGE_SENT = "ChannelMessageSent"
    CHANNEL_MESSAGE_RECEIVED = "ChannelMessageReceived"
    MESSAGE_TIMEOUT = "MessageTimeout"
    CHILD_STARTED = "ChildStarted"
    CHILD_REFUSED = "ChildRefused"
    CHILD_ENDED = "ChildEnded"
    COMPENSATION_EXECUTED = "CompensationExecuted"
    COMPENSATION_FAILED = "CompensationFailed"
    CANCELLATION_REQUESTED = "CancellationRequested"
    WORKFLOW_RECURRED = "WorkflowRecurred"
    WORKFLOW_RETRIED = "WorkflowRetried"
    WORKFLOW_FORKED = "WorkflowForked"
    SUPERSEDED = "Superseded"
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
class PendingActivity:
    """An activity without an outcome yet that has failed before, or has told how far it has come.

    Attributes:
        activity_id: which call it is, for example ``"charge:1"``.
        name: the activity's name.
        attempts: how many attempts have failed.
        last_error: why the last of them did.
        next_attempt_at: when the next one is due; in the past: it runs, or is about to.
        heartbeat: what its last recorded heartbeat told.
        heartbeat_at: when that was recorded; ``None``: there was none.
    """

    activity_id: str
    name: str
    attempts: int
    last_error: ErrorInfo | None
    next_attempt_at: datetime | None
    heartbeat: Any
    heartbeat_at: datetime | None


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
        source_hash: of the workflow's code that began this run.
        pending: activities that are being retried, or that last; only :meth:`romancy.App.get_instance` looks for them.
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
    pending: tuple[PendingActivity, ...] = ()


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


@dataclass(frozen=True, slots=True)
class Event(Generic[T]):
    """An event that a workflow has waited for, as CloudEvents 1.0 calls its parts.

    Attributes:
        type: what happened, for example ``"payment.completed"``.
        source: who says so; with ``id`` it names the event.
        id: unique within its source.
        subject: the key that it was sent with, or ``None``.
        time: when it happened, aware.
        data: what it carries; as ``wait_event(type=…)`` says, else plain JSON values.
        extensions: further attributes.
    """

    type: str
    source: str
    id: str
    subject: str | None
    time: datetime
    data: T
    extensions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Message(Generic[T]):
    """A message that a workflow has received from a channel.

    Attributes:
        id: unique.
        channel: where it came from.
        data: what it carries; as ``receive(type=…)`` says, else plain JSON values.
        metadata: what the sender put beside it.
        sender: the id of the instance that sent it, or ``None``: it came from outside.
        sent_at: when, aware.
    """

    id: str
    channel: str
    data: T
    metadata: Mapping[str, Any]
    sender: str | None
    sent_at: datetime


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
