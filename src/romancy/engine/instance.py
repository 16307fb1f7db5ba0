"""One live instance: its loop, its place in history, and what it waits for.

The way of an outcome: the runner hands it in, it gets the next ``seq`` and goes to the writer, the workflow's
future is resolved, the loop runs until nothing is ready, and what the code asked for meanwhile is started, each
activity once all that the code has seen is durable.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from romancy.definitions import Workflow
from romancy.engine.gate import Gate
from romancy.engine.operations import (
    ActivityOperation,
    MailOperation,
    RecurOperation,
    TimerOperation,
)
from romancy.engine.replayed import (
    CANCELLATION,
    COMPLETED,
    EXECUTED,
    HEARTBEAT,
    RETRY,
    TIMER_EXPIRED,
    ReplayedRun,
)
from romancy.engine.run import Ending, RunHost
from romancy.engine.saga import undo_of
from romancy.errors import (
    DatabaseError,
    ForbiddenInWorkflowError,
    RetryExhaustedError,
)
from romancy.failures import decode_error, encode_error
from romancy.model import HistoryKind, Status
from romancy.retry import RetryPolicy
from romancy.signature import Arguments
from romancy.storage.failures import is_conflict
from romancy.storage.mail import CHILD, EVENT, MESSAGE, NEVER_US, REQUEST, SUSPEND, Delivery, Mail, Receipt, Wait
from romancy.storage.posting import outcome_mail
from romancy.storage.rows import ClaimedRow, HistoryRow, ProgressRow, RunRow, StateRow

logger = logging.getLogger("romancy.engine")

FAILED = HistoryKind.ACTIVITY_FAILED.value
UNDONE_FAILED = HistoryKind.COMPENSATION_FAILED.value
RUNNING = Status.RUNNING.value
COMPENSATING = Status.COMPENSATING.value
WAITING_FOR_TIMER = Status.WAITING_FOR_TIMER.value
WAITING_FOR_MAIL = (
    (EVENT, Status.WAITING_FOR_EVENT.value),
    (MESSAGE, Status.WAITING_FOR_MESSAGE.value),
    (CHILD, Status.WAITING_FOR_CHILD.value),
)
"""What an instance's status says; where it waits for several things, the first of these."""


class InstanceHost(RunHost, Protocol):
    """What an instance needs of its worker."""

    default_retry: RetryPolicy

    @property
    def start_activity(self) -> Callable[[LiveInstance, ActivityOperation], None]:
        """Runs the next attempt."""
        ...

    def cancel_activity(self, operation: ActivityOperation) -> None:
        """The workflow gave it up: end the attempt in progress."""
        ...

    def on_waiting(self, instance: LiveInstance, is_waiting: bool) -> None:
        """The instance has begun, or ceased, to wait for nothing but time."""
        ...

    def on_ended(self, instance: LiveInstance, state: StateRow | None) -> None:
        """The instance's last state is durable; ``None``: its end was refused."""
        ...

    def on_gone(self, instance: LiveInstance) -> None:
        """The instance is no longer live here."""
        ...

    def begin_run(self, last: LiveInstance, row: ClaimedRow, given: Arguments, ticket: int) -> None:
        """Begin the next run of an instance, whose last row is in the batch of this ticket."""
        ...


