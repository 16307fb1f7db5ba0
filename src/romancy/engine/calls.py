"""The calls of one run: their ids, their numbers, and where in the user's code they stand."""

from __future__ import annotations

import sys
from types import FrameType

from romancy.engine.loop import RUN_READY_CODE
from romancy.engine.operations import CodePlace
from romancy.errors import DuplicateNameError


class CallIds:
    """Gives each call of a run an id, ``name:counter`` or one of the user's, and its number among all calls.

    Attributes:
        position: how many calls there have been.
    """

    __slots__ = ("_counters", "_explicit", "_instance_id", "_run", "position")

    def __init__(self, instance_id: str, run: int) -> None:
        self.position = 0
        self._instance_id = instance_id
        self._run = run
        self._counters: dict[str, int] = {}
        self._explicit: set[str] | None = None

    def next(self, name: str) -> str:
        """The next id of that name.

        Raises:
            DuplicateNameError: the user has given it to another call.
        """
        self.position += 1
        count = self._counters.get(name, 0) + 1
        self._counters[name] = count
        call_id = f"{name}:{count}"
        if self._explicit is not None and call_id in self._explicit:
            raise self._taken(call_id)
        return call_id

    def explicit(self, call_id: str) -> str:
        """An id that the user gives.

        Raises:
            DuplicateNameError: another call has it.
        """
        self.position += 1
        name, _, count = call_id.rpartition(":")
        is_auto = count.isdecimal() and 0 < int(count) <= self._counters.get(name, 0)
        if self._explicit is None:
            self._explicit = set()
        if is_auto or call_id in self._explicit:
            raise self._taken(call_id)
        self._explicit.add(call_id)
        return call_id

    def _taken(self, call_id: str) -> DuplicateNameError:
        return DuplicateNameError(
            f"the activity id {call_id!r} is used twice in run {self._run} of instance "
            f"{self._instance_id}: give each call an id of its own, or leave "
            f"ids to Romancy"
        )


def place_in_user_code(depth: int) -> CodePlace | None:
    """Where in the user's code a call comes from; unknown for a task that begins inside a library."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and frame.f_code is not RUN_READY_CODE:
        if not frame.f_globals.get("__name__", "").startswith(("asyncio", "romancy.")):
            return CodePlace(frame.f_code, frame.f_lasti)
        frame = frame.f_back
    return None
