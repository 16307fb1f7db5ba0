"""Sends events and messages to instances."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from romancy.context.activity import check_no_open_transaction
from romancy.engine.messaging import mode_conflict
from romancy.envelopes import EventHead, checked_time, encode_data, message_body
from romancy.lifecycle import Lifecycle
from romancy.names import checked_name
from romancy.serde import check_size
from romancy.settings import Settings
from romancy.storage.posting import event_mail, message_mail


class Sending:
    """See the module.

    Args:
        life: what is open.
        settings: the app's options.
    """

    def __init__(self, life: Lifecycle, settings: Settings) -> None:
        self._life = life
        self._settings = settings

    async def event(
        self,
        event_type: str,
        data: Any,
        key: str | None,
        instance_id: str | None,
        source: str,
        id: str | None,
        time: datetime | None,
        extensions: Mapping[str, Any] | None,
    ) -> bool:
        """See :meth:`romancy.App.send_event`."""
        life = self._life
        life.check_running()
        check_no_open_transaction("send an event")
        text = encode_data("the data of an event", data)
        check_size("the data of an event", [text], self._settings.max_payload_bytes)
        now_us, mail_id = life.clock.now_us(), life.ids.new_id()
        head = EventHead(
            checked_name("event_type", event_type), source, id or mail_id,
            checked_name("key", key, may_be_empty=True), checked_time(time, now_us), extensions or {},
        )  # fmt: skip
        to_id = checked_name("instance_id", instance_id, may_be_empty=True)
        expires_at = now_us + self._settings.event_retention_us
        return await life.writer.post(event_mail(head, text, mail_id, to_id, expires_at, is_from_outside=True))

    async def to_channel(self, channel: str, data: Any, metadata: Mapping[str, Any] | None) -> None:
        """See :meth:`romancy.App.publish`."""
        await self._message(checked_name("channel", channel), None, "", data, metadata)

    async def to_mailbox(self, instance_id: str, channel: str, data: Any, metadata: Mapping[str, Any] | None) -> None:
        """See :meth:`romancy.App.send_to`."""
        to_id = checked_name("instance_id", instance_id)
        await self._message(checked_name("channel", channel), "direct", to_id, data, metadata)

    async def _message(
        self, channel: str, mode: str | None, to_id: str, data: Any, metadata: Mapping[str, Any] | None
    ) -> None:
        life = self._life
        life.check_running()
        check_no_open_transaction("send a message")
        text = encode_data("the data of a message", data)
        check_size("the data of a message", [text], self._settings.max_payload_bytes)
        found = await asyncio.wrap_future(life.store.open_channel(None, channel, mode, None))
        if found != mode and not (mode is None and found != "direct"):
            raise mode_conflict(channel, found, mode)
        now_us, mail_id = life.clock.now_us(), life.ids.new_id()
        body = message_body(mail_id, channel, text, metadata, None, now_us)
        await life.writer.post(message_mail(mail_id, channel, to_id, body, now_us, is_from_outside=True))
