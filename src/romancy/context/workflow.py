"""``WorkflowContext``: what workflow code holds while it runs, and the children that it starts."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from random import Random
from typing import Any, Generic, Literal, NoReturn, ParamSpec, Protocol, TypeVar, cast, overload

from romancy.definitions import Activity, Workflow
from romancy.envelopes import EventHead, encode_data, message_body, read_event, read_message
from romancy.errors import ChildWorkflowError, ConfigurationError, DefinitionError
from romancy.failures import decode_error, decode_info
from romancy.model import Event, HistoryKind, Message, Status, from_micros, to_micros
from romancy.names import checked_name
from romancy.retry import Seconds, as_seconds
from romancy.serde import load_json
from romancy.storage.mail import CHILD, EVENT, MESSAGE, Mail
from romancy.storage.posting import event_mail, message_mail

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

ParentFailure = Literal["cancel", "abandon"]
"""What becomes of a child when its parent fails or is cancelled."""


class RunningWorkflow(Protocol):
    """What a context reads of the instance that runs."""

    @property
    def instance_id(self) -> str: ...
    @property
    def run(self) -> int: ...
    @property
    def workflow_name(self) -> str: ...
    @property
    def is_replaying(self) -> bool: ...
    @property
    def seed(self) -> str: ...
    @property
    def event_retention_us(self) -> int: ...
    @property
    def mail(self) -> WorkflowMail: ...
    def workflow_time_us(self) -> int: ...
    def new_mail_id(self) -> str: ...
    def check_payload(self, what: str, text: str) -> None: ...
    def on_failure(self, undo: Activity[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...
    def patched(self, change_id: str) -> bool: ...
    async def recur(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn: ...


class WorkflowMail(Protocol):
    """What a context asks of the mail of the instance that runs."""

    async def wait_for(self, kind: str, name: str, subject: str, timeout_us: int | None, now_us: int) -> str: ...
    async def send(self, kind: HistoryKind, name: str, text: str, make: Callable[[], Sequence[Mail]]) -> None: ...
    async def send_on(self, channel: str, mode: str | None, text: str, make: Callable[[], Sequence[Mail]]) -> None: ...
    async def subscribe(self, channel: str, mode: str) -> None: ...
    async def start_child(
        self, workflow: Workflow[..., Any], text: str, child_id: str | None, is_followed: bool
    ) -> str: ...
    async def unsubscribe(self, channel: str) -> None: ...


class WorkflowContext:
    """A workflow's first parameter: its identity, and the deterministic forms of time and chance."""

    __slots__ = ("_random", "_workflow")

    def __init__(self, workflow: RunningWorkflow) -> None:
        self._workflow = workflow
        self._random: Random | None = None

    @property
    def instance_id(self) -> str:
        """The id of this instance."""
        return self._workflow.instance_id

    @property
    def run(self) -> int:
        """The number of this run of the instance, from 1."""
        return self._workflow.run

    @property
    def workflow_name(self) -> str:
        """The name that the workflow is registered under."""
        return self._workflow.workflow_name

    @property
    def is_replaying(self) -> bool:
        """Whether the code is being brought back to where it was. For logging only: decisions must not depend on it."""
        return self._workflow.is_replaying

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger that names the instance and is silent during replay."""
        return _WorkflowLogger(self._workflow)

    def now(self) -> datetime:
        """Workflow time, an aware UTC datetime: when the latest recorded event (at first: the start) happened.

        It is the same on every replay, and stands still while workflow code runs.
        """
        return from_micros(self._workflow.workflow_time_us())

    async def sleep(self, seconds: float | timedelta) -> None:
        """Wait durably; never shorter than that, across crashes and restarts. ``asyncio.sleep`` does the same.

        Args:
            seconds: how long, in seconds or as a ``timedelta``; not above zero: at once.
        """
        if isinstance(seconds, timedelta):
            seconds = seconds.total_seconds()
        await asyncio.sleep(seconds)

    async def sleep_until(self, when: datetime) -> None:
        """Wait durably until a time; a past one: at once.

        Args:
            when: an aware datetime.

        Raises:
            ValueError: it has no time zone.
        """
        wait_us = to_micros(when) - self._workflow.workflow_time_us()
        await asyncio.sleep(wait_us / 1_000_000)

    # -- sagas -------------------------------------------------------------------------------------

    def on_failure(self, undo: Activity[P, Any], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run this activity with these arguments, should the workflow fail or be cancelled from here on.

        Compensations run last in, first out, together with those of ``@activity(compensate=…)``: each with its
        retries, and the others also when one fails.

        Args:
            undo: the activity.
            args: its arguments.
            kwargs: its arguments by name.

        Raises:
            DefinitionError: this is no activity.

        Example:
            ``ctx.on_failure(release_seat, seat_id)``
        """
        if not isinstance(undo, Activity):
            raise DefinitionError(f"on_failure({undo!r}): give an activity, for it runs durably, too")
        self._workflow.on_failure(undo, args, kwargs)

    # -- further runs, children, changes -----------------------------------------------------------

    async def recur(self, *args: Any, **kwargs: Any) -> NoReturn:
        """End this run and begin the next one of this instance with a new input, in one transaction. Never returns.

        For workflows without end: the history of each run is kept on its own and stays short. Subscriptions and the
        mailbox stay; what the run was waiting for, and its compensations, do not.

        Args:
            args: the new input, as for ``start_workflow``.
            kwargs: the new input, by parameter name.

        Raises:
            SerializationError: the input can't be stored.

        Example:
            ``await ctx.recur(counter + 1)``
        """
        await self._workflow.recur(args, kwargs)

    def patched(self, change_id: str) -> bool:
        """Whether this run has the change of that name: for changing workflows that have running instances.

        ``True`` in runs that come here for the first time with the new code, and from then on in that run; ``False``
        where the run had gone past this place before the change.

        Args:
            change_id: a name for the change, the same for good.

        Example:
            ``if ctx.patched("charge-before-shipping"): …``
        """
        return self._workflow.patched(checked_name("change_id", change_id))

    async def start_child(
        self,
        workflow: Workflow[P, R],
        /,
        *args: Any,
        id: str | None = None,
        on_parent_failure: ParentFailure = "cancel",
        **kwargs: Any,
    ) -> ChildHandle[R]:
        """Start another workflow as a child of this instance; once, and not again on replay.

        Args:
            workflow: its definition.
            args: its input.
            id: its instance id; by default one made of this instance's id and the call's.
            on_parent_failure: what becomes of it when this instance fails or is cancelled: ``"cancel"`` or
                ``"abandon"``: it goes on. Where this instance completes, children that still run go on.
            kwargs: its input, by parameter name.

        Raises:
            InstanceConflictError: the id belongs to somebody else.
            SerializationError: the input can't be stored.
        """
        if not isinstance(workflow, Workflow):
            raise DefinitionError(f"start_child({workflow!r}): give a workflow")
        if on_parent_failure not in ("cancel", "abandon"):
            raise ConfigurationError(f"on_parent_failure={on_parent_failure!r}: give 'cancel' or 'abandon'")
        text = workflow.signature.encode_input(args, kwargs).text
        self._workflow.check_payload(f"the input of workflow {workflow.name!r}", text)
        chosen = None if id is None else checked_name("id", id)
        child_id = await self._workflow.mail.start_child(workflow, text, chosen, on_parent_failure == "cancel")
        return ChildHandle(self, child_id, workflow)

    async def execute_child(
        self,
        workflow: Workflow[P, R],
        /,
        *args: Any,
        id: str | None = None,
        on_parent_failure: ParentFailure = "cancel",
        **kwargs: Any,
    ) -> R:
        """Start a child and wait for its result; see :meth:`start_child`.

        Raises:
            ChildWorkflowError: the child failed or was cancelled.
        """
        child = await self.start_child(workflow, *args, id=id, on_parent_failure=on_parent_failure, **kwargs)
        return await child.result()

    # -- events and messages -----------------------------------------------------------------------

    @overload
    async def wait_event(
        self, event_type: str, *, key: str | None = None, timeout: Seconds | None = None, type: type[T]
    ) -> Event[T]: ...
    @overload
    async def wait_event(
        self, event_type: str, *, key: str | None = None, timeout: Seconds | None = None, type: Any = None
    ) -> Event[Any]: ...
    async def wait_event(
        self, event_type: str, *, key: str | None = None, timeout: Seconds | None = None, type: Any = None
    ) -> Event[Any]:
        """Wait for an event, durably.

        An event that was sent before with a key, or to this instance, is taken at once; one without reaches those who
        wait when it is sent. It is consumed if and only if history records it: an event that comes after the timeout,
        or after the wait was cancelled, stays for the next wait.

        Args:
            event_type: the event's type, for example ``"payment.completed"``.
            key: only events with this key (their CloudEvents ``subject``); ``None``: any.
            timeout: how long to wait, in seconds or as a ``timedelta``.
            type: what the data are, for example a dataclass; by default plain JSON values.

        Raises:
            EventTimeoutError: nothing came in time.
            SerializationError: the data do not fit ``type``.

        Example:
            ``paid = await ctx.wait_event("payment.completed", key=order_id, timeout=3600, type=Payment)``
        """
        name = checked_name("event_type", event_type)
        subject = checked_name("key", key, may_be_empty=True)
        body = await self._workflow.mail.wait_for(EVENT, name, subject, _micros(timeout), self._now_us())
        return read_event(body, type)

    async def send_event(
        self,
        event_type: str,
        data: Any = None,
        *,
        key: str | None = None,
        instance_id: str | None = None,
        extensions: Mapping[str, Any] | None = None,
    ) -> None:
        """Send an event to workflows: a recorded step, once and not again on replay.

        Args:
            event_type: the event's type.
            data: anything that Romancy can store.
            key: the event's key; such an event is kept until somebody waits for it.
            instance_id: the one instance that it is for; it is kept for that.
            extensions: further attributes.

        Raises:
            SerializationError: the data can't be stored.
        """
        workflow = self._workflow
        text = encode_data("the data of an event", data)
        workflow.check_payload("the data of an event", text)
        name = checked_name("event_type", event_type)
        subject = checked_name("key", key, may_be_empty=True)
        to_id = checked_name("instance_id", instance_id, may_be_empty=True)
        source = f"romancy:{workflow.workflow_name}/{workflow.instance_id}"

        def make() -> list[Mail]:
            mail_id, now_us = workflow.new_mail_id(), self._now_us()
            head = EventHead(name, source, mail_id, subject, now_us, extensions or {})
            return [event_mail(head, text, mail_id, to_id, now_us + workflow.event_retention_us)]

        await workflow.mail.send(HistoryKind.EVENT_SENT, name, text, make)

    async def subscribe(self, channel: str, mode: str = "broadcast") -> None:
        """Subscribe this instance to a channel, until it ends or unsubscribes; kept across ``recur``.

        Args:
            channel: its name.
            mode: ``"broadcast"``: every subscriber gets every message that is published after it has subscribed;
                ``"competing"``: each message goes to one of those who receive; ``"direct"``: a mailbox for
                ``send_to``, which needs no subscription.

        Raises:
            ChannelModeConflictError: the channel has another mode.
        """
        if mode not in ("broadcast", "competing", "direct"):
            raise ConfigurationError(f"mode={mode!r}: give 'broadcast', 'competing' or 'direct'")
        await self._workflow.mail.subscribe(checked_name("channel", channel), mode)

    async def unsubscribe(self, channel: str) -> None:
        """Leave a channel; messages that were not received are dropped."""
        await self._workflow.mail.unsubscribe(checked_name("channel", channel))

    @overload
    async def receive(self, channel: str, *, timeout: Seconds | None = None, type: type[T]) -> Message[T]: ...
    @overload
    async def receive(self, channel: str, *, timeout: Seconds | None = None, type: Any = None) -> Message[Any]: ...
    async def receive(self, channel: str, *, timeout: Seconds | None = None, type: Any = None) -> Message[Any]:
        """Wait for the next message of a channel, durably; in the order in which each sender sent.

        Args:
            channel: its name; for ``broadcast`` and ``competing``, subscribe first.
            timeout: how long to wait, in seconds or as a ``timedelta``.
            type: what the data are; by default plain JSON values.

        Raises:
            MessageTimeoutError: nothing came in time.
            SerializationError: the data do not fit ``type``.
        """
        name = checked_name("channel", channel)
        body = await self._workflow.mail.wait_for(MESSAGE, name, "", _micros(timeout), self._now_us())
        return read_message(body, type)

    async def publish(self, channel: str, data: Any = None, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Publish a message: a recorded step, once and not again on replay.

        Args:
            channel: its name. What is published before anybody has subscribed is kept for the first consumer of a
                ``competing`` channel, for 24 hours.
            data: anything that Romancy can store.
            metadata: more of it, beside.

        Raises:
            ChannelModeConflictError: the channel is ``direct``; use :meth:`send_to`.
            SerializationError: the data can't be stored.
        """
        await self._send_on(checked_name("channel", channel), None, "", data, metadata)

    async def send_to(
        self, instance_id: str, channel: str, data: Any = None, *, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Send a message to one instance's mailbox: a recorded step. It waits there until it is received.

        Raises:
            ChannelModeConflictError: the channel has a mode other than ``direct``.
            SerializationError: the data can't be stored.
        """
        to_id = checked_name("instance_id", instance_id)
        await self._send_on(checked_name("channel", channel), "direct", to_id, data, metadata)

    async def _send_on(
        self, channel: str, mode: str | None, to_id: str, data: Any, metadata: Mapping[str, Any] | None
    ) -> None:
        workflow = self._workflow
        text = encode_data("the data of a message", data)
        workflow.check_payload("the data of a message", text)

        def make() -> list[Mail]:
            mail_id, now_us = workflow.new_mail_id(), self._now_us()
            body = message_body(mail_id, channel, text, metadata, workflow.instance_id, now_us)
            return [message_mail(mail_id, channel, to_id, body, now_us)]

        await workflow.mail.send_on(channel, mode, text, make)

    def _now_us(self) -> int:
        return self._workflow.workflow_time_us()

    def random(self) -> Random:
        """A random number generator that gives the same numbers on every replay. Not for secrets."""
        if self._random is None:
            self._random = Random(self._workflow.seed)
        return self._random

    def uuid4(self) -> uuid.UUID:
        """A UUID that is the same on every replay. Not for secrets."""
        return uuid.UUID(int=self.random().getrandbits(128), version=4)


class ChildHandle(Generic[R]):
    """A child that a workflow has started; made by :meth:`WorkflowContext.start_child`."""

    __slots__ = ("_context", "_outcome", "_workflow", "instance_id")

    def __init__(self, context: WorkflowContext, instance_id: str, workflow: Workflow[..., R]) -> None:
        self.instance_id = instance_id
        self._context = context
        self._workflow = workflow
        self._outcome: asyncio.Task[str] | None = None

    async def result(self) -> R:
        """Wait until the child has ended, and return what it returned.

        Raises:
            ChildWorkflowError: it failed or was cancelled; ``__cause__`` is what it raised.
        """
        if self._outcome is None:
            # Its outcome comes once, however many wait for it.
            mail = self._context._workflow.mail
            waiting = mail.wait_for(CHILD, self.instance_id, "", None, self._context._now_us())
            self._outcome = asyncio.get_running_loop().create_task(waiting)
        status, result, error = load_json(await asyncio.shield(self._outcome))
        if status == Status.COMPLETED:
            return cast("R", self._workflow.signature.decode_result(result))
        raise ChildWorkflowError(self.instance_id, status, decode_info(error).message) from decode_error(error)

    def __repr__(self) -> str:
        return f"<child {self.instance_id}>"


def _micros(timeout: Seconds | None) -> int | None:
    return None if timeout is None else round(as_seconds(timeout, "timeout") * 1_000_000)


class _WorkflowLogger(logging.LoggerAdapter[logging.Logger]):
    def __init__(self, workflow: RunningWorkflow) -> None:
        super().__init__(logging.getLogger("romancy.workflow"), {"instance_id": workflow.instance_id})
        self._workflow = workflow

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802  (the name is logging's)
        return not self._workflow.is_replaying and self.logger.isEnabledFor(level)

    def process(self, msg: object, kwargs: object) -> tuple[object, object]:  # type: ignore[override]
        return f"[{self._workflow.workflow_name} {self._workflow.instance_id}] {msg}", kwargs
