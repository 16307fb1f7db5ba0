"""The rule of replay: does what history says next fit what the code has asked for?

Pure: takes a recorded event and the open requests, says which request it answers, or how the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from romancy.model import HistoryKind
from romancy.storage.rows import HistoryRow

TIMER_EVENTS = frozenset({HistoryKind.TIMER_EXPIRED})


@dataclass(frozen=True, slots=True)
class Request:
    """A request of the code, as far as replay compares it.

    Attributes:
        is_timer: an activity and a timer never answer for each other.
        arguments: the stored form of an activity's arguments; ``None`` for timers.
        same_arguments: whether two stored forms mean the same; ``None``: arguments are not compared.
    """

    operation_id: str
    name: str
    position: int
    is_timer: bool
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
    is_timer = event.kind in TIMER_EVENTS
    if (request.name, request.position, request.is_timer) != (event.name, event.position, is_timer):
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
    what = "timer" if event.kind in TIMER_EVENTS else f"activity {event.name!r}"
    return f"{what} as {event.operation_id} (request {event.position})"


def _describe(request: Request) -> str:
    what = "timer" if request.is_timer else f"activity {request.name!r}"
    return f"{what} as {request.operation_id} (request {request.position})"


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:120] + "…"
