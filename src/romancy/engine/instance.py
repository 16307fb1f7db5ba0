"""One live instance: its loop, its place in history, and what it waits for.

The way of an outcome: the runner hands it in, it gets the next ``seq`` and goes to the writer, the workflow's
future is resolved, the loop runs until nothing is ready, and what the code asked for meanwhile is started, each
activity once all that the code has seen is durable.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from types import FrameType
from typing import Any, Protocol

from romancy.clock import Clock
from romancy.context import WorkflowContext
from romancy.definitions import Activity, CallOptions, Workflow
from romancy.engine.loop import RUN_READY_CODE, ReadyCallback, TimerCallback, make_loop, start_task
from romancy.engine.operations import ActivityOperation, CodePlace, Operation, TimerOperation
from romancy.engine.replay import Request, compare, expectation
from romancy.engine.timers import TimerQueue
from romancy.errors import (
    DatabaseError,
    DuplicateNameError,
    ForbiddenInWorkflowError,
    NonDeterminismError,
    RetryExhaustedError,
    RomancyError,
    SerializationError,
)
from romancy.failures import decode_error, encode_error
from romancy.model import HistoryKind, Status
from romancy.retry import RetryPolicy
from romancy.serde import check_size
from romancy.signature import Arguments
from romancy.storage.failures import is_conflict
from romancy.storage.rows import ClaimedRow, HistoryRow, StateRow
from romancy.storage.writer import Recorder, Writer

logger = logging.getLogger("romancy.engine")

COMPLETED = HistoryKind.ACTIVITY_COMPLETED.value
FAILED = HistoryKind.ACTIVITY_FAILED.value
RETRY = HistoryKind.ACTIVITY_RETRY_SCHEDULED.value
TIMER_EXPIRED = HistoryKind.TIMER_EXPIRED.value
RUNNING = Status.RUNNING.value
WAITING_FOR_TIMER = Status.WAITING_FOR_TIMER.value

LATEST_US = 253_402_300_799_000_000
"""The last second of the year 9999, beyond which Python has no dates: later deadlines are taken for this one."""


class InstanceHost(Protocol):
    """What an instance needs of its worker."""

    worker_id: str
    loop: asyncio.AbstractEventLoop
    writer: Writer
    timers: TimerQueue
    clock: Clock
    max_payload_bytes: int
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
        "_claims",
        "_context",
        "_counters",
        "_explicit_ids",
        "_gate_queue",
        "_gate_waiters",
        "_host",
        "_is_asked",
        "_is_gated",
        "_is_in_code",
        "_is_waiting_for_commit",
        "_loop",
        "_main",
        "_open_activities",
        "_open_timers",
        "_position",
        "_recorded_status",
        "_seq",
        "_time_us",
        "instance_id",
        "is_gone",
        "is_replaying",
        "is_waiting",
        "run",
        "running_count",
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
        self._position = 0
        self._counters: dict[str, int] = {}
        self._explicit_ids: set[str] | None = None
        self._open_activities: dict[str, ActivityOperation] = {}
        self._open_timers: dict[str, TimerOperation] = {}
        self._is_asked: list[Operation] = []
        self._blocked: list[tuple[int, ActivityOperation]] = []
        self._is_waiting_for_commit = False
        self._is_gated = False
        self._is_in_code = False
        self._gate_queue: deque[Callable[[], None]] | None = None
        self._gate_waiters: list[asyncio.Future[None]] | None = None
        self._recorded_status = row.status
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
        place = self._place(2) if self.is_replaying else None
        arguments = activity.signature.encode_arguments(args, kwargs)
        if len(arguments.text) * 4 > self._host.max_payload_bytes:
            check_size(f"the input of activity {activity.name!r}", [arguments.text], self._host.max_payload_bytes)
        self._position += 1
        operation_id = self._next_id(activity.name) if options.id is None else self._explicit_id(options.id)
        if self._explicit_ids is not None and options.id is None and operation_id in self._explicit_ids:
            raise self._id_taken(operation_id)
        return self._await_activity(
            ActivityOperation(operation_id, self._position, place, activity, options, arguments)
        )

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
        self._position += 1
        place = self._place(3) if self.is_replaying else None
        deadline_us = min(deadline_us, LATEST_US)
        operation = TimerOperation(self._next_id("timer"), self._position, place, deadline_us)
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

    def _next_id(self, name: str) -> str:
        count = self._counters.get(name, 0) + 1
        self._counters[name] = count
        return f"{name}:{count}"

    def _explicit_id(self, operation_id: str) -> str:
        name, _, count = operation_id.rpartition(":")
        is_auto = count.isdecimal() and 0 < int(count) <= self._counters.get(name, 0)
        if self._explicit_ids is None:
            self._explicit_ids = set()
        if is_auto or operation_id in self._explicit_ids:
            raise self._id_taken(operation_id)
        self._explicit_ids.add(operation_id)
        return operation_id

    def _id_taken(self, operation_id: str) -> DuplicateNameError:
        return DuplicateNameError(
            f"the activity id {operation_id!r} is used twice in run {self.run} of instance {self.instance_id}: give "
            f"each call an id of its own, or leave ids to Romancy"
        )

    @staticmethod
    def _place(depth: int) -> CodePlace | None:
        """Where in the user's code a request comes from; unknown for a task that begins inside a library."""
        frame: FrameType | None = sys._getframe(depth)
        while frame is not None and frame.f_code is not RUN_READY_CODE:
            if not frame.f_globals.get("__name__", "").startswith(("asyncio", "romancy.")):
                return CodePlace(frame.f_code, frame.f_lasti)
            frame = frame.f_back
        return None

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
        if self._main.done():
            if not self.is_replaying:
                self._end()
        elif not self.is_replaying:
            self._start_asked()

    def _start_asked(self) -> None:
        if self._is_asked:
            asked, self._is_asked = self._is_asked, []
            for operation in asked:
                if isinstance(operation, ActivityOperation):
                    if not operation.is_abandoned and not operation.future.done():
                        self._start_activity(operation)
                elif isinstance(operation, TimerOperation) and operation.id in self._open_timers:
                    on_deadline = partial(self._on_deadline, operation)
                    operation.deadline = self._host.timers.add(operation.deadline_us, on_deadline)
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
        is_waiting = not (self.running_count or self._blocked or self._is_gated)
        if is_waiting and not self._open_timers and not self._open_activities:
            self.park(
                ForbiddenInWorkflowError(
                    "the workflow waits for something that nothing will ever set: no activity runs, no timer is due. "
                    "Look for an Event, a Future or a Queue that only this code could fill"
                )
            )
            return
        if is_waiting and not any(op.backoff for op in self._open_activities.values()) and self._open_timers:
            self._record_status(WAITING_FOR_TIMER)
        elif self._recorded_status != RUNNING:
            self._record_status(RUNNING)
        if is_waiting or self.is_waiting:
            self.is_waiting = is_waiting
            self._host.on_waiting(self, is_waiting)

    def _record_status(self, status: str) -> None:
        if status == self._recorded_status:
            return
        self._recorded_status = status
        wake = self.next_wake_us() if status == WAITING_FOR_TIMER else None
        self._host.writer.record(self, None, self._state(status, owner=self._host.worker_id, ready_at=wake))

    def next_wake_us(self) -> int | None:
        """The earliest deadline of a timer or a backoff."""
        deadlines = [timer.deadline_us for timer in self._open_timers.values()]
        deadlines += [op.due_us for op in self._open_activities.values() if op.backoff is not None]
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

    def on_completed(self, operation: ActivityOperation, text: str, value: Any) -> None:
        """Record an activity's result and let the workflow go on with it."""
        if self._is_gated:
            self._after_gate(lambda: self.on_completed(operation, text, value))
            return
        self._attempt_over(operation)
        if self.is_gone:
            return
        self._record(self._event(COMPLETED, operation, result=text))
        self._deliver(operation, value, None)

    def on_failed(self, operation: ActivityOperation, error: BaseException) -> None:
        """Record that an activity failed for good and raise in the workflow what replay will raise."""
        if self._is_gated:
            self._after_gate(lambda: self.on_failed(operation, error))
            return
        self._attempt_over(operation)
        if self.is_gone:
            return
        text = encode_error(error)
        self._record(self._event(FAILED, operation, error=text))
        self._deliver(operation, None, decode_error(text))

    def on_retry(self, operation: ActivityOperation, error: BaseException, wait_s: float) -> None:
        """Record a failed attempt and when the next one is due, then wait for that."""
        if self._is_gated:
            self._after_gate(lambda: self.on_retry(operation, error, wait_s))
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
        self._record(self._event(RETRY, operation, result=began, error=encode_error(error), due_at=operation.due_us))
        self._start_activity(operation)
        self._settle()

    def _attempt_over(self, operation: ActivityOperation) -> None:
        operation.running = None
        self.running_count -= 1

    def _deliver(self, operation: ActivityOperation, value: Any, error: BaseException | None) -> None:
        self._open_activities.pop(operation.id, None)
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
        if self._is_gated:
            self._after_gate(lambda: self._on_deadline(operation))
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
        while self._is_gated:
            if self._gate_waiters is None:
                self._gate_waiters = []
            waiter = asyncio.get_running_loop().create_future()
            self._gate_waiters.append(waiter)
            await waiter
        self._is_gated = True
        return self._event(COMPLETED, operation, result=text)

    def settle_reserved(self, operation: ActivityOperation, *, is_committed: bool, value: Any) -> None:
        """The transaction is over; deliver its outcome, if it has one, and what waited behind it."""
        self._is_gated = False
        if is_committed and not self.is_gone:
            self._attempt_over(operation)
            self._deliver(operation, value, None)
        while not self._is_gated and self._gate_queue:
            self._gate_queue.popleft()()
        waiters, self._gate_waiters = self._gate_waiters, None
        for waiter in waiters or ():
            if not waiter.done():
                waiter.set_result(None)
        if not self.is_gone and not self._is_gated:
            self._settle()

    def _after_gate(self, action: Callable[[], None]) -> None:
        if self._gate_queue is None:
            self._gate_queue = deque()
        self._gate_queue.append(action)

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
        except SystemExit:
            logger.warning("workflow %s called sys.exit(); taken as a failure", self.workflow_name)

    def _replay_one(self, event: HistoryRow) -> bool:
        self._seq = event.seq
        assert event.operation_id is not None
        is_timer = event.kind == TIMER_EXPIRED
        operation: Operation | None = (
            self._open_timers.get(event.operation_id) if is_timer else self._open_activities.get(event.operation_id)
        )
        if self._main.done():
            place = f"{self.workflow.place}"
            self.park(NonDeterminismError(self.instance_id, expectation(event), "the end of the workflow", place))
            return False
        mismatch = compare(event, self._request(operation), lambda: map(self._request, self._open()))
        if mismatch is not None:
            at = self._find_place(mismatch.request.operation_id) if mismatch.request else None
            place = str(at) if at else self.workflow.place
            self.park(NonDeterminismError(self.instance_id, mismatch.expected, mismatch.found, place))
            return False
        if isinstance(operation, TimerOperation):
            self._time_us = event.at
            del self._open_timers[operation.id]
            self._loop.make_ready(operation.callback.ready)
        elif isinstance(operation, ActivityOperation):
            operation.attempt = event.attempt
            if event.kind == RETRY:
                operation.due_us = event.due_at or 0
                operation.first_attempt_us = int(event.result or event.at)
                return True
            self._time_us = event.at
            del self._open_activities[operation.id]
            try:
                self._replay_outcome(operation, event)
            except SerializationError as error:
                self.park(error)
                return False
        self._run_replay()
        return not self.is_gone

    def _replay_outcome(self, operation: ActivityOperation, event: HistoryRow) -> None:
        if event.kind == COMPLETED:
            value = operation.activity.signature.decode_result(event.result or "null")
            self._resolve(operation.future, value, None)
        else:
            assert event.error is not None
            self._resolve(operation.future, None, decode_error(event.error))

    def _open(self) -> list[Operation]:
        return [*self._open_activities.values(), *self._open_timers.values()]

    def _request(self, operation: Operation | None) -> Any:
        if operation is None:
            return None
        if isinstance(operation, ActivityOperation):
            same = operation.activity.signature.same_arguments if self.workflow.compare_inputs else None
            return Request(operation.id, operation.name, operation.position, False, operation.arguments.text, same)
        return Request(operation.id, operation.name, operation.position, True, None, None)

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
        self._is_asked = [op for op in self._is_asked if op.id in self._open_activities or op.id in self._open_timers]
        self._advance()

    # -- the end -----------------------------------------------------------------------------------

    def _end(self) -> None:
        """Record how the workflow ended; its last outcome and this share a commit."""
        main = self._main
        if main.cancelled():
            self._finish(Status.CANCELLED, HistoryKind.WORKFLOW_CANCELLED, None, None)
            return
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
                self._finish(Status.COMPLETED, None, text, None)
                return
        if isinstance(error, ForbiddenInWorkflowError):
            self.park(error)
            return
        self._finish(Status.FAILED, HistoryKind.WORKFLOW_FAILED, None, encode_error(error))

    def _finish(self, status: Status, kind: HistoryKind | None, result: str | None, error: str | None) -> None:
        host = self._host
        self._time_us = max(self._time_us, host.clock.now_us())
        event = None
        if kind is not None:
            self._seq += 1
            event = HistoryRow(
                self.instance_id,
                self.run,
                self._seq,
                kind,
                None,
                None,
                None,
                0,
                self._time_us,
                None,
                None,
                None,
                error,
            )
        state = StateRow(self.instance_id, status.value, None, None, self._time_us, self._time_us, result, error)
        ticket = host.writer.record(self, event, state)
        self._leave_memory()
        host.writer.when_durable(ticket, lambda: host.on_ended(self, state))

    def park(self, error: BaseException) -> None:
        """Set the instance aside as suspended, its history untouched, until somebody resumes it."""
        if self.is_gone:
            return
        text = encode_error(error)
        logger.error("instance %s of workflow %s is suspended: %s", self.instance_id, self.workflow_name, error)
        state = self._state(Status.SUSPENDED.value, owner=None, ready_at=None, error=text)
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
        self._loop.discard()
        # Break the cycles here, or each instance would have to wait for the garbage collector.
        del self._loop, self._main, self._context
        self._open_activities = {}
        self._open_timers = {}
        self._is_asked = []
        self._blocked = []
        self._host.on_gone(self)


def exhausted(operation: ActivityOperation, error: BaseException) -> RetryExhaustedError:
    """The error for an activity whose policy allows no further attempt."""
    return RetryExhaustedError(operation.id, operation.attempt, error)
