"""Sagas: what a run has done that can be undone, and the undoing, last in, first out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from romancy.definitions import Activity
from romancy.engine.operations import ActivityOperation

logger = logging.getLogger("romancy.workflow")


class Undo(NamedTuple):
    """An activity that undoes something, with its arguments."""

    activity: Activity[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def undo_of(operation: ActivityOperation, value: Any) -> Undo | None:
    """What undoes this activity, which has returned this value, if anything does.

    It gets the arguments of the activity, and the value as ``result``, as far as it takes them.
    """
    compensate = operation.activity.compensate
    if compensate is None or operation.is_compensation:
        return None
    given = operation.arguments
    bound = inspect.signature(operation.activity.fn).bind(*given.args, **given.kwargs)
    bound.apply_defaults()
    known = {**bound.arguments, "result": value}
    wanted = inspect.signature(compensate.fn).parameters
    return Undo(compensate, (), {name: known[name] for name in wanted if name in known})


class Saga:
    """The undos of one run, in the order in which what they undo was done."""

    __slots__ = ("_undos",)

    def __init__(self) -> None:
        self._undos: list[Undo] = []

    def __bool__(self) -> bool:
        return bool(self._undos)

    def add(self, undo: Undo) -> None:
        """Undo this, should the run fail or be cancelled."""
        self._undos.append(undo)

    async def compensate(self, call: Callable[[Undo], Coroutine[Any, Any, Any]]) -> None:
        """Undo everything, the last first; one that fails does not keep the others from being undone.

        Runs as workflow code, so that it replays: a crash in its middle resumes there.
        """
        while self._undos:
            undo = self._undos.pop()
            try:
                await call(undo)
            except Exception as error:  # noqa: BLE001  (whatever a user's activity raised; history has it)
                logger.error("compensation %s failed, and the others go on: %s", undo.activity.name, error)
