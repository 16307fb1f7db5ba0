"""One live instance: its loop, its place in history, and what it waits for.

The way of an outcome: the runner hands it in, it gets the next ``seq`` and goes to the writer, the workflow's
future is resolved, the loop runs until nothing is ready, and what the code asked for meanwhile is started, each
activity once all that the code has seen is durable.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn, Protocol

from romancy.context import WorkflowContext
from romancy.definitions import DEFAULT_OPTIONS, Activity, CallOptions, Workflow
from romancy.engine.calls import CallIds, place_in_user_code
from romancy.engine.gate import Gate
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
from romancy.engine.replay import Request, compare
from romancy.engine.saga import Saga, Undo, undo_of
from romancy.errors import (
    DatabaseError,
    ForbiddenInWorkflowError,
    NonDeterminismError,
    RetryExhaustedError,
    RomancyError,
    SerializationError,
    WorkflowCancelledError,
)
from romancy.failures import decode_error, encode_error
from romancy.model import HistoryKind, Status
from romancy.retry import RetryPolicy
from romancy.serde import check_size, dump_plain, load_json
from romancy.signature import Arguments
from romancy.storage.again import seed_of
from romancy.storage.failures import is_conflict
from romancy.storage.mail import CHILD, EVENT, MESSAGE, NEVER_US, REQUEST, SUSPEND, Delivery, Mail, Receipt, Wait
from romancy.storage.posting import outcome_mail
from romancy.storage.rows import ClaimedRow, HistoryRow, PatchRow, ProgressRow, RunRow, StateRow, SupersededRow
from romancy.storage.writer import Recorder

logger = logging.getLogger("romancy.engine")

COMPLETED = HistoryKind.ACTIVITY_COMPLETED.value
FAILED = HistoryKind.ACTIVITY_FAILED.value
RETRY = HistoryKind.ACTIVITY_RETRY_SCHEDULED.value
TIMER_EXPIRED = HistoryKind.TIMER_EXPIRED.value
EXECUTED = HistoryKind.COMPENSATION_EXECUTED.value
UNDONE_FAILED = HistoryKind.COMPENSATION_FAILED.value
SUPERSEDED = HistoryKind.SUPERSEDED.value
MARKERS = (SUPERSEDED, HistoryKind.WORKFLOW_RETRIED.value, HistoryKind.WORKFLOW_FORKED.value)
HEARTBEAT = HistoryKind.ACTIVITY_HEARTBEAT.value
CANCELLATION = HistoryKind.CANCELLATION_REQUESTED.value
RUNNING = Status.RUNNING.value
COMPENSATING = Status.COMPENSATING.value
WAITING_FOR_TIMER = Status.WAITING_FOR_TIMER.value
WAITING_FOR_MAIL = (
    (EVENT, Status.WAITING_FOR_EVENT.value),
    (MESSAGE, Status.WAITING_FOR_MESSAGE.value),
    (CHILD, Status.WAITING_FOR_CHILD.value),
)
"""What an instance's status says; where it waits for several things, the first of these."""

LATEST_US = 253_402_300_799_000_000
"""The last second of the year 9999, beyond which Python has no dates: later deadlines are taken for this one."""


class Ending(NamedTuple):
    """How a run ended: the status, the history kind if one is recorded, and the result or the error as text."""

    status: Status
    kind: HistoryKind | None
    result: str | None
    error: str | None


class InstanceHost(MessagingHost, Protocol):
    """What an instance needs of its worker."""

    worker_id: str
    max_payload_bytes: int
    event_retention_us: int
    default_retry: RetryPolicy

    def start_activity(self, instance: LiveInstance, operation: ActivityOperation) -> None:
        """Run the next attempt."""
        ...

    def cancel_activity(self, operation: ActivityOperation) -> None:
        """The workflow gave it up: end the attempt in progress."""
        ...

    def on_waiting(self, instance: LiveInstance, is_waiting: bool) -> None:
        """The instance has begun, or ceased, to wait for nothing but time."""
        ...

    def on_ended(self, instance: LiveInstance, state: StateRow) -> None:
        """The instance's last state is durable."""
        ...

    def on_gone(self, instance: LiveInstance) -> None:
        """The instance is no longer live here."""
        ...

    def begin_run(self, last: LiveInstance, row: ClaimedRow, given: Arguments, ticket: int) -> None:
        """Begin the next run of an instance, whose last row is in the batch of this ticket."""
        ...


