"""A run that is brought back to where it was: its history, fed event by event, until the code stands where it stood."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from romancy.definitions import Workflow
from romancy.engine.operations import ActivityOperation, CodePlace, MailOperation, Operation, TimerOperation
from romancy.engine.replay import Request, compare
from romancy.engine.run import Run, RunHost
from romancy.engine.saga import undo_of
from romancy.errors import ForbiddenInWorkflowError, NonDeterminismError, SerializationError
from romancy.failures import decode_error
from romancy.model import HistoryKind
from romancy.serde import load_json
from romancy.signature import Arguments
from romancy.storage.rows import ClaimedRow, HistoryRow, SupersededRow

logger = logging.getLogger("romancy.engine")

COMPLETED = HistoryKind.ACTIVITY_COMPLETED.value
EXECUTED = HistoryKind.COMPENSATION_EXECUTED.value
RETRY = HistoryKind.ACTIVITY_RETRY_SCHEDULED.value
HEARTBEAT = HistoryKind.ACTIVITY_HEARTBEAT.value
TIMER_EXPIRED = HistoryKind.TIMER_EXPIRED.value
CANCELLATION = HistoryKind.CANCELLATION_REQUESTED.value
SUPERSEDED = HistoryKind.SUPERSEDED.value
LOST = HistoryKind.ACTIVITY_ATTEMPT_LOST.value
MARKERS = (LOST, SUPERSEDED, HistoryKind.WORKFLOW_RETRIED.value, HistoryKind.WORKFLOW_FORKED.value)


class ReplayedRun(Run):
    """A run that can be fed its history; see :class:`romancy.engine.run.Run`."""

    __slots__ = ("_compares_inputs", "_is_cancel_asked", "_strays")

    def __init__(self, host: RunHost, row: ClaimedRow, workflow: Workflow[..., Any], given: Arguments | None) -> None:
        super().__init__(host, row, workflow, given)
        # A fork has another id than its history was recorded under, and may have passed it on.
        self._compares_inputs = workflow.compare_inputs and self._seed is None
        self._strays: list[int] | None = None
        self._is_cancel_asked = False

    def _note_end(self) -> None:
        """Once the code has ended, whether live or on replay: how, and nothing else of it goes on."""
        raise NotImplementedError

    def replay(self, events: Sequence[HistoryRow]) -> bool:
        """Feed recorded events, in order; ``False`` once the instance has been parked."""
        for event in events:
            if self._seq == 0:
                self._run_replay()
            if self.is_gone or not self._replay_one(event):
                return False
        return True

    def _run_replay(self) -> None:
        try:
            self._loop.run_ready()
        except ForbiddenInWorkflowError as error:
            self.park(error)
            return
        except SystemExit:
            logger.warning("workflow %s called sys.exit(); taken as a failure", self.workflow_name)
        self._note_end()

    def _replay_one(self, event: HistoryRow) -> bool:
        self._seq = event.seq
        if event.kind in MARKERS:
            self._pass_over(event)
        elif event.kind == CANCELLATION and self._strays is None:
            self._time_us = event.at
            self._cancel_main(event.input)
            self._run_replay()
        else:
            operation = self._answered_by(event)
            if operation is not None:
                self._answer(operation, event)
        return not self.is_gone

    def _cancel_main(self, text: str | None) -> None:
        self._is_cancel_asked = True
        self._main.cancel(load_json(text or "{}").get("reason") or "cancelled")

    def _answered_by(self, event: HistoryRow) -> Operation | None:
        """The request that the event answers; ``None`` if the code no longer asks for it, or has been parked."""
        operation = self._open_operation(event)
        if operation is None and self._main.done() and self._begin_compensation():
            self._run_replay()
            operation = self._open_operation(event)
        mismatch = compare(event, self._request(operation), lambda: map(self._request, self._open()))
        if mismatch is None:
            return operation
        if self._strays is not None:
            self._strays.append(event.seq)
            return None
        found, place = mismatch.found, self.workflow.place
        if operation is None and self._main.done():
            found = "the end of the workflow"
        elif mismatch.request is not None:
            place = str(self._find_place(mismatch.request.operation_id) or place)
        self.park(NonDeterminismError(self.instance_id, mismatch.expected, found, place))
        return None

    def _answer(self, operation: Operation, event: HistoryRow) -> None:
        if isinstance(operation, ActivityOperation):
            operation.attempt = event.attempt
            if event.kind == RETRY:
                operation.due_us = event.due_at or 0
                operation.first_attempt_us = int(event.result or event.at)
                return
            if event.kind == HEARTBEAT:
                operation.details, operation.details_seq = event.result, event.seq
                return
        self._time_us = event.at
        if isinstance(operation, TimerOperation):
            del self._open_timers[operation.id]
            self._loop.make_ready(operation.callback)
        elif isinstance(operation, MailOperation):
            self._resolve(operation.future, *self.mail.replay(operation, event))
        elif isinstance(operation, ActivityOperation):
            del self._open_activities[operation.id]
            try:
                self._replay_outcome(operation, event)
            except SerializationError as error:
                self.park(error)
                return
        self._run_replay()

    def _pass_over(self, event: HistoryRow) -> None:
        """An event that answers nothing: an outcome that a retry has taken back, or where a retry or a fork went on;
        or an attempt whose commit got lost.

        Between the two, history may have outcomes that the code has only asked for because of the one taken back.
        """
        if event.kind == LOST:
            return
        if event.kind == SUPERSEDED:
            if self._strays is None:
                self._strays = []
            operation = self._open_activities.get(event.operation_id or "")
            if operation is not None:
                operation.attempt = operation.due_us = operation.first_attempt_us = 0
        elif self._strays is not None:
            if self._strays:
                row = SupersededRow(self.instance_id, self.run, self._strays)
                self._outside.writer.record_change(self, row)
            self._strays = None

    def _replay_outcome(self, operation: ActivityOperation, event: HistoryRow) -> None:
        if event.kind in (COMPLETED, EXECUTED):
            value = operation.activity.signature.decode_result(event.result or "null")
            if operation.activity.compensate is not None:
                self._add_undo(undo_of(operation, value))
            self._resolve(operation.future, value, None)
        else:
            assert event.error is not None
            self._resolve(operation.future, None, decode_error(event.error))

    def _open_operation(self, event: HistoryRow) -> Operation | None:
        operation_id = event.operation_id or ""
        if event.kind == TIMER_EXPIRED:
            return self._open_timers.get(operation_id)
        found = self._open_activities.get(operation_id)
        if found is None and self._mail is not None:
            return self._mail.open.get(operation_id)
        return found

    def _open(self) -> list[Operation]:
        mail = self._mail.open.values() if self._mail is not None else ()
        return [*self._open_activities.values(), *self._open_timers.values(), *mail]

    def _request(self, operation: Operation | None) -> Any:
        if operation is None:
            return None
        if isinstance(operation, ActivityOperation):
            same = operation.activity.signature.same_arguments if self._compares_inputs else None
            return Request(
                operation.id, operation.name, operation.position, operation.answers, operation.arguments.text, same
            )
        text = operation.input if isinstance(operation, MailOperation) else None
        same_text = str.__eq__ if self._compares_inputs else None
        return Request(operation.id, operation.name, operation.position, operation.answers, text, same_text)

    def _find_place(self, operation_id: str) -> CodePlace | None:
        return next((op.place for op in self._open() if op.id == operation_id), None)
