"""What workflow code has asked for and waits for: activities, timers, mail; each with its place in the run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

from romancy.definitions import Activity, CallOptions, Workflow
from romancy.engine.loop import ReadyCallback
from romancy.engine.timers import Deadline
from romancy.signature import Arguments
from romancy.storage.mail import Mail, Wait

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
        answers: what kind of request this is, in the words of :data:`romancy.engine.replay.ANSWERS`.
        name: what is asked for: an activity's name, an event's, ``timer`` …
    """

    __slots__ = ("id", "place", "position")
    answers: str
    name: str

    def __init__(self, operation_id: str, position: int, place: CodePlace | None) -> None:
        self.id = operation_id
        self.position = position
        self.place = place

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
        details: what its last heartbeat told, as text.
        details_seq: the row of history that has it; 0: none yet.
        is_compensation: it undoes another activity.
    """

    __slots__ = (
        "activity",
        "arguments",
        "attempt",
        "backoff",
        "details",
        "details_seq",
        "due_us",
        "first_attempt_us",
        "future",
        "is_abandoned",
        "is_compensation",
        "name",
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
        self.name = activity.name
        self.options = options
        self.arguments = arguments
        self.future: asyncio.Future[Any]
        self.attempt = 0
        self.due_us = 0
        self.first_attempt_us = 0
        self.running: Any = None
        self.backoff: Deadline | None = None
        self.is_abandoned = False
        self.details: str | None = None
        self.details_seq = 0
        self.is_compensation = False

    @property
    def answers(self) -> str:  # type: ignore[override]
        return "compensation" if self.is_compensation else "activity"


class TimerOperation(Operation):
    """A sleep or a timeout.

    Attributes:
        deadline_us: when it is due, microseconds since the epoch.
        callback: what the workflow's loop runs then.
        deadline: its place in the worker's timers, once it is live.
    """

    __slots__ = ("callback", "deadline", "deadline_us")
    answers = "timer"
    name = TIMER

    def __init__(self, operation_id: str, position: int, place: CodePlace | None, deadline_us: int) -> None:
        super().__init__(operation_id, position, place)
        self.deadline_us = deadline_us
        self.deadline: Deadline | None = None
        self.callback: ReadyCallback


class MailOperation(Operation):
    """A wait for mail, or something sent.

    Attributes:
        future: what the workflow awaits.
        input: what history records beside the name; replay compares it.
    """

    __slots__ = ("answers", "future", "input", "name")

    def __init__(
        self, operation_id: str, position: int, place: CodePlace | None, answers: str, name: str, text: str | None
    ) -> None:
        super().__init__(operation_id, position, place)
        self.name = name
        self.answers = answers
        self.input = text
        self.future: asyncio.Future[Any]


class WaitOperation(MailOperation):
    """A wait for an event, a message, or the end of a child.

    Attributes:
        wait: how the database knows it.
        deadline_us: when its time is over; 0: never.
        deadline: its place in the worker's timers, once it is live.
        is_registered: the database has it, or has had it.
    """

    __slots__ = ("deadline", "deadline_us", "is_registered", "wait")

    def __init__(
        self,
        operation_id: str,
        position: int,
        place: CodePlace | None,
        answers: str,
        wait: Wait,
        text: str | None,
        deadline_us: int,
    ) -> None:
        super().__init__(operation_id, position, place, answers, wait.name, text)
        self.wait = wait
        self.deadline_us = deadline_us
        self.deadline: Deadline | None = None
        self.is_registered = False


class SendOperation(MailOperation):
    """Something that the workflow sends; recorded with what it sends.

    Attributes:
        kind: the history kind that records it.
        mail: makes what is sent, once it is sent.
    """

    __slots__ = ("kind", "mail")

    def __init__(
        self,
        operation_id: str,
        position: int,
        place: CodePlace | None,
        answers: str,
        name: str,
        text: str | None,
        kind: str,
        mail: Callable[[], Sequence[Mail]],
    ) -> None:
        super().__init__(operation_id, position, place, answers, name, text)
        self.kind = kind
        self.mail = mail


class ChildOperation(SendOperation):
    """The start of a child.

    Attributes:
        workflow: what it runs.
        child_id: its instance id.
        stored_input: its input, as text.
        is_keyed: the id came from the user, and may be taken.
        is_followed: the child is cancelled when its parent fails or is cancelled.
    """

    __slots__ = ("child_id", "is_followed", "is_keyed", "stored_input", "workflow")
    workflow: Workflow[..., Any]
    child_id: str
    stored_input: str
    is_keyed: bool
    is_followed: bool


class RecurOperation(Operation):
    """The end of this run, and the beginning of the next.

    Attributes:
        given: the input of the next run.
    """

    __slots__ = ("given",)
    answers = "recur"
    name = "recur"

    def __init__(self, operation_id: str, position: int, place: CodePlace | None, given: Arguments) -> None:
        super().__init__(operation_id, position, place)
        self.given = given