class LiveInstance(Recorder):
    """A running instance in this worker's memory.

    Args:
        host: the worker.
        row: the instance as claimed or started.
        workflow: its definition.
        given: the input of an instance that has just been started here; ``None`` for one that was claimed: its
            history must be fed first (:meth:`replay`, then :meth:`go_live`).
    """

    __slots__ = (
        "_blocked",
        "_calls",
        "_claims",
        "_compares_inputs",
        "_context",
        "_ending",
        "_gate",
        "_host",
        "_is_asked",
        "_is_cancel_asked",
        "_is_compensating",
        "_is_fresh",
        "_is_in_code",
        "_is_waiting_for_commit",
        "_is_wake_stale",
        "_loop",
        "_mail",
        "_main",
        "_open_activities",
        "_open_timers",
        "_parent_id",
        "_patches",
        "_recorded_status",
        "_recorded_wake_us",
        "_requests",
        "_saga",
        "_seq",
        "_strays",
        "_successor",
        "_time_us",
        "instance_id",
        "is_gone",
        "is_replaying",
        "is_waiting",
        "run",
        "running_count",
        "seed",
        "workflow",
        "workflow_name",
    )

    def __init__(
        self, host: InstanceHost, row: ClaimedRow, workflow: Workflow[..., Any], given: Arguments | None
    ) -> None:
        super().__init__()
        self._host = host
        self.instance_id = row.instance_id
        self.run = row.run
        self.workflow_name = row.workflow_name
        self.workflow = workflow
        self.is_replaying = given is None
        self.is_gone = False
        self.is_waiting = False
        self.running_count = 0
        self._time_us = row.started_at
        self._seq = 0
        self._calls = CallIds(f"run {row.run} of instance {row.instance_id}")
        self._mail: Messaging | None = None
        self._saga: Saga | None = None
        self._ending: Ending | None = None
        self._is_compensating = False
        self._is_cancel_asked = False
        self._requests: list[Delivery] | None = None
        self._parent_id = row.parent_id
        self._patches: dict[str, bool] = {} if row.patches is None else dict.fromkeys(load_json(row.patches), True)
        self._is_fresh = row.is_fresh
        self.seed = row.seed or seed_of(row.instance_id, row.run)
        # A fork has another id than its history was recorded under, and may have passed it on.
        self._compares_inputs = workflow.compare_inputs and row.seed is None
        self._strays: list[int] | None = None
        self._successor: LiveInstance | None = None
        self._open_activities: dict[str, ActivityOperation] = {}
        self._open_timers: dict[str, TimerOperation] = {}
        self._is_asked: list[Operation] = []
        self._blocked: list[tuple[int, ActivityOperation]] = []
        self._is_waiting_for_commit = False
        self._is_in_code = False
        self._gate: Gate | None = None
        self._recorded_status = row.status
        self._recorded_wake_us = 0
        self._is_wake_stale = False
        self._claims = row.claims
        self._loop = make_loop(self, host.loop)
        self._context = WorkflowContext(self)
        args, kwargs = workflow.signature.decode_input(row.input) if given is None else (given.args, given.kwargs)
        self._main = start_task(self._loop, workflow.fn(self._context, *args, **kwargs), workflow.name)

    # -- what the workflow's code reaches ----------------------------------------------------------

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
        if self._loop.is_closed():
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
        if len(arguments.text) * 4 > self._host.max_payload_bytes:
            check_size(f"the input of activity {activity.name!r}", [arguments.text], self._host.max_payload_bytes)
        calls = self._calls
        operation_id = calls.next(activity.name) if options.id is None else calls.explicit(options.id)
        return ActivityOperation(operation_id, calls.position, place, activity, options, arguments)

    async def _await_activity(self, operation: ActivityOperation) -> Any:
        if self._loop.is_closed():
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
        if self._loop.is_closed():
            raise GeneratorExit
        place = place_in_user_code(3) if self.is_replaying else None
        deadline_us = min(deadline_us, LATEST_US)
        operation = TimerOperation(self._calls.next("timer"), self._calls.position, place, deadline_us)
        operation.callback = TimerCallback(self, deadline_us, callback, operation)
        self._open_timers[operation.id] = operation
        self._is_asked.append(operation)
        return operation.callback

    def cancel_timer(self, timer: TimerCallback) -> None:
        """See :class:`romancy.engine.loop.LoopHost`."""
        operation: TimerOperation = timer.operation
        self._open_timers.pop(operation.id, None)
        if operation.deadline is not None:
            operation.deadline.cancel()

    @property
    def mail(self) -> Messaging:
        """What the instance sends and waits for."""
        if self._mail is None:
            self._mail = Messaging(self._host, self)
        return self._mail

    @property
    def event_retention_us(self) -> int:
        """See :class:`romancy.context.RunningWorkflow`."""
        return self._host.event_retention_us

    def new_mail_id(self) -> str:
        """See :class:`romancy.context.RunningWorkflow`."""
        return self._host.new_mail_id()

    def check_payload(self, what: str, text: str) -> None:
        """See :class:`romancy.context.RunningWorkflow`."""
        check_size(what, [text], self._host.max_payload_bytes)

    # -- what its mail needs of it (see MessagingInstance) ---------------------------------------------

    @property
    def recorder(self) -> Recorder:
        return self

    def request(self, name: str) -> tuple[str, int, CodePlace | None]:
        if self._loop.is_closed():
            raise GeneratorExit
        place = place_in_user_code(4) if self.is_replaying else None
        return self._calls.next(name), self._calls.position, place

    def ask(self, operation: Operation) -> None:
        self._is_asked.append(operation)

    def future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._loop)

    def when_open(self, action: Callable[[], None]) -> bool:
        if self._is_gated:
            assert self._gate is not None
            self._gate.after(action)
            return False
        return True

    def record(
        self, kind: str, operation: Operation, *, result: str | None = None, error: str | None = None
    ) -> HistoryRow:
        event = self._event(kind, operation, result=result, error=error)
        self._record(event)
        return event

    def go_on(self, future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
        self._resolve(future, value, error)
        self._advance()

    def _abandon(self, operation: ActivityOperation) -> None:
        """The workflow's await was cancelled; a result that still comes in is recorded, and waits for nobody."""
        if self.is_gone or operation.is_abandoned:
            return
        operation.is_abandoned = True
        if operation.running is not None:
            self._host.cancel_activity(operation)
            return
        if operation.backoff is not None:
            operation.backoff.cancel()
        if not self.is_replaying:
            self._open_activities.pop(operation.id, None)

    # -- running -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Run a new instance up to its first wait."""
        self._advance()

    def _advance(self) -> None:
        """Run the code as far as it goes, then start what it asked for."""
        self._is_in_code = True
        try:
            self._loop.run_ready()
        except ForbiddenInWorkflowError as error:
            self.park(error)
            return
        except SystemExit:
            logger.warning("workflow %s called sys.exit(); taken as a failure", self.workflow_name)
        finally:
            self._is_in_code = False
        if not self.is_replaying:
            if self._main.done():
                self._on_main_done()
            else:
                self._start_asked()

    def _start_asked(self) -> None:
        if self._is_asked:
            asked, self._is_asked = self._is_asked, []
            for operation in asked:
                if isinstance(operation, ActivityOperation):
                    if not operation.is_abandoned and not operation.future.done():
                        self._start_activity(operation)
                elif isinstance(operation, TimerOperation):
                    if operation.id in self._open_timers:
                        on_deadline = partial(self._on_deadline, operation)
                        operation.deadline = self._host.timers.add(operation.deadline_us, on_deadline)
                        self.note_deadline(operation.deadline_us)
                elif isinstance(operation, RecurOperation):
                    self._recur(operation)
                    return
                else:
                    assert isinstance(operation, MailOperation)
                    self.mail.start(operation)
        self._settle()

    def _start_activity(self, operation: ActivityOperation) -> None:
        """Start it now, after its backoff, or once everything before it is durable."""
        if operation.due_us and operation.due_us > self._host.clock.now_us():
            operation.backoff = self._host.timers.add(operation.due_us, lambda: self._after_backoff(operation))
        elif self.ticket <= self._host.writer.committed:
            self._run_activity(operation)
        else:
            self._blocked.append((self.ticket, operation))
            if not self._is_waiting_for_commit:
                self._is_waiting_for_commit = True
                self._host.writer.when_durable(self.ticket, self._on_commit)

    def _after_backoff(self, operation: ActivityOperation) -> None:
        operation.backoff = None
        if not self.is_gone:
            self._start_activity(operation)
            self._settle()

    def _on_commit(self) -> None:
        """A barrier is down: start the activities that stood before it."""
        self._is_waiting_for_commit = False
        if self.is_gone:
            return
        committed = self._host.writer.committed
        blocked, self._blocked = self._blocked, []
        for ticket, operation in blocked:
            if operation.is_abandoned:
                continue
            if ticket <= committed:
                self._run_activity(operation)
            else:
                self._blocked.append((ticket, operation))
        if self._blocked:
            self._is_waiting_for_commit = True
            self._host.writer.when_durable(self._blocked[0][0], self._on_commit)
        else:
            self._settle()

    def _run_activity(self, operation: ActivityOperation) -> None:
        self.running_count += 1
        self._host.start_activity(self, operation)

    def _settle(self) -> None:
        """Note in the database, and with the worker, whether only time is waited for."""
        if self._is_in_code:
            return  # the code has not come to rest; _start_asked settles when it has
        if self._main.done():
            self._on_main_done()
            return
        is_waiting = not (self.running_count or self._blocked or self._is_gated)
        mail = self._mail
        if mail is not None and mail.open:
            is_waiting = is_waiting and not mail.is_busy
        elif is_waiting and not self._open_timers and not self._open_activities:
            self.park(
                ForbiddenInWorkflowError(
                    "the workflow waits for something that nothing will ever set: no activity runs, no timer is due, "
                    "no event or message is waited for. Look for an Event, a Future or a Queue that only this code "
                    "could fill"
                )
            )
            return
        status = self._waiting_status() if is_waiting else self._running_status
        if status != self._recorded_status or self._is_wake_stale:
            self._record_status(status)
        if is_waiting or self.is_waiting:
            self.is_waiting = is_waiting
            self._host.on_waiting(self, is_waiting)

    def _waiting_status(self) -> str:
        """The status of an instance that only waits; one whose activity waits for its next attempt is running."""
        if self._is_compensating or any(op.backoff for op in self._open_activities.values()):
            return self._running_status
        kinds = self._mail.waits_for() if self._mail is not None and self._mail.open else ()
        return next((status for kind, status in WAITING_FOR_MAIL if kind in kinds), WAITING_FOR_TIMER)

    @property
    def _running_status(self) -> str:
        return COMPENSATING if self._is_compensating else RUNNING

    def _record_status(self, status: str) -> None:
        self._recorded_status = status
        # Handed back, a waiting instance sleeps on until then, or until mail comes.
        wake = None if status in (RUNNING, COMPENSATING) else self.next_wake_us() or NEVER_US
        self._recorded_wake_us = wake or 0
        self._is_wake_stale = False
        self._host.writer.record(self, None, self._state(status, owner=self._host.worker_id, ready_at=wake))

    def note_deadline(self, deadline_us: int) -> None:
        """The code waits for a time; should that come before the one that is recorded, record it."""
        if deadline_us < self._recorded_wake_us:
            self._is_wake_stale = True

    def next_wake_us(self) -> int | None:
        """The earliest deadline of a timer, a backoff or a wait."""
        deadlines = [timer.deadline_us for timer in self._open_timers.values()]
        deadlines += [op.due_us for op in self._open_activities.values() if op.backoff is not None]
        if self._mail is not None and (deadline_us := self._mail.next_deadline_us()):
            deadlines.append(deadline_us)
        return min(deadlines, default=None)

    # -- outcomes ----------------------------------------------------------------------------------

    def effective_retry(self, operation: ActivityOperation) -> RetryPolicy:
        """The call's policy, else the activity's, else the app's."""
        return operation.options.retry or operation.activity.retry or self._host.default_retry

    def on_attempt_dropped(self, operation: ActivityOperation) -> None:
        """An attempt ended without an outcome: the workflow gave it up, or the instance has left."""
        self._attempt_over(operation)
        if not self.is_gone:
            assert operation.is_abandoned
            self._open_activities.pop(operation.id, None)
            self._settle()

    def on_completed(self, operation: ActivityOperation, text: str, value: Any, outgoing: Sequence[Mail] = ()) -> None:
        """Record an activity's result, with what it sends, and let the workflow go on with it."""
        if self._is_gated and not self.when_open(lambda: self.on_completed(operation, text, value, outgoing)):
            return
        self._attempt_over(operation)
        if self.is_gone:
            return
        self._record(self._event(EXECUTED if operation.is_compensation else COMPLETED, operation, result=text))
        if outgoing:
            self._host.writer.record_mail(self, outgoing)
        self._deliver(operation, value, None)

    def on_failed(self, operation: ActivityOperation, error: BaseException) -> None:
        """Record that an activity failed for good and raise in the workflow what replay will raise."""
        if self._is_gated and not self.when_open(lambda: self.on_failed(operation, error)):
            return
        self._attempt_over(operation)
        if self.is_gone:
            return
        text = encode_error(error)
        self._record(self._event(UNDONE_FAILED if operation.is_compensation else FAILED, operation, error=text))
        self._deliver(operation, None, decode_error(text))

    def on_retry(self, operation: ActivityOperation, error: BaseException, wait_s: float) -> None:
        """Record a failed attempt and when the next one is due, then wait for that."""
        if self._is_gated and not self.when_open(lambda: self.on_retry(operation, error, wait_s)):
            return
        self._attempt_over(operation)
        if self.is_gone:
            return
        if operation.is_abandoned:
            self._open_activities.pop(operation.id, None)
            self._settle()
            return
        operation.due_us = self._host.clock.now_us() + round(wait_s * 1_000_000)
        began = str(operation.first_attempt_us)
        if operation.details is not None:
            self.on_progress(operation, operation.details)
        self._record(self._event(RETRY, operation, result=began, error=encode_error(error), due_at=operation.due_us))
        self._start_activity(operation)
        self._settle()

    def on_progress(self, operation: ActivityOperation, details: str) -> None:
        """Record how far an activity has come: in one row of history, whose latest state counts."""
        if self.is_gone or operation.is_abandoned or self._open_activities.get(operation.id) is not operation:
            return
        if self._is_gated and not self.when_open(lambda: self.on_progress(operation, details)):
            return
        operation.details = details
        if operation.details_seq == 0:
            event = self._event(HEARTBEAT, operation, result=details)
            operation.details_seq = event.seq
            self._record(event)
        else:
            now = self._host.clock.now_us()
            row = ProgressRow(self.instance_id, self.run, operation.details_seq, now, details)
            self._host.writer.record_change(self, row)

    def _attempt_over(self, operation: ActivityOperation) -> None:
        operation.running = None
        self.running_count -= 1

    def _deliver(self, operation: ActivityOperation, value: Any, error: BaseException | None) -> None:
        self._open_activities.pop(operation.id, None)
        if error is None and operation.activity.compensate is not None:
            self._add_undo(undo_of(operation, value))
        self._resolve(operation.future, value, error)
        self._advance()

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

    def _on_deadline(self, operation: TimerOperation) -> None:
        """A timer is due: record it and let the workflow go on."""
        if self.is_gone or operation.id not in self._open_timers:
            return
        if self._is_gated and not self.when_open(lambda: self._on_deadline(operation)):
            return
        del self._open_timers[operation.id]
        self._time_us = max(self._time_us, operation.deadline_us)
        self._record(self._event(TIMER_EXPIRED, operation))
        self._loop.make_ready(operation.callback.ready)
        self._advance()

    def _record(self, event: HistoryRow) -> None:
        """Queue an event; the first one after a takeover shows that the instance is not what kills its workers."""
        state = None
        if self._claims:
            self._claims = 0
            state = self._state(self._recorded_status, owner=self._host.worker_id, ready_at=None)
        self._host.writer.record(self, event, state)

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
        self._time_us = max(self._time_us, self._host.clock.now_us())
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

    # -- outcomes that commit in a transaction of their own ------------------------------------------

    async def reserve(self, operation: ActivityOperation, text: str) -> HistoryRow:
        """The row that a transactional activity commits with its own rows.

        Until :meth:`settle_reserved` no other event of this instance is delivered, so that the order in history
        is the order in which the workflow saw things.
        """
        if self._gate is None:
            self._gate = Gate()
        await self._gate.shut()
        return self._event(EXECUTED if operation.is_compensation else COMPLETED, operation, result=text)

    def settle_reserved(self, operation: ActivityOperation, *, is_committed: bool, value: Any) -> None:
        """The transaction is over; deliver its outcome, if it has one, and what waited behind it."""
        gate = self._gate
        assert gate is not None
        gate.open()
        if is_committed and not self.is_gone:
            self._attempt_over(operation)
            self._deliver(operation, value, None)
        gate.let_pass()
        if not self.is_gone and not gate.is_shut:
            self._settle()

    @property
    def _is_gated(self) -> bool:
        return self._gate is not None and self._gate.is_shut

    # -- replay ------------------------------------------------------------------------------------

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
            self._loop.make_ready(operation.callback.ready)
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
        """An event that answers nothing: an outcome that a retry has taken back, or where a retry or a fork went on.

        Between the two, history may have outcomes that the code has only asked for because of the one taken back.
        """
        if event.kind == SUPERSEDED:
            if self._strays is None:
                self._strays = []
            operation = self._open_activities.get(event.operation_id or "")
            if operation is not None:
                operation.attempt = operation.due_us = operation.first_attempt_us = 0
        elif self._strays is not None:
            if self._strays:
                row = SupersededRow(self.instance_id, self.run, self._strays)
                self._host.writer.record_change(self, row)
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

    def go_live(self) -> None:
        """History is at its end: from here on, what the code asks for is done."""
        if self._seq == 0:
            self._run_replay()
        if self.is_gone:
            return
        self.is_replaying = False
        for operation in [op for op in self._open_activities.values() if op.is_abandoned]:
            del self._open_activities[operation.id]
        still_open = {id(operation) for operation in self._open()}
        # The end of a run, asked for after its last outcome, is recorded nowhere but in the next run.
        self._is_asked = [op for op in self._is_asked if id(op) in still_open or isinstance(op, RecurOperation)]
        if self._mail is not None:
            self._mail.go_live()
        requests, self._requests = self._requests, None
        for request in requests or ():
            if not self.is_gone:
                self._on_request(request)
        if not self.is_gone:
            self._advance()

    def know_mail(self, deliveries: Sequence[Delivery], waits: Sequence[Wait]) -> None:
        """What the database has for this instance, which has just been claimed."""
        requests = [delivery for delivery in deliveries if delivery.kind == REQUEST]
        self._requests = requests or None
        if waits or len(requests) < len(deliveries):
            self.mail.know([delivery for delivery in deliveries if delivery.kind != REQUEST], waits)

    def on_delivery(self, delivery: Delivery) -> None:
        """Mail has come."""
        if self.is_gone:
            return
        if delivery.kind != REQUEST:
            self.mail.on_delivery(delivery)
        elif self.is_replaying:
            self._requests = [*(self._requests or ()), delivery]
        elif self.when_open(lambda: self.on_delivery(delivery)):
            self._on_request(delivery)

    def _on_request(self, request: Delivery) -> None:
        """Somebody asks for the end of this instance, or for a rest."""
        self._host.writer.record_mail(self, [Receipt(*request[:3])])
        if request.name == SUSPEND:
            self._leave_as(Status.SUSPENDED, None)
        elif not self._is_cancel_asked and self._ending is None:
            self._seq += 1
            self._time_us = max(self._time_us, self._host.clock.now_us())
            self._record(self._own_event(CANCELLATION, text=request.body))
            self._cancel_main(request.body)
            self._advance()

    def _cancel_main(self, text: str | None) -> None:
        self._is_cancel_asked = True
        self._main.cancel(load_json(text or "{}").get("reason") or "cancelled")

    # -- the end -----------------------------------------------------------------------------------

    def _on_main_done(self) -> None:
        """The code has ended: undo what it did, if it failed, and record how it ended."""
        self._note_end()
        if self._ending is None:
            return  # parked
        if self._ending.status is not Status.COMPLETED:
            if self._mail is not None:
                self._mail.cancel_children()
            if self.running_count or self._is_gated:
                return  # what can't be interrupted ends first, and is undone, too
            if self._begin_compensation():
                if self._recorded_status != COMPENSATING:
                    # Again after each takeover, it would look as if it had come forward.
                    self._record_status(COMPENSATING)
                self._advance()
                return
        self._finish(self._ending)

    def _note_end(self) -> None:
        """Once the code has ended, whether live or on replay: how, and nothing else of it goes on."""
        if self._ending is None and self._main.done():
            self._ending = self._how_main_ended()
            if self._ending is not None and self._ending.status is not Status.COMPLETED:
                self._give_up_the_rest()

    def _give_up_the_rest(self) -> None:
        """The run has failed: nothing of it goes on but attempts that can't be interrupted."""
        for task in self._loop.tasks:
            task.cancel()
        self._is_in_code = True
        try:
            self._loop.run_ready()
        except ForbiddenInWorkflowError as error:
            logger.warning("instance %s: clean-up code went on without end: %s", self.instance_id, error)
        finally:
            self._is_in_code = False
        for operation in list(self._open_activities.values()):
            self._abandon(operation)
        for timer in list(self._open_timers.values()):
            timer.callback.cancel()
        self._is_asked = []

    def _how_main_ended(self) -> Ending | None:
        main = self._main
        if main.cancelled():
            return Ending(Status.CANCELLED, HistoryKind.WORKFLOW_CANCELLED, None, self._why_cancelled())
        error = main.exception()
        if error is None:
            try:
                text, _ = self.workflow.signature.encode_result(main.result())
                if len(text) * 4 > self._host.max_payload_bytes:
                    what = f"the result of workflow {self.workflow_name!r}"
                    check_size(what, [text], self._host.max_payload_bytes)
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

    # -- sagas -------------------------------------------------------------------------------------

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

    # -- the end -----------------------------------------------------------------------------------

    def _finish(self, ending: Ending) -> None:
        """Record how the run ended; its last outcome and this share a commit."""
        host = self._host
        self._time_us = max(self._time_us, host.clock.now_us())
        event = None
        if ending.kind is not None:
            self._seq += 1
            event = self._own_event(ending.kind.value, error=ending.error)
        state = StateRow(
            self.instance_id, ending.status.value, None, None, self._time_us, self._time_us, ending.result, ending.error
        )
        if self._mail is not None:
            self._mail.close()
        if self._parent_id is not None:
            host.writer.record_mail(self, [outcome_mail(host.new_mail_id(), self._parent_id, state)])
        ticket = host.writer.record(self, event, state)
        self._leave_memory()
        host.writer.when_durable(ticket, lambda: host.on_ended(self, state))

    # -- further runs ------------------------------------------------------------------------------

    async def recur(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        """See :class:`romancy.context.RunningWorkflow`."""
        given = self.workflow.signature.encode_input(args, kwargs)
        check_size(f"the input of workflow {self.workflow_name!r}", [given.text], self._host.max_payload_bytes)
        self.ask(RecurOperation(*self.request("recur"), given))
        await self.future()
        raise AssertionError("a run that has ended goes on")

    def _recur(self, operation: RecurOperation) -> None:
        """End this run and begin the next, in one transaction."""
        if self.is_gone or not self.when_open(partial(self._recur, operation)):
            return
        host, given = self._host, operation.given
        self._seq += 1
        self._time_us = max(self._time_us, host.clock.now_us())
        self._record(self._own_event(HistoryKind.WORKFLOW_RECURRED.value, text=given.text))
        if self._mail is not None:
            self._mail.withdraw_all()
        row = RunRow(self.instance_id, self.run + 1, self._time_us, self.workflow.source_hash, given.text)
        host.writer.record_change(self, row)
        ticket = self.ticket
        claimed = ClaimedRow(
            self.instance_id, row.run, self.workflow_name, RUNNING, 0, row.started_at, row.input, self._parent_id
        )
        self._leave_memory()
        host.begin_run(self, claimed, given, ticket)

    def succeeded_by(self, instance: LiveInstance) -> None:
        """The next run: should the database refuse this one's end, that run is nobody's, either."""
        self._successor = instance

    def patched(self, change_id: str) -> bool:
        """See :class:`romancy.context.RunningWorkflow`."""
        known = self._patches.get(change_id)
        if known is None:
            known = self._patches[change_id] = self._is_fresh or not self.is_replaying
            if known:
                met = sorted(change for change, is_in in self._patches.items() if is_in)
                self._host.writer.record_change(self, PatchRow(self.instance_id, dump_plain(met)))
        return known

    # -- leaving -----------------------------------------------------------------------------------

    def _own_event(self, kind: str, *, text: str | None = None, error: str | None = None) -> HistoryRow:
        """A row of history that answers no request."""
        return HistoryRow(
            self.instance_id, self.run, self._seq, kind, None, None, None, 0, self._time_us, None, text, None, error
        )

    def park(self, error: BaseException) -> None:
        """Set the instance aside as suspended, its history untouched, until somebody resumes it."""
        if self.is_gone:
            return
        logger.error("instance %s of workflow %s is suspended: %s", self.instance_id, self.workflow_name, error)
        self._leave_as(Status.SUSPENDED, encode_error(error))

    def _leave_as(self, status: Status, error: str | None) -> None:
        state = self._state(status.value, owner=None, ready_at=None, error=error)
        ticket = self._host.writer.record(self, None, state)
        host = self._host
        self._leave_memory()
        host.writer.when_durable(ticket, lambda: host.on_ended(self, state))

    def evict(self) -> None:
        """Leave memory; the database wakes the instance when its time comes."""
        assert self.is_waiting
        wake = self.next_wake_us()
        self._host.writer.record(self, None, self._state(self._recorded_status, owner=None, ready_at=wake))
        self._leave_memory()

    def drop(self) -> None:
        """Leave memory without a trace: the worker stops, or the instance belongs to another."""
        if not self.is_gone:
            self._leave_memory()

    def on_refused(self, error: DatabaseError) -> None:
        """Somebody else wrote this history: leave it to them. What the database can't hold parks the instance."""
        if self._successor is not None:
            self._successor.on_refused(error)
        if self.is_gone:
            return
        if not is_conflict(error):
            self.park(error)
            return
        logger.warning("instance %s belongs to another worker now; dropped here: %s", self.instance_id, error)
        self.drop()

    def _state(self, status: str, *, owner: str | None, ready_at: int | None, error: str | None = None) -> StateRow:
        now = self._host.clock.now_us()
        return StateRow(self.instance_id, status, owner, ready_at, now, None, None, error)

    def _leave_memory(self) -> None:
        self.is_gone = True
        for operation in self._open_activities.values():
            if operation.backoff is not None:
                operation.backoff.cancel()
            if operation.running is not None:
                self._host.cancel_activity(operation)
        for timer in self._open_timers.values():
            if timer.deadline is not None:
                timer.deadline.cancel()
        if self._mail is not None:
            self._mail.forget()
        self._loop.discard()
        # Break the cycles here, or each instance would have to wait for the garbage collector.
        del self._loop, self._main, self._context
        self._open_activities = {}
        self._open_timers = {}
        self._is_asked = []
        self._blocked = []
        self._mail = None
        self._host.on_gone(self)


def exhausted(operation: ActivityOperation, error: BaseException) -> RetryExhaustedError:
    """The error for an activity whose policy allows no further attempt."""
    return RetryExhaustedError(operation.id, operation.attempt, error)
