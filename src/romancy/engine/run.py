"""One run of workflow code: its loop, what the code reaches and has asked for, and the rows of its history."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, NoReturn, Protocol

from romancy.context import WorkflowContext
from romancy.definitions import DEFAULT_OPTIONS, Activity, CallOptions, Workflow
from romancy.engine.calls import CallIds, place_in_user_code
from romancy.engine.loop import ReadyCallback, TimerCallback, make_loop, start_task
from romancy.engine.messaging import Messaging, MessagingHost
from romancy.engine.operations import (
    ActivityOperation,
    CodePlace,
    MailOperation,
    Operation,
    RecurOperation,
    TimerOperation,
)
from romancy.engine.saga import Saga, Undo
from romancy.errors import ForbiddenInWorkflowError, RomancyError, WorkflowCancelledError
from romancy.failures import encode_error
from romancy.model import HistoryKind, Status
from romancy.serde import check_size, dump_plain, load_json
from romancy.signature import Arguments
from romancy.storage.again import seed_of
from romancy.storage.rows import ClaimedRow, HistoryRow, PatchRow, StateRow
from romancy.storage.writer import Recorder

LATEST_US = 253_402_300_799_000_000
"""The last second of the year 9999, beyond which Python has no dates: later deadlines are taken for this one."""


class Ending(NamedTuple):
    """How a run ended: the status, the history kind if one is recorded, and the result or the error as text."""

    status: Status
    kind: HistoryKind | None
    result: str | None
    error: str | None


class RunHost(MessagingHost, Protocol):
    """What a run needs of the worker."""

    worker_id: str
    max_payload_bytes: int
    event_retention_us: int


class Run(Recorder):
    """One run of a workflow's code, on a loop of its own.

    Args:
        host: the worker.
        row: the instance as claimed or started.
        workflow: its definition.
        given: the input, if the run begins here; ``None``: it has begun elsewhere, and its history must be fed first.
    """

    __slots__ = (
        "_calls",
        "_claims",
        "_context",
        "_is_asked",
        "_is_compensating",
        "_is_fresh",
        "_loop",
        "_mail",
        "_main",
        "_open_activities",
        "_open_timers",
        "_outside",
        "_parent_id",
        "_patches",
        "_recorded_status",
        "_saga",
        "_seed",
        "_seq",
        "_time_us",
        "instance_id",
        "is_gone",
        "is_replaying",
        "run",
        "workflow",
        "workflow_name",
    )

    def __init__(self, host: RunHost, row: ClaimedRow, workflow: Workflow[..., Any], given: Arguments | None) -> None:
        super().__init__()
        (
            self.instance_id, self.run, self.workflow_name, self._recorded_status, self._claims, self._time_us, text,
            self._parent_id, patches, self._seed, self._is_fresh,
        ) = row  # fmt: skip
        self._outside = host
        self.workflow = workflow
        self.is_replaying = given is None
        self.is_gone = False
        self._seq = 0
        self._calls = CallIds(self.instance_id, self.run)
        self._mail: Messaging | None = None
        self._saga: Saga | None = None
        self._is_compensating = False
        self._patches: dict[str, bool] = {} if patches is None else dict.fromkeys(load_json(patches), True)
        self._open_activities: dict[str, ActivityOperation] = {}
        self._open_timers: dict[str, TimerOperation] = {}
        self._is_asked: list[Operation] = []
        self._loop = make_loop(self, host.loop)
        self._context = WorkflowContext(self)
        args, kwargs = workflow.signature.decode_input(text) if given is None else (given.args, given.kwargs)
        self._main = start_task(self._loop, workflow.fn(self._context, *args, **kwargs), workflow.name)

    # -- what the live instance answers ------------------------------------------------------------

    def park(self, error: BaseException) -> None:
        """Set the instance aside as suspended, its history untouched, until somebody resumes it."""
        raise NotImplementedError

    def when_open(self, action: Callable[[], None]) -> bool:
        """See :class:`romancy.engine.messaging.MessagingInstance`."""
        raise NotImplementedError

    def note_deadline(self, deadline_us: int) -> None:
        """See :class:`romancy.engine.messaging.MessagingInstance`."""
        raise NotImplementedError

    def go_on(self, future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
        """See :class:`romancy.engine.messaging.MessagingInstance`."""
        raise NotImplementedError

    def _abandon(self, operation: ActivityOperation) -> None:
        """The workflow's await was cancelled; a result that still comes in is recorded, and waits for nobody."""
        raise NotImplementedError

    # -- what the workflow's code reaches ---------------------------------------------------------

    @property
    def seed(self) -> str:
        """See :class:`romancy.context.RunningWorkflow`."""
        return self._seed or seed_of(self.instance_id, self.run)

    def workflow_time_us(self) -> int:
        """The time of the last delivered event."""
        return self._time_us

    def call_activity(
        self,
        activity: Activity[..., Any],
        options: CallOptions,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Coroutine[Any, Any, Any]:
        """See :class:`romancy.definitions.WorkflowHost`.

        The id is given here, at the call, and not when the coroutine begins: ``asyncio.as_completed`` begins
        coroutines in an order that differs from run to run.
        """
        if self._loop.is_discarded:
            raise GeneratorExit
        place = place_in_user_code(2) if self.is_replaying else None
        return self._await_activity(self._operation(activity, options, args, kwargs, place))

    def _operation(
        self,
        activity: Activity[..., Any],
        options: CallOptions,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        place: CodePlace | None,
    ) -> ActivityOperation:
        arguments = activity.signature.encode_arguments(args, kwargs)
        if len(arguments.text) * 4 > self._outside.max_payload_bytes:
            check_size(f"the input of activity {activity.name!r}", [arguments.text], self._outside.max_payload_bytes)
        calls = self._calls
        operation_id = calls.next(activity.name) if options.id is None else calls.explicit(options.id)
        return ActivityOperation(operation_id, calls.position, place, activity, options, arguments)

    async def _await_activity(self, operation: ActivityOperation) -> Any:
        if self._loop.is_discarded:
            raise GeneratorExit
        operation.future = asyncio.Future(loop=self._loop)
        self._open_activities[operation.id] = operation
        self._is_asked.append(operation)
        try:
            return await operation.future
        except asyncio.CancelledError:
            self._abandon(operation)
            raise

    def add_timer(self, deadline_us: int, callback: ReadyCallback) -> TimerCallback:
        """See :class:`romancy.engine.loop.LoopHost`."""
        if self._loop.is_discarded:
            raise GeneratorExit
        place = place_in_user_code(3) if self.is_replaying else None
        deadline_us = min(deadline_us, LATEST_US)
        operation = TimerOperation(self._calls.next("timer"), self._calls.position, place, deadline_us)
        operation.callback = callback
        self._open_timers[operation.id] = operation
        self._is_asked.append(operation)
        return TimerCallback(self, deadline_us, callback, operation)

    def cancel_timer(self, operation: TimerOperation) -> None:
        """See :class:`romancy.engine.loop.LoopHost`."""
        self._open_timers.pop(operation.id, None)
        if operation.deadline is not None:
            operation.deadline.cancel()

    @property
    def mail(self) -> Messaging:
        """What the instance sends and waits for."""
        if self._mail is None:
            self._mail = Messaging(self._outside, self)
        return self._mail

    @property
    def event_retention_us(self) -> int:
        """See :class:`romancy.context.RunningWorkflow`."""
        return self._outside.event_retention_us

    def new_mail_id(self) -> str:
        """See :class:`romancy.context.RunningWorkflow`."""
        return self._outside.new_mail_id()

    def check_payload(self, what: str, text: str) -> None:
        """See :class:`romancy.context.RunningWorkflow`."""
        check_size(what, [text], self._outside.max_payload_bytes)

    async def recur(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        """See :class:`romancy.context.RunningWorkflow`."""
        given = self.workflow.signature.encode_input(args, kwargs)
        check_size(f"the input of workflow {self.workflow_name!r}", [given.text], self._outside.max_payload_bytes)
        self.ask(RecurOperation(*self.request("recur"), given))
        await self.future()
        raise AssertionError("a run that has ended goes on")

    def patched(self, change_id: str) -> bool:
        """See :class:`romancy.context.RunningWorkflow`."""
        known = self._patches.get(change_id)
        if known is None:
            known = self._patches[change_id] = self._is_fresh or not self.is_replaying
            if known:
                met = sorted(change for change, is_in in self._patches.items() if is_in)
                self._outside.writer.record_change(self, PatchRow(self.instance_id, dump_plain(met)))
        return known

    # -- what its mail needs of it (see MessagingInstance) ----------------------------------------

    @property
    def recorder(self) -> Recorder:
        return self

    def request(self, name: str) -> tuple[str, int, CodePlace | None]:
        if self._loop.is_discarded:
            raise GeneratorExit
        place = place_in_user_code(4) if self.is_replaying else None
        return self._calls.next(name), self._calls.position, place

    def ask(self, operation: Operation) -> None:
        self._is_asked.append(operation)

    def future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._loop)

    # -- sagas ------------------------------------------------------------------------------------

    def on_failure(self, undo: Activity[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See :class:`romancy.context.RunningWorkflow`."""
        undo.signature.encode_arguments(args, kwargs)  # what can't be stored is an error now, not in an emergency
        self._add_undo(Undo(undo, args, kwargs))

    def _add_undo(self, undo: Undo | None) -> None:
        if undo is not None:
            if self._saga is None:
                self._saga = Saga()
            self._saga.add(undo)

    def _begin_compensation(self) -> bool:
        """Whether there is something to undo, once; if so, the undoing is the code from here on."""
        main = self._main
        has_failed = main.cancelled() or main.exception() is not None
        if not has_failed or not self._saga or self._is_compensating:
            return False
        self._is_compensating = True
        self._main = start_task(self._loop, self._saga.compensate(self._call_undo), "compensation")
        return True

    def _call_undo(self, undo: Undo) -> Coroutine[Any, Any, Any]:
        operation = self._operation(undo.activity, DEFAULT_OPTIONS, undo.args, undo.kwargs, None)
        operation.is_compensation = True
        return self._await_activity(operation)

    # -- its rows ---------------------------------------------------------------------------------

    def record(
        self, kind: str, operation: Operation, *, result: str | None = None, error: str | None = None
    ) -> HistoryRow:
        event = self._event(kind, operation, result=result, error=error)
        self._record(event)
        return event

    def _record(self, event: HistoryRow) -> None:
        """Queue an event; the first one after a takeover shows that the instance is not what kills its workers."""
        state = None
        if self._claims:
            self._claims = 0
            state = self._state(self._recorded_status, owner=self._outside.worker_id, ready_at=None)
        self._outside.writer.record(self, event, state)

    def _event(
        self,
        kind: str,
        operation: Operation,
        *,
        result: str | None = None,
        error: str | None = None,
        due_at: int | None = None,
    ) -> HistoryRow:
        """The next row of history; from here on this is the workflow's time."""
        self._seq += 1
        self._time_us = max(self._time_us, self._outside.clock.now_us())
        attempt, arguments = 0, None
        if isinstance(operation, ActivityOperation):
            attempt, arguments = operation.attempt, operation.arguments.text
        elif isinstance(operation, MailOperation):
            arguments = operation.input
        return HistoryRow(
            self.instance_id,
            self.run,
            self._seq,
            kind,
            operation.id,
            operation.name,
            operation.position,
            attempt,
            self._time_us,
            due_at,
            arguments,
            result,
            error,
        )

    def _own_event(self, kind: str, *, text: str | None = None, error: str | None = None) -> HistoryRow:
        """A row of history that answers no request."""
        return HistoryRow(
            self.instance_id, self.run, self._seq, kind, None, None, None, 0, self._time_us, None, text, None, error
        )

    def _state(self, status: str, *, owner: str | None, ready_at: int | None, error: str | None = None) -> StateRow:
        now = self._outside.clock.now_us()
        return StateRow(self.instance_id, status, owner, ready_at, now, None, None, error)

    # -- outcomes and the end ---------------------------------------------------------------------

    @staticmethod
    def _resolve(future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        elif isinstance(error, StopIteration):
            failure = RuntimeError("an activity raised StopIteration, which a future can't hold")
            failure.__cause__ = error
            future.set_exception(failure)
        else:
            future.set_exception(error)

    def _how_main_ended(self) -> Ending | None:
        main = self._main
        if main.cancelled():
            return Ending(Status.CANCELLED, HistoryKind.WORKFLOW_CANCELLED, None, self._why_cancelled())
        error = main.exception()
        if error is None:
            try:
                text, _ = self.workflow.signature.encode_result(main.result())
                if len(text) * 4 > self._outside.max_payload_bytes:
                    what = f"the result of workflow {self.workflow_name!r}"
                    check_size(what, [text], self._outside.max_payload_bytes)
            except RomancyError as failure:
                error = failure
            else:
                return Ending(Status.COMPLETED, None, text, None)
        if isinstance(error, ForbiddenInWorkflowError):
            self.park(error)
            return None
        return Ending(Status.FAILED, HistoryKind.WORKFLOW_FAILED, None, encode_error(error))

    def _why_cancelled(self) -> str:
        try:
            self._main.result()
        except asyncio.CancelledError as error:
            return encode_error(WorkflowCancelledError(str(error) or "cancelled"))
        raise AssertionError
