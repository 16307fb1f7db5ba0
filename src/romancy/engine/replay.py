"""The rule of replay: does what history says next fit what the code has asked for?

Pure: takes a recorded event and the open requests, says which request it answers, or how the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from romancy.model import HistoryKind
from romancy.storage.rows import HistoryRow

ANSWERS: dict[str, str] = {
    HistoryKind.ACTIVITY_COMPLETED: "activity",
    HistoryKind.ACTIVITY_FAILED: "activity",
    HistoryKind.COMPENSATION_EXECUTED: "compensation",
    HistoryKind.COMPENSATION_FAILED: "compensation",
    HistoryKind.TIMER_EXPIRED: "timer",
    HistoryKind.EVENT_RECEIVED: "event",
    HistoryKind.EVENT_TIMEOUT: "event",
    HistoryKind.CHANNEL_MESSAGE_RECEIVED: "message",
    HistoryKind.MESSAGE_TIMEOUT: "message",
    HistoryKind.EVENT_SENT: "sent event",
    HistoryKind.CHANNEL_MESSAGE_SENT: "sent message",
    HistoryKind.CHANNEL_SUBSCRIBED: "subscription",
    HistoryKind.CHANNEL_UNSUBSCRIBED: "end of a subscription",
    HistoryKind.CHILD_STARTED: "start of a child",
    HistoryKind.CHILD_REFUSED: "start of a child",
    HistoryKind.CHILD_ENDED: "child",
}
"""Which kind of request an event answers. The others answer any: a retry, an activity or its compensation; a refusal,
whatever a channel refuses."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request of the code, as far as replay compares it.

    Attributes:
        answers: its kind, in the words of :data:`ANSWERS`; requests of different kinds never stand for each other.
        arguments: the stored form of an activity's arguments, or what else is recorded; ``None`` for timers.
        same_arguments: whether two stored forms mean the same; ``None``: arguments are not compared.
    """

    operation_id: str
    name: str
    position: int
    answers: str
    arguments: str | None
    same_arguments: Callable[[str, str], bool] | None


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Where code and history part.

    Attributes:
        request: the request that differs, if one can be named.
    """

    expected: str
    found: str
    request: Request | None


def compare(event: HistoryRow, request: Request | None, others: Callable[[], Iterable[Request]]) -> Mismatch | None:
    """Whether the event answers the request of the same id.

    Args:
        event: what history records next.
        request: the code's request with the event's operation id, if there is one.
        others: gives the code's open requests, for the message.
    """
    expected = expectation(event)
    if request is None:
        first = min(others(), key=lambda other: other.position, default=None)
        found = "no request at all" if first is None else _describe(first)
        return Mismatch(expected, found, first)
    answers = ANSWERS.get(event.kind, request.answers)
    if (request.name, request.position, request.answers) != (event.name, event.position, answers):
        return Mismatch(expected, _describe(request), request)
    if request.same_arguments is None or event.input is None or request.arguments is None:
        return None
    if request.same_arguments(event.input, request.arguments):
        return None
    return Mismatch(
        f"{expected} with the arguments {_short(event.input)}",
        f"{_describe(request)} with the arguments {_short(request.arguments)}",
        request,
    )


def expectation(event: HistoryRow) -> str:
    """An event's request, for messages."""
    return (
        f"{_what(ANSWERS.get(event.kind, 'activity'), event.name)} as {event.operation_id} (request {event.position})"
    )


def _describe(request: Request) -> str:
    return f"{_what(request.answers, request.name)} as {request.operation_id} (request {request.position})"


def _what(answers: str, name: str | None) -> str:
    return answers if answers == "timer" else f"{answers} {name!r}"


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:120] + "…"
