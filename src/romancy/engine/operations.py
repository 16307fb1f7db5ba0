"""What workflow code has asked for and waits for: activities and timers, each with its place in the run."""

from __future__ import annotations

import asyncio
from types import CodeType
from typing import Any

from romancy.definitions import Activity, CallOptions
from romancy.engine.loop import TimerCallback
from romancy.engine.timers import Deadline
from romancy.signature import Arguments

TIMER = "timer"


class CodePlace:
    """Where in the workflow's code something was asked for; the line is worked out only when it is shown."""

    __slots__ = ("_code", "_instruction")

    def __init__(self, code: CodeType, instruction: int) -> None:
        self._code = code
        self._instruction = instruction

    def __str__(self) -> str:
        line = self._code.co_firstlineno
        for start, end, number in self._code.co_lines():
            if start <= self._instruction < end and number is not None:
                line = number
        return f"{self._code.co_filename}:{line}"


class Operation:
    """One thing that the code asked for.

    Attributes:
        id: ``name:counter``, or what the call's options say.
        position: how many-eth request of the run it is, timers included; the same on every replay.
        place: where it was asked for; known during replay only.
    """

    __slots__ = ("id", "place", "position")

    def __init__(self, operation_id: str, position: int, place: CodePlace | None) -> None:
        self.id = operation_id
        self.position = position
        self.place = place

    @property
    def name(self) -> str:
        """The activity's name, or ``timer``."""
        raise NotImplementedError

    def describe(self) -> str:
        """For messages."""
        return f"{self.id} (request {self.position})"


class ActivityOperation(Operation):
    """An activity call.

    Attributes:
        future: what the workflow awaits.
        attempt: how many attempts have ended.
        due_us: when the next attempt may begin, 0 for at once.
        first_attempt_us: when the first attempt began, 0 before.
        running: the attempt in progress, owned by the runner.
        backoff: the deadline of the next attempt while it waits.
        is_abandoned: the workflow no longer waits for it.
    """

    __slots__ = (
        "activity",
        "arguments",
        "attempt",
        "backoff",
        "due_us",
        "first_attempt_us",
        "future",
        "is_abandoned",
        "options",
        "running",
    )

    def __init__(
        self,
        operation_id: str,
        position: int,
        place: CodePlace | None,
        activity: Activity[..., Any],
        options: CallOptions,
        arguments: Arguments,
    ) -> None:
        # As Operation.__init__ does it; without the call, for there is one of these for every step.
        self.id = operation_id
        self.position = position
        self.place = place
        self.activity = activity
        self.options = options
        self.arguments = arguments
        self.future: asyncio.Future[Any]
        self.attempt = 0
        self.due_us = 0
        self.first_attempt_us = 0
        self.running: Any = None
        self.backoff: Deadline | None = None
        self.is_abandoned = False

    @property
    def name(self) -> str:
        return self.activity.name


class TimerOperation(Operation):
    """A sleep or a timeout.

    Attributes:
        deadline_us: when it is due, microseconds since the epoch.
        callback: what the workflow's loop runs then.
        deadline: its place in the worker's timers, once it is live.
    """

    __slots__ = ("callback", "deadline", "deadline_us")

    def __init__(self, operation_id: str, position: int, place: CodePlace | None, deadline_us: int) -> None:
        super().__init__(operation_id, position, place)
        self.deadline_us = deadline_us
        self.deadline: Deadline | None = None
        self.callback: TimerCallback

    @property
    def name(self) -> str:
        return TIMER
