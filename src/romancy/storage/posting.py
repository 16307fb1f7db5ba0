"""Events and messages as mail."""

from __future__ import annotations

from hashlib import sha256

from romancy.envelopes import EventHead, event_body, event_digest
from romancy.serde import dump_plain
from romancy.storage.mail import ANYBODY, CHILD, EVENT, KEPT_US, MESSAGE, NEVER_US, REQUEST, Mail
from romancy.storage.rows import StateRow


def event_mail(
    head: EventHead, data: str, mail_id: str, to_id: str, expires_at: int, *, is_from_outside: bool = False
) -> Mail:
    """An event; one from outside counts once, however often it is sent."""
    digest = event_digest(head) if is_from_outside else None
    return Mail(to_id, mail_id, EVENT, head.type, head.subject, event_body(head, data), expires_at, digest)


def message_mail(
    mail_id: str, channel: str, to_id: str, body: str, now_us: int, *, is_from_outside: bool = False
) -> Mail:
    """A message; one that is for somebody does not expire.

    One from outside comes with no record beside it that would tell, after a lost connection, whether it was sent: its
    id is kept for that.
    """
    expires_at = now_us + KEPT_US if to_id == ANYBODY else NEVER_US
    digest = sha256(f"message\0{mail_id}".encode()).hexdigest() if is_from_outside else None
    return Mail(to_id, mail_id, MESSAGE, channel, "", body, expires_at, digest)


def request_mail(mail_id: str, instance_id: str, what: str, body: str) -> Mail:
    """A request to an instance, such as ``cancel``; the first of its kind counts."""
    return Mail(instance_id, mail_id, REQUEST, what, "", body, NEVER_US)


def outcome_mail(mail_id: str, parent_id: str, state: StateRow) -> Mail:
    """The end of a child, for its parent."""
    body = dump_plain([state.status, state.result, state.error])
    return Mail(parent_id, mail_id, CHILD, state.instance_id, "", body, NEVER_US)