class LiveInstance(ReplayedRun):
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
        "_ending",
        "_gate",
        "_host",
        "_is_end_refused",
        "_is_in_code",
        "_is_waiting_for_commit",
        "_is_wake_stale",
        "_recorded_wake_us",
        "_requests",
        "_successor",
        "has_ended",
        "is_waiting",
        "running_count",
    )

    def __init__(
        self, host: InstanceHost, row: ClaimedRow, workflow: Workflow[..., Any], given: Arguments | None
    ) -> None:
        super().__init__(host, row, workflow, given)
        self._host = host
        self.is_waiting = False
        self.running_count = 0
        self._ending: Ending | None = None
        self._requests: list[Delivery] | None = None
        self._successor: LiveInstance | None = None
        self.has_ended = False
        self._is_end_refused = False
        self._blocked: list[tuple[int, ActivityOperation]] = []
        self._is_waiting_for_commit = False
        self._is_in_code = False
        self._gate: Gate | None = None
        self._recorded_wake_us = 0
        self._is_wake_stale = False

    # -- what its mail needs of it (see MessagingInstance) ---------------------------------------------

    def when_open(self, action: Callable[[], None]) -> bool:
        if self._is_gated:
            assert self._gate is not None
            self._gate.after(action)
            return False
        return True

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
        is_busy = self.running_count or self._blocked
        if is_busy and self._recorded_status == RUNNING and not (self._is_wake_stale or self.is_waiting):
            return  # as ever, between two activities
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
        gate = self._gate
        if gate is not None and not self.when_open(lambda: self.on_completed(operation, text, value, outgoing)):
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

    def _on_deadline(self, operation: TimerOperation) -> None:
        """A timer is due: record it and let the workflow go on."""
        if self.is_gone or operation.id not in self._open_timers:
            return
        if self._is_gated and not self.when_open(lambda: self._on_deadline(operation)):
            return
        del self._open_timers[operation.id]
        self._time_us = max(self._time_us, operation.deadline_us)
        self._record(self._event(TIMER_EXPIRED, operation))
        self._loop.make_ready(operation.callback)
        self._advance()

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

    # -- going live, and what is asked of it from outside ------------------------------------------

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
        for request in sorted(requests or (), key=in_order_of_asking):
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
            self.cancel_timer(timer)
        self._is_asked = []

    def _finish(self, ending: Ending) -> None:
        """Record how the run ended; its last outcome and this share a commit."""
        host = self._host
        status, kind, result, error = ending
        now = self._time_us = max(self._time_us, host.clock.now_us())
        event = None
        if kind is not None:
            self._seq += 1
            event = self._own_event(kind.value, error=error)
        state = StateRow(self.instance_id, status._value_, None, None, now, now, result, error)
        if self._mail is not None:
            self._mail.close()
        if self._parent_id is not None:
            host.writer.record_mail(self, [outcome_mail(host.new_mail_id(), self._parent_id, state)])
        ticket = host.writer.record(self, event, state)
        self.has_ended = True
        self._leave_memory()
        host.writer.when_durable(ticket, partial(self._on_end_written, state))

    def _on_end_written(self, state: StateRow) -> None:
        self._host.on_ended(self, None if self._is_end_refused else state)

    # -- further runs ------------------------------------------------------------------------------

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

    # -- leaving -----------------------------------------------------------------------------------

    def park(self, error: BaseException) -> None:
        """Set the instance aside as suspended, its history untouched, until somebody resumes it."""
        if not self.is_gone:
            self._park(error)

    def _park(self, error: BaseException) -> None:
        logger.error("instance %s of workflow %s is suspended: %s", self.instance_id, self.workflow_name, error)
        self._leave_as(Status.SUSPENDED, encode_error(error))

    def _leave_as(self, status: Status, error: str | None) -> None:
        state = self._state(status.value, owner=None, ready_at=None, error=error)
        ticket = self._host.writer.record(self, None, state)
        host = self._host
        if not self.is_gone:
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
        if self.is_gone and (not self.has_ended or self._is_end_refused):
            return
        self._is_end_refused = self.has_ended
        if not is_conflict(error):
            self._park(error)
            return
        logger.warning("instance %s belongs to another worker now; dropped here: %s", self.instance_id, error)
        self.drop()

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
        self.party = None
        self._host.on_gone(self)


def in_order_of_asking(delivery: Delivery) -> str:
    """A key to sort by: a rest that is asked for before the end must not keep it off, nor be taken back by it."""
    return delivery.mail_id


def exhausted(operation: ActivityOperation, error: BaseException) -> RetryExhaustedError:
    """The error for an activity whose policy allows no further attempt."""
    return RetryExhaustedError(operation.id, operation.attempt, error)
