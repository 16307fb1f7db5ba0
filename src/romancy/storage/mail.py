"""Mail: events, messages, outcomes of children and requests, on their way to instances; the records.

An instance that waits leaves a *wait*; who sends leaves a *mail*. Where the two fit they become a *delivery*, which
stays until the instance has recorded it.
"""

from __future__ import annotations

from typing import NamedTuple
from zlib import crc32

from romancy.storage.schema import SLOTS

EVENT = "event"
MESSAGE = "message"
CHILD = "child"
REQUEST = "request"

CANCEL = "cancel"
SUSPEND = "suspend"
"""Names of requests."""

BROADCAST = "broadcast"
COMPETING = "competing"
DIRECT = "direct"

ANYBODY = ""
"""``to_id`` of mail that whoever waits for it may take."""
ANYTHING = ""
"""``subject`` of a wait that takes any."""
KEPT_US = 24 * 3600 * 1_000_000
"""How long mail for nobody in particular is kept, unless the app says otherwise."""
NEVER_US = 9_000_000_000_000_000_000


class Wait(NamedTuple):
    """An instance begins to wait.

    Attributes:
        kind: ``event``, ``message`` or ``child``.
        name: the event's type, the channel, or the child's id.
        subject: of an event, the key; empty: any.
    """

    instance_id: str
    run: int
    operation_id: str
    kind: str
    name: str
    subject: str


class Withdrawal(NamedTuple):
    """An instance waits no longer.

    Attributes:
        wait: what it waited for.
        returns: what has been delivered already goes back to where it came from; else it stays delivered.
    """

    wait: Wait
    returns: bool


class Receipt(NamedTuple):
    """A delivery has been recorded."""

    instance_id: str
    run: int
    operation_id: str


class Mail(NamedTuple):
    """Something sent.

    Attributes:
        to_id: the instance that it is for; empty: whoever it concerns.
        subject: of an event, its key; may be empty.
        expires_at: until when it waits for somebody who waits for it.
        digest: of several mails with the same digest, the first counts; ``None``: it is the only one.
    """

    to_id: str
    mail_id: str
    kind: str
    name: str
    subject: str
    body: str
    expires_at: int
    digest: str | None = None


class Closing(NamedTuple):
    """An instance has ended: its subscriptions and its mailbox go."""

    instance_id: str


class Unsubscription(NamedTuple):
    """An instance leaves a channel; what the channel had for it goes."""

    instance_id: str
    channel: str


class Delivery(NamedTuple):
    """A mail that met a wait. ``to_id`` says where it goes back to if the wait is withdrawn."""

    instance_id: str
    run: int
    operation_id: str
    to_id: str
    mail_id: str
    kind: str
    name: str
    subject: str
    body: str
    expires_at: int


Operation = Wait | Withdrawal | Receipt | Mail | Closing | Unsubscription


class Post:
    """What came of a batch of operations.

    Attributes:
        deliveries: what met; their instances should hear of it.
        kept: deliveries of waits that were to be withdrawn, and had them already.
        repeated: ids of mails whose digest was known.
    """

    __slots__ = ("deliveries", "kept", "repeated")

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self.kept: list[Delivery] = []
        self.repeated: set[str] = set()


def slot_of(kind: str, name: str) -> int:
    """The slot whose lock lets waits and mail of this topic meet."""
    return crc32(f"{kind}\0{name}".encode()) % SLOTS
