"""What one instance sends and waits for: events, messages, the outcomes of children."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

from romancy.clock import Clock
from romancy.definitions import Workflow
from romancy.engine.operations import (
    ChildOperation,
    CodePlace,
    MailOperation,
    Operation,
    SendOperation,
    WaitOperation,
)
from romancy.engine.timers import TimerQueue
from romancy.errors import (
    ChannelModeConflictError,
    DatabaseError,
    EventTimeoutError,
    FencedError,
    InstanceConflictError,
    MessageTimeoutError,
    RomancyError,
)
from romancy.failures import decode_error, encode_error
from romancy.model import HistoryKind
from romancy.starting import pending_row
from romancy.storage.mail import (
    CANCEL,
    CHILD,
    EVENT,
    MESSAGE,
    Closing,
    Delivery,
    Mail,
    Receipt,
    Unsubscription,
    Wait,
    Withdrawal,
)
from romancy.storage.posting import request_mail
from romancy.storage.rows import HistoryRow, StartRow
from romancy.storage.writer import Recorder, Writer

logger = logging.getLogger("romancy.engine")

RETRY_WAIT_S = 0.1
LONGEST_ID = 200

RECEIVED = {
    EVENT: HistoryKind.EVENT_RECEIVED.value,
    MESSAGE: HistoryKind.CHANNEL_MESSAGE_RECEIVED.value,
    CHILD: HistoryKind.CHILD_ENDED.value,
}
SENDING = ""
"""What stands for anything that is not a wait, among the kinds of waits."""

TIMED_OUT = {EVENT: HistoryKind.EVENT_TIMEOUT.value, MESSAGE: HistoryKind.MESSAGE_TIMEOUT.value}


class MessagingHost(Protocol):
    """What messaging needs of the worker."""

    loop: asyncio.AbstractEventLoop
    writer: Writer
    timers: TimerQueue
    clock: Clock

    def new_mail_id(self) -> str:
        """An id for something sent; ids sort by time."""
        ...

    def open_channel(self, channel: str, mode: str | None, subscriber: str | None) -> Future[str | None]:
        """The channel's mode; where it has none yet, it gets this one. Then subscribes, if that is its mode."""
        ...

    def start_child(self, row: StartRow) -> Future[tuple[str, str, str | None] | None]:
        """Insert a child; where its id is taken, the workflow's name, the input and the parent of who has it."""
        ...

    def hint(self) -> None:
        """There may be work: look now."""
        ...


