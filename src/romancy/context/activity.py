"""``ActivityContext``: what an activity holds of the attempt that it is."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar, cast, overload
from weakref import ref

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from romancy.envelopes import EventHead, decode_data, encode_data, message_body
from romancy.errors import ActivityTimeoutError, NotInActivityError, SessionError
from romancy.names import checked_name
from romancy.serde import check_size
from romancy.storage.mail import Mail
from romancy.storage.posting import event_mail, message_mail
from romancy.storage.sessions import ActivityTransaction, SessionEngines

T = TypeVar("T")

NOTHING: list[Mail] = []
"""Shared by all that send nothing; never changed."""


class ActivitySender(Protocol):
    """What an activity needs for sending."""

    @property
    def max_payload_bytes(self) -> int: ...
    @property
    def event_retention_us(self) -> int: ...
    @property
    def last_details(self) -> str | None: ...
    def new_mail_id(self) -> str: ...
    def now_us(self) -> int: ...
    def beat(self, details: str) -> None: ...


class ActivityContext:
    """What an activity knows of the attempt that it is; see :func:`current_activity`.

    Attributes:
        instance_id: the instance that asked for it.
        run: the run of that instance.
        workflow_name: the workflow's name.
        activity_id: which call of the run this is, for example ``"charge:1"``.
        attempt: the number of this attempt, from 1.
        outgoing: for the engine: what goes out with the outcome.
        transaction: for the engine: the attempt's transaction, once the session was asked for.
    """

    __slots__ = (
        "_engines",
        "_is_async",
        "_sender_ref",
        "activity_id",
        "attempt",
        "instance_id",
        "outgoing",
        "run",
        "transaction",
        "workflow_name",
    )

    def __init__(
        self,
        instance_id: str,
        run: int,
        workflow_name: str,
        activity_id: str,
        attempt: int,
        engines: SessionEngines | None,
        is_async: bool,
        sender: ActivitySender,
    ) -> None:
        self.instance_id = instance_id
        self.run = run
        self.workflow_name = workflow_name
        self.activity_id = activity_id
        self.attempt = attempt
        self._engines = engines
        self._is_async = is_async
        # Else each attempt would form a cycle, and wait for the garbage collector.
        self._sender_ref = ref(sender)
        self.outgoing = NOTHING
        self.transaction: ActivityTransaction | None = None

    @property
    def _sender(self) -> ActivitySender:
        sender = self._sender_ref()
        if sender is None:
            raise ActivityTimeoutError(f"this attempt of activity {self.activity_id} is over")
        return sender

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt of this call, and for no other call: for services that take such keys."""
        return f"{self.instance_id}/{self.run}/{self.activity_id}"

    @property
    def session(self) -> AsyncSession:
        """The SQLAlchemy session of this attempt: an ``AsyncSession``; in a plain ``def`` activity a ``Session``.

        What is written through it commits together with the activity's recorded outcome, exactly once, or not at
        all. It opens at its first use; on SQLite it then holds the database's one write lock until the activity
        ends, so do slow things before. ``commit`` and ``rollback`` on it touch a savepoint only.

        Type checkers see an ``AsyncSession``; in a plain ``def`` take :attr:`sync_session`, which is the same object.

        Raises:
            SessionError: the activity is not transactional.
        """
        return cast("AsyncSession", self._open())

    @property
    def sync_session(self) -> Session:
        """The session of a plain ``def`` activity, for type checkers; see :attr:`session`.

        Raises:
            SessionError: the activity is an ``async def``, or not transactional.
        """
        session = self._open()
        if isinstance(session, AsyncSession):
            raise SessionError(f"activity {self.activity_id} is an async def: use .session, and await its methods")
        return session

    def heartbeat(self, details: Any = None) -> None:
        """Tell that this attempt lives and how far it has come; from its thread or task, as often as one likes.

        The details of the last heartbeat are recorded within a second, and outlive the process: a later attempt finds
        them in :meth:`last_heartbeat`, and can go on from there. With ``heartbeat_timeout=`` an attempt that falls
        silent has failed.

        Args:
            details: anything that Romancy can store, such as the number of rows done.

        Raises:
            SerializationError: the details can't be stored, or are too large (``PayloadTooLargeError``).
            ActivityTimeoutError: this attempt of a plain ``def`` has timed out and another may run already: stop.

        Example:
            ``current_activity().heartbeat({"page": page})``
        """
        self._sender.beat(self._encoded("the details of a heartbeat", details))

    @overload
    def last_heartbeat(self, *, type: type[T]) -> T | None: ...
    @overload
    def last_heartbeat(self, *, type: Any = None) -> Any: ...
    def last_heartbeat(self, *, type: Any = None) -> Any:
        """The details of the last :meth:`heartbeat` of this call, by this attempt or one before; ``None``: none yet.

        Args:
            type: what they are, for example a dataclass; by default plain JSON values.
        """
        text = self._sender.last_details
        return None if text is None else decode_data("the details of a heartbeat", text, type)

    def send_event(
        self,
        event_type: str,
        data: Any = None,
        *,
        key: str | None = None,
        instance_id: str | None = None,
        extensions: Mapping[str, Any] | None = None,
    ) -> None:
        """Send an event to workflows, as part of this activity's outcome: it is sent once, when that is recorded,
        in the same transaction; a failed attempt sends nothing.

        Args:
            event_type: the event's type.
            data: anything that Romancy can store.
            key: the event's key; such an event is kept until somebody waits for it.
            instance_id: the one instance that it is for; it is kept for that.
            extensions: further attributes.

        Raises:
            SerializationError: the data can't be stored.
        """
        text = self._encoded("the data of an event", data)
        name = checked_name("event_type", event_type)
        subject = checked_name("key", key, may_be_empty=True)
        to_id = checked_name("instance_id", instance_id, may_be_empty=True)
        mail_id, now_us = self._sender.new_mail_id(), self._sender.now_us()
        source = f"romancy:{self.workflow_name}/{self.instance_id}"
        head = EventHead(name, source, mail_id, subject, now_us, extensions or {})
        self._send(event_mail(head, text, mail_id, to_id, now_us + self._sender.event_retention_us))

    def publish(self, channel: str, data: Any = None, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Publish a message, as part of this activity's outcome: delivered on commit, dropped on rollback.

        Raises:
            SerializationError: the data can't be stored.
        """
        self._send_on(checked_name("channel", channel), "", data, metadata)

    def send_to(
        self, instance_id: str, channel: str, data: Any = None, *, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Send a message to one instance's mailbox, as part of this activity's outcome.

        Raises:
            SerializationError: the data can't be stored.
        """
        self._send_on(checked_name("channel", channel), checked_name("instance_id", instance_id), data, metadata)

    def _send_on(self, channel: str, to_id: str, data: Any, metadata: Mapping[str, Any] | None) -> None:
        text = self._encoded("the data of a message", data)
        mail_id, now_us = self._sender.new_mail_id(), self._sender.now_us()
        body = message_body(mail_id, channel, text, metadata, self.instance_id, now_us)
        self._send(message_mail(mail_id, channel, to_id, body, now_us))

    def _encoded(self, what: str, data: Any) -> str:
        text = encode_data(what, data)
        check_size(what, [text], self._sender.max_payload_bytes)
        return text

    def _send(self, mail: Mail) -> None:
        if self.outgoing is NOTHING:
            self.outgoing = []
        self.outgoing.append(mail)

    @property
    def has_open_transaction(self) -> bool:
        """Whether the session has begun its transaction."""
        return self.transaction is not None and self.transaction.is_open

    @property
    def holds_everybody_up(self) -> bool:
        """For the engine: whether nobody else can write until this attempt's transaction has ended."""
        return self.transaction is not None and self.transaction.holds_everybody_up

    def _open(self) -> AsyncSession | Session:
        if self.transaction is None:
            if self._engines is None:
                raise SessionError(
                    f"activity {self.activity_id} is defined with transactional=False, so it has no session"
                )
            self.transaction = self._engines.transaction(is_async=self._is_async)
        return self.transaction.session()


CURRENT_ACTIVITY: ContextVar[ActivityContext] = ContextVar("romancy_current_activity")


def current_activity() -> ActivityContext:
    """The context of the activity that is running in this task or thread.

    Raises:
        NotInActivityError: none is.

    Example:
        ``await current_activity().session.execute(insert(orders).values(id=order_id))``
    """
    try:
        return CURRENT_ACTIVITY.get()
    except LookupError:
        raise NotInActivityError(
            "no activity is running here: call current_activity() inside an @activity that a workflow runs"
        ) from None


def check_no_open_transaction(what: str) -> None:
    """Refuse to wait for a write: on SQLite an open session holds the one write lock, so that would never end.

    Raises:
        SessionError: it is an activity with such a session that asks.
    """
    current = CURRENT_ACTIVITY.get(None)
    if current is not None and current.holds_everybody_up:
        raise SessionError(
            f"activity {current.activity_id} can't {what} while its session is open, for the session holds the "
            f"database's write lock: do it before the session's first use, or in an activity of its own"
        )