class MessagingInstance(Protocol):
    """What messaging needs of its instance."""

    instance_id: str
    run: int
    is_gone: bool
    is_replaying: bool

    @property
    def recorder(self) -> Recorder: ...
    def request(self, name: str) -> tuple[str, int, CodePlace | None]:
        """The id, number and place of a further request of the code."""
        ...

    def ask(self, operation: Operation) -> None:
        """The code has come to this request."""
        ...

    def future(self) -> asyncio.Future[Any]:
        """A future of the workflow's loop."""
        ...

    def when_open(self, action: Callable[[], None]) -> bool:
        """``True``: no outcome is being committed on its own. Else the action is called once that is so."""
        ...

    def record(
        self, kind: str, operation: Operation, *, result: str | None = None, error: str | None = None
    ) -> HistoryRow:
        """Queue the next row of history."""
        ...

    def go_on(self, future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
        """Resolve a future of the workflow's, and run its code."""
        ...

    def note_deadline(self, deadline_us: int) -> None:
        """The code waits for a time."""
        ...


class Messaging:
    """The mail of one live instance; made when its code first has to do with mail.

    Args:
        host: the worker.
        instance: whose mail it is.

    Attributes:
        open: what the code waits for, by operation id.
    """

    __slots__ = ("_followers", "_host", "_instance", "_known_deliveries", "_known_waits", "_open_kinds", "open")

    def __init__(self, host: MessagingHost, instance: MessagingInstance) -> None:
        self._host = host
        self._instance = instance
        self._followers: set[str] = set()
        self._known_deliveries: dict[str, Delivery] = {}
        self._known_waits: dict[str, Wait] = {}
        self.open: dict[str, MailOperation] = {}
        # How many of each kind: with thousands of children, nobody walks through them all at each one's end.
        self._open_kinds: Counter[str] = Counter()

    # -- what the code asks for --------------------------------------------------------------------

    async def wait_for(self, kind: str, name: str, subject: str, timeout_us: int | None, now_us: int) -> str:
        """Wait for mail; returns its body.

        Raises:
            EventTimeoutError, MessageTimeoutError: nothing came in time.
        """
        instance = self._instance
        operation_id, position, place = instance.request(kind)
        wait = Wait(instance.instance_id, instance.run, operation_id, kind, name, subject)
        text = json.dumps({"key": subject}, ensure_ascii=False, separators=(",", ":")) if subject else None
        deadline_us = 0 if timeout_us is None else now_us + max(timeout_us, 0)
        operation = WaitOperation(operation_id, position, place, kind, wait, text, deadline_us)
        body: str = await self._answer(operation)
        return body

    async def send(self, kind: HistoryKind, name: str, text: str, make: Callable[[], Sequence[Mail]]) -> None:
        """Send something, once and not again on replay; returns when that is recorded on its way.

        Args:
            kind: what history calls it.
            name: the event's type, or the channel.
            text: what is sent, for history.
            make: makes the mail.
        """
        answers = "sent event" if kind is HistoryKind.EVENT_SENT else "sent message"
        operation_id, position, place = self._instance.request("send")
        await self._answer(SendOperation(operation_id, position, place, answers, name, text, kind.value, make))

    async def send_on(self, channel: str, mode: str | None, text: str, make: Callable[[], Sequence[Mail]]) -> None:
        """Send on a channel that has this mode, or (``None``) any but ``direct``.

        Raises:
            ChannelModeConflictError: it has another.
        """
        await self._on_channel("sent message", channel, mode, None, text, HistoryKind.CHANNEL_MESSAGE_SENT, make)

    async def subscribe(self, channel: str, mode: str) -> None:
        """Subscribe the instance.

        Raises:
            ChannelModeConflictError: the channel has another mode.
        """
        subscriber = self._instance.instance_id
        text = json.dumps({"mode": mode})
        kind = HistoryKind.CHANNEL_SUBSCRIBED
        await self._on_channel("subscription", channel, mode, subscriber, text, kind, lambda: ())

    async def unsubscribe(self, channel: str) -> None:
        """Leave a channel."""
        operation_id, position, place = self._instance.request("unsubscribe")
        kind = HistoryKind.CHANNEL_UNSUBSCRIBED.value
        await self._answer(
            SendOperation(operation_id, position, place, "end of a subscription", channel, None, kind, lambda: ())
        )

    async def start_child(
        self, workflow: Workflow[..., Any], text: str, child_id: str | None, is_followed: bool
    ) -> str:
        """Start a child; returns its id once that is recorded.

        Raises:
            InstanceConflictError: the id belongs to somebody else.
        """
        instance = self._instance
        operation_id, position, place = instance.request("child")
        is_keyed = child_id is not None
        if child_id is None:
            child_id = child_id_of(instance.instance_id, instance.run, operation_id)
        operation = ChildOperation(
            operation_id,
            position,
            place,
            "start of a child",
            workflow.name,
            text,
            HistoryKind.CHILD_STARTED.value,
            lambda: (),
        )
        operation.workflow, operation.child_id, operation.stored_input = workflow, child_id, text
        operation.is_keyed, operation.is_followed = is_keyed, is_followed
        await self._answer(operation)
        return operation.child_id

    async def _on_channel(
        self,
        answers: str,
        channel: str,
        mode: str | None,
        subscriber: str | None,
        text: str,
        kind: HistoryKind,
        make: Callable[[], Sequence[Mail]],
    ) -> None:
        operation_id, position, place = self._instance.request("channel")
        operation = ChannelOperation(operation_id, position, place, answers, channel, text, kind.value, make)
        operation.mode = mode
        operation.subscriber = subscriber
        await self._answer(operation)

    async def _answer(self, operation: MailOperation) -> Any:
        operation.future = self._instance.future()
        self.open[operation.id] = operation
        self._open_kinds[_kind_of(operation)] += 1
        self._instance.ask(operation)
        try:
            return await operation.future
        except asyncio.CancelledError:
            self._abandon(operation)
            raise

    def _abandon(self, operation: MailOperation) -> None:
        """The code no longer waits. What was to be sent is sent; mail that came goes back."""
        if self._instance.is_gone or not isinstance(operation, WaitOperation):
            return
        if operation.id not in self.open:
            return
        self._close(operation)
        if operation.deadline is not None:
            operation.deadline.cancel()
        if operation.is_registered:
            # During replay nothing is registered: what the database still has is withdrawn in go_live.
            self._host.writer.record_mail(self._instance.recorder, [Withdrawal(operation.wait, returns=True)])

    def _close(self, operation: MailOperation) -> None:
        """The code no longer waits for this."""
        del self.open[operation.id]
        self._open_kinds[_kind_of(operation)] -= 1

    # -- doing it ----------------------------------------------------------------------------------

    def start(self, operation: MailOperation) -> None:
        """The code has come to rest: do what it asked for."""
        if operation.id not in self.open:
            return
        if isinstance(operation, WaitOperation):
            self._start_wait(operation)
        elif isinstance(operation, ChannelOperation):
            asked = self._host.open_channel(operation.name, operation.mode, operation.subscriber)
            asyncio.wrap_future(asked, loop=self._host.loop).add_done_callback(
                partial(self._on_channel_known, operation)
            )
        elif isinstance(operation, ChildOperation) and operation.is_keyed:
            started = self._host.start_child(self._child_row(operation))
            asyncio.wrap_future(started, loop=self._host.loop).add_done_callback(
                partial(self._on_child_known, operation)
            )
        elif isinstance(operation, SendOperation):
            # In a callback of its own: the code runs on from here.
            self._host.loop.call_soon(self._send, operation)

    def _start_wait(self, operation: WaitOperation) -> None:
        if operation.deadline_us:
            operation.deadline = self._host.timers.add(operation.deadline_us, partial(self._on_deadline, operation))
            self._instance.note_deadline(operation.deadline_us)
        delivery = self._known_deliveries.pop(operation.id, None)
        is_known = delivery is not None or self._known_waits.pop(operation.id, None) is not None
        operation.is_registered = True
        if delivery is not None:
            self._host.loop.call_soon(self.on_delivery, delivery)
        elif not is_known:
            self._host.writer.record_mail(self._instance.recorder, [operation.wait])

    def _send(self, operation: SendOperation) -> None:
        instance = self._instance
        if instance.is_gone or operation.id not in self.open:
            return
        if not instance.when_open(partial(self._send, operation)):
            return
        self._close(operation)
        result = json.dumps(operation.child_id) if isinstance(operation, ChildOperation) else None
        instance.record(operation.kind, operation, result=result)
        mail: Sequence[Any] = operation.mail()
        if isinstance(operation, ChildOperation):
            self._note_child(operation)
            starts = () if operation.is_keyed else (self._child_row(operation),)
            ticket = self._host.writer.record_mail(instance.recorder, (), starts)
            self._host.writer.when_durable(ticket, self._host.hint)
        if operation.kind == HistoryKind.CHANNEL_UNSUBSCRIBED:
            mail = [Unsubscription(instance.instance_id, operation.name)]
        if mail:
            self._host.writer.record_mail(instance.recorder, mail)
        instance.go_on(operation.future, None, None)

    def _on_channel_known(self, operation: ChannelOperation, done: asyncio.Future[str | None]) -> None:
        if self._is_answered(operation, done):
            self._send_or_refuse(operation, operation.conflict(done.result()), HistoryKind.CHANNEL_REFUSED)

    def _on_child_known(
        self, operation: ChildOperation, done: asyncio.Future[tuple[str, str, str | None] | None]
    ) -> None:
        if not self._is_answered(operation, done):
            return
        found = done.result()
        conflict = None
        if found is not None and found != (operation.name, operation.stored_input, self._instance.instance_id):
            conflict = InstanceConflictError(
                f"the id {operation.child_id!r} of the child belongs to an instance of workflow {found[0]!r} that "
                f"was started by somebody else, or with another input: choose another id, or leave it to Romancy"
            )
        self._send_or_refuse(operation, conflict, HistoryKind.CHILD_REFUSED)

    def _is_answered(self, operation: SendOperation, done: asyncio.Future[Any]) -> bool:
        """Whether the database has answered; where it can't now, it is asked again."""
        if done.cancelled():
            return False
        error = done.exception()
        if self._instance.is_gone or operation.id not in self.open:
            return False
        if error is None:
            return True
        if not isinstance(error, FencedError):  # of that the worker is about to hear, too
            if not isinstance(error, DatabaseError):
                logger.error("asking the database for %s failed in an unforeseen way", operation.id, exc_info=error)
            self._host.loop.call_later(RETRY_WAIT_S, self.start, operation)
        return False

    def _send_or_refuse(self, operation: SendOperation, conflict: RomancyError | None, refusal: HistoryKind) -> None:
        if conflict is None:
            self._send(operation)
        else:
            self._refuse(operation, conflict, refusal)

    def _refuse(self, operation: SendOperation, error: RomancyError, refusal: HistoryKind) -> None:
        instance = self._instance
        if instance.is_gone or not instance.when_open(partial(self._refuse, operation, error, refusal)):
            return
        self._close(operation)
        text = encode_error(error)
        instance.record(refusal.value, operation, error=text)
        instance.go_on(operation.future, None, decode_error(text))

    # -- children ----------------------------------------------------------------------------------

    def _child_row(self, operation: ChildOperation) -> StartRow:
        now_us = self._host.clock.now_us()
        row = pending_row(operation.child_id, operation.workflow, operation.stored_input, now_us)
        return row._replace(parent_id=self._instance.instance_id)

    def _note_child(self, operation: ChildOperation) -> None:
        if operation.is_followed:
            self._followers.add(operation.child_id)

    def cancel_children(self) -> None:
        """The instance has failed or was cancelled: so are the children that follow it."""
        followers, self._followers = sorted(self._followers), set()
        body = json.dumps({"reason": f"its parent {self._instance.instance_id} has ended"})
        mail = [request_mail(self._host.new_mail_id(), child_id, CANCEL, body) for child_id in followers]
        if mail:
            self._host.writer.record_mail(self._instance.recorder, mail)

    # -- what comes --------------------------------------------------------------------------------

    def on_delivery(self, delivery: Delivery) -> None:
        """Mail has come: record it, and let the code go on with it."""
        instance = self._instance
        if instance.is_gone:
            return
        if instance.is_replaying:
            self._known_deliveries[delivery.operation_id] = delivery
            return
        operation = self.open.get(delivery.operation_id)
        if delivery.run != instance.run or not isinstance(operation, WaitOperation):
            return  # it is recorded already, or goes back with the withdrawal of its wait
        if not instance.when_open(partial(self.on_delivery, delivery)):
            return
        self._close(operation)
        if operation.deadline is not None:
            operation.deadline.cancel()
        self._followers.discard(delivery.name)
        instance.record(RECEIVED[delivery.kind], operation, result=delivery.body)
        self._host.writer.record_mail(instance.recorder, [Receipt(*delivery[:3])])
        instance.go_on(operation.future, delivery.body, None)

    def _on_deadline(self, operation: WaitOperation) -> None:
        """The time is over; unless mail has come, which only the database knows."""
        if self._instance.is_gone or operation.id not in self.open:
            return
        ticket = self._host.writer.record_mail(self._instance.recorder, [Withdrawal(operation.wait, returns=False)])
        self._host.writer.when_durable(ticket, partial(self._on_withdrawn, operation))

    def _on_withdrawn(self, operation: WaitOperation) -> None:
        instance = self._instance
        if instance.is_gone or operation.id not in self.open:
            return  # mail had come
        if not instance.when_open(partial(self._on_withdrawn, operation)):
            return
        self._close(operation)
        instance.record(TIMED_OUT[operation.wait.kind], operation)
        instance.go_on(operation.future, None, timeout_error(operation))

    # -- replay ------------------------------------------------------------------------------------

    def replay(self, operation: MailOperation, event: HistoryRow) -> tuple[Any, BaseException | None]:
        """The recorded answer to an open request."""
        self._close(operation)
        if event.error is not None:
            return None, decode_error(event.error)
        if isinstance(operation, ChildOperation):
            # A fork's child is its source's.
            operation.child_id = json.loads(event.result or "null") or operation.child_id
            self._note_child(operation)
        elif event.kind == HistoryKind.CHILD_ENDED:
            self._followers.discard(operation.name)
        if event.kind in TIMED_OUT.values():
            assert isinstance(operation, WaitOperation)
            return None, timeout_error(operation)
        return event.result, None

    def know(self, deliveries: Sequence[Delivery], waits: Sequence[Wait]) -> None:
        """What the database has of this instance, when it is loaded."""
        self._known_deliveries = {d.operation_id: d for d in deliveries if d.run == self._instance.run}
        self._known_waits = {wait.operation_id: wait for wait in waits}

    def go_live(self) -> None:
        """History is at its end: withdraw what the code no longer waits for."""
        stale = [wait for wait in self._known_waits.values() if self._is_stale(wait)]
        stale += [Wait(*d[:3], d.kind, d.name, d.subject) for d in self._known_deliveries.values() if self._is_stale(d)]
        if stale:
            withdrawals = [Withdrawal(wait, returns=True) for wait in stale]
            self._host.writer.record_mail(self._instance.recorder, withdrawals)

    def _is_stale(self, known: Wait | Delivery) -> bool:
        operation = self.open.get(known.operation_id)
        return known.run != self._instance.run or not isinstance(operation, WaitOperation)

    # -- the end -----------------------------------------------------------------------------------

    def withdraw_all(self) -> None:
        """Wait for nothing more; mail that has come goes back."""
        waits = [op.wait for op in self.open.values() if isinstance(op, WaitOperation) and op.is_registered]
        waits += self._known_waits.values()
        if waits:
            withdrawals = [Withdrawal(wait, returns=True) for wait in waits]
            self._host.writer.record_mail(self._instance.recorder, withdrawals)

    def close(self) -> None:
        """The instance ends: so do its subscriptions and its mailbox."""
        self.withdraw_all()
        self._host.writer.record_mail(self._instance.recorder, [Closing(self._instance.instance_id)])

    def forget(self) -> None:
        """The instance leaves memory."""
        for operation in self.open.values():
            if isinstance(operation, WaitOperation) and operation.deadline is not None:
                operation.deadline.cancel()
        self.open = {}
        self._open_kinds.clear()

    def next_deadline_us(self) -> int | None:
        """The earliest deadline of an open wait."""
        deadlines = [op.deadline_us for op in self.open.values() if isinstance(op, WaitOperation) and op.deadline_us]
        return min(deadlines, default=None)

    def waits_for(self) -> set[str]:
        """The kinds of what is waited for."""
        return {kind for kind, count in self._open_kinds.items() if count and kind != SENDING}

    @property
    def is_busy(self) -> bool:
        """Whether something is being sent."""
        return self._open_kinds[SENDING] > 0


class ChannelOperation(SendOperation):
    """Something sent on a channel, or a subscription: first the channel's mode must be known.

    Attributes:
        mode: which mode it must have; ``None``: any that is published on.
        subscriber: who subscribes, if anybody.
    """

    __slots__ = ("mode", "subscriber")
    mode: str | None
    subscriber: str | None

    def conflict(self, found: str | None) -> ChannelModeConflictError | None:
        """Whether the channel has another mode."""
        if found == self.mode or (self.mode is None and found != "direct"):
            return None
        return mode_conflict(self.name, found, self.mode)


def _kind_of(operation: MailOperation) -> str:
    return operation.wait.kind if isinstance(operation, WaitOperation) else SENDING


def mode_conflict(channel: str, found: str | None, wanted: str | None) -> ChannelModeConflictError:
    """The error for a channel of another mode."""
    if wanted is None:
        cure = "send to one instance with send_to, or publish on another channel"
    elif wanted == "direct":
        cure = "publish on it, or send on another channel"
    else:
        cure = f"subscribe with mode={found!r}, or take another channel"
    return ChannelModeConflictError(
        f"channel {channel!r} has the mode {found!r}, not {wanted or 'broadcast'!r}: {cure}"
    )


def timeout_error(operation: WaitOperation) -> EventTimeoutError | MessageTimeoutError:
    """The error for a wait whose time is over."""
    wait = operation.wait
    if wait.kind == EVENT:
        key = f" with key {wait.subject!r}" if wait.subject else ""
        return EventTimeoutError(f"no event {wait.name!r}{key} came in time ({operation.id})")
    return MessageTimeoutError(f"no message came on channel {wait.name!r} in time ({operation.id})")


def child_id_of(parent_id: str, run: int, operation_id: str) -> str:
    """The id of a child: the same on every replay, and no other instance's."""
    whole = f"{parent_id}/{operation_id}" if run == 1 else f"{parent_id}/{run}/{operation_id}"
    if len(whole) <= LONGEST_ID:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[:32]
    return f"{whole[: LONGEST_ID - 33]}~{digest}"
